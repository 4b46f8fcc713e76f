"""Attention backends that come as packages, held against the reference: forward and every gradient, at head_dim 64 and 72.

    python -m benchmarks.studies.attention_parity --backends xformers,flash_attn_4 --json parity.json

Ends with status 1 where a backend serves and breaks the numerical contract, or serves nowhere. What it refuses on a GPU although
its package is there is run all the same, last, and only written down: a refusal that stands for a fault which is gone may go too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.speed import measure
from benchmarks.speed.ceilings import DTYPES
from ditkernels.diagnostics import check
from ditkernels.ops import dispatch
from ditkernels.ops.attention import BACKENDS, PackageBackend


class Try(NamedTuple):
    """One backend at one size, and why it refuses, if it does."""

    backend: str
    case: check.Case
    inputs: check.Inputs
    refused: str | None

    def row(self, found: check.Parity | None) -> dict[str, Any]:
        """What is written down."""
        tensor = next(iter(self.inputs.values()))
        return {
            "backend": self.backend,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "refused": self.refused,
            "error_over_allowed": None if found is None else found.ratio,
            "where": None if found is None else found.where,
        }


def tries(args: argparse.Namespace) -> Iterator[Try]:
    """All that is asked for."""
    device = measure.device_of(args)
    for backend in args.backends:
        for head_dim in args.head_dims:
            for tokens in args.tokens:
                for dtype in args.dtypes:
                    case = check.Case("attention", {"qkv_or_q": (2, tokens, 3, 4, head_dim)})
                    inputs = case.inputs(check.Precision(dtype, DTYPES[dtype], DTYPES[dtype]), device)
                    yield Try(backend, case, inputs, check.refusals(case, inputs)[backend])


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is served, then what is refused."""
    found = list(tries(args))
    for one in found:
        if one.refused is None:
            yield one.row(check.parity(one.case, one.inputs, one.backend))
    for one in found:
        if one.refused is not None:
            yield one.row(_all_the_same(one))


def _all_the_same(one: Try) -> check.Parity | None:
    """Parity of what the backend refuses; None where it could not even be called."""
    backend = BACKENDS[one.backend]
    on_gpu = next(iter(one.inputs.values())).is_cuda
    if not (on_gpu and isinstance(backend, PackageBackend) and importable(backend)):
        return None
    with mock.patch.object(type(backend), "refuse", return_value=None):
        return check.parity(one.case, one.inputs, one.backend)


def importable(backend: PackageBackend) -> bool:
    """Whether the backend's package is there and loads."""
    try:
        return hasattr(importlib.import_module(backend.module), backend.function)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return False


def verdict(rows: list[dict[str, Any]], backends: list[str]) -> list[str]:
    """What is wrong, a line each."""
    served = [row for row in rows if row["refused"] is None]
    wrong = [
        f"{row['backend']} at {row['shape']} in {row['dtype']}: {row['where']}, {row['error_over_allowed']:.1f} x the error allowed"
        for row in served
        if not row["error_over_allowed"] <= 1
    ]
    idle = sorted(set(backends) - {row["backend"] for row in served})
    reasons = {row["backend"]: row["refused"] for row in rows if row["refused"] is not None}
    return [*wrong, *(f"{name} serves nowhere: {reasons[name]}" for name in idle)]


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where something is wrong."""
    parser = measure.parser(__doc__)
    known = dispatch.ATTENTION_BACKENDS
    parser.add_argument("--backends", type=measure.names_among(known), default=["xformers", "flash_attn_4"])
    parser.add_argument("--head-dims", type=measure.numbers, default=[64, 72])
    parser.add_argument("--tokens", type=measure.numbers, default=[64, 256, 1000])
    parser.add_argument("--dtypes", type=measure.names_among(DTYPES), default=["bf16", "fp16"])
    args = parser.parse_args(argv)
    found: list[dict[str, Any]] = []

    def noted() -> Iterator[dict[str, Any]]:
        for row in rows(args):
            found.append(row)
            yield row

    columns = ("backend", "shape", "dtype", "error_over_allowed", "where", "refused")
    measure.report("attention_parity", args, noted(), columns)
    faults = verdict(found, args.backends)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
