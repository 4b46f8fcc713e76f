"""The fused ops against plain and compiled PyTorch, forward and backward, beside the measured copy bandwidth.

    python -m benchmarks.speed.ops --json benchmarks/results/ops.json          DiT-XL/2 at 256 px, batch 256
    python -m benchmarks.speed.ops --device cpu --threads 1,2 --processes 5    sizes that a CPU can bear, in five processes each

GB/s counts the bytes that the op must move at least: the (B, N, D) tensors as often as the design asks, and the image. What a
contender moves beyond that shows as a lower rate. A backend whose forward or gradients break the numerical contract on a
smaller batch of the same shape gets no speed.

The pass ``forward`` is that of training, ``inference`` takes no gradients. ``over_eager`` and its like say how many times as fast
a contender is as another one in the same rounds. ``copy`` is PyTorch's ``copy_`` of as many bytes as the op must move at least;
``of_copy`` is a rate over that of one large copy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import measure
from benchmarks.speed.measure import Contender
from ditkernels import ops, reference, use_backend
from ditkernels.diagnostics import check
from ditkernels.ops import dispatch

PRECISIONS = {
    "bf16": check.Precision("bf16", torch.bfloat16, torch.bfloat16),
    "fp32+bf16": check.Precision("fp32+bf16", torch.float32, torch.bfloat16),
    "fp32": check.Precision("fp32", torch.float32, torch.float32),
}
CONTENDERS = ("eager", "compiled", "max-autotune", *dispatch.BACKENDS)
BASELINES = {name: name for name in ("eager", "compiled", "copy")}
HALVES = {
    "inference": ("forward",),
    "forward": ("forward",),
    "backward": ("backward",),
    "forward+backward": ("forward", "backward"),
}
Shape = tuple[int, int, int]
GATE_BATCH = 3
MLP_RATIO = 4


class Site(NamedTuple):
    """An op as a DiT calls it.

    Attributes:
        case: shapes and options.
        forward, backward: how often each (B, N, D) tensor is touched at least, one letter a touch: s in the dtype of the
            residual stream, o in that of the others. A packed qkv counts as one tensor; so do dq, dk and dv.
        image: elements of the image read or written once by either.
    """

    case: check.Case
    forward: str
    backward: str
    image: int = 0

    def floor(self, which: str, precision: check.Precision) -> int:
        """The bytes that a pass must move at least; 0 where it makes views."""
        touched = [getattr(self, half) for half in HALVES[which]]
        return sum(floor_bytes(self, touches, precision) for touches in touched if touches)


def sites(batch: int, grid: tuple[int, int], width: int, patch_size: int) -> dict[str, Site]:
    """The ops at B samples, a grid of tokens and D channels; latents have 4 channels, the output 8."""
    tokens, p = (batch, grid[0] * grid[1], width), patch_size
    pixels = batch * grid[0] * grid[1] * p * p
    vectors = dict.fromkeys(("gate", "shift", "scale"), (batch, width))
    modulation = {name: vectors[name] for name in ("shift", "scale")}
    linear = {"weight": (8 * p * p, width), "bias": (8 * p * p,)}
    residual = {"branch": tokens, "gate": vectors["gate"]}
    image = {
        "x": (batch, 4, grid[0] * p, grid[1] * p),
        "weight": (width, 4, p, p),
        "bias": (width,),
        "pos_embed": (tokens[1], width),
    }
    patches = {"grid": grid, "patch_size": p}
    return {
        "modulate_norm": Site(check.Case("modulate_norm", {"x": tokens, **modulation}), "so", "oss"),
        "gated_residual": Site(check.Case("gated_residual", {"x": tokens, **residual}), "sos", "soo"),
        "gated_residual_norm": Site(
            check.Case("gated_residual_norm", {"x": tokens, "branch": tokens, **vectors}), "soso", "sosoos"
        ),
        # The product and the sums of the bias read dy each.
        "patch_embed": Site(check.Case("patch_embed", image), "s", "ss", 4 * pixels),
        "final_layer": Site(
            check.Case("final_layer", {"x": tokens, **residual, **modulation, **linear}, patches),
            "so",
            "soso" + "oo" + "osoos",  # the norm again, the products (h, dh), the backward of the norm
            8 * pixels,
        ),
        "bias_gelu": Site(
            check.Case("bias_gelu", {"x": (*tokens[:2], MLP_RATIO * width), "bias": (MLP_RATIO * width,)}),
            "oo",
            "ooo",
        ),
        "split_qkv": Site(
            check.Case("split_qkv", {"packed": (*tokens[:2], 3, *heads_of(width)), "bias": (3 * width,)}),
            "",
            "oo",
        ),
    }


def measurable(shape: Shape, patch_size: int) -> dict[str, Site]:
    """The ops of a DiT at (B, N, D), and ``gelu``: ``bias_gelu`` whose linear kept its bias."""
    batch, tokens, width = shape
    known = sites(batch, _grid(tokens), width, patch_size)
    of_bias = known["bias_gelu"]
    return {**known, "gelu": of_bias._replace(case=check.Case("bias_gelu", {"x": of_bias.case.shapes["x"]}))}


def heads_of(width: int) -> tuple[int, int]:
    """Heads and head_dim of the paper's model of this width; one head where there is none."""
    known = {size["hidden_size"]: size["num_heads"] for size in reference.SIZES.values()}
    heads = known.get(width, 1)
    return heads, width // heads


