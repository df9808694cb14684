from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from distill.adversarial.augment import augment
from distill.adversarial.gan import ApproximateR1, ExactR1, Logistic
from distill.adversarial.vision import VisionTransformer
from distill.batch import Batch, Sample
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.pixel_adversarial import PixelAdversarial
from tests import tiny

B = 4


class Game:
    """A strategy at work on pictures of 16 x 16."""

    def __init__(self, vit: Path, image: bool = False, **settings):
        given = tiny.batch(B)
        self.decodes = 0
        pictures = given.draws.uniform("pictures", 3, 16, 16) * 2 - 1
        self.batch = Batch(given.x0, given.cond, given.prompts, given.draws, None, pictures, self.decode)
        self.strategy = PixelAdversarial(vision=str(vit), image=str(vit) if image else None, **settings)
        torch.manual_seed(3)
        self.strategy.configure(SimpleNamespace(pooled=tiny.POOLED), Frozen(torch.nn.Identity()))  # type: ignore[arg-type]
        self.answer = given.draws.normal("answer", tiny.CHANNELS, 4, 4).requires_grad_()
        self.sample = Sample(self.answer * 1.0, given.x0, torch.tensor([1.0, 0.75, 0.5, 1.0]), self.decode)

    def decode(self, latents: Tensor) -> Tensor:
        self.decodes += 1
        return torch.tanh(latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3))

    def settled(self) -> "Game":
        """The heads no longer move their estimate of the spectral norm, so that calls can be compared."""
        self.strategy.critic.eval()
        return self

    def reference_logits(self, pictures: Tensor, purpose: str, cond: Tensor | None) -> list[Tensor]:
        vit: VisionTransformer = self.strategy.vision.network
        changed = augment(pictures, self.batch.draws, f"{purpose}/augment") if self.strategy.changes else pictures
        return [h(f, cond) for h, f in zip(self.strategy.critic.heads, vit.tokens(changed), strict=True)]

    @property
    def text(self) -> Tensor:
        pooled = self.batch.cond["pooled"]
        return pooled / pooled.square().mean(1, keepdim=True).sqrt()


