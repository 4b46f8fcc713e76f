"""Where a training step's time goes, predicted: operations and bytes counted, speeds assumed.

    python -m benchmarks.predicted.cost_model                                  the twelve models at 256 px, batch 256
    python -m benchmarks.predicted.cost_model --models DiT-XL/2 --detail       one model, every kind of kernel
    python -m benchmarks.predicted.cost_model --tflops 700 --bandwidth 4000    another device
    python -m benchmarks.predicted.cost_model --docs docs/performance.md       writes that page's tables

No step is run. One forward and backward of the model passes through fake tensors, which have shapes and no values, while every
kernel is counted: a product by its operations, anything else by the bytes of its inputs and outputs, each once. Time is
operations over ``--tflops`` plus bytes over ``--bandwidth``: every kernel runs at the device's ceiling and none waits for its
launch, so a measured step is slower. What the models differ in is right all the same, because both are counted in one way.

The host enqueues the kernels of a step one by one. They are counted in a step of a narrow model of the same depth. Each kernel of
plain PyTorch is taken to cost the host ``--host-us``, and a step of ours ``--host-ratio`` of what a plain step costs. A batch whose
step on the device is shorter than that leaves the device waiting: the host bounds the model.

The optimizer reads weight, gradient and two moments and writes three of them back; the moving average reads two and writes
one: 40 bytes a parameter in all, 36 where one pass does both (``train --optimizer fused``). With master weights it is 36 too: a
gradient in bf16 saves two, the copy's write costs two; what is saved is in the moving.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import ditkernels
from benchmarks.speed import host, measure
from ditkernels import models, reference
from ditkernels.ops import _triton
from ditkernels.training.master_weights import make_bf16_copies

# An H200's, as design figures: 790 TFLOP/s of bf16 products, 4300 GB/s of copying. Assumed here, not measured.
ASSUMED_TFLOPS, ASSUMED_GBPS = 790.0, 4300.0
# What eager PyTorch's host needs for a kernel, autograd included: assumed. A step of ours needs about as much; host.py measures it.
ASSUMED_HOST_US, ASSUMED_HOST_RATIO = 8.0, 1.0
OPTIMIZER_BYTES, FUSED_OPTIMIZER_BYTES = 40, 36
FREE = {"aten::detach", "aten::empty_like", "aten::_unsafe_view", "prim::device"}
# Of products with epilogues: what they move beside operands and result, the argument of GELU, among outputs or arguments.
KEPT = {"mlp": (1, 1), "mlp_backward": (0, 4)}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train: which model, with which dtype of the residual stream, the bytes of its optimizer a parameter, whether its
    matrices are bf16 copies of master weights, and whether GELU is an epilogue of its MLPs' products."""

    models: Any
    options: dict[str, Any]
    optimizer_bytes: int = OPTIMIZER_BYTES
    master_weights: bool = False
    epilogues: bool = False


VARIANTS = {
    "plain": Variant(reference.DiT_models, {}),
    "ours": Variant(ditkernels.DiT_models, {}),
    "ours, bf16 residual": Variant(ditkernels.DiT_models, {"residual_dtype": torch.bfloat16}),
    "ours, bf16 residual, fused optimizer": Variant(
        ditkernels.DiT_models, {"residual_dtype": torch.bfloat16}, FUSED_OPTIMIZER_BYTES
    ),
    "ours, bf16 residual, fused optimizer, master weights": Variant(
        ditkernels.DiT_models, {"residual_dtype": torch.bfloat16}, FUSED_OPTIMIZER_BYTES, master_weights=True
    ),
    "ours, bf16 residual, fused optimizer, master weights, epilogues": Variant(
        ditkernels.DiT_models,
        {"residual_dtype": torch.bfloat16},
        FUSED_OPTIMIZER_BYTES,
        master_weights=True,
        epilogues=True,
    ),
}


@dataclasses.dataclass
class Counted:
    """What one step does.

    Attributes:
        operations: of products and attention, 2 a multiply-add.
        moved: bytes by kind of kernel, products and attention left out.
        optimizer: bytes that the optimizer and the moving average move.
    """

    operations: int
    moved: Counter[str]
    optimizer: int


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of every kernel that is neither a view nor a product."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        bare = name.partition("::")[2]
        if bare in KEPT:
            self.moved[name] += _footprint((args, out)[KEPT[bare][0]][KEPT[bare][1]])
        elif not func.is_view and name not in FREE and bare not in PRODUCTS and "attention" not in bare:
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
            self.moved[name] += sum(_footprint(tensor) for tensor in tensors.values())
        return out


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(dout: torch.Size, *heads: torch.Size, **_: Any) -> int:
    return sdpa_backward_flop_count(dout, *heads[:3])