def floor_bytes(site: Site, touches: str, precision: check.Precision) -> int:
    """The bytes that the op must move at least."""
    shapes = site.case.shapes
    first = next(iter(shapes.values()))
    token_elements = math.prod(first if "pos_embed" not in shapes else (*shapes["pos_embed"], first[0]))
    sizes = {"s": precision.stream.itemsize, "o": precision.others.itemsize}
    return token_elements * sum(sizes[letter] for letter in touches) + site.image * precision.others.itemsize


class Inputs(NamedTuple):
    """One set: the arguments, which take gradients, and the gradients to feed backward."""

    arguments: dict[str, Tensor]
    cotangents: list[Tensor]


def takes_stream(case: check.Case) -> bool:
    """Whether ``x`` is the residual stream: not the latents, nor what a linear made."""
    return case.has_stream and case.op != "bias_gelu"


def dtype_of(name: str, case: check.Case, precision: check.Precision) -> torch.dtype:
    """The stream has its own dtype; all else has that of the weights."""
    return precision.stream if name == "x" and takes_stream(case) else precision.others


def needs_gradient(name: str, case: check.Case) -> bool:
    """In training neither the latents nor the positions, which are fixed, take a gradient."""
    return name != "pos_embed" and (name != "x" or len(case.shapes["x"]) == 3)


def input_sets(case: check.Case, precision: check.Precision, device: torch.device) -> list[Inputs]:
    """Random values; enough sets that no cache holds them all."""

    def one() -> Inputs:
        arguments = {
            name: torch.randn(shape, device=device, dtype=dtype_of(name, case, precision)) for name, shape in case.shapes.items()
        }
        for name, tensor in arguments.items():
            tensor.requires_grad_(needs_gradient(name, case))
        with torch.no_grad():
            outputs = call(getattr(reference, case.op), case, arguments, precision)
        return Inputs(arguments, [torch.randn_like(output) for output in outputs])

    first = one()
    size = measure.nbytes(*first.arguments.values(), *first.cotangents)
    return [first, *(one() for _ in range(measure.input_sets(size) - 1))]


def call(
    function: Callable[..., Any], case: check.Case, arguments: dict[str, Tensor], precision: check.Precision
) -> tuple[Tensor, ...]:
    """The outputs of a function that means a case's op, as a tuple."""
    outputs = function(**arguments, **case.options, **_out_dtype(case.op, precision))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _out_dtype(op: str, precision: check.Precision) -> dict[str, torch.dtype]:
    """The stream begins in its own dtype; normed rows come in the dtype their linear wants."""
    if op == "patch_embed":
        return {"out_dtype": precision.stream}
    return {"out_dtype": precision.others} if op.endswith("norm") else {}


