"""The optimizer's step: AdamW and the moving average in one pass against torch's two, over the weights of a model.

    python -m benchmarks.speed.optimizer --json benchmarks/results/optimizer.json    DiT-XL/2
    python -m benchmarks.speed.optimizer --device cpu --threads 1,2 --processes 5    a model that a CPU can bear, five processes

GB/s counts 36 bytes a parameter, what one pass over fp32 weights must move; torch's two move 40 and show as a lower rate. With
gradients and copies in bf16, as `train --master-weights` has them, it is 36 again, and 52 for torch, casts included. ``fused`` and
``foreach`` are ``torch.optim.AdamW`` of that name and ``torch._foreach_lerp_``, in fp32 alone; ``over_fused`` and ``over_foreach``
say how many times as fast a step is as theirs, in the same rounds. A backend whose step breaks the numerical contract gets no
speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import measure, training
from benchmarks.speed.measure import Contender
from ditkernels import ops, use_backend
from ditkernels.diagnostics import check

BACKENDS = ("torch", "triton", "cuda")
TORCH = ("fused", "foreach")
CONTENDERS = (*TORCH, "cpu", *BACKENDS)
LEARNING_RATE, DECAY = 1e-4, 0.9999
BYTES = 36
KINDS = ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "averages")


def state_of(model: str, device: torch.device) -> dict[str, list[Tensor]]:
    """A model's trained weights and all that belongs to them, random, in the order of the model."""
    with torch.device("meta"):
        net = training.constructor(model, fused=False)()
    shapes = [weight.shape for weight in net.parameters() if weight.requires_grad]
    state = {kind: [torch.rand(shape, device=device) for shape in shapes] for kind in KINDS}
    return {**state, "steps": [torch.zeros((), device=device) for _ in shapes]}


def contender(backend: str, state: dict[str, list[Tensor]], numbers: dict[str, Tensor]) -> Contender:
    """A step as the trainer takes it."""

    def step(_: object) -> None:
        with use_backend(backend):
            ops.adamw_ema(**state, lr=LEARNING_RATE, decay=DECAY, **numbers)

    return Contender(backend, step)


def of_torch(kind: str, state: dict[str, list[Tensor]]) -> Contender:
    """A step of torch's optimizer, then of the moving average, over weights of its own."""
    weights = [nn.Parameter(weight.clone()) for weight in state["weights"]]
    averages = [weight.clone() for weight in state["averages"]]
    for weight, gradient in zip(weights, state["gradients"]):
        weight.grad = gradient
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, **{kind: True})

    @torch.no_grad()
    def step(_: object) -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, weights, 1 - DECAY)

    return Contender(kind, step)


def why_not(backend: str, device: torch.device) -> tuple[str | None, float | None]:
    """Why a backend gets no speed, and the worst of its errors over what the contract allows."""
    worst = 0.0
    for case in check.CASES:
        if case.updates:
            for precision in check.PRECISIONS[:2]:
                inputs = case.inputs(precision, device)
                reason = check.refusals(case, inputs)[backend]
                if reason is not None:
                    return f"cannot serve: {reason}", None
                found = check.parity(case, inputs, backend)
                if not found.ratio <= 1:
                    return f"WRONG: {found.where}, {found.ratio:.1f} x allowed", None
                worst = max(worst, found.ratio)
    return None, worst


def rows_of(model: str, args: argparse.Namespace, copy_gbps: float) -> Iterator[dict[str, Any]]:
    """Every backend on a model, in fp32 and with gradients and copies in bf16."""
    device = measure.device_of(args)
    ratios = {}
    for backend in [name for name in args.contenders if name not in TORCH]:
        reason, ratio = why_not(backend, device)
        if reason is None:
            ratios[backend] = ratio
        else:
            yield {"op": "adamw_ema", "model": model, "contender": backend, "note": reason}
    numbers = {"grad_scale": torch.ones((), device=device), "found_inf": torch.zeros((), device=device)}
    state = state_of(model, device)
    parameters = sum(weight.numel() for weight in state["weights"])
    floor = parameters * BYTES
    for copied in (False, True):
        if copied:
            gradients = [gradient.to(torch.bfloat16) for gradient in state["gradients"]]
            copies = [weight.to(torch.bfloat16) for weight in state["weights"]]
            state = {**state, "gradients": gradients, "copies": copies}
        made = [contender(backend, state, numbers) for backend in ratios]
        if not copied:
            made += [of_torch(kind, state) for kind in args.contenders if kind in TORCH]
        samples = measure.paired(made, device, rounds=args.rounds)
        for name, milliseconds in samples.items():
            timing = measure.timing(milliseconds)
            gbps = floor / timing.median_ms / 1e6
            yield {
                "op": "adamw_ema",
                "model": model,
                "contender": name,
                "copied": copied,
                "precision": "fp32+bf16" if copied else "fp32",
                **timing._asdict(),
                "floor_bytes": floor,
                "gbps": gbps,
                "of_copy": gbps / copy_gbps,
                **measure.gains(samples, name, {kind: kind for kind in TORCH}),
                "error_over_allowed": ratios.get(name),
            }


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """Every model asked for."""
    copy_gbps = journal.unit("copy", measure.copy_row, args)[0]["gbps"]
    for model in args.models:
        journal.unit(model, rows_of, model, args, copy_gbps)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.repeatable(measure.resumable(measure.parser(__doc__)))
    parser.add_argument("--models", type=training.models, default=["DiT-XL/2"], help="names or WIDTHxDEPTH/PATCH")
    parser.add_argument("--contenders", type=measure.names_among(CONTENDERS), default=list(BACKENDS), help=", ".join(CONTENDERS))
    parser.add_argument("--copy-mib", type=measure.positive, default=1024, help="size of the copy")
    args = measure.arguments(parser, argv, models=["384x4/2"], contenders=[*TORCH, "cpu", "torch"], copy_mib=256)
    columns = (
        *("op", "model", "contender", "copied", "median_ms", "low_ms", "high_ms", "gbps", "of_copy"),
        *("over_fused", "over_foreach", "note"),
    )
    measure.carry_out("optimizer", args, argv, measure_all, columns)


if __name__ == "__main__":
    main()
