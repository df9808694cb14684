import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from distill.adversarial.taps import Taps
from distill.diffusion.denoiser import Denoiser
from distill.errors import ConfigError
from tests import tiny

B, H, W = 2, tiny.HEIGHT, tiny.WIDTH
SIZES = {
    "sd3": [(16, H // 2, W // 2)] * 2,
    "sd": [(8, H // 2, W // 2), (16, H // 2, W // 2), (16, H // 2, W // 2), (16, H, W), (8, H, W)],
}


@pytest.fixture(params=["sd3", "sd"])
def family(request) -> str:
    return request.param


@pytest.fixture
def denoiser(family, request) -> Denoiser:
    return request.getfixturevalue(family).eval().requires_grad_(False)


@pytest.fixture
def question() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return tiny.draws(B).normal("x_t", tiny.CHANNELS, H, W), torch.tensor([0.9, 0.3]), tiny.cond(B)


def _reference_outputs(denoiser: Denoiser, question) -> list[Tensor]:
    """The features every block answered, by hooks of our own."""
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, output: outputs.append(output)) for block in denoiser.blocks]
    denoiser(*question)
    for hook in hooks:
        hook.remove()
    return outputs


def _reference_grid(family: str, output, question) -> Tensor:
    if family == "sd":
        return output[0] if isinstance(output, tuple) else output
    tokens, height, width = output[1], H // 2, W // 2
    grid = torch.zeros(B, tokens.shape[2], height, width)
    for row in range(height):
        for column in range(width):
            grid[:, :, row, column] = tokens[:, row * width + column]
    return grid


def test_features_are_the_blocks_outputs_as_grids_of_the_latents_aspect_ratio(family, denoiser, question):
    features = Taps(denoiser)(*question)
    assert [tuple(feature.shape) for feature in features] == [(B, *size) for size in SIZES[family]]
    for feature, output in zip(features, _reference_outputs(denoiser, question), strict=True):
        assert torch.equal(feature, _reference_grid(family, output, question))


def test_the_widths_are_known_before_anything_ran(family, denoiser):
    assert Taps(denoiser).widths == [size[0] for size in SIZES[family]]
    assert Taps(denoiser, [1]).widths == [SIZES[family][1][0]]


@pytest.mark.parametrize("place", [(0, 0), (1, 4), (3, 0), (2, 5)])
def test_a_place_of_the_grid_is_that_place_of_the_latent(sd3, question, place):
    x_t, t, cond = question
    row, column = place
    changed = x_t.clone()
    changed[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    taps = Taps(sd3.requires_grad_(False), [0])
    change = (taps(changed, t, cond)[0] - taps(x_t, t, cond)[0]).square().sum(1)
    assert [divmod(sample.argmax().item(), W // 2) for sample in change] == [place] * B


def test_only_the_chosen_blocks_are_read_in_the_order_given(denoiser, question):
    everything, chosen = Taps(denoiser)(*question), Taps(denoiser, [1, 0])(*question)
    assert torch.equal(chosen[0], everything[1]) and torch.equal(chosen[1], everything[0])
    assert len(chosen) == 2


def test_closed_taps_hold_nothing(denoiser, question):
    taps = Taps(denoiser)
    features = [weakref.ref(feature) for feature in taps(*question)]
    outputs: list[weakref.ref] = []

    def watch(module: nn.Module, inputs, output) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        outputs.extend(weakref.ref(tensor) for tensor in tensors if isinstance(tensor, Tensor))

    for block in denoiser.blocks:
        block.register_forward_hook(watch)
    denoiser(*question)
    gc.collect()
    assert len(outputs) >= len(denoiser.blocks)
    assert not any(ref() is not None for ref in features + outputs)


def test_a_forward_that_fails_closes_the_taps(denoiser, question):
    taps = Taps(denoiser)
    kept: list[weakref.ref] = []

    def fail(module: nn.Module, inputs, output) -> None:
        kept.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        raise RuntimeError("no memory")

    hook = denoiser.blocks[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        taps(*question)
    hook.remove()
    gc.collect()
    assert kept[0]() is None
    assert len(taps(*question)) == len(denoiser.blocks)


def test_taps_change_no_answer(denoiser, question):
    before = denoiser(*question)
    taps = Taps(denoiser)
    taps(*question)
    assert torch.equal(denoiser(*question), before)


def test_gradients_reach_the_input_through_every_block_and_no_parameter(denoiser, question):
    x_t, t, cond = question
    for index in range(len(denoiser.blocks)):
        leaf = x_t.clone().requires_grad_()
        (feature,) = Taps(denoiser, [index])(leaf, t, cond)
        feature.square().mean().backward()
        assert leaf.grad is not None and (leaf.grad != 0).all()
    assert {parameter.grad for parameter in denoiser.parameters()} == {None}


@pytest.mark.parametrize("blocks", [[5], [-1], [], [0, 0]])
def test_a_block_that_does_not_exist_or_is_read_twice_is_refused(denoiser, blocks):
    last = len(denoiser.blocks) - 1
    with pytest.raises(ConfigError, match=rf"blocks 0 to {last}, .* got \[{', '.join(map(str, blocks))}\]"):
        Taps(denoiser, blocks)
