"""`ditkernels flops`: parameters and Gflops of the models, beside the paper's numbers."""

from __future__ import annotations

import argparse
import json

import ditkernels.commands  # noqa: F401 (it refuses to run this file as a script)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels flops`."""
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    from ditkernels.diagnostics.flops import rows, table

    counted = rows()
    print(json.dumps(counted, indent=2) if args.json else table(counted))
    return 0
