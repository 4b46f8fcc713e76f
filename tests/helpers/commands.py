"""Commands that the docs and `make gpu` name: run in this process, or only read by the parser that would read them."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from typing import Any, NoReturn
from unittest import mock

from ditkernels import cli
from tools.tree import ROOT

BENCHMARKS = ROOT / "benchmarks"


def module_of(benchmark: str) -> str:
    """The module of a benchmark of this name, whichever folder it lies in."""
    (path,) = BENCHMARKS.rglob(f"{benchmark}.py")
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def run(module: str, *arguments: str) -> None:
    """Runs a module as ``python -m`` would, in this process, whatever has imported it before."""
    with mock.patch.object(sys, "argv", [module, *arguments]):
        runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")


class _Parsed(Exception):
    """Carries the arguments out."""


def parse(command: Sequence[str]) -> argparse.Namespace:
    """The arguments of ``python -m benchmarks.NAME ...``, ``python -m ditkernels ...`` or ``ditkernels ...``.

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
                run(*words)
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{' '.join(command)}: reads no arguments")
