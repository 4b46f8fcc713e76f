"""Builds csrc/ with g++ against the host emulation of tests/emulation, once for all processes of a test run."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SOURCES = (*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "tests/emulation/probe.cu")
HEADERS = (*sorted((ROOT / "csrc").glob("*.cuh")), *sorted((ROOT / "tests/emulation").glob("*.h")))
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas")
DEFINES = ("-DDITKERNELS_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def compiler() -> str | None:
    return shutil.which("g++")


@cache
def library() -> Path:
    """The library, built unless one of the same sources, flags and torch lies in build/emulation."""
    key = hashlib.sha256(repr((FLAGS, DEFINES, torch.__version__)).encode())
    for file in (*SOURCES, *HEADERS):
        key.update(file.read_bytes())
    folder = ROOT / "build/emulation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(path)
    return path


def _build(path: Path) -> None:
    program = compiler()
    assert program is not None
    torch_root = Path(torch.__file__).parent
    include = (f"-I{ROOT}/tests/emulation", f"-I{ROOT}/csrc", "-isystem", f"{torch_root}/include")
    unfinished = path.with_suffix(".tmp")
    compile_all = (program, *FLAGS, *DEFINES, *include, "-x", "c++", *map(str, SOURCES))
    link = ("-shared", "-o", str(unfinished), f"-L{torch_root}/lib", "-ltorch_cpu")
    subprocess.run([*compile_all, *link], check=True)
    unfinished.rename(path)


@cache
def _probe() -> ctypes.CDLL:
    probe = ctypes.CDLL(str(library()))
    probe.emulation_run.restype = probe.emulation_counts.restype = ctypes.c_char_p
    return probe


def fault_of(kernel: str) -> str:
    """The error that a kernel of probe.cu ends with, "" if none."""
    return _probe().emulation_run(kernel.encode()).decode()


def reset_counts() -> None:
    _probe().emulation_reset()


def counts() -> dict[str, tuple[int, int]]:
    """By tensor: elements read, elements written since the last reset."""
    lines = (line.split() for line in _probe().emulation_counts().decode().splitlines())
    return {name: (int(read), int(written)) for name, read, written in lines}
