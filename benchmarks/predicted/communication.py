"""What many GPUs cost in communication, predicted: bytes counted, link speeds stated, nothing run.

    python -m benchmarks.predicted.communication                                                the twelve models, 1 to 1,024 GPUs
    python -m benchmarks.predicted.communication --docs docs/scaling.md --figures docs/figures  that page's tables and figures
    python -m benchmarks.predicted.communication --models DiT-XL/2 --images 8                   fewer images a GPU
    python -m benchmarks.predicted.communication --models DiT-XL/2 --nvlink 300                 another machine

Compute is that of `cost_model.py`: operations and bytes of the real model over assumed rates. Collectives cost hops and bytes:

    once around a ring     (n − 1)/n · bytes / speed, n hops        all-gather, reduce-scatter
    all-reduce             twice that; or, if that is sooner, up and down chains within nodes and trees across m of them: bytes
                           over NVLink and (m − 1)/m · bytes over the network at once, each way, and as many hops as they are deep

n GPUs sit in nodes of eight. Within a node they have NVLink; a ring through several nodes goes at the speed of NVLink or of all
network ports of a node together, whichever is less, and crosses the network once a node. Every link reaches `--reached` of
its speed.

Three ways to spread a model, as `ditkernels train` does:

    ddp     gradients (fp32) all-reduced in buckets of 25 MiB during the backward, the last of them after it
    fsdp    each block's weights (bf16) all-gathered in forward and again in backward, its gradients (fp32) reduce-scattered; the
            next block's weights travel while this one computes; optimizer and moving average work on 1/n of the parameters
    hsdp    fsdp within a node; each GPU's piece of the gradients is then all-reduced across nodes

The backward is two thirds of the compute. Communication takes neither multiprocessors nor memory bandwidth from it, and no GPU is
late: a measured step is slower.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.predicted import cost_model
from benchmarks.speed import measure
from ditkernels import reference, use_backend

NODE = 8
BUCKET = 25 * 2**20  # of DistributedDataParallel, its default
MASTER_BYTES, PRODUCT_BYTES, GRADIENT_BYTES = 4, 2, 4
STATE_BYTES = 20  # a parameter: weight, gradient, two moments, moving average, 4 bytes each
VARIANT = cost_model.VARIANTS["ours"]
MOST_IMAGES = 4096  # a GPU, that are tried
COUNTED = (32, 64)  # batches; whatever is counted is a line through them


@dataclass(frozen=True)
class Link:
    """GB/s of one GPU in one direction, and microseconds of a hop."""

    gbps: float
    hop_us: float


@dataclass(frozen=True)
class Cluster:
    """``gpus`` in nodes of eight, joined by ``network``; all links reach a share of their speed."""

    gpus: int
    nvlink: Link
    network: Link
    reached: float

    @property
    def nodes(self) -> int:
        return -(-self.gpus // NODE)

    @property
    def in_node(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, NODE)

    @property
    def _deep(self) -> int:
        """Hops from a leaf of a tree over the nodes to its root."""
        return math.ceil(math.log2(self.nodes))

    def within(self) -> Cluster:
        """The GPUs of a node."""
        return Cluster(self.in_node, self.nvlink, self.network, self.reached)

    def ring_ms(self, size: float) -> float:
        """Once around all GPUs: an all-gather to ``size`` bytes, or a reduce-scatter of as many."""
        gbps, hops_us = self.nvlink.gbps, (self.gpus - self.nodes) * self.nvlink.hop_us
        if self.nodes > 1:
            gbps = min(gbps, self.in_node * self.network.gbps)
            hops_us += self.nodes * self.network.hop_us
        return (self.gpus - 1) / self.gpus * size / (gbps * self.reached) / 1e6 + hops_us / 1e3

    def all_reduce_ms(self, size: float) -> float:
        """Of ``size`` bytes over all GPUs: by the ring, or by trees across nodes and chains within them."""
        if self.gpus == 1:
            return 0.0
        chain = size / (self.nvlink.gbps * self.reached) / 1e6
        tree = (self.nodes - 1) / self.nodes * size / (self.in_node * self.network.gbps * self.reached) / 1e6
        hops_us = (self.in_node - 1) * self.nvlink.hop_us + self._deep * self.network.hop_us
        return 2 * min(self.ring_ms(size), max(chain, tree) + hops_us / 1e3)

    def across_ms(self, size: float) -> float:
        """An all-reduce of ``size`` bytes between the GPUs of one place in every node, all places at once."""
        if self.nodes == 1:
            return 0.0
        bytes_ms = (self.nodes - 1) / self.nodes * size / (self.network.gbps * self.reached) / 1e6
        return 2 * (bytes_ms + self._deep * self.network.hop_us / 1e3)


@dataclass(frozen=True)
class Work:
    """What a GPU computes in a step on its own, in milliseconds, and what it holds."""

    forward: float
    backward: float
    optimizer: float
    parameters: int
    blocks: int
    activations: float

    @property
    def alone(self) -> float:
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class Step:
    """A step on many GPUs: milliseconds of communication in all, of what nothing hides, of the whole; bytes held by a GPU."""

    communication: float
    exposed: float
    whole: float
    held: float


def ddp(work: Work, cluster: Cluster) -> Step:
    """Buckets travel while the backward goes on; the first is full, and the last begins, at its own place in it."""
    held = STATE_BYTES * work.parameters + work.activations
    if cluster.gpus == 1:
        return Step(0.0, 0.0, work.alone, held)
    size = GRADIENT_BYTES * work.parameters
    buckets = -(-size // BUCKET)
    bucket = cluster.all_reduce_ms(size / buckets)
    whole = buckets * bucket
    exposed = max(bucket, work.backward / buckets + whole - work.backward)
    return Step(whole, exposed, work.alone + exposed, held)


def fsdp(work: Work, cluster: Cluster) -> Step:
    """All pieces of a block on all GPUs."""
    return _sharded(work, cluster, cluster)


def hsdp(work: Work, cluster: Cluster) -> Step:
    """Pieces within a node, replicas across nodes."""
    return _sharded(work, cluster.within(), cluster)


def _sharded(work: Work, group: Cluster, cluster: Cluster) -> Step:
    pieces, block = group.gpus, work.parameters / work.blocks
    gathered = 2 * PRODUCT_BYTES * block + GRADIENT_BYTES * block
    held = STATE_BYTES * work.parameters / pieces + work.activations + (gathered if pieces > 1 else 0)
    if cluster.gpus == 1:
        return Step(0.0, 0.0, work.alone, held)
    gather = group.ring_ms(PRODUCT_BYTES * block)
    reduce = group.ring_ms(GRADIENT_BYTES * block)
    if pieces < cluster.gpus:
        reduce += cluster.across_ms(GRADIENT_BYTES * block / pieces)
    forward, backward = work.forward / work.blocks, work.backward / work.blocks
    # The first gather of either pass, and the last reduction, have no block's work beside them.
    late = 2 * gather + reduce
    beside = max(0.0, gather - forward) + max(0.0, gather + reduce - backward)
    exposed = late + (work.blocks - 1) * beside
    whole = work.forward + work.backward + exposed + work.optimizer / pieces
    return Step(work.blocks * (2 * gather + reduce), exposed, whole, held)


WAYS = {"ddp": ddp, "fsdp": fsdp, "hsdp": hsdp}


# ---- What a model computes and keeps ---------------------------------------------------------------------------------


class Model:
    """One of the twelve: its costs as functions of the images a GPU takes."""

    def __init__(self, name: str, input_size: int) -> None:
        self.name = name
        self._counted = [cost_model.count(VARIANT, name, input_size, batch) for batch in COUNTED]
        self._saved = [saved_bytes(name, input_size, batch) for batch in COUNTED]
        with torch.device("meta"):
            net = VARIANT.models[name](input_size=input_size)
        self.parameters = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
        self.blocks = len(net.blocks)

    def work(self, images: float, args: argparse.Namespace) -> Work:
        """With so many images a GPU."""
        operations = _line([counted.operations for counted in self._counted], images)
        moved = _line([sum(counted.moved.values()) for counted in self._counted], images)
        compute = operations / args.tflops / 1e9 + moved / args.bandwidth / 1e6
        optimizer = self._counted[0].optimizer / args.bandwidth / 1e6
        return Work(
            compute / 3,
            compute * 2 / 3,
            optimizer,
            self.parameters,
            self.blocks,
            _line(self._saved, images),
        )


def saved_bytes(model: str, input_size: int, batch: int) -> int:
    """Bytes that autograd keeps for the backward under bf16 autocast, casts of the weights among them."""
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(), cost_model._values_unseen(), torch.random.fork_rng(devices=[]):
        net = VARIANT.models[model](input_size=input_size, **VARIANT.options).eval()

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Held, so that no other storage takes its place.
            kept[storage._cdata] = storage
            return tensor

        x = torch.empty(batch, net.in_channels, input_size, input_size)
        labels = torch.empty(batch, dtype=torch.int64)
        with (
            # As in the count of a step: linears leave their biases to the fused ops.
            use_backend("torch"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            out = net(x, labels, labels)
        del out
    return sum(storage.nbytes() for storage in kept.values())


def _line(values: list[int], images: float) -> float:
    slope = (values[1] - values[0]) / (COUNTED[1] - COUNTED[0])
    return values[0] + slope * (images - COUNTED[0])


# ---- Rows ------------------------------------------------------------------------------------------------------------


def rows(args: argparse.Namespace, models: list[Model]) -> Iterator[dict[str, Any]]:
    """Every model on every number of GPUs over every network in every way, its batch growing with them or fixed."""
    nvlink = Link(args.nvlink, args.nvlink_hop)
    networks = {
        "InfiniBand": Link(args.infiniband, args.infiniband_hop),
        "Ethernet": Link(args.ethernet, args.ethernet_hop),
    }
    for model in models:
        for gpus in args.gpus:
            for network, link in networks.items():
                cluster = Cluster(gpus, nvlink, link, args.reached)
                for batch in (None, args.batch):
                    images = args.images if batch is None else batch / gpus
                    if images < 1:
                        continue
                    work = model.work(images, args)
                    fastest = model.work(images * gpus if batch else images, args).alone
                    for way, spread in WAYS.items():
                        step = spread(work, cluster)
                        yield {
                            "origin": "predicted",
                            "model": model.name,
                            "gpus": gpus,
                            "network": network,
                            "way": way,
                            "batch": batch or round(images * gpus),
                            "fixed": batch is not None,
                            "compute_ms": work.alone,
                            "communication_ms": step.communication,
                            "exposed_ms": step.exposed,
                            "step_ms": step.whole,
                            "images_per_s": 1e3 * images * gpus / step.whole,
                            # Of so many GPUs that need not talk and share all work evenly.
                            "efficiency": fastest / (gpus if batch else 1) / step.whole,
                            "held_gib": step.held / 2**30,
                            "activations_gib": work.activations / 2**30,
                            "images_for_90": None if batch else enough_images(model, way, cluster, args),
                        }


def enough_images(model: Model, way: str, cluster: Cluster, args: argparse.Namespace) -> int | None:
    """Images a GPU, a power of two, with which a step takes a GPU's own work no more than a ninth longer; None beyond the most."""
    for images in (2**power for power in range(MOST_IMAGES.bit_length())):
        work = model.work(images, args)
        if work.alone >= 0.9 * WAYS[way](work, cluster).whole:
            return images
    return None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What is assumed, and what is asked for."""
    parser = measure.parser(__doc__)
    known = list(reference.DiT_models)
    parser.add_argument("--models", type=measure.names_among(known), default=known)
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--gpus", type=measure.numbers, default=[2**power for power in range(11)])
    parser.add_argument("--images", type=measure.positive, default=32, help="a GPU, where the batch grows")
    parser.add_argument("--batch", type=measure.positive, default=256, help="where it is fixed")
    parser.add_argument("--tflops", type=float, default=cost_model.ASSUMED_TFLOPS)
    parser.add_argument("--bandwidth", type=float, default=cost_model.ASSUMED_GBPS, help="GB/s of memory")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s a GPU, one direction")
    parser.add_argument("--infiniband", type=float, default=50.0, help="GB/s a GPU, one direction")
    parser.add_argument("--ethernet", type=float, default=12.5 / NODE, help="GB/s a GPU, one direction")
    parser.add_argument("--nvlink-hop", type=float, default=3.4, help="microseconds")
    parser.add_argument("--infiniband-hop", type=float, default=14.0, help="microseconds")
    parser.add_argument("--ethernet-hop", type=float, default=50.0, help="microseconds")
    parser.add_argument("--reached", type=float, default=0.8, help="share of a link's speed")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw them there")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="a page whose tables are to be written anew")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    models = [Model(name, args.input_size) for name in args.models]
    found = list(rows(args, models))
    columns = (
        *("model", "gpus", "network", "way", "batch", "compute_ms", "communication_ms", "exposed_ms"),
        *("step_ms", "images_per_s", "efficiency", "held_gib", "images_for_90"),
    )
    measure.report("communication", args, found, columns)
    if args.figures is not None:
        draw_efficiency(found, args.figures / "communication-efficiency.svg")
        draw_ways(found, args.figures / "communication-ways.svg")
    if args.docs is not None:
        text = args.docs.read_text(encoding="utf-8")
        for table in tables(found, models, args):
            text = measure.written_into(text, table)
        args.docs.write_text(text, encoding="utf-8")


# ---- Tables of the page ----------------------------------------------------------------------------------------------

ROOM_TAKEN = 2 * 2**30  # by the CUDA context, and what the allocator cannot use


def tables(found: list[dict[str, Any]], models: list[Model], args: argparse.Namespace) -> list[list[str]]:
    """The lines of each table in docs/scaling.md: header, rule, a row a model."""
    return [
        measure.markdown(
            "model | step alone | DDP on 8 | 16 | 64 | 256 | 1,024 | "
            "HSDP on 64 | 1,024 | FSDP2 in 1,024 pieces | DDP on 64, Ethernet",
            [_step_cells(found, model.name) for model in models],
        ),
        measure.markdown(
            "model | DDP on 8 | 64 | 1,024 | HSDP on 8 | 64 | 1,024 | DDP on 16, Ethernet | 64",
            [_images_cells(found, model.name) for model in models],
        ),
        measure.markdown(
            "model | states, DDP | states, eight pieces | activations an image | images in 24 GB: DDP / pieces | in 80 GB",
            [_memory_cells(model, args) for model in models],
        ),
    ]


def _step_cells(found: list[dict[str, Any]], name: str) -> list[str]:
    def at(gpus: int, way: str = "ddp", network: str = "InfiniBand") -> dict[str, Any]:
        return _chosen(found, model=name, gpus=gpus, way=way, network=network, fixed=False)[0]

    both = [*(at(gpus) for gpus in (8, 16, 64, 256, 1024)), *(at(gpus, "hsdp") for gpus in (64, 1024))]
    whole = [at(1024, "fsdp"), at(64, network="Ethernet")]
    return [
        name.removeprefix("DiT-"),
        f"{at(1)['compute_ms']:.1f}",
        *(f"{row['communication_ms']:.1f} ({row['exposed_ms']:.1f})" for row in both),
        *(f"{ms:.0f}" if (ms := row["communication_ms"]) >= 100 else f"{ms:.1f}" for row in whole),
    ]


def _images_cells(found: list[dict[str, Any]], name: str) -> list[str]:
    places = [
        *((gpus, way, "InfiniBand") for way in ("ddp", "hsdp") for gpus in (8, 64, 1024)),
        *((gpus, "ddp", "Ethernet") for gpus in (16, 64)),
    ]
    enough = [
        _chosen(found, model=name, gpus=gpus, way=way, network=network, fixed=False)[0]["images_for_90"]
        for gpus, way, network in places
    ]
    return [name.removeprefix("DiT-"), *(f"> {MOST_IMAGES}" if n is None else str(n) for n in enough)]


def _memory_cells(model: Model, args: argparse.Namespace) -> list[str]:
    """States in GiB, activations in MiB, and the images that fit: under DDP, and in eight pieces."""
    nvlink = Link(args.nvlink, args.nvlink_hop)
    node = Cluster(NODE, nvlink, nvlink, args.reached)
    empty = model.work(0, args)
    held = [spread(empty, node).held for spread in (ddp, fsdp)]
    an_image = model.work(1, args).activations - empty.activations

    def fitting(gib: int) -> str:
        return " / ".join(f"{(gib * 2**30 - ROOM_TAKEN - before) // an_image:.0f}" for before in held)

    return [
        model.name.removeprefix("DiT-"),
        *(f"{(before - empty.activations) / 2**30:.1f} GiB" for before in held),
        f"{an_image / 2**20:.0f} MiB",
        *(fitting(gib) for gib in (24, 80)),
    ]


# ---- Figures ---------------------------------------------------------------------------------------------------------

COLOURS = {"2": "#1f5fa8", "4": "#d9822b", "8": "#3d9a50"}
WAY_COLOURS = {"ddp": "#1f5fa8", "fsdp": "#c23b3b", "hsdp": "#3d9a50"}


def draw_efficiency(found: list[dict[str, Any]], path: Path) -> None:
    """Efficiency of DDP over GPUs: a column a size, a colour a patch size; above the batch grows, below it is fixed."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["model"].split("/")[0] for row in found))
    figure = Figure(figsize=(2.9 * len(sizes) + 0.6, 5.6), layout="constrained")
    panels = figure.subplots(2, len(sizes), sharey=True, sharex=True, squeeze=False)
    for column, size in enumerate(sizes):
        for fixed, axes in zip((False, True), panels[:, column], strict=True):
            for patch, colour in COLOURS.items():
                for network, style in (("InfiniBand", "-"), ("Ethernet", ":")):
                    chosen = {"model": f"{size}/{patch}", "way": "ddp", "network": network, "fixed": fixed}
                    shown = _chosen(found, **chosen)
                    axes.plot(
                        [row["gpus"] for row in shown],
                        [100 * row["efficiency"] for row in shown],
                        style,
                        color=colour,
                        label=f"patch {patch}, {network}",
                    )
            _gpus_axis(axes, found)
            axes.set_ylim(0, 104)
            growth = f"batch of {_batch(found)}" if fixed else f"{_images(found)} images a GPU"
            axes.set_title(f"{size}, {growth}", fontsize=9)
        panels[1, column].set_xlabel("GPUs")
    for axes in panels[:, 0]:
        axes.set_ylabel("efficiency, % (predicted)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    _save(figure, path)


def draw_ways(found: list[dict[str, Any]], path: Path) -> None:
    """The largest model of those there: step over GPUs in three ways, and what a GPU holds."""
    from matplotlib.figure import Figure

    model = max({row["model"] for row in found}, key=lambda name: _chosen(found, model=name)[0]["compute_ms"])
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for way, colour in WAY_COLOURS.items():
        shown = _chosen(found, model=model, way=way, network="InfiniBand", fixed=False)
        gpus = [row["gpus"] for row in shown]
        times.plot(gpus, [row["step_ms"] for row in shown], color=colour, label=way)
        memory.plot(gpus, [row["held_gib"] for row in shown], color=colour, label=way)
    times.axhline(shown[0]["compute_ms"], color="#888888", linewidth=0.8, linestyle="--", label="one GPU alone")
    memory.axhline(shown[0]["activations_gib"], color="#888888", linewidth=0.8, linestyle="--", label="activations")
    times.set_title(f"{model}, {_images(found)} images a GPU, InfiniBand: ms a step (predicted)", fontsize=9)
    memory.set_title(f"{model}: GiB a GPU (predicted)", fontsize=9)
    for axes in (times, memory):
        _gpus_axis(axes, found)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs")
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _chosen(found: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [row for row in found if all(row[name] == value for name, value in values.items())]


def _images(found: list[dict[str, Any]]) -> int:
    row = _chosen(found, fixed=False)[0]
    return row["batch"] // row["gpus"]


def _batch(found: list[dict[str, Any]]) -> int:
    return _chosen(found, fixed=True)[0]["batch"]


def _gpus_axis(axes: Any, found: list[dict[str, Any]]) -> None:
    ticks = sorted({row["gpus"] for row in found})[::2]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.grid(alpha=0.2)


def _save(figure: Any, path: Path) -> None:
    """Writes the figure; equal ones are equal files."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