# torch counts every fused attention but the one for CPUs.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _footprint(tensor: Tensor) -> int:
    """Bytes the tensor occupies: a broadcast axis lies in memory once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride != 0 else 1
    return elements * tensor.element_size()


def count(variant: Variant, model: str, input_size: int, batch: int) -> Counted:
    """Counts one forward and backward under bf16 autocast, as on the CPU: the kernels are those of a GPU but for attention's.

    Linears leave their biases to the fused ops, as on a GPU. Of fake tensors none of it runs.
    """
    counter, moved = FlopCounterMode(display=False, custom_mapping=ATTENTION), _Bytes()
    counter.mod_tracker = _Untracked()
    with FakeTensorMode(), _values_unseen(), torch.random.fork_rng(devices=[]):
        # In eval mode no labels are dropped, which is nothing to count; gradients are taken all the same.
        net = variant.models[model](input_size=input_size, **variant.options).eval()
        if variant.master_weights:
            net, _ = make_bf16_copies(net)
        x = torch.empty(batch, net.in_channels, input_size, input_size)
        labels = torch.empty(batch, dtype=torch.int64)
        with counter, moved, ditkernels.use_backend("torch"), _as_on_a_gpu(variant.epilogues):
            with torch.autocast("cpu", torch.bfloat16):
                out = net(x, labels, labels)
            out.float().square().mean().backward()
    trainable = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
    return Counted(counter.get_total_flops(), moved.moved, variant.optimizer_bytes * trainable)


class _Untracked(contextlib.nullcontext[None]):
    """Stands for a counter's tracker of modules, for whose global hooks every block would close its residual."""

    parents = ("Global",)


class _Kernels(TorchDispatchMode):
    """Counts kernels: one for each op that is no view, and for an op of ours the launches of its Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace == "ditkernels"
        self.count += not (ours or func.is_view or func.name().split(".")[0] in FREE)
        return func(*args, **(kwargs or {}))

    def launch(self, *args: Any, **constants: Any) -> None:
        """Stands for ``_triton.launch``."""
        self.count += 1


@functools.cache
def kernels(ours: bool, depth: int) -> int:
    """How many kernels a forward and backward launches under bf16 autocast; their number depends on the depth alone."""
    counter = _Kernels()
    sizes = {"input_size": 4, "hidden_size": host.WIDTH, "num_heads": 4, "num_classes": 10}
    net = (ditkernels.DiT if ours else reference.DiT)(depth=depth, **sizes).eval()
    t, y = torch.tensor([3, 500]), torch.tensor([1, 7])
    with host.without_kernels(), mock.patch.object(_triton, "launch", counter.launch), counter:
        with torch.autocast("cpu", torch.bfloat16):
            out = net(torch.empty(2, 4, 4, 4), t, y)
        out.float().square().mean().backward()
    return counter.count


def host_row(model: str, steps: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Kernels of a step, what the host needs for them, and up to which batch the device needs less, plain and ours.

    Args:
        steps: the rows of the model's variants at ``args.batch``.
    """
    depth = int(reference.SIZES[model.removeprefix("DiT-").partition("/")[0]]["depth"])
    made: dict[str, Any] = {"model": model, "variant": HOST, "origin": "predicted"}
    for name in ("plain", "ours"):
        count_of = kernels(name == "ours", depth)
        host_ms = kernels(False, depth) * args.host_us * (args.host_ratio if name == "ours" else 1.0) / 1e3
        # What grows with the batch, and what does not: weights, their casts and the optimizer.
        more = row(model, name, count(VARIANTS[name], model, args.input_size, 2 * args.batch), args)["step_ms"]
        of_images = (more - steps[name]["step_ms"]) / args.batch
        fixed = steps[name]["step_ms"] - of_images * args.batch
        bound = max(0, math.floor((host_ms - fixed) / of_images))
        made |= {f"{name}_kernels": count_of, f"{name}_host_ms": host_ms, f"{name}_host_bound_to": bound}
    return made


def _as_on_a_gpu(epilogues: bool) -> AbstractContextManager[Any]:
    """What a GPU would answer, one with cuBLASLt's epilogues or one without."""
    answer = mock.Mock(return_value=epilogues)
    return mock.patch.multiple(models, serves=answer, asked_for=answer, _pays=mock.Mock(return_value=True))


