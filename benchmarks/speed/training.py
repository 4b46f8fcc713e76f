"""A whole training step of a DiT: loss, backward, AdamW and the moving average, ours against plain and compiled PyTorch.

    python -m benchmarks.speed.training --json benchmarks/results/training.json     DiT-XL/2 at 256 px, batch 256
    python -m benchmarks.speed.training --device cpu --threads 1,2 --processes 5    sizes that a CPU can bear, five processes

Each contender runs at the largest of ``--batches`` that fits. Images/s is what counts, because the batches differ. Gflops are
multiply-adds, as in the paper, three times the forward's; MFU is twice that over ``--peak-tflops``, or over the rate this
device reached on the largest product of the first model, measured in the same run; ``forward`` and ``forward+backward`` are passes
without what follows them in a step. ``residual`` is the dtype of the stream
between the blocks: fp32 in the plain model, under autocast too; what a bf16 one saves stands in rows of its own. On a GPU
contenders are built, timed and thrown away one by one, for two models of this size do not fit side by side; ``--repeats`` goes
through all of them again. On a CPU they take turns, and ``over_eager`` and ``over_compiled`` say how many times as fast a contender
is as the plain one of its precision, in the same rounds.

A model whose output strays from the fp64 one more than the numerical contract allows a model gets no speed.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import ditkernels
from benchmarks.speed import measure
from benchmarks.speed.ceilings import DTYPES, product_shapes
from benchmarks.speed.measure import Contender
from ditkernels import reference
from ditkernels.diffusion import create_diffusion
from ditkernels.models import count
from ditkernels.ops import dispatch
from ditkernels.ops.mlp import ALIGNED, reason
from ditkernels.training.ema import EMA
from ditkernels.training.master_weights import make_bf16_copies, move_grads_to_masters
from ditkernels.training.optimizer import AdamWEMA

CONTRACT_FACTOR, CONTRACT_ULPS = 4.0, 2.0  # what the numerical contract allows a whole model
GATE_BATCH = 2
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999
MULTIPLY_ADDS = {"forward": 1, "forward+backward": 3, "step": 3}  # by pass, in those of a forward
SIZE = re.compile(r"(\d+)x(\d+)/(\d+)")


class Network(NamedTuple):
    """Which model: its name as ``constructor`` knows it, and the edge of the latents."""

    model: str
    input_size: int


class Recipe(NamedTuple):
    """How a contender trains.

    Attributes:
        fused: our model rather than the reference.
        precision: "fp32", "tf32" or "bf16"; bf16 is autocast over fp32 weights.
        compiled: None, or the mode that each block is compiled in.
        residual_dtype: of our model's residual stream; None is the plain model's.
        checkpointing: of our model's activations: what is recomputed in the backward to save memory.
        master_weights: whether bf16 matrices compute, whose masters one pass updates together with the moving average.
        epilogues: whether GELU is an epilogue of the MLPs' products, which is not chosen unasked before it has been measured.
    """

    fused: bool
    precision: str
    compiled: str | None = None
    residual_dtype: torch.dtype | None = None
    checkpointing: str = "none"
    master_weights: bool = False
    epilogues: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the forward runs under."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def choices(self) -> AbstractContextManager[Any]:
        """What a step is built and run under."""
        return _mlps_on_cuda() if self.epilogues else nullcontext()


@contextmanager
def _mlps_on_cuda() -> Iterator[None]:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else ()
    winners = {(".".join(map(str, capability)), op): "cuda" for op in ("mlp", "mlp_backward")}
    with mock.patch.dict(dispatch.PREFERRED, winners):
        dispatch.forget()
        yield
    dispatch.forget()


RECIPES = {
    "eager-fp32": Recipe(False, "fp32"),
    "eager-tf32": Recipe(False, "tf32"),
    "eager-bf16": Recipe(False, "bf16"),
    "compiled-fp32": Recipe(False, "fp32", "default"),
    "compiled-tf32": Recipe(False, "tf32", "default"),
    "compiled-bf16": Recipe(False, "bf16", "default"),
    "max-autotune-bf16": Recipe(False, "bf16", "max-autotune-no-cudagraphs"),
    "ours-bf16": Recipe(True, "bf16"),
    "ours-bf16-residual": Recipe(True, "bf16", residual_dtype=torch.bfloat16),
    "ours-compiled-bf16": Recipe(True, "bf16", "default"),
    "ours-compiled-bf16-residual": Recipe(True, "bf16", "default", torch.bfloat16),
    "ours-max-autotune-bf16": Recipe(True, "bf16", "max-autotune-no-cudagraphs"),
    "ours-bf16-residual-masters": Recipe(True, "bf16", residual_dtype=torch.bfloat16, master_weights=True),
    "ours-bf16-residual-epilogues": Recipe(True, "bf16", residual_dtype=torch.bfloat16, epilogues=True),
    "ours-bf16-selective": Recipe(True, "bf16", checkpointing="selective"),
    "ours-bf16-full": Recipe(True, "bf16", checkpointing="full"),
    "ours-fp32": Recipe(True, "fp32"),
    "ours-compiled-fp32": Recipe(True, "fp32", "default"),
}
ON_CPU = ["eager-fp32", "ours-fp32", "compiled-fp32", "ours-compiled-fp32"]


class Batch(NamedTuple):
    """Latents (B, C, H, W), timesteps (B,), labels (B,)."""

    x: Tensor
    t: Tensor
    y: Tensor


def constructor(name: str, fused: bool) -> Callable[..., reference.DiT]:
    """What builds a model of the paper, or one of a size of its own: WIDTHxDEPTH/PATCH, with heads of 64 channels."""
    size = SIZE.fullmatch(name)
    if size is None:
        return (ditkernels.DiT_models if fused else reference.DiT_models)[name]
    width, depth, patch_size = map(int, size.groups())
    model = ditkernels.models.DiT if fused else reference.DiT
    return partial(model, patch_size=patch_size, hidden_size=width, depth=depth, num_heads=max(1, width // 64))


def build(recipe: Any, network: Any, device: torch.device) -> reference.DiT:
    """The contender's model with random weights, the same for all: adaLN-Zero's zeros would hide half of the work.

    Args:
        recipe: says whether it is ``fused``, and its ``residual_dtype``.
        network: names the ``model`` and the ``input_size``.
    """
    torch.manual_seed(0)
    options = {"residual_dtype": recipe.residual_dtype} if recipe.fused else {}
    with device:  # made where it will be: an XL takes many seconds to initialise on a host
        model = constructor(network.model, recipe.fused)(input_size=network.input_size, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)
    return model.to(device)


def compile_blocks(model: reference.DiT, mode: str) -> None:
    """Each block by itself, as one compiles a model of this size; the ends too."""
    for part in (*model.blocks, model.final_layer):
        part.compile(mode=mode, dynamic=False)


def batches(size: int, model: reference.DiT, device: torch.device) -> list[Batch]:
    """Two random batches, to take in turns."""
    shape = (size, model.in_channels, *model.input_size)
    return [
        Batch(
            torch.randn(shape, device=device),
            torch.randint(1000, (size,), device=device),
            torch.randint(model.num_classes, (size,), device=device),
        )
        for _ in range(2)
    ]


def gate(recipe: Recipe, network: Any, device: torch.device) -> float:
    """Error of the contender's output over the error allowed, against plain PyTorch at the same precision and in fp64."""
    model = build(recipe, network, device).eval()
    plain = build(Recipe(False, recipe.precision), network, device).eval()
    x, t, y = batches(GATE_BATCH, plain, device)[0]
    with torch.no_grad():
        with recipe.autocast(device):
            actual, low = model(x, t, y), plain(x, t, y)
        exact = plain.double()(x.double(), t, y)
    error, plain_error = ((found.double() - exact).abs().max().item() for found in (actual, low))
    rounding = CONTRACT_ULPS * torch.finfo(low.dtype).eps * exact.abs().max().item()
    return error / (CONTRACT_FACTOR * plain_error + rounding)


