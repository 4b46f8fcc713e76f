"""Seconds until the first training step, each contender in processes of its own: what a user waits for after pressing return.

    python -m benchmarks.speed.first_use --json first_use.json    DiT-XL/2 at 256 px, bf16
    python -m benchmarks.speed.first_use --contenders ours-bf16 --model DiT-B/4
    python -m benchmarks.speed.first_use --device cpu --model 384x6/2 --input-size 16 --batch 2 --starts 9 \\
        --contenders compiled-fp32,ours-compiled-fp32 --json benchmarks/results/first_use.json

Each contender begins ``cold``, with empty caches of Triton's and Inductor's kernels, and then ``warm``, with those that the first
left. Warm starts take turns over the contenders, ``--starts`` times, and their seconds are medians. Seconds of the clock:
``imported`` from the start of the process until all is imported, ``built`` until the model and its optimizer are on the device,
``first`` and ``second`` for the first two steps, a step's end waited for. ``over_eager`` and ``over_compiled`` say how many times
as fast a contender's first step is as the plain one of its precision, as the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

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


def in_a_process(name: str, caches: Path, args: argparse.Namespace) -> dict[str, float]:
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


def cold_row(name: str, caches: Path, args: argparse.Namespace) -> Iterator[measure.Row]:
    """The row of the start that fills the contender's caches."""
    shutil.rmtree(caches / name, ignore_errors=True)
    yield row_of(name, "cold", [in_a_process(name, caches / name, args)], args)


def warm_rows(caches: Path, args: argparse.Namespace) -> Iterator[measure.Row]:
    """A row for each contender, all of which have filled their caches."""
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    for _ in range(args.starts):
        for name, found in starts.items():
            found.append(in_a_process(name, caches / name, args))
    first = {name: [seconds["first"] for seconds in found] for name, found in starts.items()}
    for name, found in starts.items():
        baselines = {word: f"{word}-{training.RECIPES[name].precision}" for word in ("eager", "compiled")}
        yield row_of(name, "warm", found, args) | measure.gains(first, name, baselines)


def row_of(name: str, caches: str, starts: list[dict[str, float]], args: argparse.Namespace) -> measure.Row:
    """The medians over a contender's starts."""
    until = [sum(seconds.values()) - seconds["second"] for seconds in starts]
    medians = {part: statistics.median(seconds[part] for seconds in starts) for part in starts[0]}
    row = {"model": args.model, "contender": name, "caches": caches, "starts": len(starts), **medians}
    return {**row, "until_first": statistics.median(until)}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--model", type=training.model_name, default="DiT-XL/2", help="a name, or WIDTHxDEPTH/PATCH")
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=32)
    known = list(training.RECIPES)
    parser.add_argument(
        "--contenders",
        type=measure.names_among(known),
        default=["ours-bf16", "ours-compiled-bf16", "eager-bf16", "compiled-bf16"],
        help=", ".join(known),
    )
    parser.add_argument("--starts", type=measure.positive, default=1, help="warm ones of each contender")
    parser.add_argument("--begin", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.begin is not None:
        print(json.dumps(begin(args)))
        return
    journal = measure.Journal("first_use", args)
    with measure.folder_beside(args.json) as caches:
        for name in args.contenders:
            journal.unit(f"{name} cold", cold_row, name, caches, args)
        journal.unit("warm", warm_rows, caches, args)
    gains = ("over_eager", "over_compiled")
    journal.close(("model", "contender", "caches", "imported", "built", *STEPS, "until_first", *gains))


if __name__ == "__main__":
    main()
