"""What the CUDA kernels' machine code says without a GPU: registers, spills, occupancy, share of 128-bit accesses.

    python benchmarks/static_report.py                                        every kernel for Hopper
    python benchmarks/static_report.py --archs 80,90a,100 --json report.json  every kernel for all three, some minutes of nvcc
    python benchmarks/static_report.py --families patch_embed --every 6       a sample

Needs nvcc. Occupancy counts registers, threads and static shared memory; what a launch asks for on top of these is not in the code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

import cuda_code
import machine_code
import measure
import nvcc

FAMILIES = ("adaln", "patch_embed", "final_layer")
ARCHITECTURES = ("80", "90a", "100")


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every kernel of the families asked for, for every architecture."""
    for family in args.families:
        for architecture in args.archs:
            for found in cuda_code.rows(family, architecture, args.every):
                shares = found["wide_fraction"].values()
                yield {
                    **found,
                    "occupancy": occupancy(found, architecture),
                    "narrowest": min(shares) if shares else None,
                }


def occupancy(row: dict[str, Any], architecture: str) -> float | None:
    """Warps at once over the most a multiprocessor holds; None for a kernel that names no block size."""
    if row["threads"] is None:
        return None
    capability = int(re.sub(r"\D", "", architecture))
    return machine_code.occupancy(capability, row["registers"], row["threads"], row["static_shared_bytes"])


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = measure.parser(__doc__)
    parser.add_argument("--families", type=measure.names_among(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--archs", type=measure.names_among(ARCHITECTURES), default=["90a"])
    parser.add_argument(
        "--every", type=measure.positive, default=1, help="1 for all kernels, n for every n-th"
    )
    args = parser.parse_args(argv)
    reason = cuda_code.why_not()
    if reason is not None:
        parser.error(f"the kernels' code cannot be read: {reason}")
    try:
        found = list(rows(args))
    except nvcc.BuildError as error:
        parser.error(str(error))
    columns = ("kernel", "arch", "threads", "registers", "spills", "tf32", "occupancy", "narrowest")
    measure.report("static_report", args, found, columns)


if __name__ == "__main__":
    main()
