"""Every attention backend, forward and backward, at the head widths and lengths of the paper's models.

    python -m benchmarks.speed.attention --json benchmarks/results/attention.json

TFLOP/s counts 4·B·heads·N²·head_dim operations forward and 2.5 times that backward (five products where forward has two).
A backend whose output or gradients break the numerical contract gets no speed; the ones that cannot serve say why.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import measure
from benchmarks.speed.ceilings import DTYPES
from benchmarks.speed.measure import Contender
from ditkernels import ops
from ditkernels.diagnostics import check
from ditkernels.ops import dispatch

GATE_BATCH, GATE_HEADS = 2, 2
BACKWARD_PRODUCTS = 2.5


def contenders(backend: str, sets: list[Tensor], cotangent: Tensor) -> dict[str, Contender]:
    """Forward, as training runs it, and backward of one backend."""

    def forward(qkv: Tensor) -> Tensor:
        return ops.attention(qkv, backend=backend)

    def backward(prepared: tuple[Tensor, Tensor]) -> None:
        torch.autograd.grad(*prepared, cotangent)

    def at(index: int) -> Tensor:
        return sets[index % len(sets)]

    return {
        "forward": Contender(backend, forward, at),
        "backward": Contender(backend, backward, lambda index: (forward(at(index)), at(index))),
    }


def gate(backend: str, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | float:
    """Error over the error allowed, on few heads; or why there is no such number."""
    case = check.Case("attention", {"qkv_or_q": (GATE_BATCH, tokens, 3, GATE_HEADS, head_dim)})
    inputs = case.inputs(check.Precision("", dtype, dtype), device)
    reason = check.refusals(case, inputs)[backend]
    if reason is not None:
        return f"cannot serve: {reason}"
    found = check.parity(case, inputs, backend)
    return found.ratio if found.ratio <= 1 else f"WRONG: {found.where}, {found.ratio:.1f} x allowed"


def rows_of(args: argparse.Namespace, tokens: int, head_dim: int) -> Iterator[dict[str, Any]]:
    """All backends at one length and head width."""
    device, dtype = measure.device_of(args), DTYPES[args.dtype]
    shape = (args.batch, tokens, 3, args.heads, head_dim)
    common = {"shape": list(shape), "dtype": args.dtype}
    first = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    count = measure.input_sets(measure.nbytes(first)) - 1
    sets = [first, *(torch.randn_like(first, requires_grad=True) for _ in range(count))]
    cotangent = torch.randn_like(ops.attention(first.detach(), backend="plain"))
    found: dict[str, dict[str, Contender]] = {}
    ratios: dict[str, float] = {}
    for backend in args.backends:
        verdict = gate(backend, tokens, head_dim, dtype, device)
        timed = contenders(backend, sets, cotangent)
        if isinstance(verdict, str):
            yield {**common, "backend": backend, "note": verdict}
        elif not measure.fits(timed["backward"]):
            yield {**common, "backend": backend, "note": "out of memory"}
        else:
            found[backend], ratios[backend] = timed, verdict
    operations = 4 * args.batch * args.heads * tokens**2 * head_dim
    for phase, factor in (("forward", 1.0), ("backward", BACKWARD_PRODUCTS)):
        timings = measure.interleaved([each[phase] for each in found.values()], device, rounds=args.rounds)
        for backend, timing in timings.items():
            yield {
                **common,
                "backend": backend,
                "pass": phase,
                **timing._asdict(),
                "tflops": factor * operations / timing.median_ms / 1e9,
                "error_over_allowed": ratios[backend],
            }


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """All lengths and head widths."""
    for head_dim in args.head_dims:
        for tokens in args.tokens:
            journal.unit(f"{tokens} tokens, head_dim {head_dim}", rows_of, args, tokens, head_dim)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    backends = dispatch.ATTENTION_BACKENDS
    parser.add_argument("--batch", type=measure.positive, default=32)
    parser.add_argument("--heads", type=measure.positive, default=16)
    parser.add_argument("--head-dims", type=measure.numbers, default=[64, 72])
    parser.add_argument("--tokens", type=measure.numbers, default=[64, 256, 1024, 4096])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backends", type=measure.names_among(backends), default=list(backends), help=", ".join(backends))
    args = parser.parse_args(argv)
    columns = ("shape", "dtype", "pass", "backend", "median_ms", "low_ms", "high_ms", "tflops", "note")
    journal = measure.Journal("attention", args)
    measure_all(args, journal)
    journal.close(columns)


if __name__ == "__main__":
    main()
