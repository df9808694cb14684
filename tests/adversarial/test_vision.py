import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill.adversarial.vision import FLOOR, WHITENING, VisionTransformer, Whitening, fit, open_vit, save_whitening
from distill.errors import ConfigError
from tests import tiny

B = 3


@pytest.fixture
def vit(vit_folder: Path) -> VisionTransformer:
    return VisionTransformer(str(vit_folder)).eval()


@pytest.fixture
def pictures() -> Tensor:
    return tiny.draws(B).uniform("pictures", 3, 16, 16) * 2 - 1


def test_tokens_are_those_of_the_blocks_with_the_class_token_added(vit: VisionTransformer, pictures: Tensor) -> None:
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for module in (vit.network.norm_pre, *vit.network.blocks)
    ]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    vit.network((pictures + 1).div(2).sub(mean[:, None, None]).div(std[:, None, None]))
    for hook in hooks:
        hook.remove()
    answer = vit.tokens(pictures)
    assert len(answer) == vit.taps == 5
    for tokens, output in zip(answer, outputs, strict=True):
        torch.testing.assert_close(tokens, (output[:, 1:] + output[:, :1]).mT)


def test_class_token_is_the_networks_own(vit: VisionTransformer, pictures: Tensor) -> None:
    normalised = (pictures / 2 + 0.5 - vit.mean) / vit.std
    torch.testing.assert_close(vit(pictures), vit.network(normalised))


@pytest.mark.parametrize(("depth", "expected"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23])])
def test_blocks_are_evenly_spaced(depth: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    sizes = {"patch_size": 4, "img_size": 16, "embed_dim": 12, "num_heads": 3, "num_classes": 0}
    network = timm.create_model("vit_small_patch14_dinov2", depth=depth, dynamic_img_size=True, **sizes)
    monkeypatch.setattr("distill.adversarial.vision.open_vit", lambda name: network)
    assert VisionTransformer("any").blocks == expected


def test_only_asked_blocks_run(vit_folder: Path, pictures: Tensor) -> None:
    vit = VisionTransformer(str(vit_folder), blocks=[1])
    vit.network.blocks[2].register_forward_hook(lambda *_: pytest.fail("a block behind the last tap ran"))
    assert len(vit.tokens(pictures)) == 2


def test_other_sizes_interpolate_the_position_embeddings(vit_folder: Path, pictures: Tensor) -> None:
    vit = VisionTransformer(str(vit_folder), size=24)
    assert [tuple(tokens.shape) for tokens in vit.tokens(pictures)] == [(B, 24, 36)] * 5


def test_pictures_are_brought_to_size() -> None:
    large = tiny.draws(B).uniform("pictures", 3, 32, 48)
    torch.testing.assert_close(fit(large, 16), interpolate(large, (16, 16), mode="area"))
    assert fit(large, 40).shape == (B, 3, 40, 40)
    square = large[..., :32]
    assert fit(square, 32) is square


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_of_a_file_are_taken(kind: str, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    file = tmp_path / f"weights.{kind}"
    made = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    save_file(made.state_dict(), file) if kind == "safetensors" else torch.save(made.state_dict(), file)
    opened = open_vit(f"vit_tiny_patch16_224:{file}")
    assert torch.equal(opened.blocks[3].attn.qkv.weight, made.blocks[3].attn.qkv.weight)
    file.write_bytes(b"junk")
    for broken in (file, tmp_path / "nowhere.pth"):
        with pytest.raises(ConfigError, match=r"cannot be opened \(.*one with a file as ARCHITECTURE:FILE"):
            open_vit(f"vit_tiny_patch16_224:{broken}")


def test_what_is_no_vision_transformer_is_refused(tmp_path: Path, vit_folder: Path) -> None:
    with pytest.raises(ConfigError, match="'nonsense' cannot be opened"):
        VisionTransformer("nonsense")
    with pytest.raises(ConfigError, match="cannot be opened"):
        VisionTransformer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"has the blocks 0 to 3, .* got blocks=\[4\]"):
        VisionTransformer(str(vit_folder), blocks=[4])
    with pytest.raises(ConfigError, match=r"each to be read once; got blocks=\[1, 1\]"):
        VisionTransformer(str(vit_folder), blocks=[1, 1])
    with pytest.raises(ConfigError, match="patches of 4 pixels; size=18 does not divide"):
        VisionTransformer(str(vit_folder), size=18)


def test_whitened_tokens_are_uncorrelated_and_of_like_variance() -> None:
    """Variances far above the floor become 1 and stay where they were; one far below it is not blown up."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    scales = torch.tensor([100.0, 10.0, 1e3, 1e-3])
    tokens = (directions * scales) @ torch.randn(50, 4, 400, generator=generator) + torch.arange(4.0)[:, None]
    (white,) = Whitening.of([tokens])([tokens])
    flat = white.transpose(1, 2).flatten(0, 1)
    assert flat.mean(0).abs().max() < 1e-3
    mean_variance = (scales**2).mean()
    expected = scales**2 / (scales**2 + FLOOR * mean_variance)
    found = directions.T @ torch.cov(flat.T) @ directions
    torch.testing.assert_close(found.diagonal(), expected, atol=0.02, rtol=0.02)
    assert (found - found.diagonal().diag()).abs().max() < 0.02
    matrix = Whitening.of([tokens]).matrices[0]
    torch.testing.assert_close(matrix, matrix.T)


def test_whitened_tokens_are_not_rounded(pictures: Tensor) -> None:
    network = VisionTransformer("tiny-vit")
    exact = network.tokens(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        for tokens, expected in zip(network.tokens(pictures), exact, strict=True):
            assert tokens.dtype == torch.float32
            torch.testing.assert_close(tokens, expected)


def test_a_folder_with_a_whitening_is_read_with_it(vit_folder: Path, tmp_path: Path, pictures: Tensor) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(vit_folder, folder)
    raw = VisionTransformer(str(folder)).tokens(pictures)
    for _ in range(2):  # a second time it looks at the raw tokens again
        save_whitening(str(folder), pictures)
    whitened = VisionTransformer(str(folder)).tokens(pictures)
    for tokens, expected in zip(whitened, Whitening.of(raw)(raw), strict=True):
        torch.testing.assert_close(tokens, expected, atol=0.02, rtol=0.02)  # stored as float16
    (_, last) = VisionTransformer(str(folder), blocks=[3]).tokens(pictures)
    torch.testing.assert_close(last, whitened[-1])
    (folder / WHITENING).unlink()
    for tokens, expected in zip(VisionTransformer(str(folder)).tokens(pictures), raw, strict=True):
        assert torch.equal(tokens, expected)
