"""Images a second of the sampler against the plain loop, on a CPU, paired in one run; and how both grow with steps and batch.

    python benchmarks/sampling_cpu.py --json benchmarks/results/sampling-cpu.json

The plain loop is what people run: the reference DiT, ``forward_with_cfg`` and ``ddim_sample`` step by step. The
sampler draws the same images, with the same reference model, its modulation computed ahead (``ahead``), and with the
fused one (``ahead, fused``), whose ops run on PyTorch's own kernels on a CPU. The three take turns; the result is the
median over rounds, and the gain the median of the rounds' ratios. ``cpu_gain`` is the same of processor time, which
other processes on the machine disturb less. A sampler whose images stray from the plain loop's gets no speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor, nn

from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.models import DiT as FusedDiT
from ditkernels.random import Stream, normals
from ditkernels.reference import DiT
from ditkernels.sampler import SampleConfig, sample

SCALE, CLASSES = 3.0, 10
# Of the images, relative to the largest value: two fp32 paths through all steps of a random model of this size.
ALLOWED = 1e-3


def models(args: argparse.Namespace) -> tuple[DiT, FusedDiT]:
    """A plain and a fused DiT of the same random weights, no layer of them zero."""
    sizes = (args.input_size, args.patch_size, 4, args.width, args.depth, args.width // 64 or 1)
    plain, fused = DiT(*sizes, num_classes=CLASSES), FusedDiT(*sizes, num_classes=CLASSES)
    torch.manual_seed(0)
    for parameter in plain.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    fused.load_state_dict(plain.state_dict())
    return plain.eval(), fused.eval()


@torch.no_grad()
def plain_loop(model: DiT, diffusion: GaussianDiffusion, labels: Tensor, seed: int) -> Tensor:
    """The public recipe: guided DDIM, the batch doubled, everything computed at every step."""
    doubled = torch.cat([labels, torch.full_like(labels, CLASSES)])
    shape = (model.in_channels, *model.input_size)
    x = normals(seed, Stream.SAMPLING_NOISE, 0, torch.arange(len(labels)), shape)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), doubled, SCALE)[: len(x)]

    for index in reversed(range(diffusion.num_timesteps)):
        t = torch.full_like(labels, index)
        x = diffusion.ddim_sample(predict, x, t, clip_denoised=False)["sample"]
    return x


def contenders(args: argparse.Namespace, steps: int, batch: int) -> dict[str, Callable[[int], Tensor]]:
    """By name: from a seed to images."""
    plain, fused = models(args)
    diffusion = create_diffusion(str(steps))
    labels = torch.arange(batch) % CLASSES

    def sampler(model: DiT) -> Callable[[int], Tensor]:
        return lambda seed: sample(model, diffusion, labels, SampleConfig("ddim", SCALE, seed=seed))

    return {
        "plain loop": lambda seed: plain_loop(plain, diffusion, labels, seed),
        "ahead": sampler(plain),
        "ahead, fused": sampler(fused),
    }


class Taken(NamedTuple):
    """Milliseconds of one drawing: by the clock, and of the processor."""

    wall: float
    processor: float


def row(name: str, steps: int, batch: int, taken: dict[str, list[Taken]]) -> dict[str, Any]:
    """What was found of one contender."""
    walls = [one.wall for one in taken[name]]
    pairs = list(zip(taken["plain loop"], taken[name]))
    return {
        "contender": name,
        "steps": steps,
        "batch": batch,
        "median_ms": statistics.median(walls),
        "low_ms": min(walls),
        "high_ms": max(walls),
        "images_per_s": 1e3 * batch / statistics.median(walls),
        "gain": statistics.median(plain.wall / own.wall for plain, own in pairs),
        "cpu_gain": statistics.median(plain.processor / own.processor for plain, own in pairs),
    }


def clocked(draw: Callable[[int], Tensor], seed: int) -> Taken:
    """Draws once."""
    wall, processor = time.perf_counter(), time.process_time()
    draw(seed)
    return Taken(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor))


def timed(args: argparse.Namespace, steps: int, batch: int) -> list[dict[str, Any]]:
    """Rows of the contenders, timed in turns."""
    drawing = contenders(args, steps, batch)
    wanted = drawing["plain loop"](0)
    for name, draw in drawing.items():
        error = ((draw(0) - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= ALLOWED:
            raise SystemExit(f"{name}: images stray by {error:.1e} from the plain loop's, allowed {ALLOWED:.0e}")
    taken: dict[str, list[Taken]] = {name: [] for name in drawing}
    for seed in range(args.rounds):
        for name, draw in drawing.items():
            taken[name].append(clocked(draw, seed))
    return [row(name, steps, batch, taken) for name in drawing]


def main() -> None:
    parser = measure.parser(__doc__)
    parser.set_defaults(device="cpu", rounds=5)
    parser.add_argument("--width", type=measure.positive, default=256)
    parser.add_argument("--depth", type=measure.positive, default=8)
    parser.add_argument("--input-size", type=measure.positive, default=16)
    parser.add_argument("--patch-size", type=measure.positive, default=4)
    parser.add_argument("--steps", type=measure.numbers, default=[5, 10, 20])
    parser.add_argument("--batches", type=measure.numbers, default=[1, 4, 16])
    parser.add_argument("--threads", type=measure.positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for steps in args.steps:
        for batch in args.batches:
            rows += timed(args, steps, batch)
    columns = ["contender", "steps", "batch", "median_ms", "images_per_s", "gain", "cpu_gain"]
    measure.report("sampling_cpu", args, rows, columns)


if __name__ == "__main__":
    main()
