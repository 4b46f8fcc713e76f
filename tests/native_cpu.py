"""The cpu backend in tests: what needs its library, and the two backends that serve any CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from ditkernels.ops import _native, dispatch

needs_library = pytest.mark.skipif(_native.CPU.absence is not None, reason=str(_native.CPU.absence))


@pytest.fixture(autouse=True, params=["chosen", "torch"])
def on_both_backends(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs each test of a file that imports this on what is chosen, cpu where its library is there, and on torch."""
    with dispatch.use_backend("auto" if request.param == "chosen" else "torch"):
        yield request.param
    if "torch._dynamo" in sys.modules:  # a function compiled for each backend in turn would reach the limit of its variants
        torch._dynamo.reset()
