"""Times the MLP of a block, without its last bias: what the epilogues save beside products that others make.

    python -m benchmarks.speed.mlp --json mlp.json    DiT-XL/2 at 256 px, batch 256, bf16
    python -m benchmarks.speed.mlp --model DiT-B/4 --batch 512

``eager`` and ``compiled`` are the reference; ``triton`` is the product with our bias-and-GELU kernel behind it, ``cuda`` has GELU
as an epilogue of cuBLASLt's products. A row a contender and pass; TFLOP/s of the products, which are two forward and four backward
for all of them. Held to the numerical contract first: what is wrong gets no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.speed import measure
from benchmarks.speed import ops as sites
from ditkernels.diagnostics import check
from ditkernels.reference import PATCH_SIZES, SIZES

RATIO = sites.MLP_RATIO


def case_of(model: str, batch: int, input_size: int) -> check.Case:
    """The MLP of a model named as in the paper, on latents ``input_size`` across."""
    size, patch = model.removeprefix("DiT-").split("/")
    width = int(SIZES[size]["hidden_size"])
    shapes = {
        "x": (batch, (input_size // int(patch)) ** 2, width),
        "fc1_weight": (RATIO * width, width),
        "fc1_bias": (RATIO * width,),
        "fc2_weight": (width, RATIO * width),
    }
    return check.Case("mlp", shapes)


def operations(case: check.Case, phase: str) -> int:
    """Of the products, 2 a multiply-add."""
    batch, length, width = case.shapes["x"]
    forward = 2 * batch * length * RATIO * width * 2 * width
    return forward if phase == "forward" else 2 * forward


def rows_of(args: argparse.Namespace) -> Iterator[measure.Row]:
    """A row a contender and pass, or a note why there is none."""
    device, case = measure.device_of(args), case_of(args.model, args.batch, args.input_size)
    precision = sites.PRECISIONS[args.precision]
    common = {"model": args.model, "shape": list(case.shapes["x"]), "precision": precision.name}
    ready = sites.held_to_parity(args.contenders, sites.Site(case, "", ""), precision, device)
    yield from ({**common, **note} for note in ready.notes)
    for phase in ("forward", "backward"):
        timings = measure.interleaved([made[phase] for made in ready.contenders.values()], device, rounds=args.rounds)
        for name, timing in timings.items():
            yield {
                **common,
                "contender": name,
                "pass": phase,
                **timing._asdict(),
                "tflops": operations(case, phase) / timing.median_ms / 1e9,
                "error_over_allowed": ready.ratios.get(name),
            }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    models = [f"DiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]
    parser.add_argument("--model", choices=models, default="DiT-XL/2")
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=256)
    parser.add_argument("--precision", choices=[p for p in sites.PRECISIONS if "+" not in p], default="bf16")
    parser.add_argument(
        "--contenders",
        type=measure.names_among(sites.CONTENDERS),
        default=["eager", "compiled", "max-autotune", "triton", "cuda"],
        help=", ".join(sites.CONTENDERS),
    )
    args = parser.parse_args(argv)
    columns = ("model", "precision", "pass", "contender", "median_ms", "low_ms", "high_ms", "tflops", "note")
    journal = measure.Journal("mlp", args)
    journal.unit(args.model, rows_of, args)
    journal.close(columns)


if __name__ == "__main__":
    main()
