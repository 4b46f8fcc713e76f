"""The commands of `ditkernels`: a module each, with `add_arguments(parser)` and `run(args) -> int`.

A command holds arguments and printing only. It imports no torch before `run`, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
from datetime import timedelta

DEFAULT = "(default: %(default)s)"
DEVICE = "cpu, cuda, cuda:1 ...; auto is cuda if there is one"
# How long processes wait for each other where one may have days of work left when another is done.
LONG_WORK = timedelta(days=7)


def counted(count: int, noun: str) -> str:
    """As in "1 image", "2 images"; the noun is one whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint of another program need not tell."""
    add = parser.add_argument
    add("--num-heads", type=int, help="heads of attention, where neither the checkpoint nor the paper tells")
    add("--input-size", type=edges, metavar="H[,W]", help="size of latents, where positions are learned or not stored")
    add(
        "--no-null-class",
        dest="null_class",
        action="store_false",
        help="every row of labels is a class, where the checkpoint does not tell",
    )


def edges(text: str) -> tuple[int, int]:
    """Height and width from "32" or "8,32"; ArgumentTypeError for anything else."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is H or H,W")
    return int(parts[0]), int(parts[-1])
