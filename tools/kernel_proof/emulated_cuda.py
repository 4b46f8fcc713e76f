"""Builds csrc/cuda with g++ against the host emulation of tests/ops/emulation, once for all processes of a test run.

with running() as emulation: ...          DITKERNELS_BACKEND=cuda, on the CPU; the module shows counters and switches
with running(tracing=True, order=3): ...  every element's accesses are counted; blocks and warps in another order
with running(sample=ends): ...            a few blocks of every launch run, and the bytes they move are written down
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from ditkernels.ops import _native, dispatch
from tools.tree import ROOT

EMULATION = ROOT / "tests/ops/emulation"
MODULE = "ditkernels_emulation"
# _FORTIFY_SOURCE takes a jump from one fiber to another for a broken stack.
FLAGS = (
    *(
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
    ),
    *("-U_FORTIFY_SOURCE", "-DDITKERNELS_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)


def sources() -> dict[str, str]:
    """The kernels' sources and headers by file name."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "csrc/cuda").glob("*.cu*"))}


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None if it can."""
    if shutil.which("g++") is None:
        return "the emulation needs g++"
    missing = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    return f"the emulation needs {' and '.join(missing)}" if missing else None


def build(texts: dict[str, str]) -> Path:
    """The library made of these sources, built unless one of the same content, flags and stack lies in build/emulation."""
    key = hashlib.sha256(repr((_rules(Path(), texts), torch.__version__, sys.version, sorted(texts.items()))).encode())
    for file in sorted(EMULATION.iterdir()):
        key.update(file.read_bytes())
    folder = ROOT / "build/emulation" / key.hexdigest()[:16]
    path = folder / f"{MODULE}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            (folder / "build.ninja").write_text(_rules(folder, texts), encoding="utf-8")
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True, stdout=sys.stderr)
    return path


def _rules(folder: Path, texts: dict[str, str]) -> str:
    import pybind11

    torch_root = Path(torch.__file__).parent
    # pybind11's own headers come first: torch's copy of them refuses to be included beside the stable ABI.
    system = (pybind11.get_include(), torch_root / "include", sysconfig.get_paths()["include"])
    include = " ".join((f"-I{EMULATION}", f"-I{folder}", *(f"-isystem {path}" for path in system)))
    files = [*(folder / name for name in texts if name.endswith(".cu")), EMULATION / "module.cu"]
    return "\n".join(
        (
            f"rule compile\n  command = g++ {' '.join(FLAGS)} {include} -x c++ -c $in -o $out",
            f"rule link\n  command = g++ -shared $in -o $out.tmp -L{torch_root}/lib -ltorch_cpu && mv $out.tmp $out",
            *(f"build {file.stem}.o: compile {file}" for file in files),
            f"build {MODULE}.so: link {' '.join(f'{file.stem}.o' for file in files)}",
            "",
        )
    )


@cache
def load(path: Path) -> ModuleType:
    """Registers the library's kernels for the CPU and returns its module; one library only for each process."""
    _native.CUDA.load(path)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def as_they_are() -> ModuleType:
    """The library of csrc/cuda as the process first found it: sources may be edited while tests run."""
    return load(build(sources()))


@contextlib.contextmanager
def running(
    module: ModuleType | None = None,
    *,
    tracing: bool = False,
    order: int = 0,
    last_block_only: bool = False,
    sample: Callable[[str, int], Iterable[int]] | None = None,
) -> Iterator[ModuleType]:
    """Forces the cuda backend onto the emulation; skips the test where it cannot be built.

    Args:
        module: a loaded library, by default that of csrc/cuda as it is.
        tracing: counts the accesses of every element and finds blocks that touch what others wrote.
        order: another one for another order of blocks, warps and lanes.
        last_block_only: runs the last block of every launch alone.
        sample: of a kernel and its number of blocks, those that run; ``module.sampled()`` tells what they moved.
    """
    reason = why_not()
    if reason:
        import pytest

        pytest.skip(reason)
    with mock.patch.object(_native.CUDA, "absence", _native.CUDA.absence):
        module = module or as_they_are()
        _native.CUDA.absence = None
        module.reset(tracing, order, last_block_only, sample)
        with dispatch.use_backend("cuda"):
            yield module
        module.reset(False, 0, False, None)


def ends(kernel: str, blocks: int) -> set[int]:
    """The first and the last of the blocks."""
    return {0, blocks - 1}


def passes(module: ModuleType, names: set[str], elements: int) -> Counter[str]:
    """By kernel: how many of these tensors were read or written, each of their ``elements`` exactly once.

    Asks for ``tracing``, and for tensors without gaps.
    """
    counted: Counter[str] = Counter()
    for (kernel, name), (_, _, *histograms) in module.counts().items():
        if name not in names:
            continue
        for touched in histograms:
            found = {times: count for times, count in touched.items() if count}
            assert found in ({}, {0: elements}, {1: elements}), f"{kernel}: {name} is touched {found}"
            counted[kernel] += 1 in found
    return +counted
