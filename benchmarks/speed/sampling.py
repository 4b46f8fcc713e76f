"""Guided images a second of a DiT: the sampler against the public loop, plain and compiled, in one run.

    python -m benchmarks.speed.sampling --json benchmarks/results/sampling.json     DiT-XL/2 at 256 px
    python -m benchmarks.speed.sampling --device cpu --threads 1,2 --processes 5    sizes that a CPU can bear, five processes

The public loop is what people run: the model's ``forward_with_cfg`` on the doubled batch, one solver's step after another. The
sampler is ``ditkernels.sample``: modulation computed ahead, and on a GPU a CUDA graph, captured anew for every batch.
``ahead`` is the sampler with the plain model.

How time is taken. A drawing of N steps takes ``fixed + N · step``. Whole drawings of the two ``--lengths`` are timed, by the clock
on the wall, and both numbers follow from the pair: milliseconds a step (median, 10th and 90th percentile over rounds), and what
a drawing costs beside its steps (starting noise, the capture of the graph). The drawings of ``--steps`` and their images a second
are computed from the two of each round; one of 250 steps is not run. Contenders take turns within a round, and ``over_eager`` and
``over_ahead`` say how many times as fast a drawing is as the public loop's and as ahead's of its precision, in the same rounds.

Before anything is timed, each of our contenders draws a few steps at the very batch that will be timed, graph and compilation
included. Where its images stray further from those in fp64 than the numerical contract allows a whole model, given how far plain
PyTorch strays at the same precision, it gets no speed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import measure, training
from benchmarks.speed.measure import Contender
from ditkernels import reference
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.rng import Stream, normals
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.denoiser import MODULATION_BYTES
from ditkernels.sampling.drawing import sample

SCALE = 4.0
GATE_STEPS = 3
GATE_ULPS = 64.0  # in fp32, where the plain trajectory has hardly strayed: a step is a whole model, some tens of roundings deep


class Recipe(NamedTuple):
    """How a contender draws.

    Attributes:
        fused: our model rather than the reference.
        precision: "fp32", "tf32", "bf16" (autocast over fp32 weights) or "bf16-weights".
        loop: "public" or "sampler".
        compiled: None, the mode that each block is compiled in, or "whole" for one graph of the model, in "reduce-overhead".
    """

    fused: bool
    precision: str
    loop: str = "public"
    compiled: str | None = None
    residual_dtype: torch.dtype | None = None

    @property
    def weights(self) -> torch.dtype:
        """What the weights are kept in."""
        return torch.bfloat16 if self.precision == "bf16-weights" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a drawing runs under."""
        if self.precision != "bf16":
            return nullcontext()
        # What a graph captures must not be a cast that autocast remembers and frees.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=self.loop == "public")


RECIPES = {
    "eager-fp32": Recipe(False, "fp32"),
    "eager-tf32": Recipe(False, "tf32"),
    "eager-bf16": Recipe(False, "bf16"),
    "eager-bf16-weights": Recipe(False, "bf16-weights"),
    "compiled-bf16": Recipe(False, "bf16", compiled="default"),
    "compiled-bf16-weights": Recipe(False, "bf16-weights", compiled="default"),
    "max-autotune-bf16-weights": Recipe(False, "bf16-weights", compiled="max-autotune-no-cudagraphs"),
    "whole-compiled-bf16-weights": Recipe(False, "bf16-weights", compiled="whole"),
    "ahead-fp32": Recipe(False, "fp32", "sampler"),
    "ahead-bf16": Recipe(False, "bf16", "sampler"),
    "ours-fp32": Recipe(True, "fp32"),
    "ours-bf16": Recipe(True, "bf16"),
    "ours-bf16-weights": Recipe(True, "bf16-weights"),
    "ours-compiled-bf16-weights": Recipe(True, "bf16-weights", compiled="default"),
    "sampler-fp32": Recipe(True, "fp32", "sampler"),
    "sampler-bf16": Recipe(True, "bf16", "sampler"),
    "sampler-bf16-weights": Recipe(True, "bf16-weights", "sampler"),
    "sampler-compiled-bf16-weights": Recipe(True, "bf16-weights", "sampler", "default"),
}

Draw = Callable[[int, int], Tensor]
"""(steps, seed) -> images (B, C, H, W)."""

# ---- Drawing ---------------------------------------------------------------------------------------------------------


