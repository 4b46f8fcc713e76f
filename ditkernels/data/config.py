"""How a folder of images is encoded: one dataclass, of which the flags of `ditkernels encode` are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditkernels.options import FREE, check_fields, option


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode; every field is a flag of ``ditkernels encode``.

    Raises:
        ValueError: a value of another type than its field's or out of range; the field is named.
    """

    data_path: str = option("", "folder of images, one subfolder a class", FREE)
    out: str = option("latents", "folder to write to, or to resume", FREE)
    verify: bool = option(False, "check every shard of --out against its SHA-256, encode nothing", FREE)
    unconditional: bool = option(False, "one class for all images")
    keep_empty_classes: bool = option(False, "a class folder without images keeps its number, in place of being an error", FREE)
    image_size: int = option(256, "edge of the square images, in pixels", least=1)
    vae: str = option("ema", "ema, mse, or a folder with an AutoencoderKL")
    dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", "dtype of the stored mean and standard deviation")
    batch_size: int = option(32, "images encoded at once; it decides how they are rounded", least=1)
    shard_size: int = option(4096, "images a file", least=1)
    threads: int = option(1, "CPU threads a process", least=1)
    num_workers: int = option(4, "processes that read images, for each that encodes", FREE, least=0)
    max_unreadable: int = option(100, "unreadable images that are replaced before the run stops", FREE, least=0)
    max_pixels: int = option(1 << 28, "pixels of an image that is read; a larger one is unreadable", FREE, least=1)
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto is cuda if there is one", FREE)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.vae == "none":
            raise ValueError("vae: got 'none', allowed are ema, mse, a folder")
