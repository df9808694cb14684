"""Adapters: the formula of LoRA, which layers get one, what a state dict holds, and the way back to a plain network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.lora import MARK, LoRA
from distill.errors import ConfigError
from tests import tiny

BOTH = pytest.mark.parametrize("make", [tiny.sd_denoiser, tiny.sd3_denoiser])


def learnt(make: Callable[[], Denoiser], lora: LoRA) -> Denoiser:
    """A network whose adapters have learnt something."""
    network = make()
    network.adapt(lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.weights:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network


def answer(network: Denoiser) -> Tensor:
    x_t, t = tiny.batch(2).x0, torch.tensor([0.5, 1.0])
    with torch.no_grad():
        return network(x_t, t, tiny.cond(2))


def _reference_merged(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """W + alpha / rank B A, of a convolution as of the matrix over its inputs."""
    rank = a.shape[0]
    product = b.reshape(len(b), rank) @ a.reshape(rank, -1)
    return weight + alpha / rank * product.reshape(weight.shape)


@BOTH
def test_adapters_change_nothing_at_first_and_are_a_function_of_the_seed(make: Callable[[], Denoiser]) -> None:
    networks = [make() for _ in range(3)]
    before = answer(networks[0])
    state = torch.random.get_rng_state()
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        network.adapt(LoRA(rank=4), seed)
        torch.testing.assert_close(answer(network), before, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)
    one, same, other = (torch.cat([weight.flatten() for weight in network.weights]) for network in networks)
    assert torch.equal(one, same) and not torch.equal(one, other)


@BOTH
def test_all_layers_of_the_blocks_are_adapted_and_nothing_else_is_trained(make: Callable[[], Denoiser]) -> None:
    plain, network = make(), make()
    inside = {id(layer) for block in plain.blocks for layer in block.modules()}
    expected = {
        name
        for name, layer in plain.named_modules()
        if id(layer) in inside and isinstance(layer, nn.Linear | nn.Conv2d)
    }
    network.adapt(LoRA(rank=2), seed=0)
    adapted = {name.split(MARK)[0] for name, _ in network.named_parameters() if MARK in name}
    assert adapted == expected and expected
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert [id(weight) for weight in trained] == [id(weight) for weight in network.weights]


@BOTH
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_merged_is_the_formula_and_answers_as_adapted(make: Callable[[], Denoiser], alpha: float | None) -> None:
    lora = LoRA(rank=4, alpha=alpha)
    plain, network = make(), learnt(make, lora)
    weights, adapted = dict(network.named_parameters()), answer(network)
    network.merge()
    assert not network.adapted and network.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(answer(network), adapted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(answer(plain), adapted, atol=1e-2)
    merged, checked = network.state_dict(), 0
    for name, weight in plain.named_parameters():
        stem = name.removesuffix(".weight")
        if (a := weights.get(f"{stem}.lora_A.default.weight")) is None:
            torch.testing.assert_close(merged[name], weight)
            continue
        b = weights[f"{stem}.lora_B.default.weight"]
        torch.testing.assert_close(merged[name], _reference_merged(weight, a, b, alpha or 4), atol=1e-5, rtol=1e-4)
        checked += 1
    assert checked > 5


@BOTH
def test_twins_share_their_weights_and_not_their_adapters(make: Callable[[], Denoiser]) -> None:
    base = make()
    before, own = answer(base), {id(weight) for weight in base.parameters()}
    twins = [base.twin(base.process) for _ in range(2)]
    for seed, twin in enumerate(twins):
        twin.adapt(LoRA(rank=2), seed)
        assert {id(weight) for name, weight in twin.named_parameters() if MARK not in name} == own
    with torch.no_grad():
        for weight in twins[0].weights:
            weight.add_(0.1)
    for network in (base, twins[1]):
        torch.testing.assert_close(answer(network), before, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(answer(twins[0]), before, atol=1e-3)


@BOTH
def test_state_dict_is_the_adapters_alone_and_lacks_none(make: Callable[[], Denoiser]) -> None:
    lora = LoRA(rank=2)
    network, other = learnt(make, lora), make()
    other.adapt(lora, seed=3)
    holder = nn.ModuleDict({"student": network})  # as a training module has it, under a name
    state = holder.state_dict()
    assert state and all(MARK in name and name.startswith("student.") for name in state)
    nn.ModuleDict({"student": other}).load_state_dict(state)
    assert torch.equal(answer(other), answer(network))
    missing = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lora_A"):
        holder.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        holder.load_state_dict(state | {"student.network.foreign": torch.zeros(1)})
    frozen = next(f"student.{name}" for name, _ in network.named_parameters() if MARK not in name)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        holder.load_state_dict(state | {frozen: torch.zeros(1)})


def test_the_same_adapters_have_the_same_settings() -> None:
    one, other = LoRA(4, layers=["to_q", "to_k"]), LoRA(4, alpha=4, layers=["to_k", "to_q"])
    assert one.settings() == other.settings() != LoRA(4, alpha=8, layers=["to_k", "to_q"]).settings()
    assert LoRA(**one.settings()).settings() == one.settings()


def test_named_layers_alone_are_adapted() -> None:
    network = tiny.sd3_denoiser()
    network.adapt(LoRA(rank=2, layers=["attn.to_q", "to_out.0"]), seed=0)
    names = {name.split(MARK)[0].split(".", 3)[-1] for name, _ in network.named_parameters() if MARK in name}
    assert names == {"attn.to_q", "attn.to_out.0"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "model.lora.rank=0 is too few"),
        ({"alpha": 0.0}, "model.lora.alpha=0.0 is no strength; give a positive number, or null for the rank"),
        ({"alpha": float("nan")}, "model.lora.alpha=nan is no strength"),
        ({"alpha": float("inf")}, "model.lora.alpha=inf is no strength"),
        ({"layers": []}, "model.lora.layers is empty; leave it out"),
        (
            {"layers": ["to_q", "to_x", "o_q"]},
            "model.lora.layers names to_x, o_q, and no linear or .* end in .*attn.to_q",
        ),
        ({"layers": ["proj_out"]}, "model.lora.layers names proj_out, and no linear"),  # it is outside the blocks
    ],
)
def test_bad_settings_are_said(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny.sd3_denoiser().adapt(LoRA(**settings), seed=0)
