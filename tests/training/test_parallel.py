from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill import backbones
from distill.adversarial.taps import Taps
from distill.backbones.base import Backbone
from distill.batch import Cond
from distill.training import parallel


def test_compiled_blocks_answer_and_are_tapped_as_plain_ones(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, then run as they are: what a backend makes of the trace is not ours."""
    compile, traced = torch.compile, []

    def trace(function: Any) -> Any:
        traced.append(function)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    answers: list[list[Tensor]] = []
    for compiled in (False, True):
        backbone = backbones.load(str(sd3_folder))
        denoiser = backbone.denoiser()
        taps = Taps(denoiser)
        parallel.prepare(denoiser, compiled=compiled)
        with torch.no_grad():
            cond = backbone.text_encoder()(["a red ring", "a blue square"])
        x = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0)).requires_grad_()
        t = torch.tensor([1.0, 0.25])
        features = taps(x, t, cond)
        (gradient,) = torch.autograd.grad(denoiser(x, t, cond).square().mean(), x)
        answers.append([*features, gradient])
    assert len(traced) == len(denoiser.blocks) > 0
    for plain, other in zip(*answers, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-5)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@dataclass
class Asked:
    """A small teacher and what it is asked."""

    backbone: Backbone
    x: Tensor
    t: Tensor
    cond: Cond


@pytest.fixture(params=["sd_folder", "sd3_folder"])
def asked(request: pytest.FixtureRequest) -> Asked:
    backbone = backbones.load(str(request.getfixturevalue(request.param)))
    with torch.no_grad():
        cond = backbone.text_encoder()(["a red ring", "a blue square"])
    x = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    return Asked(backbone, x, torch.tensor([0.999, 0.25]), cond)


def test_shards_gathered_in_bfloat16_leave_no_whole_copy_behind(mesh: DeviceMesh, asked: Asked) -> None:
    """Autocast keeps one of every weight for the way back; what is gathered is freed at once and gathered again."""
    copies, gradients = [], []
    for bfloat16 in (False, True):
        denoiser = asked.backbone.denoiser()
        weights = [p.detach().bfloat16() for block in denoiser.blocks for p in block.parameters() if p.ndim > 1]
        parallel.prepare(denoiser, mesh, bfloat16=bfloat16)
        saved: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(partial(_noted, saved), lambda kept: kept):
            answer = denoiser(asked.x, asked.t, asked.cond)
        there = [tensor for tensor in saved if tensor.untyped_storage().nbytes()]
        copies.append(sum(any(_is(weight, tensor) for tensor in there) for weight in weights) / len(weights))
        answer.square().mean().backward()
        parts = [p.grad.full_tensor().flatten() for p in denoiser.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert copies[0] > 0.8 and copies[1] == 0
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


def test_a_network_gathered_in_bfloat16_is_asked_like_any_other(mesh: DeviceMesh, asked: Asked) -> None:
    """Outside autocast as within it, in float32: times that bfloat16 does not have, the answer, and what it says of
    itself, by which diffusers chooses the precision of noise and latents.
    """
    denoiser = asked.backbone.denoiser()
    parallel.prepare(denoiser, mesh, bfloat16=True)
    told: list[Tensor] = []
    embedding = getattr(denoiser.network, "time_proj", None) or denoiser.network.time_text_embed
    embedding.register_forward_pre_hook(lambda _, arguments: told.append(arguments[0]))
    timestep = denoiser.process.timestep(asked.t)
    with torch.no_grad():
        outside = denoiser.predict(asked.x, timestep, asked.cond)
        with torch.autocast("cpu", torch.bfloat16):
            within = denoiser.predict(asked.x, timestep, asked.cond)
    assert outside.equal(within) and outside.dtype == denoiser.network.dtype == torch.float32
    assert told and all(time.float().equal(timestep.float()) for time in told)
    assert not timestep.bfloat16().float().equal(timestep.float()), "nothing to lose"


def _noted(seen: list[Tensor], tensor: Tensor) -> Tensor:
    seen.append(tensor)
    return tensor


def _is(weight: Tensor, tensor: Tensor) -> bool:
    """As it is or transposed, as a matrix product keeps it."""
    turned = [tensor, tensor.T] if tensor.ndim == 2 else [tensor]
    return any(each.dtype == weight.dtype and each.shape == weight.shape and each.equal(weight) for each in turned)


def test_ddp_keeps_no_copy_of_the_gradients(tmp_path: Path) -> None:
    """It looks after one parameter, the smallest; frozen ones are not trained anyway."""
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    module[0].bias.requires_grad_(False)
    module[0].register_buffer("positions", torch.zeros(5))
    module.add_module("strategies", torch.nn.Module())
    module.strategies.register_buffer("statistics", torch.zeros(2))  # type: ignore[union-attr]
    parallel.average_alone(module, DDPStrategy())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
    finally:
        torch.distributed.destroy_process_group()
    kept = [p for p in wrapped._module_parameters if p.requires_grad]
    assert [p.shape for p in kept] == [(1,)]
    assert [buffer.numel() for buffer in wrapped.modules_buffers] == [2], "the critic's; the others are alike anyway"
    whole = torch.nn.Linear(2, 2)
    parallel.average_alone(whole, SingleDeviceStrategy())
    assert not hasattr(whole, "_ddp_params_and_buffers_to_ignore")


def test_only_cpus_without_its_instructions_lack_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for theirs in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda theirs=theirs: theirs)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert [parallel.lacks_bfloat16(name) for name in ("cpu", "auto", "gpu")] == [not theirs, not theirs, False]
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        assert [parallel.lacks_bfloat16(name) for name in ("cpu", "auto", "gpu")] == [not theirs, False, False]