class Step:
    """A training step, and everything it keeps between steps."""

    def __init__(self, recipe: Recipe, network: Any, device: torch.device, batch: int) -> None:
        self.recipe, self.device = recipe, device
        self.model = build(recipe, network, device).train()
        if recipe.fused:
            self.model.checkpointing = recipe.checkpointing  # type: ignore[assignment]
        self.batches = batches(batch, self.model, device)
        self.diffusion = create_diffusion("")
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.computing = self.prepare()
        if recipe.compiled is not None:
            compile_blocks(self.computing, recipe.compiled)

    def prepare(self) -> reference.DiT:
        """Makes the optimizer; returns the model that computes."""
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        return self.model

    def update(self) -> None:
        """The optimizer's step, and the moving average's."""
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - EMA_DECAY)

    def forward(self, index: int) -> Tensor:
        """The loss of a batch."""
        # It is a setting of the process, in which other contenders may have had their turn.
        torch.set_float32_matmul_precision("high" if self.recipe.precision == "tf32" else "highest")
        x, t, y = self.batches[index % len(self.batches)]
        with self.recipe.autocast(self.device):
            return self.diffusion.training_losses(self.computing, x, t, model_kwargs={"y": y})["loss"].mean()

    def forward_and_backward(self, index: int) -> None:
        """The gradients of a batch, which are thrown away."""
        self.forward(index).backward()
        self.computing.zero_grad(set_to_none=True)

    def __call__(self, index: int) -> None:
        self.forward(index).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def contender(self, name: str, which: str) -> Contender:
        """What is to be timed in a pass."""
        passes = {"forward": self.forward, "forward+backward": self.forward_and_backward, "step": self}
        return Contender(name, passes[which])


