"""Captioned real images, in anything Hugging Face `datasets` reads, as a Lightning data module."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from distill import backbones
from distill.backbones.base import Backbone
from distill.data import loading
from distill.data.generate import Made, Maker, make_here
from distill.data.shards import MANIFEST, LatentsDataset, read_manifest
from distill.errors import ConfigError, at_least_one, check_seeds, none_or_more

CAPTIONS = ("caption", "text", "txt", "prompt")  # columns that hold captions, unless one is named
FILES = {".parquet": "parquet", ".tar": "webdataset"}
WHITE_OF_16_BITS = 65535
IN_A_ROW = 100  # images that cannot be read before it is not them
STORAGE = {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}  # errors that are of no single image


class ImagesDataset:
    """Images with their captions, resized and cropped to one size.

    An image that cannot be read, or has no caption, is replaced by the next one that can, and named in the batch; a
    hundred in a row, or a storage that fails, end the run. Of a row with several captions the first is taken.

    Args:
        source: a folder (images with a metadata.jsonl or metadata.csv, parquet files, or webdataset archives), one
            such file, or the id of a data set on the hub.
        height, width: in pixels.
        split: of the data set.
        caption: the column of the captions; the first of `CAPTIONS` that is there if not given.
        count: how many, the first ones; all if not given.

    Raises:
        ConfigError: nothing there, or no images, or no captions, or captions that are no text.
    """

    def __init__(
        self,
        source: str,
        height: int,
        width: int,
        split: str = "train",
        caption: str | None = None,
        count: int | None = None,
    ):
        from datasets import Image

        rows = _read(source, split)
        images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
        images = images or [name for name, kind in rows.features.items() if _holds_bytes(kind)]
        captions = [name for name in ((caption,) if caption else CAPTIONS) if name in rows.features]
        if not images or not captions or not len(rows):
            raise ConfigError(
                f"'{source}' ({split}) has {len(rows)} rows with the columns {', '.join(rows.features)}; captioned "
                f"images need a column of images and one of captions, called {caption or ' or '.join(CAPTIONS)} "
                "(data.caption names another)"
            )
        if not _holds_text(rows.features[captions[0]]):
            raise ConfigError(
                f"the column {captions[0]} of '{source}' ({split}) holds {rows.features[captions[0]]} and no text; "
                "name that of the captions with data.caption"
            )
        self.source, self.split, self.height, self.width = source, split, height, width
        self.image, self.caption = images[0], captions[0]
        if count is not None and len(rows) < count:
            raise ConfigError(
                f"'{source}' ({split}) holds {len(rows)} images, and {count} are asked; set data.reference to "
                f"{len(rows)} or less"
            )
        rows = rows if count is None else rows.select(range(count))
        self.rows = rows.select_columns([self.image, self.caption]).cast_column(self.image, Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """`{"pixels": [B, 3, H, W] in [-1, 1], "prompts": B captions, "unread": images that were skipped, and why}`."""
        unread: list[str] = []
        found = [self._readable(index, unread) for index in indices]
        pixels = torch.stack([picture for picture, _ in found])
        return {"pixels": pixels, "prompts": [caption for _, caption in found], "unread": unread}

    def captions_digest(self, count: int) -> str:
        """A digest of the first `count` captions, in their order."""
        said = hashlib.sha256()
        for part in self.rows.select_columns([self.caption]).select(range(count)).iter(batch_size=1000):
            said.update(repr(part[self.caption]).encode())
        return said.hexdigest()[:12]

    def sizes_digest(self, count: int) -> str:
        """A digest of the lengths of the first `count` pictures' files, in their order; of those that lie in archives
        and tables, which would have to be read whole, nothing.
        """
        said, pictures = hashlib.sha256(), self.rows.select_columns([self.image]).select(range(count))
        if any((image or {}).get("bytes") for image in pictures[:1][self.image]):
            return "in archives or tables"
        for part in pictures.iter(batch_size=1000):
            for image in part[self.image]:
                file = Path((image or {}).get("path") or "")
                said.update(f"{file.stat().st_size if file.is_file() else None},".encode())
        return said.hexdigest()[:12]

    def _readable(self, index: int, unread: list[str]) -> tuple[Tensor, str]:
        for offset in range(min(len(self), IN_A_ROW)):
            row = self.rows[(index + offset) % len(self)]
            try:
                caption = _one(row[self.caption])
                return resize_and_crop(_decode(row[self.image]), self.height, self.width) * 2 - 1, caption
            except Exception as error:  # decoders have many kinds, and one row must not end a run of weeks
                name = (row[self.image] or {}).get("path") or f"row {(index + offset) % len(self)}"
                if getattr(error, "errno", None) in STORAGE:
                    raise ConfigError(
                        f"the storage of '{self.source}' failed at {name} ({error}); when it is back run the same "
                        "again, a training with --ckpt_path last"
                    ) from error
                last = error
                unread.append(f"{name} ({' '.join(str(error).split()) or type(error).__name__})")
        some = f"the {len(self)} images" if len(self) <= IN_A_ROW else f"{IN_A_ROW} images in a row"
        raise ConfigError(f"none of {some} of '{self.source}' can be read with a caption; the last: {last}") from last


class EncodedImages(Maker):
    """Images through a pipeline's autoencoder, once.

    Args:
        backbone: whose autoencoder.
        folder: where the shards go.
        images: what is encoded.
    """

    def __init__(self, backbone: Backbone, folder: str | Path, images: ImagesDataset):
        backbone.check_size(images.height, images.width)
        settings = {
            "kind": "images",
            "source": images.source,
            "split": images.split,
            "captions": images.captions_digest(len(images)),
            "pictures": images.sizes_digest(len(images)),
            "count": len(images),
            "height": images.height,
            "width": images.width,
            "autoencoder": backbone.autoencoder_fingerprint,
        }
        super().__init__(folder, settings, len(images), shard_size=512, batch_size=16)
        self.images, self.autoencoder = images, backbone.autoencoder().eval()
        self.unread: set[str] = set()

    def asked(self, count: int) -> dict[str, Any]:
        of_first = {"captions": self.images.captions_digest(count), "pictures": self.images.sizes_digest(count)}
        return self.settings | of_first

    def _alike(self, name: str, old: Any, asked: Any) -> bool:
        """Folders of earlier versions do not tell their pictures."""
        return (name == "pictures" and old is None) or super()._alike(name, old, asked)

    def make(self, indices: list[int], device: torch.device) -> Made:
        batch = self.images.__getitems__(indices)
        if new := [name for name in batch["unread"] if name not in self.unread]:
            self.unread.update(new)
            warnings.warn(f"{told(len(self.unread), new)}; the next ones stand in for them", stacklevel=2)
        with torch.no_grad():
            return {"x0": self.autoencoder.to(device).encode(batch["pixels"].to(device))}, batch["prompts"]


class ImagesData(loading.Compared, loading.SharedFolders):
    """Captioned real images for training, encoded on the fly or once.

    Args:
        source, height, width, split, caption: as in `ImagesDataset`.
        batch_size: samples of one batch over all processes.
        seed: of their order.
        workers: loader processes.
        encoded: a folder for the images' latents, made before training if it is not there; methods that need the
            pictures decode them. None encodes every batch anew.
        teacher: the pipeline whose autoencoder encodes them; needed with `encoded`.
        reference: how many images of `reference_split` `validate` and `test` compare with; 0 for none.
        reference_split: of the data set.

    Raises:
        ConfigError: a source that cannot be read, or `encoded` without `teacher`.
    """

    def __init__(
        self,
        source: str,
        height: int = 512,
        width: int = 512,
        split: str = "train",
        caption: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
        workers: int = 4,
        encoded: str | None = None,
        teacher: str | None = None,
        reference: int = 0,
        reference_split: str = "validation",
    ):
        super().__init__()
        if encoded and not teacher:
            raise ConfigError("data.encoded needs data.teacher, the pipeline whose autoencoder encodes the images")
        at_least_one(height=height, width=width)
        check_seeds(**{"data.seed": seed})
        none_or_more(**{"data.workers": workers, "data.reference": reference})
        self.source, self.size, self.split, self.caption = source, (height, width), split, caption
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.encoded, self.teacher = encoded, teacher
        self.references, self.reference_split = reference, reference_split
        self.unread: set[str] = set()

    @property
    def description(self) -> str:
        """What the data is, for a student's model card."""
        return f"images of {self.source}, {self.size[0]} x {self.size[1]}"

    def prepare_data(self) -> None:
        if self.references:
            self._compared()  # a source that cannot be read stops here, before anything is loaded
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self.check_batch_size()
        images = self._images()
        if self.encoded:
            maker = EncodedImages(backbones.load(str(self.teacher)), self.encoded, images)
            whole = (maker.folder / MANIFEST).is_file() and read_manifest(maker.folder)["complete"]
            if self.trainer is not None and self.trainer.world_size > 1 and not whole:
                warnings.warn(
                    f"one process encodes while the others wait; all share it in: {self._command()}", stacklevel=2
                )
            make_here(maker, "encoding images")

    def setup(self, stage: str) -> None:
        self.reference = self._compared() if self.references else []  # type: ignore[assignment]
        if stage == "fit":
            self.dataset = LatentsDataset(self.encoded) if self.encoded else self._images()

    def train_dataloader(self) -> StatefulDataLoader:
        return loading.loader(self.dataset, self.batch_size, self.seed, self.trainer, self.workers)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Counts and reports the images that could not be read."""
        if new := [name for name in batch.pop("unread", []) if name not in self.unread]:
            self.unread.update(new)
            warnings.warn(told(len(self.unread), new), stacklevel=2)  # of every process: each reads images of its own
        return batch

    def _command(self) -> str:
        height, width = self.size
        settings = {"teacher": self.teacher, "source": self.source, "output": self.encoded, "height": height,
                    "width": width, "split": self.split, "caption": self.caption}  # fmt: skip
        options = [part for name, value in settings.items() if value for part in (f"--{name}", str(value))]
        return shlex.join(["distill", "generate", "encoded", *options])

    def _compared(self) -> ImagesDataset:
        return ImagesDataset(self.source, *self.size, self.reference_split, self.caption, self.references)

    def _images(self) -> ImagesDataset:
        return ImagesDataset(self.source, *self.size, self.split, self.caption)


def told(count: int, names: list[str]) -> str:
    """That `count` images could not be read so far, the last ones with these names."""
    return f"{count} images could not be read so far and were skipped, the last is {names[-1]}"


def resize_and_crop(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture `[3, H, W]` in [0, 1], resized until it covers the size and cropped to its centre.

    Of a thin one most is cut off before: a line of a pixel resized as a whole would take gigabytes.
    """
    from torchvision.transforms.v2 import functional as F

    factor = max(height / picture.shape[1], width / picture.shape[2])
    needed = [2 * math.ceil(side / factor) for side in (height, width)]  # twice, so that few pictures are cut
    picture = F.center_crop(picture, [min(pair) for pair in zip(needed, picture.shape[1:], strict=True)])
    sides = [max(side, round(old * factor)) for side, old in zip((height, width), picture.shape[1:], strict=True)]
    return F.center_crop(F.resize(picture, sides, antialias=True), [height, width]).clamp(0, 1)