def _values_unseen() -> AbstractContextManager[Any]:
    """Fake labels have no values to check."""
    return mock.patch.object(reference, "check_labels")


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every model in every variant, then the bound: products and optimizer alone."""
    for model in args.models:
        plain_ms, steps = None, {}
        for name, variant in VARIANTS.items():
            counted = count(variant, model, args.input_size, args.batch)
            made = row(model, name, counted, args)
            plain_ms, steps[name] = plain_ms or made["step_ms"], made
            yield {**made, "of_plain": made["step_ms"] / plain_ms}
            if args.detail:
                yield from detail(model, name, counted, args)
        bound = row(model, BOUND, dataclasses.replace(counted, moved=Counter()), args)
        yield {**bound, "of_plain": bound["step_ms"] / plain_ms}
        yield host_row(model, steps, args)


def row(model: str, name: str, counted: Counted, args: argparse.Namespace) -> dict[str, Any]:
    """One predicted step."""
    products = counted.operations / args.tflops / 1e9
    moving = sum(counted.moved.values()) / args.bandwidth / 1e6
    optimizer = counted.optimizer / args.bandwidth / 1e6
    step = products + moving + optimizer
    return {
        "model": model,
        "variant": name,
        "origin": "predicted",
        "products_ms": products,
        "moving_ms": moving,
        "optimizer_ms": optimizer,
        "step_ms": step,
        "images_per_s": 1e3 * args.batch / step,
    }


def detail(model: str, name: str, counted: Counted, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The kinds of kernel that take a hundredth of the moving or more."""
    whole = sum(counted.moved.values())
    for kind, moved in counted.moved.most_common():
        if moved >= whole / 100:
            yield {
                "model": model,
                "variant": name,
                "kernel": kind,
                "gbytes": moved / 1e9,
                "moving_ms": moved / args.bandwidth / 1e6,
            }


# ---- Tables of the page ----------------------------------------------------------------------------------------------

ALL_LEVERS = list(VARIANTS)[-1]
BOUND = "nothing but products"
HOST = "the host"
SHOWN = "DiT-XL/2"


def tables(found: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the tables in docs/performance.md: a row a model, then the variants of one."""
    steps = {(row["model"], row["variant"]): row for row in found if "step_ms" in row}
    models = list(dict.fromkeys(model for model, _ in steps))
    of_models = measure.markdown(
        "model | products | optimizer | moving: plain | ours | ours, all levers | step, ours of plain | all levers of plain | "
        "images/s, all levers | products alone",
        [_model_cells(model, steps) for model in models],
    )
    of_hosts = measure.markdown(
        "model | kernels a step: plain | ours | the host, ms | bound by the host up to batch: plain | ours",
        [_host_cells(row) for row in found if row["variant"] == HOST],
    )
    if SHOWN not in models:
        return [of_models, of_hosts]
    of_variants = measure.markdown(
        "variant of XL/2 | moving | optimizer | step | of plain | images/s",
        [_variant_cells(name, steps[SHOWN, name]) for name in (*VARIANTS, BOUND)],
    )
    return [of_models, of_hosts, of_variants]


def _model_cells(model: str, steps: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    plain, ours, best, bound = (steps[model, name] for name in ("plain", "ours", ALL_LEVERS, BOUND))
    return [
        model.removeprefix("DiT-"),
        *map(_ms, (plain["products_ms"], plain["optimizer_ms"])),
        *(_ms(row["moving_ms"]) for row in (plain, ours, best)),
        *(f"{row['of_plain']:.2f}" for row in (ours, best)),
        *(f"{row['images_per_s']:,.0f}" for row in (best, bound)),
    ]


def _host_cells(row: dict[str, Any]) -> list[str]:
    names = ("plain_kernels", "ours_kernels", "plain_host_ms", "plain_host_bound_to", "ours_host_bound_to")
    return [row["model"].removeprefix("DiT-"), *(f"{row[name]:,.0f}" for name in names)]


def _variant_cells(name: str, row: dict[str, Any]) -> list[str]:
    times = [_ms(row[what]) for what in ("moving_ms", "optimizer_ms", "step_ms")]
    return [name, *times, f"{row['of_plain']:.2f}", f"{row['images_per_s']:,.0f}"]


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def main(argv: list[str] | None = None) -> None:
    """Runs the model."""
    parser = measure.parser(__doc__)
    known = list(reference.DiT_models)
    parser.add_argument("--models", type=measure.names_among(known), default=known)
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=256)
    parser.add_argument("--tflops", type=float, default=ASSUMED_TFLOPS, help="of bf16 products")
    parser.add_argument("--bandwidth", type=float, default=ASSUMED_GBPS, help="GB/s of copying")
    parser.add_argument("--host-us", type=float, default=ASSUMED_HOST_US, help="of the host for a kernel of eager PyTorch")
    parser.add_argument("--host-ratio", type=float, default=ASSUMED_HOST_RATIO, help="of a step of ours to plain on the host")
    parser.add_argument("--detail", action="store_true", help="bytes by kind of kernel")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="a page whose tables are to be written anew")
    args = parser.parse_args(argv)
    columns = (
        *("model", "variant", "kernel", "gbytes", "products_ms", "moving_ms", "optimizer_ms"),
        *("step_ms", "images_per_s", "of_plain", "plain_kernels", "ours_kernels", "plain_host_ms"),
        *("plain_host_bound_to", "ours_host_bound_to"),
    )
    journal = measure.Journal("cost_model", args)
    for found in rows(args):
        journal.add(found)
    journal.close(columns)
    if args.docs is not None:
        text = args.docs.read_text(encoding="utf-8")
        for table in tables(journal.rows):
            text = measure.written_into(text, table)
        args.docs.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
