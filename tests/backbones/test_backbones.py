"""Backbones read stock pipelines and agree with what stock diffusers computes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from distill import backbones
from distill.backbones.base import same_network
from distill.backbones.sd import SDBackbone
from distill.data import shapes
from distill.errors import ConfigError
from distill.inference import open_painter

FAMILIES = ["sd3_folder", "sd_folder", "sdxl_folder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_is_the_pipelines_own(family: str, request: pytest.FixtureRequest) -> None:
    backbone = backbones.load(str(request.getfixturevalue(family)))
    pipeline = backbone.pipeline()
    prompts = ["a red ring", "a large blue square on a tan background"]
    options = {"max_sequence_length": 4} if family == "sd3_folder" else {"num_images_per_prompt": 1}
    extra = (None, None) if family == "sd3_folder" else ()
    expected = pipeline.encode_prompt(prompts, *extra, device="cpu", do_classifier_free_guidance=False, **options)
    cond = backbone.text_encoder()(prompts)
    assert torch.equal(cond["text"], expected[0])
    if family != "sd_folder":
        assert torch.equal(cond["pooled"], expected[2])
    assert cond["pooled"].shape == (2, backbone.pooled)


def test_empty_prompt_of_sdxl_is_what_its_pipeline_guides_with(sdxl_folder: Path) -> None:
    backbone = backbones.load(str(sdxl_folder))
    _, text, _, pooled = backbone.pipeline().encode_prompt("a red ring", device="cpu", do_classifier_free_guidance=True)
    cond = backbone.text_encoder()(["", "a red ring"])
    assert torch.equal(cond["text"][:1], text) and torch.equal(cond["pooled"][:1], pooled)
    assert cond["text"][1].any() and cond["pooled"][1].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_one_step_of_the_pipeline_is_the_denoisers_x0(
    family: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """From pure noise, one unguided step at the last level ends at x0 (Euler to 0; DDIM to the first step's level)."""
    backbone = backbones.load(str(request.getfixturevalue(family)))
    pipeline, denoiser = backbone.student_pipeline(backbone.denoiser()), backbone.denoiser()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(0))
    call = backbone.student_call([1.0]) | ({"max_sequence_length": 4} if family == "sd3_folder" else {})
    height, width = size
    ours = pipeline("a red ring", latents=noise, output_type="latent", height=height, width=width, **call).images
    with torch.no_grad():
        x0 = denoiser(noise, torch.ones(1), backbone.text_encoder()(["a red ring"]))
    assert torch.allclose(ours, x0, atol=1e-3 if family == "sd3_folder" else 2e-2)


def test_autoencoder_speaks_scaled_latents(sd3_folder: Path) -> None:
    backbone = backbones.load(str(sd3_folder))
    ours, stock = backbone.autoencoder(), backbone.pipeline().vae
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(pixels)
        assert torch.allclose(latents, (stock.encode(pixels).latent_dist.mode() - 0.1) * 0.5, atol=1e-6)
        assert torch.allclose(ours.decode(latents), stock.decode(latents / 0.5 + 0.1).sample, atol=1e-6)


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "epsilon"), ("v_prediction", "v_prediction")])
def test_prediction_type_is_the_checkpoints(prediction: str, kind: str, tmp_path: Path) -> None:
    from tests.pipelines import random_sd

    assert backbones.load(str(random_sd(tmp_path / "sd", prediction=prediction))).process().prediction == kind


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_students_schedule_may_end_at_pure_noise(prediction: str, sd_folder: Path) -> None:
    """The exported pipeline's one step is x0 where alpha is 0, so nothing of its noise is left in it."""
    changes = {"rescale_betas_zero_snr": True, "prediction_type": prediction}
    backbone = backbones.load(str(sd_folder), schedule=changes)
    alpha, _ = backbone.process().alpha_sigma(torch.ones(1))
    assert alpha.item() < 1e-3 < backbones.load(str(sd_folder)).process().alpha_sigma(torch.ones(1))[0].item()
    denoiser = backbone.denoiser()
    pipeline = backbone.student_pipeline(denoiser)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.rescale_betas_zero_snr and pipeline.scheduler.config.prediction_type == prediction
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    ours = pipeline("a red ring", latents=noise, output_type="latent", **backbone.student_call([1.0])).images
    with torch.no_grad():
        x0 = denoiser(noise, torch.ones(1), backbone.text_encoder()(["a red ring"]))
    torch.testing.assert_close(ours, x0, atol=1e-3, rtol=1e-3)


