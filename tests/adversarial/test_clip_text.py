from pathlib import Path

import pytest
import torch

from distill.adversarial.clip_text import ClipText
from distill.errors import ConfigError

ARCHITECTURE = "RN50-quickgelu"


def test_it_answers_as_open_clips_text_tower(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE, pretrained=None)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    prompts = ["a red ring", "a large blue square"]
    tower = ClipText(f"{ARCHITECTURE}:{tmp_path / 'clip.pt'}").eval()
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer(ARCHITECTURE)(prompts))
        torch.testing.assert_close(tower(prompts), expected)
    assert tower.width == expected.shape[1]
    assert not any("visual" in name for name, _ in tower.named_parameters()), "the image tower is kept for nothing"


@pytest.mark.parametrize("name", ["ViT-nonsense:x", "ViT-B-32", "ViT-B-32:no_such_tag"])
def test_what_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ClipText(name)
