"""Times the norm family with each kind of vector, in turns with plain PyTorch: forward, and forward with backward.

    python -m benchmarks.speed.modulations --device cpu --rounds 41 --threads 1 --json benchmarks/results/cpu-modulations.json

A kind says what gate, shift and scale are: of a sample, shared by the batch, of a segment (4 a sample), of a token, or of a row
that an index chooses for each token (2 a sample, as of clean and noisy tokens). Of "branch_norm" they are of a sample, and the
branch is normed first, with a weight. ``min x`` is the speed that each is held to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import measure
from ditkernels import ops, reference

SHAPES = ((1, 256, 384), (4, 256, 1152))
OPS = ("modulate_norm", "gated_residual", "gated_residual_norm")
SEGMENTS, ROWS = 4, 2
KINDS = ("sample", "shared", "segment", "token", "index", "branch_norm")
AIM = 1.8
COLUMNS = ("op", "kind", "shape", "pass", "ours_ms", "plain_ms", "times faster", "min x")


def inputs_of(op: str, kind: str, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Leaves; the index is in runs, as of a picture that is clean in one half."""
    batch, length, width = shape
    others = {"shared": (), "segment": (batch, SEGMENTS), "token": (batch, length), "index": (batch, ROWS)}
    axes = others.get(kind, (batch,))
    vectors = {"modulate_norm": ("shift", "scale"), "gated_residual": ("gate",)}.get(op, ("gate", "shift", "scale"))
    tokens = ("x",) if op == "modulate_norm" else ("x", "branch")
    made = {name: torch.randn(*shape, device=device) for name in tokens}
    made |= {name: torch.randn(*axes, width, device=device) for name in vectors}
    if kind == "branch_norm":
        made["branch_weight"] = torch.randn(width, device=device)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def contender(room: Any, op: str, inputs: dict[str, Tensor], extra: dict[str, Any], backward: bool) -> Callable[[Any], Any]:
    function = getattr(room, op)

    def inference(_: Any) -> Any:
        with torch.no_grad():
            return function(**inputs, **extra)

    def both(_: Any) -> Any:
        outputs = function(**inputs, **extra)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, list(inputs.values()), [extra_gradient(output) for output in outputs])

    return both if backward else inference


_GRADIENTS: dict[tuple[int, ...], Tensor] = {}


def extra_gradient(output: Tensor) -> Tensor:
    """A cotangent of the output's shape, made once."""
    shape = tuple(output.shape)
    if shape not in _GRADIENTS:
        _GRADIENTS[shape] = torch.randn_like(output)
    return _GRADIENTS[shape]


def measured(args: argparse.Namespace) -> Iterator[measure.Row]:
    device = measure.device_of(args)
    torch.manual_seed(0)
    for shape in SHAPES:
        for op in args.ops:
            for kind in (kind for kind in args.kinds if kind != "branch_norm" or op != "modulate_norm"):
                inputs = inputs_of(op, kind, shape, device)
                index = (torch.arange(shape[1], device=device) * ROWS // shape[1]).expand(shape[0], -1).contiguous()
                extra = {"index": {"index": index}, "branch_norm": {"branch_norm": "rmsnorm"}}.get(kind, {})
                for backward in (False, True):
                    contenders = [
                        measure.Contender(name, contender(room, op, inputs, extra, backward))
                        for name, room in (("ours", ops), ("plain", reference))
                    ]
                    samples = measure.paired(contenders, device, rounds=args.rounds)
                    ours, plain = (measure.timing(samples[name]) for name in ("ours", "plain"))
                    ratios = sorted(b / a for a, b in zip(samples["ours"], samples["plain"]))
                    yield {
                        "op": op, "kind": kind, "shape": list(shape), "pass": "forward+backward" if backward else "forward",
                        "ours_ms": ours.median_ms, "plain_ms": plain.median_ms,
                        "times faster": ratios[len(ratios) // 2], "min x": AIM,
                    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    made = measure.parser(__doc__)
    made.add_argument("--ops", type=measure.names_among(OPS), default=list(OPS))
    made.add_argument("--kinds", type=measure.names_among(KINDS), default=list(KINDS))
    made.add_argument("--threads", type=measure.positive, default=1, help="of torch")
    args = measure.arguments(made, argv)
    torch.set_num_threads(args.threads)
    measure.report("modulations", args, measured(args), COLUMNS)


if __name__ == "__main__":
    main()
