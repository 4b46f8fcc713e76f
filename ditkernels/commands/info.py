"""`ditkernels info`: the machine, the versions, and for every op the backend chosen here and why not the others."""

from __future__ import annotations

import argparse

from ditkernels.commands import DEVICE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels info`."""
    parser.add_argument("--device", default="auto", help=DEVICE)


def run(args: argparse.Namespace) -> int:
    """Prints everything; returns 0, or 1 if a section could not be told to its end.

    Raises:
        ValueError: a device that is not there.
    """
    from ditkernels.diagnostics.info import everything
    from ditkernels.runtime import resolve_device

    failures: list[Exception] = []
    for line in everything(resolve_device(args.device), failures):
        print(line)
    return 1 if failures else 0
