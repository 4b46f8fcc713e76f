"""How a program of a Triton kernel works. This file needs no Triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How one program works: rows held at a time, warps, pipeline stages, and the most registers a thread may use.

    With None, ptxas sets the limit on registers from the number of programs that it wants on a multiprocessor.
    """

    rows: int
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """The options that a launch passes to Triton; ``rows`` is a constant of the kernel instead."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