class MasterStep(Step):
    """A training step with master weights."""

    def prepare(self) -> reference.DiT:
        computing, self.copies = make_bf16_copies(self.model)
        average = EMA(self.model, EMA_DECAY)
        self.optimizer = AdamWEMA(self.weights, average, self.copies, lr=LEARNING_RATE, weight_decay=0.0)
        return computing

    def update(self) -> None:
        move_grads_to_masters(self.copies)
        self.optimizer.step()


class Ready(NamedTuple):
    """A contender that can be timed: a step at its batch, and the error of its output over the error allowed."""

    step: Step
    batch: int
    ratio: float | None


def largest(recipe: Recipe, network: Network, sizes: list[int], device: torch.device) -> tuple[Step, int] | None:
    """The contender at the largest batch that fits, or None if none does."""
    for batch in sorted(sizes, reverse=True):
        _collect(device)
        try:
            step = (MasterStep if recipe.master_weights else Step)(recipe, network, device, batch)
        except torch.OutOfMemoryError:
            continue
        if measure.fits(Contender("", step)):
            return step, batch
        del step
    return None


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def made_ready(name: str, network: Network, args: argparse.Namespace, device: torch.device) -> Ready | str:
    """A contender, built and held to the contract; or why it has no speed."""
    recipe = RECIPES[name]
    ratio = None
    if recipe.epilogues:
        # Of sizes that suit: those of all models do.
        refusal = reason(device, torch.bfloat16, *[ALIGNED] * 3)
        if refusal is not None:
            return f"cannot serve: {refusal}"
    if recipe.fused:
        torch.set_float32_matmul_precision("high" if recipe.precision == "tf32" else "highest")
        ratio = gate(recipe, network, device)
        if not ratio <= 1:
            return f"WRONG: {ratio:.1f} x the error allowed"
    found = largest(recipe, network, args.batches, device)
    return "out of memory at every batch" if found is None else Ready(*found, ratio)


def common_of(name: str, network: Network) -> measure.Row:
    """What a row says of its contender."""
    recipe = RECIPES[name]
    residual = "bf16" if recipe.residual_dtype == torch.bfloat16 else "fp32"
    named = {"contender": name, "precision": recipe.precision, "residual": residual, "compiled": recipe.compiled}
    return {**network._asdict(), **named}


def rows_together(names: list[str], network: Network, args: argparse.Namespace, peak: float) -> Iterator[measure.Row]:
    """Contenders, built, gated, timed in turns and thrown away."""
    device = measure.device_of(args)
    _collect(device)
    torch._dynamo.reset()
    ready: dict[str, Ready] = {}
    for name in names:
        found = made_ready(name, network, args, device)
        if isinstance(found, str):
            yield {**common_of(name, network), "note": found}
        else:
            ready[name] = found
    for which in args.passes:
        contenders = [one.step.contender(name, which) for name, one in ready.items()]
        # One round warms up, for whatever is compiled has been when the batch was tried.
        samples = measure.paired(contenders, device, rounds=args.rounds, warmup=1)
        for name, one in ready.items():
            yield {**common_of(name, network), **speed(name, which, one, samples, peak)}


