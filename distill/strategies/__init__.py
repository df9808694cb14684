"""The terms a recipe can mix, by short class name."""

from distill.adversarial.gan import ApproximateR1, ExactR1, Hinge, Logistic
from distill.diffusion.levels import Discrete, Evenly, LogitNormal, Shifted, Uniform
from distill.strategies.base import Strategy
from distill.strategies.conditional_adversarial import ConditionalAdversarial
from distill.strategies.consistency import ConsistencyDistillation
from distill.strategies.inputs import Inputs, NoisedData, PairedNoise
from distill.strategies.latent_adversarial import LatentAdversarial
from distill.strategies.perceptual_regression import PerceptualRegression
from distill.strategies.pixel_adversarial import PixelAdversarial
from distill.strategies.pretraining import DiffusionPretraining
from distill.strategies.score_distillation import ScoreDistillation

__all__ = [
    "ApproximateR1",
    "ConditionalAdversarial",
    "ConsistencyDistillation",
    "DiffusionPretraining",
    "Discrete",
    "Evenly",
    "ExactR1",
    "Hinge",
    "Inputs",
    "LatentAdversarial",
    "LogitNormal",
    "Logistic",
    "NoisedData",
    "PairedNoise",
    "PerceptualRegression",
    "PixelAdversarial",
    "ScoreDistillation",
    "Shifted",
    "Strategy",
    "Uniform",
]
