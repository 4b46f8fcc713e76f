"""Where images and features come from: an ``.npz`` of the ADM suite, a folder, or arrays; read piece by piece."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGES = "arr_0"


class Header(NamedTuple):
    """Shape and dtype of an array inside an ``.npz``, and whether its first axis runs fastest."""

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
    if header.fortran:
        raise ValueError(f"{path}: {IMAGES}: an array in Fortran order cannot be streamed")


def npz_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    """The images of an ``.npz``, (B, 3, H, W) uint8, holding one batch at a time."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
        count, height, width, channels = _read_header(file).shape
        size = height * width * channels
        for start in range(0, count, batch_size):
            length = min(batch_size, count - start)
            content = file.read(length * size)
            if len(content) < length * size:
                raise ValueError(f"{path}: {IMAGES} ends early")
            images = np.frombuffer(content, np.uint8).reshape(length, height, width, channels)
            yield torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def folder_files(path: Path) -> list[Path]:
    """The PNG and JPEG files of a folder in the order of their names. Raises ValueError where there are none."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path}: got no images, allowed is a folder of {', '.join(SUFFIXES)} files")
    return files


def folder_batches(files: list[Path], batch_size: int) -> Iterator[Tensor]:
    """The images, (B, 3, H, W) uint8. Raises ValueError where they differ in size."""
    from PIL import Image

    size: tuple[int, int] | None = None
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            with Image.open(file) as image:
                size = size or image.size
                if image.size != size:
                    raise ValueError(
                        f"{file}: got {image.size[0]} x {image.size[1]}, the images before it are {size[0]} x {size[1]}"
                    )
                batch.append(np.array(image.convert("RGB")))
        yield torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2).copy())


def described_by(path: Path) -> dict[str, Any] | None:
    """What `ditkernels sample` wrote beside the samples: the content of ``metadata.json``, or None.

    Raises ValueError where there is one that cannot be read.
    """
    beside = path.parent / "metadata.json"
    if not beside.is_file():
        return None
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: not JSON: {error}") from error
    return described if isinstance(described, dict) else None