def _read(source: str, split: str) -> Any:
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file() and path.suffix in FILES:
            return load_dataset(FILES[path.suffix], data_files={split: source}, split=split)
        return load_dataset(source, split=split)
    except Exception as error:  # datasets raises a dozen kinds of its own
        reason = str(error).splitlines()[0]
        here = "" if path.exists() else f"there is no '{source}' here, and "
        raise ConfigError(
            f"{here}the images '{source}' ({split}) cannot be read ({reason}); give a folder of images with a "
            "metadata.jsonl, a parquet file, a webdataset archive, or a data set on the hub"
        ) from error


def _holds_text(kind: Any) -> bool:
    from datasets import List, Value

    kind = kind.feature if isinstance(kind, List) else kind
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _holds_bytes(kind: Any) -> bool:
    """Whether a column is one of pictures' files, as tables that `datasets` did not write have them."""
    from datasets import Value

    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")


def _one(caption: Any) -> str:
    """The caption of a row, or the first of several."""
    first = caption[0] if isinstance(caption, list) else caption
    if not isinstance(first, str):
        raise ValueError(f"a caption is text; here is {first!r}")
    return first


def decode(picture: io.BytesIO | str | Path) -> Tensor:
    """The picture of a file as it is meant to be seen, `[3, H, W]` in [0, 1]: turned as the camera says beside it, on
    white where it is transparent, and of 16 bits as of 8.

    Raises:
        Exception: one of the many kinds that decoders have; a picture of numbers without a known range.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional as F

    with Image.open(picture) as opened:
        turned = ImageOps.exif_transpose(opened)
    if turned.mode.startswith(("I", "F")):
        values = torch.from_numpy(np.asarray(turned, dtype=np.float32))
        if turned.mode == "F" or values.min() < 0 or values.max() > WHITE_OF_16_BITS:
            raise ValueError(f"a picture in mode {turned.mode} does not say which number is white")
        return (values / WHITE_OF_16_BITS).expand(3, -1, -1)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    return F.pil_to_tensor(turned.convert("RGB")).float() / 255


def _decode(image: dict[str, Any]) -> Tensor:
    return decode(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