def public_loop(
    model: reference.DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor,
    config: SampleConfig,
    dtype: torch.dtype,
) -> Tensor:
    """Guided sampling, the batch doubled and everything computed at every step; states in ``dtype``.

    Noise is the sampler's where a gate compares the two; its cost is part of a DDPM step in both.
    """
    batch, weights = len(labels), model.pos_embed.dtype
    doubled = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    indices = torch.arange(batch, device=labels.device)
    shape = (model.in_channels, *model.input_size)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([x, x]).to(weights)
        return model.forward_with_cfg(both, torch.cat([t, t]), doubled, config.guidance_scale)[:batch].to(dtype)

    x = normals(config.seed, Stream.SAMPLING_NOISE, 0, indices, shape).to(dtype)
    for taken, index in enumerate(reversed(range(diffusion.num_timesteps)), start=1):
        t = torch.full_like(labels, index)
        if config.solver == "ddim":
            x = diffusion.ddim_sample(predict, x, t, clip_denoised=False)["sample"]
        else:
            noise = normals(config.seed, Stream.SAMPLING_NOISE, taken, indices, shape).to(dtype)
            x = diffusion.p_sample(predict, x, t, clip_denoised=False, noise=noise)["sample"]
    return x


def drawing(recipe: Recipe, model: reference.DiT, labels: Tensor, solver: str, dtype: torch.dtype = torch.float32) -> Draw:
    """What a contender does; the model is one of its recipe."""
    # The sampler reads modulation computed ahead through copies of the blocks, which torch.compile does not follow.
    ahead = 0 if recipe.compiled is not None else MODULATION_BYTES

    @torch.no_grad()
    def draw(steps: int, seed: int) -> Tensor:
        config = SampleConfig(solver, SCALE, seed=seed)
        diffusion = create_diffusion(str(steps))
        with _matmul_precision(recipe.precision), recipe.autocast(labels.device):
            if recipe.loop == "public":
                return public_loop(model, diffusion, labels, config, dtype)
            return sample(model, diffusion, labels, config, modulation_bytes=ahead)

    return draw


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build(recipe: Recipe, args: argparse.Namespace, device: torch.device) -> reference.DiT:
    """The contender's model, compiled if it says so."""
    model = training.build(recipe, args, device).eval().to(recipe.weights)
    if recipe.compiled == "whole":
        # forward_with_cfg calls forward and not the module.
        model.forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)  # type: ignore[method-assign]
    elif recipe.compiled is not None:
        training.compile_blocks(model, recipe.compiled)
    return model


# ---- Gate ------------------------------------------------------------------------------------------------------------


class Gate:
    """The images of a few steps in fp64, and how far plain PyTorch strays from them at each precision."""

    def __init__(self, args: argparse.Namespace, labels: Tensor) -> None:
        self._args, self._labels = args, labels
        plain = training.build(RECIPES["eager-fp32"], args, labels.device).eval().double()
        exact = drawing(RECIPES["eager-fp32"], plain, labels, args.solver, torch.float64)
        self._exact = exact(GATE_STEPS, 0)
        self._strayed: dict[str, float] = {}

    def ratio(self, recipe: Recipe, draw: Draw) -> float:
        """Error over the error allowed."""
        if recipe.precision not in self._strayed:
            plain = Recipe(False, recipe.precision)
            model = build(plain, self._args, self._labels.device)
            low = drawing(plain, model, self._labels, self._args.solver)
            self._strayed[recipe.precision] = self._error(low)
        rounding = GATE_ULPS * torch.finfo(torch.float32).eps * self._exact.abs().max().item()
        return self._error(draw) / (training.CONTRACT_FACTOR * self._strayed[recipe.precision] + rounding)

    def _error(self, draw: Draw) -> float:
        return (draw(GATE_STEPS, 0).double() - self._exact).abs().max().item()


# ---- Timing ----------------------------------------------------------------------------------------------------------


