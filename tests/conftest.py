import json
from pathlib import Path

import pytest
import torch

from distill.backbones.sd import SDDenoiser
from distill.backbones.sd3 import SD3Denoiser
from tests import pipelines, tiny


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever ran before, in whatever order the tests are dealt out."""
    torch.manual_seed(0)


@pytest.fixture
def sd3() -> SD3Denoiser:
    return tiny.sd3_denoiser()


@pytest.fixture
def sd() -> SDDenoiser:
    return tiny.sd_denoiser()


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SD3 pipeline on disk: 2 blocks, 16 latent channels."""
    return pipelines.random_sd3(tmp_path_factory.mktemp("pipelines") / "sd3")


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SD 1.5 pipeline on disk."""
    return pipelines.random_sd(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SDXL pipeline on disk."""
    return pipelines.random_sdxl(tmp_path_factory.mktemp("pipelines") / "sdxl")


@pytest.fixture(scope="session")
def sd3_latents(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 latents the small SD3 made."""
    from distill import backbones
    from distill.data.generate import Generation, TeacherLatents, make_here

    folder = tmp_path_factory.mktemp("latents") / "sd3"
    generation = Generation(count=64, steps=2, guidance=3.0, shard_size=32, batch_size=32)
    make_here(TeacherLatents(backbones.load(str(sd3_folder)), folder, generation), "latents")
    return folder


def _pairs(teacher: Path, folder: Path) -> Path:
    from distill import backbones
    from distill.data.generate import PairGeneration, TeacherPairs, make_here

    generation = PairGeneration(count=64, steps=2, shard_size=32, batch_size=32)
    make_here(TeacherPairs(backbones.load(str(teacher)), folder, generation), "pairs")
    return folder


@pytest.fixture(scope="session")
def sd_pairs(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 ODE pairs of the small SD 1.5."""
    return _pairs(sd_folder, tmp_path_factory.mktemp("pairs") / "sd")


@pytest.fixture(scope="session")
def sdxl_pairs(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 ODE pairs of the small SDXL."""
    return _pairs(sdxl_folder, tmp_path_factory.mktemp("pairs") / "sdxl")


@pytest.fixture(scope="session")
def sd3_pairs(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 ODE pairs of the small SD3."""
    return _pairs(sd3_folder, tmp_path_factory.mktemp("pairs") / "sd3")


@pytest.fixture(scope="session")
def latent_lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LatentLPIPS for latents of 4 channels, as a weight file."""
    from distill.perceptual.latent_lpips import LatentLPIPS

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("networks") / "latent_lpips.pth"
    torch.save(LatentLPIPS(width=4).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random vision transformer on disk."""
    return pipelines.random_vit(tmp_path_factory.mktemp("networks") / "vit")


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Inception network with random weights, as a file in torch-fidelity's layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as unread:
        unread.setattr("torch.load", lambda *_, **__: {})
        unread.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="nothing")
    path = tmp_path_factory.mktemp("networks") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen captioned pictures of noise."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for index in range(16):
        noise = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