def test_a_network_of_pure_noise_is_sampled_from_there(sd_folder: Path, tmp_path: Path) -> None:
    """Also out of a folder whose own sampler begins below, as SD 1.5's does (arXiv 2305.08891, section 3.3)."""
    copytree(sd_folder, tmp_path / "leading")
    file = tmp_path / "leading" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "leading", "steps_offset": 1}))
    for changes, first in (({"rescale_betas_zero_snr": True}, 999), ({}, 901)):
        schedule = {"prediction_type": "v_prediction", **changes}
        scheduler = backbones.load(str(tmp_path / "leading"), schedule=schedule).pipeline().scheduler
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == first


def test_schedules_that_cannot_be_are_refused(sd_folder: Path, sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match="zero terminal SNR cannot be trained with prediction_type=epsilon"):
        backbones.load(str(sd_folder), schedule={"rescale_betas_zero_snr": True}).process()
    with pytest.raises(ConfigError, match="names beta_end; the noise schedule of .* knows prediction_type, rescale"):
        backbones.load(str(sd_folder), schedule={"beta_end": 0.1})
    with pytest.raises(ConfigError, match="cannot be changed"):
        backbones.load(str(sd3_folder), schedule={"rescale_betas_zero_snr": True})


def test_pipeline_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="is a FluxPipeline; a teacher must be one of"):
        backbones.load(str(tmp_path))


def test_solver_by_name(sd_folder: Path) -> None:
    scheduler = backbones.load(str(sd_folder)).pipeline().scheduler
    assert type(backbones.solver("DPMSolverMultistepScheduler", scheduler)).__name__ == "DPMSolverMultistepScheduler"
    with pytest.raises(ConfigError, match="no scheduler 'Nope'"):
        backbones.solver("Nope", scheduler)
    with pytest.raises(ConfigError, match="cannot follow this pipeline's noise schedule"):
        backbones.solver("FlowMatchHeunDiscreteScheduler", scheduler)


OTHERS = ("EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative", "IPNDM", "ScoreSdeVe", "CogVideoXDDIM",
          "DDIMInverse", "DPMSolverMultistepInverse", "RePaint", "KarrasVe", "Amused", "UnCLIP", "SCM")  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_solver_of_other_noise_levels_or_of_the_other_way_is_refused(name: str) -> None:
    """Diffusers makes most of them from any scheduler's settings, and paints something else with them."""
    with pytest.raises(ConfigError, match=f"{name}Scheduler cannot follow this pipeline's noise schedule"):
        backbones.solver(f"{name}Scheduler", backbones.load("tiny-sd").scheduler())


FOLLOWERS = ("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "LCM",
             "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver", "TCD",
             "UniPCMultistep")  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWERS)
def test_solvers_that_follow(name: str) -> None:
    own = backbones.load("tiny-sd").scheduler()
    assert type(backbones.solver(f"{name}Scheduler", own)).__name__ == f"{name}Scheduler"


