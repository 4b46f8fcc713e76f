"""What starts processes that train: a server that has imported everything, and forks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from unittest import mock

import pytest

from tools.tree import found_from


@pytest.fixture(scope="module")
def forked(request: pytest.FixtureRequest) -> Iterator[ForkServerContext]:
    """What starts the processes; the server imports the module of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])
    # The server looks there for what it imports.
    with mock.patch.dict(os.environ, found_from(os.environ)):
        yield context
