"""Samples on disk: PNG files, a grid, the ADM suite's ``.npz`` and latents; whole or not there, the same bytes every time."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditkernels.files import replacing, write_bytes

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
    return pixels_of(images)


def pixels_of(images: Tensor) -> Pixels:
    """As :func:`to_pixels`, whatever the values: where they are not finite, the pixel is not defined."""
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def png_of(pixels: Pixels) -> bytes:
    """The content of a PNG of pixels (H, W, 3). Raises ImportError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"pictures of samples need Pillow ({error}): pip install ditkernels[vae]") from error
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def write_png(path: Path, pixels: Pixels) -> None:
    """Writes :func:`png_of` pixels."""
    write_bytes(path, png_of(pixels))


def grid_of(pixels: Sequence[Pixels] | Pixels) -> Pixels:
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
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A fixed date: the same samples are the same file.
            with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as file:
                _write_array(file, array)


def write_npy(path: Path, array: Streamed) -> None:
    """An ``.npy``, as ``write_npz``."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write_array(file, array)


def _write_array(file: IO[bytes], array: Streamed) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    for piece in array.pieces:
        file.write(np.ascontiguousarray(piece, array.dtype).tobytes())