def functions(names: list[str], op: str) -> dict[str, tuple[Callable[..., Any], str | None]]:
    """By contender: what it calls, and the backend it forces."""
    plain, fused = getattr(reference, op), getattr(ops, op)
    known: dict[str, tuple[Callable[..., Any], str | None]] = {
        "eager": (plain, None),
        "compiled": (torch.compile(plain, dynamic=False), None),
        "max-autotune": (torch.compile(plain, dynamic=False, mode="max-autotune-no-cudagraphs"), None),
        **{backend: (fused, backend) for backend in dispatch.BACKENDS},
    }
    return {name: known[name] for name in names if name in known}


def gate(site: Site, backend: str, precision: check.Precision, device: torch.device) -> check.Parity | str:
    """Parity of a backend, forward and every gradient, on a small batch of the site's shape; or why it cannot serve."""
    batch = next(iter(site.case.shapes.values()))[0]
    of_a_sample = ("x", "branch", "gate", "shift", "scale", "packed")
    shapes = {name: (GATE_BATCH, *shape[1:]) if name in of_a_sample else shape for name, shape in site.case.shapes.items()}
    case = site.case if batch <= GATE_BATCH else check.Case(site.case.op, shapes, site.case.options)
    if not takes_stream(case):
        precision = check.Precision(precision.name, precision.others, precision.others)
    inputs = case.inputs(precision, device)
    reason = check.refusals(case, inputs)[backend]
    return check.parity(case, inputs, backend) if reason is None else reason


def by_pass(
    name: str,
    function: Callable[..., Any],
    backend: str | None,
    case: check.Case,
    precision: check.Precision,
    sets: list[Inputs],
) -> dict[str, Contender]:
    """What there is to time; the forward is that of training."""

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        with use_backend(backend or "auto"):
            return call(function, case, inputs.arguments, precision)

    @torch.no_grad()
    def inference(inputs: Inputs) -> tuple[Tensor, ...]:
        return forward(inputs)

    def backward(prepared: tuple[tuple[Tensor, ...], Inputs]) -> None:
        outputs, inputs = prepared
        leaves = [leaf for leaf in inputs.arguments.values() if leaf.requires_grad]
        with use_backend(backend or "auto"):
            torch.autograd.grad(outputs, leaves, inputs.cotangents)

    def at(index: int) -> Inputs:
        return sets[index % len(sets)]

    return {
        "inference": Contender(name, inference, at),
        "forward": Contender(name, forward, at),
        "backward": Contender(name, backward, lambda index: (forward(at(index)), at(index))),
        "forward+backward": Contender(name, lambda inputs: backward((forward(inputs), inputs)), at),
    }


