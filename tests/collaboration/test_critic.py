"""A trained critic as a judge: opened from a checkpoint alone, one sample's score its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import backbones
from distill.cli import main
from distill.collaboration.critic import CriticJudge
from distill.collaboration.judges import open_judge
from distill.errors import ConfigError
from distill.export import read_checkpoint
from distill.frozen import Frozen
from distill.strategies.pixel_adversarial import PixelAdversarial
from tests.collaboration.test_judges import drawn
from tests.runs import fit_arguments

R1 = "{class_path: ExactR1, init_args: {weight: 0.1}}"
PIXEL = "{class_path: PixelAdversarial, init_args: {vision: tiny-vit, image: null, norm: group}}"
LATENT = f"{{class_path: LatentAdversarial, init_args: {{norm: group, hidden: 32, r1: {R1}}}}}"
TOGETHER = "{class_path: LatentAdversarial, init_args: {norm: local_batch, hidden: 32}}"
DISTANCE = "{class_path: ScoreDistillation, init_args: {}}"


def test_a_critic_that_sees_the_real_picture_is_no_judge() -> None:
    strategy = PixelAdversarial(vision="tiny-vit", image="tiny-vit", image_from_noise=True, norm="group")
    with pytest.raises(ConfigError, match="was trained to see each prompt's real picture, which a judge does not have"):
        strategy.check_judging()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints by the strategies they were trained with, two updates each."""
    made: dict[str, Path] = {}

    def checkpoint(strategies: str) -> Path:
        if strategies not in made:
            folder = tmp_path_factory.mktemp("run")
            given = {"data__batch_size": 4, "model__strategies": strategies, "checkpoint__dirpath": folder}
            main(fit_arguments("tiny_add.yaml", Path("tiny-sd"), None, folder, **given, data__workers=None))
            made[strategies] = folder / "last.ckpt"
        return made[strategies]

    return checkpoint


@pytest.mark.parametrize("strategies", [f"[{DISTANCE}, {PIXEL}]", f"[{LATENT}]"], ids=["pixel", "latent"])
def test_scores_are_of_each_image_alone(strategies: str, trained) -> None:
    prompts, images = drawn(6)
    judge = open_judge(f"critic:{trained(strategies)}")
    scores = judge(prompts, images)
    assert scores.shape == (6,) and scores.dtype == torch.float32 and scores.std() > 0
    order = [4, 1]
    some = judge([prompts[index] for index in order], images[order])
    torch.testing.assert_close(some, scores[order], atol=1e-5, rtol=1e-4)
    other = judge([*prompts[1:], prompts[0]], images)
    assert not torch.allclose(other, scores, atol=1e-6), "it reads the prompt"


def test_score_of_pixels_is_the_mean_of_the_trained_heads(trained) -> None:
    checkpoint = trained(f"[{DISTANCE}, {PIXEL}]")
    prompts, images = drawn(3)
    judge = CriticJudge(f"critic:{checkpoint}")
    critic, weights = judge.strategy.critic, read_checkpoint(checkpoint)[1]
    stored = {name: value for name, value in weights.items() if name.startswith("strategies.1.critic.")}
    assert len(stored) == len(critic.state_dict()) > 0
    for name, value in critic.state_dict().items():
        torch.testing.assert_close(value, stored[f"strategies.1.critic.{name}"])
    with torch.no_grad():
        pooled = judge.text_encoder(prompts)["pooled"]
        condition = pooled / pooled.square().mean(1, keepdim=True).sqrt()
        tokens = judge.strategy.vision.network.tokens(images * 2 - 1)
        heads = [head(feature, condition).mean(1) for head, feature in zip(critic.heads, tokens, strict=True)]
    torch.testing.assert_close(judge(prompts, images), sum(heads) / len(heads), atol=1e-5, rtol=1e-4)


