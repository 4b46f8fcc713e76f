"""The commands of `ditkernels`: a module each, with `add_arguments(parser)` and `run(args) -> int`.

A command holds arguments and printing only. It imports no torch before `run`, so that help and usage errors come at once.
"""

from __future__ import annotations

from datetime import timedelta

DEFAULT = "(default: %(default)s)"
DEVICE = "cpu, cuda, cuda:1 ...; auto is cuda if there is one"
# How long processes wait for each other where one may have days of work left when another is done.
LONG_WORK = timedelta(days=7)


def counted(count: int, noun: str) -> str:
    """As in "1 image", "2 images"; the noun is one whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
