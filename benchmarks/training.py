"""A whole training step of a DiT: loss, backward, AdamW and the moving average, ours against plain and compiled PyTorch.

    python benchmarks/training.py --json benchmarks/results/training.json            DiT-XL/2 at 256 px, batch 256
    python benchmarks/training.py --models DiT-S/8 --batches 4 --rounds 3 --contenders eager-fp32,ours-bf16     a laptop

Each contender runs at the largest of ``--batches`` that fits. Images/s is what counts, because the batches differ. Gflops are
multiply-adds, as in the paper, three times the forward's; MFU is twice that over ``--peak-tflops``, or over the rate this
device reached on the largest product of the first model, measured in the same run. ``residual`` is the dtype of the stream
between the blocks: fp32 in the plain model, under autocast too; what a bf16 one saves stands in rows of its own. Contenders are
built, timed and thrown away one by one, for two models of this size do not fit side by side; ``--repeats`` goes through all of
them again.

A model whose output strays from the fp64 one more than the numerical contract allows a model gets no speed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import measure
import torch
from ceilings import DTYPES, product_shapes
from measure import Contender
from torch import Tensor

import ditkernels
from ditkernels import flops, reference
from ditkernels.diffusion import create_diffusion
from ditkernels.masters import hand_over, lowered
from ditkernels.ops import dispatch
from ditkernels.ops.mlp import ALIGNED, reason
from ditkernels.optimizer import EMA, AdamWEMA

CONTRACT_FACTOR, CONTRACT_ULPS = 4.0, 2.0  # what the numerical contract allows a whole model
GATE_BATCH = 2
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999


class Network(NamedTuple):
    """Which model: its name, and the edge of the latents."""

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
}


class Batch(NamedTuple):
    """Latents (B, C, H, W), timesteps (B,), labels (B,)."""

    x: Tensor
    t: Tensor
    y: Tensor


def build(recipe: Any, network: Any, device: torch.device) -> reference.DiT:
    """The contender's model with random weights, the same for all: adaLN-Zero's zeros would hide half of the work.

    Args:
        recipe: says whether it is ``fused``, and its ``residual_dtype``.
        network: names the ``model`` and the ``input_size``.
    """
    torch.manual_seed(0)
    models = ditkernels.DiT_models if recipe.fused else reference.DiT_models
    options = {"residual_dtype": recipe.residual_dtype} if recipe.fused else {}
    with device:  # made where it will be: an XL takes many seconds to initialise on a host
        model = models[network.model](input_size=network.input_size, **options)
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

    def __call__(self, index: int) -> None:
        x, t, y = self.batches[index % len(self.batches)]
        with self.recipe.autocast(self.device):
            loss = self.diffusion.training_losses(self.computing, x, t, model_kwargs={"y": y})["loss"].mean()
        loss.backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)


class MasterStep(Step):
    """A training step with master weights."""

    def prepare(self) -> reference.DiT:
        computing, self.copies = lowered(self.model, torch.bfloat16)
        average = EMA(self.model, EMA_DECAY)
        self.optimizer = AdamWEMA(self.weights, average, self.copies, lr=LEARNING_RATE, weight_decay=0.0)
        return computing

    def update(self) -> None:
        hand_over(self.copies)
        self.optimizer.step()


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


def row(name: str, network: Network, args: argparse.Namespace, device: torch.device, peak: float) -> dict[str, Any]:
    """One contender, built, gated, timed and thrown away."""
    _collect(device)
    torch._dynamo.reset()
    recipe = RECIPES[name]
    residual = "bf16" if recipe.residual_dtype == torch.bfloat16 else "fp32"
    common = {**network._asdict(), "contender": name, "residual": residual, "compiled": recipe.compiled}
    torch.set_float32_matmul_precision("high" if recipe.precision == "tf32" else "highest")
    ratio = None
    if recipe.epilogues:
        # Of sizes that suit: those of all models do.
        refusal = reason(device, torch.bfloat16, *[ALIGNED] * 3)
        if refusal is not None:
            return {**common, "note": f"cannot serve: {refusal}"}
    if recipe.fused:
        ratio = gate(recipe, network, device)
        if not ratio <= 1:
            return {**common, "note": f"WRONG: {ratio:.1f} x the error allowed"}
    found = largest(recipe, network, args.batches, device)
    if found is None:
        return {**common, "note": "out of memory at every batch"}
    step, batch = found
    timing = measure.interleaved([Contender(name, step)], device, rounds=args.rounds)[name]
    macs = 3 * flops.count(step.model).macs
    images = 1e3 * batch / timing.median_ms
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        **common,
        "batch": batch,
        **timing._asdict(),
        "images_per_s": images,
        "gflops_per_s": images * macs / 1e9,
        "mfu": 2 * images * macs / 1e12 / peak,
        "peak_gib": memory,
        "error_over_allowed": ratio,
    }


def product_row(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """TFLOP/s on the largest product of a block, or what is to stand for them, as multiply-adds."""
    with torch.device("meta"):
        model = reference.DiT_models[args.models[0]](input_size=args.input_sizes[0])
    shape = product_shapes(model, max(args.batches) * model.grid[0] * model.grid[1])["fc1"]
    peak = args.peak_tflops or measure.matmul_rate(measure.device_of(args), shape, DTYPES["bf16"], rounds=args.rounds)
    yield {"contender": "product", "gflops_per_s": peak * 500, "mfu": 1.0}


def rows_of(name: str, network: Network, repeat: int, args: argparse.Namespace, peak: float) -> Iterator[dict[str, Any]]:
    """The row of a contender in one of its turns."""
    with RECIPES[name].choices():
        made = row(name, network, args, measure.device_of(args), peak)
    yield {**made, "repeat": repeat}


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """All contenders on every model, as often as asked."""
    peak = journal.unit("product", product_row, args)[0]["gflops_per_s"] / 500
    for repeat in range(args.repeats):
        for input_size in args.input_sizes:
            for model in args.models:
                for name in args.contenders:
                    unit = f"{model} {input_size} {name} {repeat}"
                    journal.unit(unit, rows_of, name, Network(model, input_size), repeat, args, peak)


def models(text: str) -> list[str]:
    """An argparse type: names of models, or all."""
    known = list(ditkernels.DiT_models)
    return known if text == "all" else measure.names_among(known)(text)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--models", type=models, default=["DiT-XL/2"], help="names, or all twelve: all")
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
    args = parser.parse_args(argv)
    columns = (
        *("model", "input_size", "contender", "residual", "batch", "median_ms", "low_ms", "high_ms"),
        *("images_per_s", "gflops_per_s", "mfu", "peak_gib", "note"),
    )
    journal = measure.Journal("training", args)
    measure_all(args, journal)
    journal.close(columns)


if __name__ == "__main__":
    main()
