"""Processes that work together without torch's process groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditkernels.runtime import World


class Among(World):
    """Process ``rank`` of ``size``; ``barrier`` returns when all have called it."""

    def __init__(self, rank: int, size: int, barrier: Callable[[], object] | None = None) -> None:
        self.rank, self.size = rank, size
        self._barrier = barrier

    def on_first(self, function: Callable[[], Any]) -> Any:
        return function() if self.first else None

    def barrier(self) -> None:
        if self._barrier is not None:
            self._barrier()
