"""What every network shares."""

import pytest
import torch

from distill.errors import ConfigError
from tests import tiny


def test_checkpointed_pass_under_autocast_is_recomputed_with_the_kernels_it_used() -> None:
    """The choice of attention kernel holds within a forward pass only, and recomputing happens after it."""
    gradients = []
    for checkpointed in (False, True):
        denoiser, batch = tiny.sd3_denoiser().train(), tiny.batch(2)
        if checkpointed:
            denoiser.network.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16):
            x0 = denoiser(batch.x0, torch.tensor([1.0, 0.5]), batch.cond)
        x0.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("level", [-0.1, 1.5, 999.0, float("nan")])
def test_a_timestep_is_no_level(level: float) -> None:
    batch = tiny.batch(2)
    with pytest.raises(ConfigError, match=r"noise levels lie in \[0, 1\], 0 is data; a network was asked at .* to"):
        tiny.sd3_denoiser()(batch.x0, torch.tensor([0.5, level]), batch.cond)
