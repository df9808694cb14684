"""Schedulers that draw noise between their steps."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill.diffusion.sampling import draws_noise, own_noise

STILL = ("DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")
DRAWING = ("EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "KDPM2AncestralDiscreteScheduler")


@pytest.mark.parametrize(("name", "draws"), [*((n, False) for n in STILL), *((n, True) for n in DRAWING)])
def test_schedulers_that_draw_noise_are_known(name: str, draws: bool) -> None:
    scheduler = getattr(diffusers, name)()
    state = torch.get_rng_state()
    assert draws_noise(scheduler) is draws
    assert torch.equal(torch.get_rng_state(), state) and "step" not in vars(scheduler)


def test_so_are_those_of_flows() -> None:
    assert not draws_noise(diffusers.FlowMatchEulerDiscreteScheduler())
    assert draws_noise(diffusers.FlowMatchLCMScheduler())


def test_a_stochastic_variant_of_a_solver_is_one_that_draws() -> None:
    assert draws_noise(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))


def test_each_sample_has_noise_of_its_own() -> None:
    """Alone or beside others, and never the global generator's."""
    scheduler = diffusers.FlowMatchLCMScheduler()

    def step(seeds: list[int]) -> torch.Tensor:
        scheduler.set_timesteps(2)
        nothing = torch.zeros(len(seeds), 4, 2, 2)
        with own_noise(scheduler, [torch.Generator().manual_seed(seed) for seed in seeds]):
            return scheduler.step(nothing, scheduler.timesteps[0], nothing).prev_sample

    torch.manual_seed(7)
    together = step([3, 7])
    assert torch.equal(torch.cat([step([3]), step([7])]), together) and not torch.equal(together[0], together[1])
