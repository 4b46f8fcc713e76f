"""`ditkernels check`: every op on every backend that this machine has, held against the reference in fp64."""

from __future__ import annotations

import argparse

from ditkernels.commands import DEVICE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels check`."""
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--backend", help="check the ops on this backend alone, without attention: cuda, triton, cpu or torch")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0, or 1 if a check failed.

    Raises:
        ValueError: a device or a backend that is not there.
    """
    from ditkernels.diagnostics.check import everything
    from ditkernels.runtime import resolve_device

    return 0 if everything(resolve_device(args.device), args.backend) else 1