@pytest.mark.parametrize("own", ["EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_no_solver_clips_latents(own: str, sd_folder: Path, tmp_path: Path) -> None:
    """DDIM does by default, and only says so where a folder's own scheduler is another."""
    import diffusers

    made = getattr(diffusers, own)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert not backbones.solver("DDIMScheduler", made).config.clip_sample
    copytree(sd_folder, tmp_path / "sd")
    made.save_pretrained(tmp_path / "sd" / "scheduler")
    changed = backbones.load(str(tmp_path / "sd"), schedule={"prediction_type": "v_prediction"})
    assert not changed.pipeline(**changed.unchecked).scheduler.config.clip_sample


def test_one_autoencoder_is_known_in_every_folder(sd_folder: Path, tmp_path: Path) -> None:
    one = backbones.load(str(sd_folder))
    again = one.pipeline(**one.unchecked)
    again.save_pretrained(tmp_path / "other")
    assert backbones.load(str(tmp_path / "other")).autoencoder_fingerprint == one.autoencoder_fingerprint
    with torch.no_grad():
        next(again.vae.parameters()).add_(1)
    again.save_pretrained(tmp_path / "another")
    assert backbones.load(str(tmp_path / "another")).autoencoder_fingerprint != one.autoencoder_fingerprint


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solver_of_a_flow_goes_where_its_own_goes(name: str) -> None:
    def paint(steps: int, solver: str | None) -> torch.Tensor:
        return open_painter("tiny-sd3", steps, 1.0, solver)(shapes.captions(3, range(4)))

    exact = paint(100, None)
    assert (paint(15, name) - exact).abs().mean() < (paint(15, None) - exact).abs().mean()


def test_solver_that_knows_no_flow_is_refused() -> None:
    scheduler = backbones.load("tiny-sd3").pipeline().scheduler
    assert type(backbones.solver("FlowMatchHeunDiscreteScheduler", scheduler)).__name__.startswith("FlowMatchHeun")
    with pytest.raises(ConfigError, match="DDIMScheduler cannot follow this pipeline's rectified flow"):
        backbones.solver("DDIMScheduler", scheduler)


def test_weights_of_either_format_are_told_apart(sd_folder: Path, tmp_path: Path) -> None:
    known = []
    for seed in (0, 1):
        folder = tmp_path / str(seed) / "mine"
        copytree(sd_folder, folder)
        for file in (folder / "unet").glob("*.safetensors"):
            file.unlink()
        torch.save({"weight": torch.full((8,), float(seed))}, folder / "unet" / "diffusion_pytorch_model.bin")
        known.append(backbones.load(str(folder)).fingerprint)
    assert known[0] != known[1]
    assert same_network("mine@12", "other@12") and same_network("org/name", "org/name")
    assert not same_network("mine@12", "mine@13") and not same_network("org/name", "name@12")


def test_sizes_that_the_autoencoder_would_cut_are_refused(sd_folder: Path) -> None:
    backbone = backbones.load(str(sd_folder))
    assert backbone.latent_shape(backbone.factor * 3, None)[1] == 3
    for side in (0, -backbone.factor, backbone.factor + 1):
        with pytest.raises(ConfigError, match=f"positive multiples of {backbone.factor} pixels; got {side}"):
            backbone.latent_shape(side, None)


def test_a_hub_that_cannot_be_asked_is_no_silent_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported student must not quietly become a pipeline of others; what is known to be none needs no word."""

    def unreached(*_: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreached)
    with pytest.warns(UserWarning, match=r"cannot be asked whether 'someone/student' has a distill.json"):
        assert SDBackbone("someone/student").calls == {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SDBackbone("someone/pipeline").call == {}


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_run_that_has_begun_asks_the_hub_for_nothing_more(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that times out, at a grid of samples say, would end a run of weeks."""
    folder, asked = request.getfixturevalue(f"{family}_folder"), []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **given: asked.append(name) or folder)
    backbone, index = type(backbones.load(str(folder)))("someone/pipeline"), DiffusionPipeline.load_config(folder)
    read: list[Any] = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda path, **given: read.append(path) or index)
    monkeypatch.setattr(backbone, "_own", {}, raising=False)
    student = backbone.denoiser()
    read.clear()
    shared = {"vae": backbone.autoencoder().network, **backbone.text_encoder().components}
    for _ in range(2):
        pipeline = backbone.student_pipeline(student, **shared, **backbone.unchecked)
        call = backbone.student_call([1.0, 0.5])
    assert pipeline(["a red ring"], output_type="pt", **call).images.shape[0] == 1
    assert "someone/pipeline" not in map(str, read)
    assert asked == ["someone/pipeline"] and backbone.fingerprint == "someone/pipeline"


