"""Every test begins with no backend forced and leaves none, and runs on one thread, since the suite itself runs in parallel."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import pytest
import torch

import ditkernels
from ditkernels.ops import _native, _triton, dispatch, settings
from tools.tree import found_from

torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    """Which copy of the package is tested, and what its backends run on."""
    return [
        f"ditkernels {ditkernels.__version__} in {Path(ditkernels.__file__).parent}, torch {torch.__version__}",
        f"Triton: {_triton.MISSING or _triton.triton.__version__}",
        f"CUDA library: {_native.cuda_library()}",
        f"CPU library: {_native.cpu_library()}",
    ]


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DITKERNELS_BACKEND", raising=False)
    monkeypatch.delenv("DITKERNELS_ATTENTION_BACKEND", raising=False)
    monkeypatch.setattr(settings, "_process", settings._Process())
    dispatch.forget()
    yield
    dispatch.forget()
    assert settings._outer.get() == (), "the test left a use_backend block open"


_DEFAULTS = [torch.float64, torch.float16, torch.bfloat16, torch.device("meta"), torch.device("cpu")]


@pytest.fixture(params=_DEFAULTS, ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default dtype or device of the process; the test leaves it as it is."""
    before, kind = torch.get_default_dtype(), type(request.param)
    setter, getter = {
        torch.dtype: (torch.set_default_dtype, torch.get_default_dtype),
        torch.device: (torch.set_default_device, torch.get_default_device),
    }[kind]
    setter(request.param)
    try:
        yield
        assert getter() == request.param
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def forked(request: pytest.FixtureRequest) -> Iterator[ForkServerContext]:
    """What starts processes: a server that has imported the module of the tests, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])
    # The server looks there for what it imports.
    with mock.patch.dict(os.environ, found_from(os.environ)):
        yield context


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests, whole files of proofs each, start first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: "test_proof" not in item.name)
