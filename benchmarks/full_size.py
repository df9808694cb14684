"""The recipes at paper size on one accelerator: images per second and peak memory, with random weights.

Writes pipelines of the released sizes to disk in the diffusers layout, data for them, and runs `distill fit` with each
recipe as it is but for the number of devices, the size of the batch and where things lie. What is learnt means
nothing; that the recipes run, how fast, and in how much memory, does.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from results import FOLDER, ROOT, command, save

from distill.cli import quiet
from distill.data import shapes
from distill.data.loading import loader
from distill.data.shapes_data import ShapesDataset
from distill.files import read_json
from distill.provenance import machine, today
from distill.tiny.text import build_tokenizer

TOKENS = 77  # of CLIP's text encoders
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where random weights are drawn


def main() -> None:
    """Writes what is missing, measures each case, prints and writes the result."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "full_size")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="updates of a run, 2 or more; the second half is timed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begins no case after so many")
    parser.add_argument("--only-write", action="store_true", help="writes the networks of the cases and ends")
    parser.add_argument("--note", help="kept beside the cases measured now: what else the machine was doing, say")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps is the updates of a run, whose second half is timed: 2 or more; got {options.steps}")
    began = time.monotonic()
    for name in options.cases:
        write(CASES[name]["family"], options.folder)
        if CASES[name]["settings"] is add:
            vits(options.folder)
    if options.only_write:
        return
    for name in options.cases:
        if time.monotonic() - began < options.seconds:
            found = run(name, options.folder, options.steps)
            keep(name, found | ({"note": options.note} if options.note else {}))
            print(name, json.dumps(found), flush=True)


def keep(name: str, found: dict[str, Any]) -> None:
    """Writes a case beside those that were measured before, each with the command, the machine and the date of its own
    measurement."""
    file = FOLDER / "full_size.json"
    before = read_json(file)["values"]["cases"] if file.is_file() else {}
    measured = {"command": command(), "machine": machine(), "date": today()}
    save("full_size", {"cases": before | {name: measured | found}}, [0])


