"""How often a model calls the norm family: what closes its residuals, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ditkernels import ops

CLOSING = ("modulate_norm", "gated_residual", "gated_residual_norm")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts calls of the norm family's public functions."""
    calls = dict.fromkeys(CLOSING, 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    with mock.patch.multiple(ops, **{name: counting(name, getattr(ops, name)) for name in CLOSING}):
        yield calls
