"""Where images and features come from: an ``.npz`` of the ADM suite, a folder, or arrays; read piece by piece."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditkernels.data.folder import ImageFolder
from ditkernels.data.formats import UnreadableImageError
from ditkernels.data.images import read_whole
from ditkernels.files import printable

IMAGES = "arr_0"


class Header(NamedTuple):
    """Shape, dtype and order of an array inside an ``.npz``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def headers(path: Path) -> dict[str, Header]:
    """What an ``.npz`` holds, without reading it. Raises ValueError, naming the file, where it is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _header(archive, name) for name in names}
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is not an .npz file: {error}") from error


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(name) as file:
        return _read_header(file)


def _read_header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return Header(shape, dtype, fortran)


def check_images(path: Path, header: Header) -> None:
    """Raises ValueError unless the array is (N, H, W, 3) uint8, as the ADM suite wants it."""
    shape = header.shape
    if header.dtype != np.uint8:
        raise ValueError(f"{path}: {IMAGES}: got dtype {header.dtype}, allowed is uint8")
    if len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{path}: {IMAGES}: got shape {shape}, allowed is (N, H, W, 3)")


def npz_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    """The images of an ``.npz``, (B, 3, H, W) uint8, holding one batch at a time; all of them where they lie in Fortran's order."""
    if headers(path)[IMAGES].fortran:
        with np.load(path) as arrays:
            images = torch.from_numpy(np.ascontiguousarray(arrays[IMAGES].transpose(0, 3, 1, 2)))
        yield from images.split(batch_size)
        return
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
        count, height, width, channels = _read_header(file).shape
        size = height * width * channels
        for start in range(0, count, batch_size):
            length = min(batch_size, count - start)
            content = file.read(length * size)
            if len(content) < length * size:
                raise ValueError(f"{path}: {IMAGES} ends early")
            pixels = np.frombuffer(content, np.uint8).reshape(length, height, width, channels)
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def folder_batches(folder: ImageFolder, batch_size: int, max_pixels: int, notes: list[str]) -> Iterator[Tensor]:
    """The images of a folder in the order of their paths, (B, 3, H, W) uint8, read as training reads them but for the crop.

    Args:
        folder: scanned as unconditional.
        batch_size: images at once.
        max_pixels: of an image that is decoded.
        notes: what was passed over is added here.

    Raises:
        ValueError: they differ in size, or one is unreadable; it is named.
        OSError, MemoryError: as :func:`read_whole`.
    """
    animated = 0
    size: tuple[int, ...] | None = None
    for start in range(0, len(folder), batch_size):
        batch = []
        for file in folder.files[start : start + batch_size]:
            pixels, more = _read(folder.root / file, max_pixels)
            size = size or pixels.shape
            if pixels.shape != size:
                raise ValueError(
                    f"{printable(str(folder.root / file))}: got {pixels.shape[1]} x {pixels.shape[0]}, "
                    f"the images before it are {size[1]} x {size[0]}"
                )
            batch.append(pixels)
            animated += more
        yield torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2).copy())
    if animated:
        notes.append(f"{printable(str(folder.root))}: of {animated} animated images the first frames were taken")


def _read(file: Path, max_pixels: int) -> tuple[np.ndarray, bool]:
    try:
        return read_whole(file, max_pixels)
    except UnreadableImageError as error:
        raise ValueError(f"{printable(str(file))} is not a readable image: {error}") from error
