"""The command line: `ditkernels COMMAND ...`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; only the one asked for is imported, and none imports
torch before it runs.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("ditkernels: error: run `python -m ditkernels COMMAND ...`", file=sys.stderr)
    sys.exit(2)

import argparse
import importlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ditkernels._version import __version__

TRACEBACK_VARIABLE = "DITKERNELS_TRACEBACK"

# Each is a module of ditkernels.commands; beside it stands its line in `ditkernels --help`.
COMMANDS = {
    "demo": "train a small DiT on real handwritten digits, sample it with guidance, show the picture",
    "train": "train a DiT on a folder of images or of latents, or on the digits",
    "encode": "a folder of images to latents, once, resumable, for `train`",
    "plot": "draw loss, speed and FID of training runs side by side",
    "check": "run the parity of every op and backend that this machine has",
    "sample": "guided samples of a checkpoint, a handful or 50,000, resumable",
    "eval": "FID, sFID, Inception Score, precision and recall of samples",
    "convert": "checkpoints between the public DiT layout, diffusers' and ours",
    "consolidate": "a checkpoint that many processes wrote in pieces, as one file a part",
    "flops": "parameters and Gflops of the models, beside the paper's numbers",
    "info": "machine, versions, and for every op the backend chosen and why",
}


class UsageError(ValueError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A flag that is cut short would be another one tomorrow.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit status: the command's own; 2 for bad input, told in one line on stderr (with the environment
        variable DITKERNELS_TRACEBACK=1, raised instead); 130 when interrupted; 141 when the reader of a pipe
        left, as `head` does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8. The error stream prints them as it is.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _told_on_the_console():
            status = _run(argv)
        # Here, so that a pipe whose reader has left breaks inside the try.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _discard_stdout()
        return 141
    except _bad_input() as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"ditkernels: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ditkernels: interrupted", file=sys.stderr)
        return 130


class _Console(logging.Handler):
    """What the library tells: on stdout, warnings on stderr; no bar is torn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if record.levelno >= logging.WARNING:
            tqdm.write(f"ditkernels: {record.getMessage()}", file=sys.stderr)
        else:
            tqdm.write(record.getMessage(), file=sys.stdout)
            sys.stdout.flush()


@contextmanager
def _told_on_the_console() -> Iterator[None]:
    package, console = logging.getLogger("ditkernels"), _Console()
    before = package.level
    package.addHandler(console)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(console)
        package.setLevel(before)


def _bad_input() -> tuple[type[Exception], ...]:
    """What a command raises on bad input. The ops' own error is known only where they have been imported."""
    dispatch = sys.modules.get("ditkernels.ops.dispatch")
    of_ops = () if dispatch is None else (dispatch.BackendError,)
    return ValueError, FloatingPointError, OSError, ImportError, MemoryError, *of_ops


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="ditkernels", description="Fused kernels, training and sampling for Diffusion Transformers.")
    parser.add_argument("--version", action="version", version=f"ditkernels {__version__}")
    asked_for = next((argument for argument in argv if not argument.startswith("-")), None)
    if asked_for is not None and asked_for not in COMMANDS:
        raise UsageError(f"command: got {asked_for!r}, allowed are {', '.join(COMMANDS)}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == asked_for:
            module = importlib.import_module(f"ditkernels.commands.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if asked_for is None:
        parser.print_help(sys.stderr)
        return 2
    status: int = args.run(args)
    return status


def _discard_stdout() -> None:
    # What is still buffered would fail again at the interpreter's exit, with a message nobody asked for.
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
