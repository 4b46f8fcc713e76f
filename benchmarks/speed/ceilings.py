"""What the device can do at best: copying memory, and the products of a DiT at their own shapes.

    python -m benchmarks.speed.ceilings --model DiT-XL/2 --batch 256

Every other number is read against these: a memory-bound kernel against the copy, a training step against the products.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import ditkernels
from benchmarks.speed import measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def product_shapes(model: ditkernels.DiT, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of the four products of a block, for ``tokens`` rows."""
    block: Any = model.blocks[0]
    linears = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    return {name: (tokens, linear.out_features, linear.in_features) for name, linear in linears.items()}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The copy, then the products."""
    device = measure.device_of(args)
    speed = measure.copy_bandwidth(device, size=args.copy_mib * 2**20, rounds=args.rounds)
    yield {"what": "copy", "shape": [args.copy_mib * 2**20], "gbps": speed}
    with torch.device("meta"):
        model = ditkernels.DiT_models[args.model](input_size=args.input_size)
    tokens = args.batch * model.grid[0] * model.grid[1]
    for name, shape in product_shapes(model, tokens).items():
        rate = measure.matmul_rate(device, shape, DTYPES[args.dtype], rounds=args.rounds)
        yield {"what": name, "shape": list(shape), "dtype": args.dtype, "tflops": rate}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--model", default="DiT-XL/2", choices=list(ditkernels.DiT_models))
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--copy-mib", type=measure.positive, default=1024)
    args = parser.parse_args(argv)
    journal = measure.Journal("ceilings", args)
    journal.unit("ceilings", rows, args)
    journal.close(("what", "shape", "dtype", "gbps", "tflops"))


if __name__ == "__main__":
    main()
