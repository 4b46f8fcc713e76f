"""`ditkernels encode`: a folder of images to latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ditkernels.commands import LONG_WORK, counted
from ditkernels.data.config import EncodeConfig
from ditkernels.options import add_flags, from_flags

if TYPE_CHECKING:
    from ditkernels.data.latents import LatentFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels encode`: the fields of EncodeConfig."""
    add_flags(parser, EncodeConfig)


def run(args: argparse.Namespace) -> int:
    """Encodes, or verifies; returns 0.

    Raises:
        ValueError, ImportError, OSError: as ``encode`` and ``verify``.
    """
    from ditkernels.data.encode import encode, verify
    from ditkernels.data.latents import INDEX, read_index
    from ditkernels.runtime import process_device, processes

    config = from_flags(EncodeConfig, args)
    if config.verify:
        print(f"{config.out}: {_extent(verify(Path(config.out)))}, every SHA-256 is right")
        return 0
    device = process_device(config.device)
    with processes(timeout=LONG_WORK) as world:
        folder = encode(config, device, world)
    if world.first:
        print(f"{config.out}: {_extent(folder)}")
        for file in read_index(folder.root / INDEX)["unreadable"]:
            print(f"{file}: not a readable image; the next one stands in its place")
    return 0


def _extent(folder: LatentFolder) -> str:
    return f"{counted(len(folder), 'image')} in {counted(len(folder.shards), 'shard')}"
