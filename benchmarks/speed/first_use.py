"""Seconds until the first training step, each contender in processes of its own: what a user waits for after pressing return.

    python -m benchmarks.speed.first_use --json first_use.json    DiT-XL/2 at 256 px, bf16
    python -m benchmarks.speed.first_use --contenders ours-bf16 --model DiT-B/4

Each contender begins twice: ``cold``, with empty caches of Triton's and Inductor's kernels, and ``warm``, with those that the first
left. Seconds of the clock: ``imported`` from the start of the process until all is imported, ``built`` until the model and its
optimizer are on the device, ``first`` and ``second`` for the first two steps, a step's end waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise

import torch

from benchmarks.speed import measure, training
from tools.tree import found_from

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
STEPS = ("first", "second")


def begin(args: argparse.Namespace) -> dict[str, float]:
    """What the process that a user starts does; seconds of each part."""
    device = measure.device_of(args)
    clock = [args.started, time.time()]
    recipe = training.RECIPES[args.begin]
    with recipe.choices():
        made = training.MasterStep if recipe.master_weights else training.Step
        step = made(recipe, training.Network(args.model, args.input_size), device, args.batch)
        for index in range(1 + len(STEPS)):
            if index:
                step(index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            clock.append(time.time())
    names = ("imported", "built", *STEPS)
    return {name: end - start for name, (start, end) in zip(names, pairwise(clock), strict=True)}


def in_a_process(name: str, caches: str, args: argparse.Namespace) -> dict[str, float]:
    """The same in a fresh process that keeps its compiled kernels in a folder.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    flags = (
        *("--begin", name, "--started", repr(time.time()), "--model", args.model, "--device", args.device),
        *("--input-size", str(args.input_size), "--batch", str(args.batch)),
    )
    environment = found_from({**os.environ, **{cache: f"{caches}/{cache}" for cache in CACHES}})
    command = [sys.executable, "-m", "benchmarks.speed.first_use", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(name: str, args: argparse.Namespace) -> Iterator[measure.Row]:
    """A row with cold caches, and one with warm ones."""
    with tempfile.TemporaryDirectory() as caches:
        for state in ("cold", "warm"):
            seconds = in_a_process(name, caches, args)
            until = sum(seconds.values()) - seconds["second"]
            yield {"model": args.model, "contender": name, "caches": state, **seconds, "until_first": until}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--model", choices=list(training.ditkernels.DiT_models), default="DiT-XL/2")
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=32)
    known = list(training.RECIPES)
    parser.add_argument(
        "--contenders",
        type=measure.names_among(known),
        default=["ours-bf16", "ours-compiled-bf16", "eager-bf16", "compiled-bf16"],
        help=", ".join(known),
    )
    parser.add_argument("--begin", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.begin is not None:
        print(json.dumps(begin(args)))
        return
    journal = measure.Journal("first_use", args)
    for name in args.contenders:
        journal.unit(name, rows_of, name, args)
    journal.close(("model", "contender", "caches", "imported", "built", *STEPS, "until_first"))


if __name__ == "__main__":
    main()
