"""Fixtures that force a backend of kernels: each test of a file that imports one runs on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ditkernels.ops import _native, dispatch
from tools.kernel_proof import emulated_cuda


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with dispatch.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with dispatch.use_backend("cuda"):
        yield


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    """The cuda backend on the CPU."""
    with emulated_cuda.running():
        yield


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def on_both(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs on one, then on the other."""
    if request.param == "cuda" and not _native.architectures():
        pytest.skip(_native.cuda_library())
    with dispatch.use_backend(request.param):
        yield
