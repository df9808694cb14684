import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv1d, conv2d, leaky_relu

from distill.adversarial.heads import BatchNormLocal, GridHead, HeadCondition, TokenHead
from distill.errors import ConfigError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _reference_batch_norm_local(x: Tensor, size: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of each `size` consecutive samples for themselves."""
    parts = [batch_norm(part, None, None, weight, bias, training=True, eps=1e-5) for part in x.split(size)]
    return torch.cat(parts)


@pytest.mark.parametrize(("batch", "size"), [(2, 2), (6, 6), (8, 8), (16, 8), (12, 6), (14, 7), (11, 11)])
@pytest.mark.parametrize("places", [(), (9,), (3, 5)])
def test_groups_of_at_most_eight_samples_are_normalised(batch, size, places):
    x = 3 * torch.randn(batch, 4, *places) + 2
    norm = BatchNormLocal(4)
    norm.weight.data, norm.bias.data = torch.randn(4), torch.randn(4)
    expected = _reference_batch_norm_local(x, size, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


def test_no_statistics_are_kept_and_training_makes_no_difference():
    norm, x = BatchNormLocal(4), torch.randn(8, 4, 3, 3)
    assert list(norm.buffers()) == []
    assert torch.equal(norm.train()(x), norm.eval()(x))


def test_low_precision_comes_back_as_it_went_in():
    x = torch.randn(8, 4, 3, 3)
    out = BatchNormLocal(4)(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), BatchNormLocal(4)(x), atol=0.05, rtol=0.05)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples per process"):
        BatchNormLocal(4)(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="at least 2 samples per process"):
        GridHead(8, 0)(torch.randn(1, 8, 3, 3), None)


def _reference_head(head: GridHead, features: Tensor, condition: Tensor | None) -> Tensor:
    """StyleGAN-T's head: a pointwise and a residual spatial convolution, then a projection on the condition."""

    def block(x: Tensor, convolution, norm, padding: int) -> Tensor:
        x = conv2d(x, convolution.weight, convolution.bias, padding=padding)
        return leaky_relu(_reference_batch_norm_local(x, len(x), norm.weight, norm.bias), 0.2)

    x = block(features, head.enter[0], head.enter[1], 0)
    x = (block(x, head.mix[0], head.mix[1], 1) + x) / math.sqrt(2)
    x = conv2d(x, head.leave.weight, head.leave.bias)
    if condition is None:
        return x[:, 0]
    direction = condition @ head.project.weight.T + head.project.bias
    return torch.einsum("bdhw,bd->bhw", x, direction) / math.sqrt(x.shape[1])


def _reference_token_head(head: TokenHead, features: Tensor, condition: Tensor | None, size: int) -> Tensor:
    """StyleGAN-T's head over a ring of tokens, of weights divided by their largest singular value.

    Convolutions of k = 1, of k = 9 with a shortcut, and of k = 1 to the projection; local batch norm over groups of
    `size` samples; a token's logit is its product with the projected condition over the root of 64.
    """

    def convolved(x: Tensor, convolution, reach: int) -> Tensor:
        raw = convolution.parametrizations.weight.original
        ring = torch.cat([x[..., x.shape[2] - reach :], x, x[..., :reach]], dim=2)
        return conv1d(ring, raw / torch.linalg.svdvals(raw.flatten(1))[0], convolution.bias)

    def block(x: Tensor, convolution, norm, reach: int) -> Tensor:
        x = convolved(x, convolution, reach)
        return leaky_relu(_reference_batch_norm_local(x, size, norm.weight, norm.bias), 0.2)

    x = block(features, head.enter[0], head.enter[1], 0)
    x = (block(x, head.mix[0], head.mix[1], 4) + x) / 2**0.5
    x = convolved(x, head.leave, 0)
    if condition is None:
        return x[:, 0]
    direction = condition @ head.project.weight.T + head.project.bias
    return (x * direction[:, :, None]).sum(1) / 64**0.5


def token_head(cond: int) -> TokenHead:
    """With norms that have learned something, and estimates of the spectral norms that have come to rest."""
    head = TokenHead(8, cond)
    for norm in (head.enter[1], head.mix[1]):
        norm.weight.data, norm.bias.data = torch.randn(8), torch.randn(8)
    for _ in range(300):
        head(torch.randn(2, 8, 4), torch.randn(2, cond))
    return head.eval()


@pytest.mark.parametrize("cond", [0, 6])
@pytest.mark.parametrize(("batch", "size"), [(4, 4), (12, 6)])
def test_a_head_of_tokens_is_the_formula(cond, batch, size):
    head = token_head(cond)
    for tokens in (4, 16, 37):  # as few as the kernel reaches to one side, and as many as do not divide
        features, condition = torch.randn(batch, 8, tokens), torch.randn(batch, cond) if cond else None
        logits = head(features, condition)
        assert logits.shape == (batch, tokens)
        expected = _reference_token_head(head, features, condition, size)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_tokens_that_are_shifted_around_shift_their_logits():
    head, features, condition = token_head(6), torch.randn(4, 8, 16), torch.randn(4, 6)
    logits = head(features, condition)
    for places in (1, 5, 15):
        shifted = head(features.roll(places, 2), condition)
        torch.testing.assert_close(shifted, logits.roll(places, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cond", [0, 6])
@pytest.mark.parametrize("grid", [(3, 7), (7, 3), (1, 1)])
def test_a_head_is_the_formula_on_any_aspect_ratio(cond, grid):
    head = GridHead(8, cond).eval()  # in training every call moves the spectral norm's estimate
    features, condition = torch.randn(4, 8, *grid), torch.randn(4, cond) if cond else None
    logits = head(features, condition)
    assert logits.shape == (4, *grid)
    torch.testing.assert_close(logits, _reference_head(head, features, condition), atol=1e-5, rtol=1e-5)


def test_a_conditioned_head_judges_each_sample_by_its_own_condition():
    head, features, condition = GridHead(8, 6).eval(), torch.randn(4, 8, 3, 5), torch.randn(4, 6)
    other = condition.clone()
    other[2] = torch.randn(6)
    change = (head(features, condition) - head(features, other)).abs().flatten(1).amax(1)
    assert change[2] > 1e-3
    assert change[[0, 1, 3]].tolist() == [0, 0, 0]


def test_an_unconditional_head_has_nothing_to_condition():
    head = GridHead(8, 0).eval()
    features = torch.randn(4, 8, 3, 5)
    assert head.project is None
    assert torch.equal(head(features, None), head(features, torch.randn(4, 6)))


def test_every_convolution_is_spectrally_normalised():
    head = GridHead(8, 6, hidden=16)
    for parameter in head.parameters():
        parameter.data *= 7
    for _ in range(30):
        head(torch.randn(4, 8, 3, 5), torch.randn(4, 6))
    for convolution in (head.enter[0], head.mix[0], head.leave):
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_inner_width_can_be_chosen():
    head = GridHead(8, 0, hidden=24)
    assert [tuple(c.weight.shape) for c in (head.enter[0], head.mix[0], head.leave)] == [
        (24, 8, 1, 1),
        (24, 24, 3, 3),
        (1, 24, 1, 1),
    ]


def test_group_norm_judges_samples_one_by_one():
    head, features, condition = GridHead(8, 6, norm="group").eval(), torch.randn(4, 8, 3, 5), torch.randn(4, 6)
    alone = torch.cat([head(features[i : i + 1], condition[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(head(features, condition), alone, atol=1e-5, rtol=1e-5)


def test_an_unknown_norm_and_no_channels_are_refused():
    with pytest.raises(ConfigError, match="'batch' is unknown; choose one of local_batch, group"):
        GridHead(8, 0, norm="batch")
    with pytest.raises(ConfigError, match="hidden=0 is too few"):
        GridHead(8, 0, hidden=0)


def test_the_condition_holds_level_and_text_side_by_side():
    condition = HeadCondition(10)
    t, pooled = torch.tensor([0.2, 0.7]), torch.randn(2, 10)
    both = condition(t, pooled)
    assert both.shape == (2, condition.size) == (2, 138)
    later, reworded = condition(t + 0.1, pooled), condition(t, pooled.flip(1))
    assert (both[:, :128] != later[:, :128]).any(1).all() and torch.equal(both[:, 128:], later[:, 128:])
    assert (both[:, 128:] != reworded[:, 128:]).any(1).all() and torch.equal(both[:, :128], reworded[:, :128])


def test_close_levels_are_told_apart():
    condition = HeadCondition(10)
    levels = condition(torch.linspace(0, 1, 1001), torch.zeros(1001, 10))[:, :128]
    gaps = (levels[1:] - levels[:-1]).norm(dim=1)
    assert gaps.min() > 1e-2


def test_any_width_can_be_normalised_in_groups():
    assert GridHead(12, 0, norm="group")(torch.randn(2, 12, 3, 3), None).isfinite().all()