def speed(name: str, which: str, ready: Ready, samples: dict[str, list[float]], peak: float) -> measure.Row:
    """What a row says of a contender's speed in a pass."""
    step, device = ready.step, ready.step.device
    timing = measure.timing(samples[name])
    macs = MULTIPLY_ADDS[which] * count(step.model).macs
    images = 1e3 * ready.batch / timing.median_ms
    return {
        "batch": ready.batch,
        "pass": which,
        **timing._asdict(),
        "images_per_s": images,
        "gflops_per_s": images * macs / 1e9,
        "mfu": 2 * images * macs / 1e12 / peak,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        **measure.gains(samples, name, {word: f"{word}-{step.recipe.precision}" for word in ("eager", "compiled")}),
        "error_over_allowed": ready.ratio,
    }


def product_row(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """TFLOP/s on the largest product of a block, or what is to stand for them, as multiply-adds."""
    with torch.device("meta"):
        model = constructor(args.models[0], fused=False)(input_size=args.input_sizes[0])
    shape = product_shapes(model, max(args.batches) * model.grid[0] * model.grid[1])["fc1"]
    device = measure.device_of(args)
    # Few CPUs multiply bf16; the rate of the others at it is no ceiling.
    dtype = DTYPES["fp32" if device.type == "cpu" else "bf16"]
    peak = args.peak_tflops or measure.matmul_rate(device, shape, dtype, rounds=args.rounds)
    yield {"contender": "product", "gflops_per_s": peak * 500, "mfu": 1.0}


def rows_of(names: list[str], network: Network, repeat: int, args: argparse.Namespace, peak: float) -> Iterator[dict[str, Any]]:
    """The rows of some contenders in one of their turns."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(RECIPES[name].choices())
        yield from ({**row, "repeat": repeat} for row in rows_together(names, network, args, peak))


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """All contenders on every model, as often as asked."""
    peak = journal.unit("product", product_row, args)[0]["gflops_per_s"] / 500
    on_cpu = measure.device_of(args).type == "cpu"
    together = [args.contenders] if on_cpu else [[name] for name in args.contenders]
    for repeat in range(args.repeats):
        for input_size in args.input_sizes:
            for model in args.models:
                for names in together:
                    unit = f"{model} {input_size} {','.join(names)} {repeat}"
                    journal.unit(unit, rows_of, names, Network(model, input_size), repeat, args, peak)


def model_name(text: str) -> str:
    """An argparse type: the name of a model of the paper, or the size of another."""
    return text if SIZE.fullmatch(text) else measure.names_among([*ditkernels.DiT_models, "WIDTHxDEPTH/PATCH"])(text)[0]


def models(text: str) -> list[str]:
    """An argparse type: names of models, or all of the paper's."""
    return list(ditkernels.DiT_models) if text == "all" else [model_name(name) for name in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.repeatable(measure.resumable(measure.parser(__doc__)))
    parser.add_argument("--models", type=models, default=["DiT-XL/2"], help="names or WIDTHxDEPTH/PATCH; or all twelve: all")
    parser.add_argument(
        "--input-sizes",
        type=measure.numbers,
        default=[32],
        help="edge of the latents: 32 is 256 px, 64 is 512 px",
    )
    parser.add_argument("--batches", type=measure.numbers, default=[256, 192, 128, 64, 32, 16])
    parser.add_argument("--peak-tflops", type=float, help="what MFU is a share of; default: measured")
    parser.add_argument("--repeats", type=measure.positive, default=1)
    parser.add_argument("--contenders", type=measure.names_among(RECIPES), default=list(RECIPES), help=", ".join(RECIPES))
    parser.add_argument("--passes", type=measure.names_among(MULTIPLY_ADDS), default=["step"], help=", ".join(MULTIPLY_ADDS))
    args = measure.arguments(
        parser, argv, rounds=7, models=["384x4/2"], batches=[4], contenders=ON_CPU, passes=["forward", "forward+backward"]
    )
    columns = (
        *("model", "input_size", "contender", "residual", "batch", "pass", "median_ms", "low_ms", "high_ms"),
        *("images_per_s", "gflops_per_s", "mfu", "peak_gib", "over_eager", "over_compiled", "note"),
    )
    measure.carry_out("training", args, argv, measure_all, columns)


if __name__ == "__main__":
    main()
