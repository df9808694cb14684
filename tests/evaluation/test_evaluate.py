from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill import backbones
from distill.data import shapes
from distill.evaluation.evaluate import HELD_OUT, distance_to_teacher
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.inference import open_painter
from distill.perceptual.latent_lpips import TINY, LatentLPIPS


def test_distance_to_the_teacher_is_of_the_same_noise_and_captions(sd_folder: Path) -> None:
    few, many = (open_painter(str(sd_folder), steps, 1.0, device="cpu") for steps in (1, 3))
    autoencoder = backbones.load(str(sd_folder)).autoencoder()
    found = distance_to_teacher(few, many, autoencoder, samples=5, seed=3, batch_size=2)
    prompts = shapes.captions(HELD_OUT, range(5))
    one, other = (painter(prompts, seed=3, batch_size=2) * 2 - 1 for painter in (few, many))
    judge, metric = load_shapes_judge(), LatentLPIPS.load(TINY)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    with torch.no_grad():
        judged = (1 - cosine(judge.features(one), judge.features(other))).mean().item()
        perceived = metric(autoencoder.encode(one), autoencoder.encode(other)).mean().item()
    assert found == {
        "judge": pytest.approx(judged, abs=2e-5),
        "latent_lpips": pytest.approx(perceived, abs=2e-5),
        "samples": 5,
        "seed": 3,
    }
    same = distance_to_teacher(many, many, autoencoder, samples=4)
    assert same["judge"] == pytest.approx(0, abs=1e-5) and same["latent_lpips"] == 0
