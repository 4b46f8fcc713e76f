"""The cpu backend in tests: what needs its library, and the two backends that serve any CPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from ditkernels.ops import _native, dispatch
from tests.helpers.subsets import WholeWay


def run_formulas(monkeypatch: pytest.MonkeyPatch, op: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Puts the formulas of a family in the place of the torch kernels of ``op``, so that a test runs them."""
    for name, formula in ((op, forward), (f"{op}_backward", backward)):
        monkeypatch.setattr(dispatch.OPS[name].implementations["torch"], "kernel", formula)
        monkeypatch.setattr(dispatch.OPS[name].implementations["torch"], "plain", None)
    dispatch.forget()


def as_ops(backend: str) -> AbstractContextManager[object]:
    """What brings the kernels of ops to run forward and backward.

    On the thin way the torch backend calls plain PyTorch where gradients are wanted; under a dispatch mode it has its kernels.
    """
    return WholeWay() if backend == "torch" else nullcontext()


# The backend that auto chooses for tensors on the CPU.
SERVING = "torch" if _native.CPU.absence else "cpu"
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
needs_library = pytest.mark.skipif(_native.CPU.absence is not None, reason=str(_native.CPU.absence))


@pytest.fixture(autouse=True, params=["chosen", "torch"])
def on_both_backends(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs each test of a file that imports this on what is chosen, cpu where its library is there, and on torch; names it."""
    with dispatch.use_backend("auto" if request.param == "chosen" else "torch"):
        yield SERVING if request.param == "chosen" else "torch"
    if "torch._dynamo" in sys.modules:  # a function compiled for each backend in turn would reach the limit of its variants
        torch._dynamo.reset()
