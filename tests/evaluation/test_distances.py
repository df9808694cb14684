from __future__ import annotations

import pytest
import torch

from distill.errors import ConfigError
from distill.evaluation.distances import open_distance
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.perceptual.lpips import load_lpips


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator), torch.rand(3, 3, 32, 32, generator=generator)


def test_shapes_is_a_cosine_of_judge_features() -> None:
    one, other = pictures()
    judge = load_shapes_judge()
    with torch.no_grad():
        a, b = judge.features(one * 2 - 1), judge.features(other * 2 - 1)
    expected = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(open_distance("shapes")(one, other), expected)


def test_lpips_is_the_packages() -> None:
    one, other = pictures()
    with torch.no_grad():
        expected = load_lpips("squeeze", "tiny-lpips")(one * 2 - 1, other * 2 - 1).flatten()
    torch.testing.assert_close(open_distance("tiny-lpips")(one, other), expected)


@pytest.mark.parametrize("name", ["shapes", "tiny-lpips"])
def test_nothing_is_apart_from_itself(name: str) -> None:
    one, other = pictures()
    distance = open_distance(name)
    assert distance(one, one).abs().max() < 1e-5 and distance(one, other).min() > 0.01


def test_distances_that_cannot_be_opened_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="the distance 'beauty' is unknown; choose one of shapes, tiny-lpips, vgg"):
        open_distance("beauty")
    with pytest.raises(ConfigError, match="'dreamsim' needs a package: pip install dreamsim"):
        open_distance("dreamsim")
