"""Seconds of one ``ditkernels.accelerate()`` of the public DiT, this checkout's beside another's, in processes that take turns.

    git worktree add /tmp/before 828b9ec
    python -m benchmarks.speed.accelerate_time --than /tmp/before --json benchmarks/results/accelerate_time.json

The models are those of examples/public_models.py of this checkout, in fp32 and with their own weights. A process makes the model,
then reads the clock around the call alone. The ratio of a turn is this checkout's seconds over the other's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.speed import measure
from ditkernels.models import DiT_models
from ditkernels.reference import SIZES
from tools.tree import ROOT

CHILD = """
import io, json, sys, time
sys.path.insert(0, sys.argv[2])
import torch
import ditkernels
from public_models import DiT
torch.set_num_threads(int(sys.argv[1]))
model = DiT(**json.loads(sys.argv[3])).to(sys.argv[4])
start = time.perf_counter()
report = ditkernels.accelerate(model, file=io.StringIO())
seconds = time.perf_counter() - start
assert ditkernels.__file__.startswith(sys.argv[5]), ditkernels.__file__
print(json.dumps({"seconds": seconds, "fused": len(report.fused), "left": len(report.left)}))
"""


def in_a_process(checkout: Path, settings: dict[str, int], device: str, threads: int) -> dict[str, float]:
    """Seconds of the call in ``checkout``, and how many parts it fused and left.

    Raises:
        RuntimeError: the process failed; the message has the end of what it said.
    """
    command = [sys.executable, "-c", CHILD, str(threads), str(ROOT / "examples"), json.dumps(settings), device, str(checkout)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    # From there: a module is first looked for where the process stands.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=checkout)
    if done.returncode:
        raise RuntimeError(f"accelerate() in {checkout} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(model: str, than: Path, threads: int, rounds: int, device: str) -> Iterator[measure.Row]:
    """A row a checkout, ours with the ratio, as medians over the turns."""
    size, patch_size = model.removeprefix("DiT-").split("/")
    settings = {"input_size": 32, "num_classes": 1000, "patch_size": int(patch_size), **SIZES[size]}
    turns = [
        {name: in_a_process(checkout, settings, device, threads) for name, checkout in (("other", than), ("ours", ROOT))}
        for _ in range(rounds)
    ]
    for name in ("other", "ours"):
        found = [turn[name] for turn in turns]
        row = {
            "model": model,
            "contender": name,
            "threads": threads,
            **found[-1],
            "seconds": statistics.median(f["seconds"] for f in found),
        }
        if name == "ours":
            row["over_other"] = statistics.median(turn["ours"]["seconds"] / turn["other"]["seconds"] for turn in turns)
        yield row


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--than", type=Path, required=True, metavar="CHECKOUT", help="a working tree of the commit to compare with")
    parser.add_argument("--model", choices=list(DiT_models), default="DiT-XL/2")
    parser.add_argument("--threads", type=measure.positive, default=1)
    args = parser.parse_args(argv)
    found = rows(args.model, args.than.resolve(), args.threads, args.rounds, str(measure.device_of(args)))
    measure.report("accelerate_time", args, found, ("model", "contender", "threads", "seconds", "fused", "left", "over_other"))


if __name__ == "__main__":
    main()