def copying(floor: int, device: torch.device) -> Contender:
    """PyTorch's copy of as many bytes as an op must move: half of them are read, half are written."""
    sources = [torch.rand(floor // 8, device=device) for _ in range(measure.input_sets(floor))]
    pairs = [(source, source.clone()) for source in sources]  # a clone and not empty memory, which no one has touched yet
    return Contender("copy", lambda pair: pair[1].copy_(pair[0]), lambda index: pairs[index % len(pairs)])


class Ready(NamedTuple):
    """Who is to be timed.

    Attributes:
        contenders: by name, then by pass.
        ratios: error over the error allowed, by name; the reference has none.
        notes: rows of those that get no speed.
    """

    contenders: dict[str, dict[str, Contender]]
    ratios: dict[str, float]
    notes: list[measure.Row]


def held_to_parity(names: list[str], site: Site, precision: check.Precision, device: torch.device) -> Ready:
    """Contenders by name, without those that cannot serve or are wrong."""
    ready = Ready({}, {}, [])
    sets = input_sets(site.case, precision, device)
    for name, (function, backend) in functions(names, site.case.op).items():
        if backend is not None:
            found = gate(site, backend, precision, device)
            if isinstance(found, str):
                ready.notes.append({"contender": name, "note": f"cannot serve: {found}"})
                continue
            if not found.ratio <= 1:
                words = f"WRONG: {found.where}, {found.ratio:.1f} x allowed"
                ready.notes.append({"contender": name, "note": words})
                continue
            ready.ratios[name] = found.ratio
        ready.contenders[name] = by_pass(name, function, backend, site.case, precision, sets)
    return ready


def rows_of(
    name: str, site: Site, shape: Shape, precision: check.Precision, args: argparse.Namespace, copy_gbps: float
) -> Iterator[dict[str, Any]]:
    """The rows of one op in one precision."""
    torch._dynamo.reset()
    device = measure.device_of(args)
    common = {"op": name, "precision": precision.name, "shape": list(shape)}
    ready = held_to_parity(args.contenders, site, precision, device)
    yield from ({**common, **note} for note in ready.notes)
    for which in args.passes:
        floor = site.floor(which, precision)
        if not floor:
            continue
        contenders = [found[which] for found in ready.contenders.values()]
        if "copy" in args.contenders:
            contenders.append(copying(floor, device))
        samples = measure.paired(contenders, device, rounds=args.rounds)
        for contender, milliseconds in samples.items():
            timing = measure.timing(milliseconds)
            gbps = floor / timing.median_ms / 1e6
            yield {
                **common,
                "contender": contender,
                "pass": which,
                **timing._asdict(),
                "floor_bytes": floor,
                "gbps": gbps,
                "of_copy": gbps / copy_gbps,
                **measure.gains(samples, contender, BASELINES),
                "error_over_allowed": ready.ratios.get(contender),
            }


def measure_all(args: argparse.Namespace, journal: measure.Journal) -> None:
    """Every op asked for in every shape and precision asked for."""
    copy_gbps = journal.unit("copy", measure.copy_row, args)[0]["gbps"]
    for shape in args.shapes:
        for name, site in measurable(shape, args.patch_size).items():
            if name in args.ops:
                for precision in args.precisions:
                    of = (name, site, shape, PRECISIONS[precision], args, copy_gbps)
                    journal.unit(f"{name} {precision} {'x'.join(map(str, shape))}", rows_of, *of)


def _grid(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many tokens."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def shapes(text: str) -> list[Shape]:
    """An argparse type: BxNxD, separated by commas."""
    found = [tuple(measure.positive(number) for number in shape.split("x")) for shape in text.split(",")]
    for shape in found:
        if len(shape) != 3:
            raise argparse.ArgumentTypeError(f"got {text}, allowed is BxNxD: samples, tokens, channels")
    return [(shape[0], shape[1], shape[2]) for shape in found]


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.repeatable(measure.resumable(measure.parser(__doc__)))
    names = list(measurable((1, 1, 8), 1))
    parser.add_argument("--shapes", type=shapes, default=[(256, 256, 1152)], help="BxNxD, ...: samples, tokens, channels")
    parser.add_argument("--patch-size", type=measure.positive, default=2)
    parser.add_argument(
        "--ops", type=measure.names_among(names), default=[name for name in names if name != "gelu"], help=", ".join(names)
    )
    parser.add_argument(
        "--precisions",
        type=measure.names_among(PRECISIONS),
        default=["bf16", "fp32+bf16"],
        help=", ".join(PRECISIONS),
    )
    contenders = (*CONTENDERS, "copy")
    parser.add_argument(
        "--contenders",
        type=measure.names_among(contenders),
        default=["eager", "compiled", "cuda", "triton"],
        help=", ".join(contenders),
    )
    parser.add_argument("--passes", type=measure.names_among(HALVES), default=["forward", "backward"], help=", ".join(HALVES))
    parser.add_argument("--copy-mib", type=measure.positive, default=1024, help="size of the copy")
    args = measure.arguments(
        parser,
        argv,
        rounds=50,
        shapes=[(1, 256, 384), (4, 256, 384), (16, 256, 384), (4, 256, 1152)],
        ops=["modulate_norm", "gated_residual", "gated_residual_norm", "bias_gelu", "gelu"],
        precisions=["fp32", "bf16"],
        contenders=["eager", "compiled", "cpu", "torch", "copy"],
        passes=["inference", "forward", "forward+backward"],
        copy_mib=256,
    )
    columns = (
        *("op", "precision", "shape", "pass", "contender", "median_ms", "low_ms", "high_ms", "gbps", "of_copy"),
        *(f"over_{word}" for word in BASELINES),
        "note",
    )
    measure.carry_out("ops", args, argv, measure_all, columns)


if __name__ == "__main__":
    main()