def run(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """One case: what `fit` logged of its last updates, or the end of what was said when something failed."""
    case, output = CASES[name], folder / "fit" / name.replace(" ", "_")
    output.mkdir(parents=True, exist_ok=True)
    facts = {"recipe": case["recipe"], "batch_size": case["batch"], "pixels": case["pixels"]}
    try:
        (output / "log").write_text(fit(case, folder, output, steps))
    except subprocess.CalledProcessError as error:
        (output / "log").write_text(error.stdout)
        return facts | {"failed": (error.stdout.strip().splitlines() or [f"exit code {error.returncode}"])[-1]}
    return facts | logged(next(output.rglob("metrics.csv")), case["batch"])


def fit(case: dict[str, Any], folder: Path, output: Path, steps: int) -> str:
    """Makes the case's data and runs `distill fit`; returns what it said.

    Raises:
        CalledProcessError: either fails.
    """
    settings = {
        "config": ROOT / "recipes" / case["recipe"],
        **case["settings"](folder, case),
        "model.teacher": folder / case["family"],
        "data.batch_size": case["batch"],
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.accelerator": "auto",
        "trainer.max_steps": steps,
        "trainer.default_root_dir": output,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": output,
        "trainer.logger.version": "",
        "trainer.log_every_n_steps": 1,
        "monitor.every": steps // 2,
        "samples.every": 0,
        "checkpoint.save_last": "false",
    }
    return said_by("fit", *(part for key, value in settings.items() for part in (f"--{key}", str(value))))


def said_by(*arguments: str) -> str:
    """Runs a command of this package, which may name classes of this file; returns what it said.

    Raises:
        CalledProcessError: it fails.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    typed, everything = [sys.executable, "-m", "distill", *arguments], subprocess.STDOUT
    return subprocess.run(
        typed, check=True, stdout=subprocess.PIPE, stderr=everything, text=True, env=environment
    ).stdout


def logged(file: Path, batch: int) -> dict[str, Any]:
    """Of the file Lightning's CSVLogger writes: the last measurement, as the first one includes the slow start."""
    rows = list(csv.DictReader(file.open()))
    last = {key: [float(row[key]) for row in rows if row.get(key)] for key in rows[0]}
    terms = {
        key: float(f"{values[-1]:.4g}")
        for key, values in last.items()
        if values and key.startswith(("student/", "critic/"))
    }
    speed = last["images/s"][-1]
    return {"images_per_second": round(speed, 3), "seconds_per_update": round(batch / speed, 3),
            "peak_memory_GiB": round(last["peak_memory_GiB"][-1], 2), "last_values": terms}  # fmt: skip


# ------------------------------------------------------------------------------------------------ networks


def write(family: str, folder: Path) -> None:
    """A pipeline of released size, bfloat16, or nothing if it is there."""
    if (folder / family / "model_index.json").is_file():
        return
    torch.manual_seed(0)
    tokenizer()  # on the CPU, where it learns its words
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            networks, kind, rest = PIPELINES[family]()
    finally:
        torch.set_default_dtype(torch.float32)
    kind(**networks, **rest).save_pretrained(folder / family)


@cache
def tokenizer() -> Any:
    """The tiny world's, padded to the length of CLIP's."""
    made = build_tokenizer()
    made.model_max_length = TOKENS
    return made


def text(width: int, layers: int, heads: int, projection: int | None, act: str = "quick_gelu") -> Any:
    """A CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(channels: int = 4, scaling: float = 0.18215, shift: float | None = None) -> Any:
    """Stable Diffusion's, of 84 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def ddim() -> Any:
    """The schedule Stable Diffusion was trained with."""
    from diffusers import DDIMScheduler

    with torch.device("cpu"):
        return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def sd(condition: int, heads: Any, linear: bool, encoder: Callable[[], Any]) -> tuple[dict[str, Any], Any, Any]:
    """Stable Diffusion 1.5 or 2.1."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=condition,
        attention_head_dim=heads,
        use_linear_projection=linear,
    )
    networks = {"unet": unet, "vae": autoencoder(), "text_encoder": encoder(), "scheduler": ddim()}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return networks, StableDiffusionPipeline, {"tokenizer": tokenizer(), **rest}


def sdxl() -> tuple[dict[str, Any], Any, Any]:
    """Stable Diffusion XL."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    encoders = {"text_encoder": text(768, 12, 12, None), "text_encoder_2": text(1280, 32, 20, 1280, "gelu")}
    networks = {"unet": unet, "vae": autoencoder(scaling=0.13025), "scheduler": ddim(), **encoders}
    return networks, StableDiffusionXLPipeline, {"tokenizer": tokenizer(), "tokenizer_2": tokenizer()}


def sd3() -> tuple[dict[str, Any], Any, Any]:
    """Stable Diffusion 3 Medium without T5, as it may be used."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    encoders = {"text_encoder": text(768, 12, 12, 768), "text_encoder_2": text(1280, 32, 20, 1280, "gelu")}
    with torch.device("cpu"):
        schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    networks = {"transformer": transformer, "vae": autoencoder(16, 1.5305, 0.0609), "scheduler": schedule, **encoders}
    rest = {"text_encoder_3": None, "tokenizer_3": None}
    return networks, StableDiffusion3Pipeline, {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), **rest}


PIPELINES: dict[str, Callable[[], tuple[dict[str, Any], Any, Any]]] = {
    "sd15": lambda: sd(768, 8, False, lambda: text(768, 12, 12, None)),
    "sd21": lambda: sd(1024, (5, 10, 20, 20), True, lambda: text(1024, 23, 16, None, "gelu")),
    "sdxl": sdxl,
    "sd3": sd3,
}


# ------------------------------------------------------------------------------------------------ data


def vits(folder: Path) -> tuple[str, str]:
    """DINOv2's two networks in timm's layout."""
    import timm
    from timm.models import save_for_hf

    names = ("vit_small_patch14_dinov2", "vit_large_patch14_dinov2")
    for name in names:
        if not (folder / name).is_dir():
            with torch.device(DEVICE):
                network = timm.create_model(name, num_classes=0)
            save_for_hf(network.cpu(), str(folder / name), safe_serialization=True)
    return str(folder / names[0]), str(folder / names[1])


class Pictures(L.LightningDataModule):
    """Drawn pictures in memory, so that no step waits for one."""

    def __init__(self, batch_size: int, pixels: int):
        super().__init__()
        self.batch_size = batch_size
        self.kept = ShapesDataset(2 * batch_size, 0, pixels, pixels).__getitems__(list(range(2 * batch_size)))

    def __len__(self) -> int:
        return 2 * self.batch_size

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"pixels": self.kept["pixels"][indices], "prompts": [self.kept["prompts"][index] for index in indices]}

    def train_dataloader(self) -> Any:
        return loader(self, self.batch_size, 0, self.trainer)


def drawn(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Drawn pictures of the recipe's size in place of a folder of images."""
    sizes = {"batch_size": case["batch"], "pixels": case["pixels"]}
    return {"data": json.dumps({"class_path": "full_size.Pictures", "init_args": sizes})}


def add(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """ADD's, with vision networks from the disk."""
    small, large = vits(folder)
    return drawn(folder, case) | {
        "model.strategies": json.dumps(replaced(case["recipe"], {"vision": small, "image": large}))
    }


def latents(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """LADD's: latents the teacher makes, in few steps."""
    prompts, output = folder / "prompts.txt", folder / "latents"
    prompts.write_text("\n".join(shapes.captions(seed=0, indices=range(64))))
    made = ["--teacher", str(folder / case["family"]), "--output", str(output), "--prompts", str(prompts)]
    made += ["--count", "64", "--steps", "2", "--guidance", "5.0", "--batch_size", "16", "--dtype", "bfloat16"]
    said_by("generate", "latents", *made, "--height", str(case["pixels"]), "--width", str(case["pixels"]))
    return {"data.folder": output, "data.workers": 0}


def pairs(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Diffusion2GAN's: pairs the teacher makes, in few steps, and a perceptual network of full width."""
    from distill.perceptual.latent_lpips import LatentLPIPS

    prompts, output, weights = folder / "prompts.txt", folder / "pairs", folder / "latent-lpips.pt"
    prompts.write_text("\n".join(shapes.captions(seed=0, indices=range(64))))
    torch.save(LatentLPIPS(4).state_dict(), weights)
    made = ["--teacher", str(folder / case["family"]), "--output", str(output), "--prompts", str(prompts)]
    said_by("generate", "pairs", *made, "--count", "64", "--steps", "2", "--batch_size", "16", "--dtype", "bfloat16")
    strategies = json.dumps(replaced(case["recipe"], {"weights": str(weights)}))
    return {"model.strategies": strategies, "model.student_init": "teacher", "data.folder": output, "data.workers": 0}


def replaced(recipe: str, values: dict[str, str]) -> list[dict[str, Any]]:
    """A recipe's strategies with other paths."""
    from omegaconf import OmegaConf

    loaded: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / recipe), resolve=True)
    strategies = loaded["model"]["init_args"]["strategies"]
    for strategy in strategies:
        arguments = strategy.get("init_args", {})
        arguments |= {key: value for key, value in values.items() if key in arguments}
    return strategies


CASES: dict[str, dict[str, Any]] = {
    "LADD, SD3 Medium": {"recipe": "ladd_sd3.yaml", "family": "sd3", "batch": 16, "pixels": 512, "settings": latents},
    "ADD, SD 2.1": {"recipe": "add_sd21.yaml", "family": "sd21", "batch": 16, "pixels": 512, "settings": add},
    "ADD, SDXL": {"recipe": "add_sdxl.yaml", "family": "sdxl", "batch": 8, "pixels": 512, "settings": add},
    "Diffusion2GAN, SD 1.5": {
        "recipe": "diffusion2gan_sd15.yaml", "family": "sd15", "batch": 16, "pixels": 512, "settings": pairs
    },
    "consistency, SD 1.5": {
        "recipe": "consistency_sd15.yaml", "family": "sd15", "batch": 16, "pixels": 512, "settings": drawn
    },
    "consistency, SDXL": {"recipe": "lcm_sdxl.yaml", "family": "sdxl", "batch": 4, "pixels": 1024, "settings": drawn},
}  # fmt: skip


if __name__ == "__main__":
    main()
