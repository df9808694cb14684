"""The page's Python runs, with small random pipelines in the place of the hub's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict

from distill.collaboration.judges import NetworkJudge
from tests.collaboration.test_pipeline import redness
from tests.runs import ROOT
from tests.test_docs import needs

PAGE = ROOT / "docs" / "collaboration.md"
SMALLER = {"1024": "64", "threshold=0.9": "threshold=0.44", "threshold=0.0": "threshold=0.47"}


def blocks() -> Iterator[tuple[str, str]]:
    """Each Python block and the text before it."""
    text = PAGE.read_text()
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        yield text[: block.start()], block[1]


def lora(pipeline: Any, folder: Path) -> Path:
    """A LoRA of a pipeline's U-Net that changes it."""
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    pipeline.unet.delete_adapters("default")
    return folder


class Named:
    """Loads what is on disk, and gives a network in the place of what has a name on the hub."""

    def __init__(self, load: Any, network: Any, asked: list[str]):
        self.load, self.network, self.asked = load, network, asked

    def __call__(self, name: Any, **kwargs: Any) -> Any:
        if Path(name).exists():
            return self.load(name, **kwargs)
        self.asked.append(name)
        return self.network


@pytest.fixture
def hub(sd_folder: Path, sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were asked for."""
    asked: list[str] = []
    load = DiffusionPipeline.from_pretrained

    def opened(cls: Any, name: str, **kwargs: Any) -> Any:
        asked.append(name)
        return load(sdxl_folder if "xl" in name else sd_folder, safety_checker=None, **kwargs)

    for auto in (AutoPipelineForText2Image, DiffusionPipeline):
        monkeypatch.setattr(auto, "from_pretrained", classmethod(opened))
    unets = {folder: load(folder).unet for folder in (sd_folder, sdxl_folder)}
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(unets[sd_folder], conditioning_embedding_out_channels=(4, 4, 4))
    for kind, network in ((UNet2DConditionModel, unets[sdxl_folder]), (ControlNetModel, control)):
        monkeypatch.setattr(kind, "from_pretrained", Named(kind.from_pretrained, network, asked))
    for kind, folder in ((StableDiffusionPipeline, sd_folder), (StableDiffusionXLPipeline, sdxl_folder)):
        weights, really = lora(load(folder), tmp_path / kind.__name__), kind.load_lora_weights
        monkeypatch.setattr(
            kind,
            "load_lora_weights",
            lambda pipeline, name, weights=weights, really=really: asked.append(name) or really(pipeline, weights),
        )
    monkeypatch.setattr("distill.collaboration.judges.open_judge", lambda spec: NetworkJudge(redness, spec))
    return asked


def test_python_of_the_page_runs(hub: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {
        "prompts": [f"a {colour} ring" for colour in ("red", "green", "blue", "cyan")] * 5,
        "pictures": torch.rand(20, 3, 32, 32, generator=generator),
        "edges": torch.rand(20, 3, 32, 32, generator=generator),
        "masks": (torch.rand(20, 1, 32, 32, generator=generator) > 0.5).float(),
    }
    answers: list[Any] = []
    for before, code in blocks():
        assert needs(before), code
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(code, names)
        if "answer" in names:
            answers.append((names.pop("answer"), names["pipe"]))
        if "fuse_lora" in code:
            assert not any("lora" in name for name in names["student"].unet.state_dict())
            kept = names["student"].unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
            own = DiffusionPipeline.from_pretrained("sdxl" if "lora-sdxl" in code else "sd").unet
            assert not torch.equal(kept, own.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight)
    first, edit, control, inpaint = (answer for answer, _ in answers)
    assert first.images[0].size == (64, 64) and inpaint.images[0].size == (32, 32)
    assert {*edit.decisions} == {"kept", "regenerated"} and {*control.decisions} <= {"kept", "refined"}
    made = answers[1][1].calibration
    assert made.steps == 2 and {step - 2 for step in edit.steps} == {0, made.choice["teacher_steps"]}
    assert {step - 4 for step in inpaint.steps} <= {0, 12} and {step - 4 for step in control.steps} <= {0, 10}
    assert {
        "stabilityai/sdxl-turbo",
        "latent-consistency/lcm-sdxl",
        "latent-consistency/lcm-lora-sdxl",
        "latent-consistency/lcm-lora-sdv1-5",
        "lllyasviel/sd-controlnet-canny",
    } <= {*hub}
