"""Training, encoding and evaluation see the same pixels in a file of each kind, and refuse the same files for the same reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditkernels.data import encode
from ditkernels.data.config import EncodeConfig
from ditkernels.data.folder import FolderBatches, ImageFolder, UnreadableImagesError
from ditkernels.data.formats import FORMAT_OF, lacking
from ditkernels.data.images import MAX_PIXELS
from ditkernels.evaluation.images import folder_batches
from tests.data.test_images import noise, saved, tiff, with_orientation

EDGE = 16
GREYS = (np.arange(EDGE * EDGE, dtype=np.uint16) * 257).reshape(EDGE, EDGE)


def write(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def animated(path: Path) -> Path:
    frames = [Image.new("RGB", (EDGE, EDGE), colour) for colour in ("red", "blue")]
    return write(path, frames[0], save_all=True, append_images=frames[1:])


# By row of the table in docs/data.md: what makes such a file in a folder.
READ: dict[str, Callable[[Path], Path]] = {
    **{
        f"8 bits: {suffix}": lambda at, suffix=suffix: saved(at / f"x.{suffix}", (EDGE, EDGE))
        for suffix in ("png", "jpg", "jfif", "webp", "avif", "jp2", "tif", "bmp", "gif", "ppm", "pgm", "pbm", "tga")
    },
    "palette": lambda at: write(at / "x.png", Image.fromarray(noise(EDGE, EDGE)).quantize(32)),
    "16 bits of grey, PNG": lambda at: write(at / "x.png", Image.fromarray(GREYS)),
    "16 bits of grey, TIFF": lambda at: tiff(at / "x.tif", GREYS, 16),
    "white is zero": lambda at: tiff(at / "x.tif", GREYS, 16, photometric=0),
    "32 bits of TIFF": lambda at: tiff(at / "x.tif", GREYS.astype(np.uint32) << 16, 32),
    "floats": lambda at: write(at / "x.tif", Image.fromarray(GREYS.astype(np.float32) / 65535)),
    "transparent pixels": lambda at: write(at / "x.png", Image.fromarray(noise(EDGE, EDGE, 4))),
    "a transparent colour": lambda at: write(at / "x.png", Image.fromarray(noise(EDGE, EDGE)[..., 0]), transparency=7),
    "orientation": lambda at: with_orientation(at / "x.png", 6, noise(EDGE, EDGE)),
    "an animation": lambda at: animated(at / "x.gif"),
}
REFUSED: dict[str, Callable[[Path], Path]] = {
    "floats out of range": lambda at: write(at / "x.tif", Image.fromarray(GREYS.astype(np.float32))),
    "floats that are none": lambda at: write(at / "x.tif", Image.fromarray(np.full((EDGE, EDGE), np.nan, np.float32))),
    "a truncated file": lambda at: cut(saved(at / "x.png", (EDGE, EDGE))),
    "no image": lambda at: text(at / "x.png"),
}


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


def text(path: Path) -> Path:
    path.write_text("no image", encoding="utf-8")
    return path


def folder_with(make: Callable[[Path], Path], root: Path) -> Path:
    (root / "a").mkdir()
    path = make(root / "a")
    if FORMAT_OF[path.suffix] in lacking():
        pytest.skip(f"this Pillow lacks {path.suffix}")
    return root


def trained_on(root: Path) -> Tensor:
    batches = FolderBatches(ImageFolder.scan(root), 1, 0, image_size=EDGE, flip=False, max_unreadable=0)
    return batches[0].images


def encoded(root: Path) -> Tensor:
    config = EncodeConfig(data_path=str(root), out="unused", image_size=EDGE, max_unreadable=0, batch_size=1, shard_size=1)
    return encode.Batches(ImageFolder.scan(root), config)[0].images


def evaluated(root: Path) -> Tensor:
    return next(folder_batches(ImageFolder.scan(root, unconditional=True), 1, MAX_PIXELS, []))


@pytest.mark.parametrize("kind", READ)
def test_all_three_see_the_same_pixels(kind: str, tmp_path: Path) -> None:
    root = folder_with(READ[kind], tmp_path)
    expected = trained_on(root)
    assert expected.shape == (1, 3, EDGE, EDGE)
    assert expected.unique().numel() > 1 or kind == "an animation"
    assert torch.equal(encoded(root), expected)
    assert torch.equal(evaluated(root), expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_all_three_refuse_for_the_same_reason(kind: str, tmp_path: Path) -> None:
    root = folder_with(REFUSED[kind], tmp_path)
    reasons = []
    for read in (trained_on, encoded, evaluated):
        with pytest.raises((UnreadableImagesError, ValueError)) as error:
            read(root)
        reasons.append(str(error.value))
    # What each says around it is its own.
    (reason,) = {said.rpartition("x.")[2].partition(": ")[2] for said in reasons[:2]}
    assert reason
    assert reasons[2].endswith(f"is not a readable image: {reason}")