def rows_at(batch: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All contenders at one batch size."""
    device = measure.device_of(args)
    _collect(device)
    labels = torch.arange(batch, device=device) % 1000
    gate = Gate(args, labels)
    draws: dict[str, Draw] = {}
    ratios: dict[str, float] = {}
    for name in args.contenders:
        recipe = RECIPES[name]
        common = _common(name, batch, args)
        try:
            draw = drawing(recipe, build(recipe, args, device), labels, args.solver)
            ratio = gate.ratio(recipe, draw) if recipe.fused or recipe.loop == "sampler" else None
        except torch.OutOfMemoryError:
            _collect(device)
            yield {**common, "note": "out of memory"}
            continue
        if ratio is not None and not ratio <= 1:
            yield {**common, "note": f"WRONG: {ratio:.1f} x the error allowed"}
            continue
        draws[name] = draw
        ratios |= {} if ratio is None else {name: ratio}
    walls = _walls(draws, args, device)
    for name in walls:
        yield from (
            {**_common(name, batch, args), **speed(name, steps, batch, walls, args, ratios.get(name))} for steps in args.steps
        )


def _common(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    graphs = RECIPES[name].loop == "sampler" and measure.device_of(args).type == "cuda"
    return {
        "model": args.model,
        "input_size": args.input_size,
        "solver": args.solver,
        "contender": name,
        "precision": RECIPES[name].precision,
        "batch": batch,
        "cuda_graphs": graphs,
    }


def _walls(draws: dict[str, Draw], args: argparse.Namespace, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """By contender: milliseconds of a short and of a long drawing, a pair a round."""
    contenders = [
        Contender(f"{name} {length}", lambda seed, draw=draw, length=length: draw(length, seed))
        for name, draw in draws.items()
        for length in args.lengths
    ]
    taken = measure.interleaved_walls(contenders, device, rounds=args.rounds)
    short, long = args.lengths
    return {name: list(zip(taken[f"{name} {short}"], taken[f"{name} {long}"])) for name in draws}


def speed(
    name: str,
    steps: int,
    batch: int,
    walls: dict[str, list[tuple[float, float]]],
    args: argparse.Namespace,
    ratio: float | None,
) -> measure.Row:
    """What a row says of a contender's drawings of so many steps."""
    short, long = args.lengths

    def drawing_of(short_ms: float, long_ms: float) -> float:
        return short_ms + (steps - short) * (long_ms - short_ms) / (long - short)

    step = measure.timing([(b - a) / (long - short) for a, b in walls[name]])
    drawings = {other: [drawing_of(a, b) for a, b in pairs] for other, pairs in walls.items()}
    drawing_ms = statistics.median(drawings[name])
    baselines = {word: f"{word}-{RECIPES[name].precision}" for word in ("eager", "ahead")}
    return {
        "steps": steps,
        **step._asdict(),
        "fixed_ms": statistics.median(a for a, _ in walls[name]) - short * step.median_ms,
        "drawing_ms": drawing_ms,
        "images_per_s": 1e3 * batch / drawing_ms,
        "timed_steps": list(args.lengths),
        **measure.gains(drawings, name, baselines),
        "error_over_allowed": ratio,
    }


def _collect(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """All contenders at every batch size."""
    for batch in args.batches:
        journal.unit(f"batch {batch}", rows_at, batch, args)


def lengths(text: str) -> list[int]:
    """An argparse type: two numbers of steps, the shorter first."""
    found = measure.numbers(text)
    if len(found) != 2 or not 2 <= found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"got {text}, allowed are two numbers of steps, 2 or more, the smaller first")
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.repeatable(measure.resumable(measure.parser(__doc__)))
    parser.set_defaults(rounds=5)
    parser.add_argument("--model", type=training.model_name, default="DiT-XL/2", help="a name, or WIDTHxDEPTH/PATCH")
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batches", type=measure.numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=measure.numbers, default=[50, 250], help="of a whole drawing")
    parser.add_argument("--lengths", type=lengths, default=[5, 25], help="steps of the drawings that are timed")
    parser.add_argument("--solver", choices=("ddim", "ddpm"), default="ddim")
    parser.add_argument("--contenders", type=measure.names_among(RECIPES), default=list(RECIPES), help=", ".join(RECIPES))
    args = measure.arguments(
        parser,
        argv,
        model="256x8/4",
        input_size=16,
        batches=[1, 8],
        steps=[5, 20],
        lengths=[5, 20],
        contenders=["eager-fp32", "ahead-fp32", "ours-fp32", "sampler-fp32"],
    )
    columns = (
        *("contender", "batch", "steps", "median_ms", "low_ms", "high_ms", "fixed_ms", "drawing_ms"),
        *("images_per_s", "over_eager", "over_ahead", "error_over_allowed", "note"),
    )
    measure.carry_out("sampling", args, argv, measure_all, columns)


if __name__ == "__main__":
    main()