def test_a_hub_that_is_not_reached_leaves_what_was_fetched_before(
    monkeypatch: pytest.MonkeyPatch, sd_folder: Path
) -> None:
    def download(name: str, local_files_only: bool = False, **given: Any) -> Path:
        if not local_files_only:
            raise TimeoutError("no answer")
        return sd_folder

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert SDBackbone("someone/pipeline").folder == str(sd_folder)


def _other(folder: Path, tmp_path: Path, part: str, **changes: Any) -> Path:
    """A copy of a pipeline, with some settings of a part's configuration changed, or taken out where they are None."""
    copy = Path(copytree(folder, tmp_path / "copy"))
    (file,) = (copy / part).glob("*config.json")
    config = {name: value for name, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_u_net_on_another_kind_of_noise_is_refused(kind: str, sdxl_folder: Path, tmp_path: Path) -> None:
    """Its file read as DDIM's would be an invented schedule."""
    copy = Path(copytree(sdxl_folder, tmp_path / "copy"))
    getattr(diffusers, kind)().save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    with pytest.raises(ConfigError, match=f"{kind}, follows no discrete variance-preserving noise"):
        backbones.load(str(copy)).process()


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"])
def test_what_a_folder_leaves_to_its_scheduler_is_its_scheduler_s(kind: str, sd_folder: Path, tmp_path: Path) -> None:
    """DDIM has other values of its own."""
    copy = Path(copytree(sd_folder, tmp_path / "copy"))
    own = getattr(diffusers, kind)()
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    backbone = backbones.load(str(copy))
    kept, _ = backbone.process().alpha_sigma(torch.tensor([0.5, 1.0]))
    assert torch.allclose(kept.square(), own.alphas_cumprod[[499, 999]])
    assert torch.allclose(backbone.student_scheduler().alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"time_cond_proj_dim": 16}, "takes the guidance as an input"),
        ("vae", {"latents_mean": [0.0] * 4}, "a mean and a deviation for each latent channel"),
    ],
)
def test_networks_of_other_kinds_are_refused(
    part: str, changes: dict[str, Any], words: str, sdxl_folder: Path, tmp_path: Path
) -> None:
    backbone = backbones.load(str(_other(sdxl_folder, tmp_path, part, **changes)))
    with pytest.raises(ConfigError, match=words):
        backbone.denoiser() if part == "unet" else backbone.autoencoder()


