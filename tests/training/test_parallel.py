from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from distill import backbones
from distill.adversarial.taps import Taps
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


def test_ddp_keeps_no_copy_of_the_gradients(tmp_path: Path) -> None:
    """It looks after one parameter, the smallest; frozen ones are not trained anyway."""
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    module[0].bias.requires_grad_(False)
    parallel.average_alone(module, DDPStrategy())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
    finally:
        torch.distributed.destroy_process_group()
    kept = [p for p in wrapped._module_parameters if p.requires_grad]
    assert [p.shape for p in kept] == [(1,)]
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
