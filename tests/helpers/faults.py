"""Faults planted in the Triton kernels: a check of theirs must find each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime.errors import InterpreterError

from tools.kernel_proof.interpreted import mutant


def assert_found(
    module: ModuleType,
    fault: tuple[str, str],
    check: Callable[[], None],
    folder: Path,
    *words: str,
    beneath: Sequence[ModuleType] = (),
) -> None:
    """The check fails on kernels of ``module`` with this replacement in their source.

    Args:
        folder: for the changed source.
        words: what the failure may be about, one of them; anything if there are none.
        beneath: modules whose kernels' functions those of ``module`` call, and whose source is changed too.
    """
    with mutant(module, *fault, folder, beneath), pytest.raises((AssertionError, InterpreterError)) as caught:
        check()
    told = str(caught.value)
    assert not words or any(word in told for word in words), told