def test_score_of_latents_is_the_mean_over_levels_of_the_trained_heads(trained, tmp_path: Path) -> None:
    """At the teacher's own noise schedule, whatever the student's was."""
    state = torch.load(trained(f"[{LATENT}]"), weights_only=True)
    state["distill"]["schedule"] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    torch.save(state, tmp_path / "scheduled.ckpt")
    prompts, images = drawn(3)
    judge = CriticJudge(f"critic:{tmp_path / 'scheduled.ckpt'}")
    strategy, process = judge.strategy, backbones.load("tiny-sd").process()
    batch, scores = judge._batch(prompts, images * 2 - 1), []
    with torch.no_grad():
        for look in range(4):
            t = strategy.levels.draw(batch.draws, f"ladd/score/{look}/t")
            assert len(t.unique()) == 1, "the same level for all"
            alpha, sigma = (part[:, None, None, None] for part in process.alpha_sigma(t))
            noise = batch.draws.normal(f"ladd/score/{look}/noise", *batch.x0.shape[1:])
            features = strategy.taps(alpha * batch.x0 + sigma * noise, t, batch.cond)
            scores += [head.mean((1, 2)) for head in strategy.critic(features, t, batch.cond["pooled"])]
    torch.testing.assert_close(judge(prompts, images), sum(scores) / len(scores), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategies", [f"[{DISTANCE}, {PIXEL}]", f"[{LATENT}]"], ids=["pixel", "latent"])
def test_all_of_a_judge_goes_to_its_device(strategies: str, trained) -> None:
    judge = CriticJudge(f"critic:{trained(strategies)}", device="meta")
    networks = [judge.strategy, judge.teacher.network, judge.text_encoder.network, judge.autoencoder.network]
    networks += [part.network for part in judge.strategy.modules() if isinstance(part, Frozen)]
    assert {p.device.type for network in networks for p in network.parameters()} == {"meta"}
    if hasattr(judge.strategy, "taps"):
        assert judge.strategy.taps.denoiser is judge.teacher.network


def test_a_judge_can_be_moved(trained) -> None:
    judge = CriticJudge(f"critic:{trained(f'[{LATENT}]')}")
    assert judge.to("meta") is judge and judge.device.type == "meta"
    networks = [judge.strategy, judge.teacher.network, judge.text_encoder.network, judge.autoencoder.network]
    assert {p.device.type for network in networks for p in network.parameters()} == {"meta"}
    assert str(trained(f"[{LATENT}]")) in judge.about


def test_a_checkpoint_that_changed_is_another_judge(trained, tmp_path: Path) -> None:
    state = torch.load(trained(f"[{LATENT}]"), weights_only=True)
    torch.save(state, tmp_path / "a.ckpt")
    spec = open_judge(f"critic:{tmp_path / 'a.ckpt'}").spec
    assert open_judge(spec).spec == spec
    name = next(name for name in state["state_dict"] if name.startswith("strategies.0.critic"))
    state["state_dict"][name] += 1
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="is another by now: its checkpoint's critics are"):
        open_judge(spec)


def test_strategies_that_no_recipe_made_are_given(trained, tmp_path: Path) -> None:
    state = torch.load(trained(f"[{DISTANCE}, {PIXEL}]"), weights_only=True)
    del state["distill"]["strategy_configs"]
    torch.save(state, tmp_path / "by_hand.ckpt")
    with pytest.raises(ConfigError, match="does not say how its strategies were made"):
        CriticJudge(f"critic:{tmp_path / 'by_hand.ckpt'}")
    strategies = [PixelAdversarial(vision="tiny-vit", image=None, norm="group")]
    state["state_dict"] = {name.replace("strategies.1.", "strategies.0."): v for name, v in state["state_dict"].items()}
    torch.save(state, tmp_path / "by_hand.ckpt")
    prompts, images = drawn(2)
    by_hand = CriticJudge(f"critic:{tmp_path / 'by_hand.ckpt'}", strategies=list(strategies))(prompts, images)
    from_recipe = open_judge(f"critic:{trained(f'[{DISTANCE}, {PIXEL}]')}")(prompts, images)
    torch.testing.assert_close(by_hand, from_recipe)


def test_critics_that_cannot_judge_get_a_sentence(trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was trained with norm=local_batch: a score would depend on the other"):
        open_judge(f"critic:{trained(f'[{TOGETHER}]')}")
    with pytest.raises(ConfigError, match="can judge: ScoreDistillation has no critic of a picture and its prompt al"):
        open_judge(f"critic:{trained(f'[{DISTANCE}]')}")
    with pytest.raises(ConfigError, match="the judge 'critic' names no checkpoint; write it as critic:CHECKPOINT"):
        open_judge("critic")
    with pytest.raises(ConfigError, match="there is no checkpoint at"):
        open_judge(f"critic:{tmp_path}/nothing.ckpt")
