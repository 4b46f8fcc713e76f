"""Samples on disk: PNG files, a grid, the ADM suite's ``.npz`` and latents; whole or not there, the same bytes every time."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


class Streamed(NamedTuple):
    """An array in pieces along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Iterable[np.ndarray]


EPOCH = (1980, 1, 1, 0, 0, 0)
GRID_IMAGES = 100


def to_pixels(images: Tensor) -> Pixels:
    """Images (B, C, H, W) in [-1, 1] as (B, H, W, 3) uint8: clamp(127.5·x + 128, 0, 255), truncated, as the published samples.

    One channel becomes grey. Raises ValueError for other than 1 or 3 channels, or values that are not finite.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: got {images.shape[1]} channels, allowed are 1 or 3; latents need a VAE to become images")
    if not torch.isfinite(images).all():
        raise ValueError("images: got values that are not finite; the model may be damaged or the scale too large")
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def write_png(path: Path, pixels: Pixels) -> None:
    """pixels: (H, W, 3)."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    write_bytes(path, content.getvalue())


def grid_of(pixels: Sequence[Pixels]) -> Pixels:
    """The first GRID_IMAGES images, row by row, as near to a square as can be; missing ones are black."""
    shown = pixels[:GRID_IMAGES]
    height, width, _ = shown[0].shape
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return canvas


def write_npz(path: Path, arrays: Mapping[str, Streamed]) -> None:
    """An ``.npz``; one piece is in memory at a time."""
    temporary = _temporary(path)
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A fixed date: the same samples are the same file.
            with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as file:
                _write_array(file, array)
    _replace(temporary, path)


def write_npy(path: Path, array: Streamed) -> None:
    """An ``.npy``, as ``write_npz``."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        _write_array(file, array)
    _replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    temporary = _temporary(path)
    temporary.write_bytes(content)
    _replace(temporary, path)


def _write_array(file: IO[bytes], array: Streamed) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    for piece in array.pieces:
        file.write(np.ascontiguousarray(piece, array.dtype).tobytes())


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed had begun to write into ``folder``."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # A name of this process's own: one that outlived its run may still write the same file, with the same bytes.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _replace(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
