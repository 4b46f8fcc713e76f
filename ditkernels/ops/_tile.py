"""How a program of a Triton kernel works. This file needs no Triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How one program works: rows held at a time, warps, pipeline stages, and the most registers a thread may use.

    With None, ptxas sets the limit on registers from the number of programs that it wants on a multiprocessor. Where ``contracts``
    is false, a multiplication and an addition stay two operations with a rounding each.
    """

    rows: int
    warps: int
    stages: int = 1
    registers: int | None = None
    contracts: bool = True

    @property
    def options(self) -> dict[str, int | None]:
        """The options that a launch passes to Triton; ``rows`` is a constant of the kernel instead."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return options if self.contracts else {**options, "enable_fp_fusion": False}