def test_a_network_of_old_has_the_size_that_diffusers_gives_it(sd_folder: Path, tmp_path: Path) -> None:
    old = _other(sd_folder, tmp_path, "unet", _diffusers_version="0.6.0")
    side = DiffusionPipeline.from_pretrained(old).unet.config.sample_size
    assert backbones.load(str(old)).latent_shape() == (4, side, side) == (4, 64, 64)
    assert backbones.load(str(sd_folder)).latent_shape() == (4, 8, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_half_size_weights_alone_is_read(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = backbones.load(str(request.getfixturevalue(family)))
    whole.pipeline().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = backbones.load(str(tmp_path / "half"))
    assert not list((tmp_path / "half").rglob("model.safetensors"))
    half.text_encoder(), half.autoencoder(), half.pipeline()
    for name, tensor in half.denoiser().network.state_dict().items():
        torch.testing.assert_close(tensor, whole.denoiser().network.state_dict()[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "part", "lost"),
    [("sd_folder", "safety_checker", True), ("sd3_folder", "text_encoder_3", True), ("sd_folder", "vae", False)],
)
def test_parts_that_can_be_done_without_may_be_missing(
    family: str, part: str, lost: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As after a partial download: named in the index, and not there."""
    copy = Path(copytree(request.getfixturevalue(family), tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    kinds = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index[part] = kinds.get(part, ["transformers", "T5EncoderModel"]) if lost else index[part]
    (copy / "model_index.json").write_text(json.dumps(index))
    if not lost:
        rmtree(copy / part)
    backbone = backbones.load(str(copy))
    assert (part in backbone.absent) == lost
    if lost:
        assert getattr(backbone.pipeline(), part) is None


def test_a_pipeline_with_adapters_beside_it_is_a_pipeline(sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(copytree(sd_folder, tmp_path / "copy"))
    (copy / "pytorch_lora_weights.safetensors").touch()
    assert isinstance(backbones.load(str(copy)), SDBackbone)


def test_a_pipeline_of_its_own_code_is_refused_by_its_name(sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(copytree(sd_folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": ["my_pipeline", "MyPipeline"]}))
    with pytest.raises(ConfigError, match="is a MyPipeline; a teacher must be one of"):
        backbones.load(str(copy))


def test_pictures_of_sd3_are_whole_patches(sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match="positive multiples of 8 pixels; got 36 x 36"):
        backbones.load(str(sd3_folder)).check_size(36, 36)
    backbones.load(str(sd3_folder)).check_size(40, 24)


def test_a_variant_beside_the_weights_is_not_looked_at(sd_folder: Path, tmp_path: Path) -> None:
    """As diffusers does not."""
    copy = Path(copytree(sd_folder, tmp_path / "copy"))
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half the size")
    assert same_network(backbones.load(str(sd_folder)).fingerprint, backbones.load(str(copy)).fingerprint)


@pytest.mark.parametrize("told", [True, False])
def test_a_scheduler_of_a_class_that_is_not_here_is_read_by_its_file(
    told: bool, sd_folder: Path, tmp_path: Path
) -> None:
    """As far as that says what the noise is."""
    changes = {} if told else {"beta_start": None}
    copy = _other(sd_folder, tmp_path, "scheduler", **changes)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["my_sched", "MyScheduler"]}))
    if told:
        assert backbones.load(str(copy)).process().facts == backbones.load(str(sd_folder)).process().facts
    else:
        with pytest.raises(ConfigError, match="follows no discrete variance-preserving noise"):
            backbones.load(str(copy)).process()


@pytest.mark.parametrize("changes", [{"use_flow_sigmas": True}, {"beta_schedule": "sigmoid"}])
def test_noise_that_ddim_has_not_is_refused(changes: dict[str, Any], sd_folder: Path, tmp_path: Path) -> None:
    copy = _other(sd_folder, tmp_path, "scheduler", **changes)
    kind = "UniPCMultistepScheduler" if "use_flow_sigmas" in changes else "DDPMScheduler"
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    with pytest.raises(ConfigError, match="follows no discrete variance-preserving noise"):
        backbones.load(str(copy)).process()


def test_half_size_weights_may_be_of_some_parts_and_in_shards(sd_folder: Path, tmp_path: Path) -> None:
    whole = backbones.load(str(sd_folder))
    copy = Path(copytree(sd_folder, tmp_path / "copy"))
    for part, size in (("vae", "1GB"), ("unet", "40KB")):
        network = getattr(whole.pipeline(), part).to(torch.float16)
        rmtree(copy / part)
        network.save_pretrained(copy / part, variant="fp16", max_shard_size=size)
    assert len(list((copy / "unet").glob("*.fp16-00001-of-*.safetensors"))) == 1
    half = backbones.load(str(copy))
    half.denoiser(), half.autoencoder(), half.text_encoder()
    assert half.half_alone and half.pipeline().unet is not None and not whole.half_alone
