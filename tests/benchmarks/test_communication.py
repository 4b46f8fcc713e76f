"""The model of communication: collectives by hand, steps that hide what they can, figures drawn alike twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.predicted import communication
from benchmarks.predicted.communication import BUCKET, WAYS, Cluster, Link, Work
from benchmarks.speed import measure
from ditkernels import reference
from tests.benchmarks.test_benchmarks import run
from tools.tree import ROOT

DOCS = ROOT / "docs/scaling.md"
NVLINK, INFINIBAND = Link(400.0, 3.0), Link(50.0, 10.0)
FREE = Link(1e12, 0.0)


def cluster(gpus: int, nvlink: Link = NVLINK, network: Link = INFINIBAND) -> Cluster:
    return Cluster(gpus, nvlink, network, reached=0.5)


def work(images: float = 32, parameters: int = 100_000_000) -> Work:
    return Work(images * 0.5, images * 1.0, 4.0, parameters, 10, images * 2**28)


def test_once_around_a_ring() -> None:
    # In a node: seven eighths of a gigabyte at half of 400 GB/s, seven hops.
    assert cluster(8).ring_ms(1e9) == pytest.approx(7 / 8 * 1e9 / 200e9 * 1e3 + 7 * 3e-3)
    # Four nodes: 28 hops in nodes, four between, all ports of a node together as fast as NVLink.
    assert cluster(32).ring_ms(1e9) == pytest.approx(31 / 32 * 1e9 / 200e9 * 1e3 + 28 * 3e-3 + 4 * 10e-3)
    slow = cluster(32, network=Link(5.0, 10.0))
    assert slow.ring_ms(1e9) == pytest.approx(31 / 32 * 1e9 / 20e9 * 1e3 + 28 * 3e-3 + 4 * 10e-3)


def test_an_all_reduce_is_a_ring_or_trees_whichever_is_sooner() -> None:
    assert cluster(1).all_reduce_ms(1e9) == 0
    # Within a node a chain has as many hops as a ring, and moves more.
    assert cluster(8).all_reduce_ms(1e9) == pytest.approx(2 * cluster(8).ring_ms(1e9))
    # Of little, over 128 nodes: a chain of seven hops and a tree seven deep, up and down.
    assert cluster(1024).all_reduce_ms(1.0) == pytest.approx(2 * 7 * (3e-3 + 10e-3))
    # Over a slow network: half of it crosses between two nodes each way, through eight ports of 2.5 GB/s.
    slow = cluster(16, network=Link(5.0, 10.0))
    assert slow.all_reduce_ms(1e9) == pytest.approx(2 * (1 / 2 * 1e9 / 20e9 * 1e3 + 7 * 3e-3 + 10e-3))
    # Of much: the bytes decide, and a ring moves (n - 1)/n of them where trees move all over NVLink.
    assert cluster(64).all_reduce_ms(1e12) == pytest.approx(2 * cluster(64).ring_ms(1e12))
    # Between nodes: seven of eight parts of it, from each GPU's own port.
    assert cluster(64).across_ms(1e9) == pytest.approx(2 * (7 / 8 * 1e9 / 25e9 * 1e3 + 3 * 10e-3))
    assert cluster(8).across_ms(1e9) == 0


def test_ddp_hides_all_but_a_bucket_behind_a_long_backward() -> None:
    short = communication.ddp(work(images=1000), cluster(64))
    buckets = -(-4 * 100_000_000 // BUCKET)
    assert short.exposed == pytest.approx(cluster(64).all_reduce_ms(4e8 / buckets))
    assert short.communication == pytest.approx(buckets * short.exposed)
    assert short.whole == pytest.approx(work(images=1000).alone + short.exposed)
    # With no backward to speak of, nothing is hidden.
    long = communication.ddp(work(images=1e-9), cluster(64))
    assert long.exposed == pytest.approx(long.communication)


def test_pieces_hide_behind_blocks_and_take_their_share_of_the_optimizer() -> None:
    group = cluster(8)
    gather, reduce = group.ring_ms(2e7), group.ring_ms(4e7)
    hidden = communication.fsdp(work(images=1000), group)
    assert hidden.exposed == pytest.approx(2 * gather + reduce)
    assert hidden.communication == pytest.approx(10 * (2 * gather + reduce))
    assert hidden.whole == pytest.approx(1500 + 4.0 / 8 + hidden.exposed)
    bare = communication.fsdp(work(images=1e-9), group)
    assert bare.exposed == pytest.approx(bare.communication)
    # Replicas of a node add an all-reduce of a GPU's piece of a block.
    replicas = communication.hsdp(work(images=1e-9), cluster(64))
    assert replicas.exposed == pytest.approx(bare.exposed + 10 * cluster(64).across_ms(4e7 / 8))


@pytest.mark.parametrize("way", WAYS)
def test_links_that_cost_nothing_leave_the_compute(way: str) -> None:
    step = WAYS[way](work(), cluster(64, FREE, FREE))
    optimizer = {"ddp": 4.0, "fsdp": 4.0 / 64, "hsdp": 4.0 / 8}[way]
    assert step.whole == pytest.approx(work().forward + work().backward + optimizer)
    assert WAYS[way](work(), cluster(1)).whole == work().alone


def test_what_a_gpu_holds() -> None:
    # Weight, gradient, two moments and moving average of 4 bytes; beside pieces, one block's gathered weights and gradients.
    block = 10_000_000 * (2 + 2 + 4)
    assert communication.ddp(work(), cluster(64)).held == 20 * 100_000_000 + work().activations
    assert communication.hsdp(work(), cluster(64)).held == 20 * 100_000_000 / 8 + work().activations + block
    assert communication.fsdp(work(), cluster(64)).held == 20 * 100_000_000 / 64 + work().activations + block


def test_what_autograd_keeps_grows_with_the_images_by_a_line() -> None:
    kept = [communication.saved_bytes("DiT-S/8", 16, batch) for batch in (2, 4, 6)]
    assert kept[2] - kept[1] == kept[1] - kept[0]
    # An image of four tokens keeps the fp32 stream twice a block at least; what does not grow is no part of the slope.
    tokens, width, depth = 4, 384, 12
    assert depth * 2 * tokens * width * 4 < (kept[1] - kept[0]) / 2 < 33_000_000


@pytest.mark.parametrize(
    "names",
    [["DiT-S/8"], pytest.param(list(reference.DiT_models), marks=pytest.mark.slow)],
    ids=["one model", "all"],
)
def test_the_tables_in_the_docs_are_the_scripts(names: list[str]) -> None:
    args = communication.arguments(["--device", "cpu"])
    models = [communication.Model(name, args.input_size) for name in names]
    found = list(communication.rows(args, models))
    page = DOCS.read_text(encoding="utf-8")
    for header, rule, *rows in communication.tables(found, models, args):
        written = page[page.index(header) :].split("\n\n")[0].splitlines()
        mine = [line for line in written[2:] if f"DiT-{line.split()[1]}" in names]
        told = "python -m benchmarks.predicted.communication --docs docs/scaling.md --figures docs/figures writes them"
        assert (written[1], mine) == (rule, rows), told
        assert [f"DiT-{line.split()[1]}" for line in written[2:]] == list(reference.DiT_models)


def test_a_table_is_written_in_the_place_of_the_one_with_its_header() -> None:
    page = "before\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\nafter | a | b |\n"
    table = ["| a | b |", "|---|---|", "| 5 | 6 |"]
    assert measure.written_into(page, table) == "before\n\n" + "\n".join(table) + "\n\nafter | a | b |\n"
    with pytest.raises(ValueError, match=r"no table begins with '\| c \|'"):
        measure.written_into(page, ["| c |", "|---|"])


def test_the_script(tmp_path: Path) -> None:
    size = ("--models", "DiT-S/8", "--input-size", "16", "--gpus", "1,8,64", "--batch", "16")
    figures = tmp_path / "figures"
    flags = (*size, "--figures", str(figures))
    rows = run("communication", *flags, out=tmp_path / "c.json")
    drawn = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert set(drawn) == {"communication-efficiency.svg", "communication-ways.svg"}
    communication.draw_efficiency(rows, figures / "communication-efficiency.svg")
    communication.draw_ways(rows, figures / "communication-ways.svg")
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == drawn
    assert {row["origin"] for row in rows} == {"predicted"}
    # A batch of 16 is not spread over 64 GPUs.
    assert {row["gpus"] for row in rows if row["fixed"]} == {1, 8}
    alone = [row for row in rows if row["gpus"] == 1]
    assert all(row["efficiency"] == 1 and row["exposed_ms"] == 0 for row in alone)
    spread = {(r["gpus"], r["network"], r["way"]): r for r in rows if not r["fixed"]}
    assert spread[8, "Ethernet", "ddp"]["step_ms"] == spread[8, "InfiniBand", "ddp"]["step_ms"]
    assert spread[64, "Ethernet", "ddp"]["step_ms"] > spread[64, "InfiniBand", "ddp"]["step_ms"]
    # Hidden behind enough images over the one, behind no number worth trying over the other.
    assert spread[64, "InfiniBand", "ddp"]["images_for_90"] > spread[8, "InfiniBand", "ddp"]["images_for_90"]
    assert spread[64, "Ethernet", "ddp"]["images_for_90"] is None
