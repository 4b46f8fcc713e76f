"""Commands that the docs and `make gpu` name: read by the parser that would read them, and not run."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from ditkernels import cli

ROOT = Path(__file__).parent.parent


class _Parsed(Exception):
    """Carries the arguments out."""


def parse(command: Sequence[str]) -> argparse.Namespace:
    """The arguments of ``python benchmarks/NAME.py ...``, ``python -m ditkernels ...`` or ``ditkernels ...``.

    Raises:
        SystemExit: the program takes them not.
        AssertionError: there is no such program, or it reads no arguments.
    """
    known = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        raise _Parsed(known(self, *args))

    words = [word for word in command if word not in ("python", "-m")]
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            if words[0] == "ditkernels":
                cli.main(words[1:])
            else:
                with mock.patch.object(sys, "argv", words):
                    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{' '.join(command)}: reads no arguments")