@pytest.mark.parametrize("augment", [None, []])
def test_student_and_critic_play_hinge_summed_over_heads(augment: list[str] | None, vit_folder: Path) -> None:
    game = Game(vit_folder, augment=augment, r1=ExactR1(0.0)).settled()
    real = game.reference_logits(game.batch.pixels, "pixel/critic", game.text)
    fake = game.reference_logits(game.sample.pixels, "pixel/critic", game.text)
    expected = sum(relu(1 - r).mean() + relu(1 + f).mean() for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(game.strategy.critic_loss(game.sample, game.batch, 0)["game"], expected)
    judged = game.reference_logits(game.sample.pixels, "pixel/student", game.text)
    expected = -sum(logits.mean() for logits in judged)
    torch.testing.assert_close(game.strategy.student_loss(game.sample, game.batch, 0), expected)


def test_pictures_of_a_bfloat16_decoder_are_enlarged(vit_folder: Path) -> None:
    """Antialiased enlarging has no bfloat16 on a CPU; the network reads float32, also where nothing is changed."""
    game = Game(vit_folder, augment=[])
    seen = []
    read = game.strategy.vision.network.tokens
    game.strategy.vision.network.tokens = lambda pictures: seen.append(pictures.dtype) or read(pictures)
    game.strategy.student_loss(SimpleNamespace(pixels=game.sample.pixels.bfloat16(), t=game.sample.t), game.batch, 0)
    assert seen == [torch.float32]


def test_r1_is_paid_at_the_heads_inputs(vit_folder: Path) -> None:
    game = Game(vit_folder, r1=ExactR1(0.5, every=2), augment=[]).settled()
    features = [f.detach().requires_grad_() for f in game.strategy.vision.network.tokens(game.batch.pixels)]
    penalty = torch.zeros(())
    for head, feature in zip(game.strategy.critic.heads, features, strict=True):
        (slope,) = torch.autograd.grad(head(feature, game.text).sum(), feature)
        penalty = penalty + slope.square().sum((1, 2)).mean()
    terms = game.strategy.critic_loss(game.sample, game.batch, 0)
    torch.testing.assert_close(terms["r1"], 0.5 * 2 * penalty)
    assert set(game.strategy.critic_loss(game.sample, game.batch, 1)) == {"game"}


def test_turns_leave_gradients_where_they_belong(vit_folder: Path) -> None:
    game = Game(vit_folder)
    game.sample.gather(game.sample.gradient(game.strategy.student_loss(game.sample, game.batch, 0)))
    assert all(p.grad is None for p in game.strategy.critic.parameters()), "the critic learnt in the student's turn"
    game.sample.backward()
    assert game.answer.grad is not None and game.answer.grad.any()
    game.answer.grad = None
    sum(game.strategy.critic_loss(game.sample, game.batch, 0).values()).backward()
    assert all(p.grad is not None for p in game.strategy.critic.parameters())
    assert game.answer.grad is None, "the student learnt in the critic's turn"
    assert game.decodes == 1, "both turns share one decoded sample"


@pytest.mark.parametrize(
    ("text", "image", "size"), [(False, False, 0), (True, False, 10), (False, True, 24), (True, True, 34)]
)
def test_condition_is_of_text_and_picture(text: bool, image: bool, size: int, vit_folder: Path) -> None:
    game = Game(vit_folder, image=image, text=text)
    condition = game.strategy._condition(game.batch, game.strategy._hidden(game.sample))
    if not size:
        assert condition is None
        return
    assert condition.shape == (B, size)
    if image:
        seen = condition[:, -24:].square().mean(1)
        torch.testing.assert_close(seen, torch.tensor([0.0, 1.0, 1.0, 0.0]))  # two began at pure noise


def test_picture_condition_from_noise_on_request(vit_folder: Path) -> None:
    game = Game(vit_folder, image=True, text=False, image_from_noise=True)
    condition = game.strategy._condition(game.batch, game.strategy._hidden(game.sample))
    torch.testing.assert_close(condition.square().mean(1), torch.ones(B))


def test_text_condition_of_another_tower(vit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tower(torch.nn.Module):
        width = 5

        def __init__(self, name: str):
            super().__init__()
            assert name == "ViT-g-14:somewhere"

        def forward(self, prompts: list[str]) -> Tensor:
            return torch.arange(1.0, 6.0).expand(len(prompts), 5)

    monkeypatch.setattr("distill.strategies.pixel_adversarial.ClipText", Tower)
    game = Game(vit_folder, text="ViT-g-14:somewhere")
    expected = torch.arange(1.0, 6.0) / torch.arange(1.0, 6.0).square().mean().sqrt()
    torch.testing.assert_close(
        game.strategy._condition(game.batch, game.strategy._hidden(game.sample)), expected.expand(B, 5)
    )
    assert game.strategy.critic.heads[0].project.in_features == 5


def test_latents_stand_for_real_pictures_once_decoded(vit_folder: Path) -> None:
    game = Game(vit_folder)
    game.batch = Batch(
        game.answer.detach(), game.batch.cond, game.batch.prompts, game.batch.draws, None, None, game.decode
    )
    assert torch.equal(game.batch.pixels, game.decode(game.answer.detach()))
    game.decodes = 0
    game.strategy.critic_loss(game.sample, game.batch, 0)
    assert game.decodes == 1, "the sample only: the real pictures were decoded before"


def test_what_cannot_work_is_refused(vit_folder: Path) -> None:
    with pytest.raises(ConfigError, match="give ExactR1, not ApproximateR1"):
        PixelAdversarial(r1=ApproximateR1())
    strategy = PixelAdversarial(vision=str(vit_folder), loss=Logistic())
    with pytest.raises(ConfigError, match="at least 2 samples per process, got 1"):
        strategy.check(1)
    PixelAdversarial(norm="group").check(1)


def test_unknown_changes_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="augment is some of colour, translation, cutout; got blur"):
        PixelAdversarial(augment=["translation", "blur"])


def test_a_pictures_condition_is_read_once_for_both_turns(vit_folder: Path) -> None:
    game, read = Game(vit_folder, image=True, text=False), []
    game.strategy.image.network.register_forward_hook(lambda *_: read.append(1))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    game.strategy.student_loss(game.sample, game.batch, 0)
    assert len(read) == 1
    game = Game(vit_folder, image=True, text=False)
    game.sample.t.fill_(1.0)
    game.strategy.image.network.register_forward_hook(lambda *_: read.append(1))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    assert len(read) == 1, "nobody sees it"
