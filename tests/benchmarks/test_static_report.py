"""The line that every kernel is held to without a GPU, at the shapes of the paper's models; and the report that shows it.

The default run takes the narrowest model, for Hopper; ``-m slow`` takes everything.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predicted import static_report
from tools.kernel_proof import launches
from tools.kernel_proof.machine_code import WIDE_SHARE

# Reads and writes of (B, N, D) tensors, forward and backward: docs/kernels.md.
PASSES = {
    "modulate_norm": (2, 3),
    "gated_residual": (3, 3),
    "gated_residual_norm": (4, 6),
    "patch_embed": (1, 0),  # backward is the library's products, beside a gather of the latents
    "final_layer": (2, 9),  # backward is the norm's forward and backward, beside the library's products
    "bias_gelu": (2, 3),
    "split_qkv": (None, 4),  # views; dq, dk, dv, and the packed gradient, which is three times as large
    "unpatchify": (0, 0),
}
# Of all parameters in a step: w, m, v, average and the gradient read, the first four written; and a copy.
UPDATE_PASSES = {"fp32": 9, "bf16": 10}
# Three programs stand for all of a launch, of which some may hold a last, shorter chunk of rows.
SHORT_CHUNKS = 0.005

COLUMNS = {
    "kernel",
    "backend",
    "arch",
    "shape",
    "registers",
    "spills",
    "wide_fraction",
    "touch_ratio",
    "occupancy",
}
BYTES = {"floor_bytes", "issued_bytes", "floor_ms", "passes"}


def report(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "report.json"
    static_report.main(["--json", str(out), *arguments])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["benchmark"] == "static_report"
    assert result["complete"]
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def passes_of(row: dict[str, Any]) -> int:
    """Those that the tables ask for."""
    if row["pass"] == "step":
        return UPDATE_PASSES[row["precision"]]
    return PASSES[row["op"]][row["pass"] == "backward"]


def assert_line(rows: list[dict[str, Any]]) -> None:
    """No spills, wide accesses, no TF32, one touch a pass, as many passes as the table says."""
    for row in rows:
        name = f"{row['backend']} {row['kernel']} of {row['op']} for {row['model']} on {row['arch']}"
        if row["kernel"] != static_report.ALL:
            assert row["spills"] == 0, f"{name} spills"
        assert 0 < row["registers"] <= 255, name
        if row["touch_ratio"] is not None:
            once = abs(row["touch_ratio"] - 1) <= SHORT_CHUNKS
            assert once, f"{name} touches an element {row['touch_ratio']} times in a pass"
        assert row["issued_bytes"] >= (row["floor_bytes"] or 0), name
        if row["kernel"] == static_report.ALL:
            wanted = passes_of(row)
            assert abs(row["passes"] - wanted) <= wanted * SHORT_CHUNKS, name
            continue
        assert row["tf32"] == 0, f"{name} rounds to TF32"
        assert 0 < row["occupancy"] <= 1, name
        # A CUDA kernel's code also holds what it does with tensors that this launch leaves out.
        touched = {tensor.split()[0] for tensor in row["touches"]}
        assert row["wide_fraction"].keys() >= touched, f"{name}: no access found to one of {touched}"
        for tensor, share in row["wide_fraction"].items():
            assert share >= WIDE_SHARE, f"{name}: {share:.0%} of {tensor} in 128-bit accesses"


def test_triton_holds_the_line(tmp_path: Path) -> None:
    rows = report(tmp_path, "--backends", "triton", "--models", "S", "--batch", "16", "--bandwidth", "1000")
    assert_line(rows)
    launched = [row for row in rows if row["kernel"] != static_report.ALL]
    assert all(row.keys() >= COLUMNS | BYTES for row in launched)
    updates = [row for row in rows if row["pass"] == "step" and row["passes"]]
    # nine of fp32; eight of fp32, and gradient and copy in bf16
    assert {row["floor_bytes"] for row in updates} == {36 * 32_865_056}
    assert {row["precision"] for row in updates} == {"fp32", "bf16"}
    assert {(row["op"], row["pass"]) for row in rows if row["pass"] != "step"} == {
        (op, way) for op, passes in PASSES.items() for way, count in zip(("forward", "backward"), passes) if count is not None
    }
    norm = next(r for r in rows if (r["op"], r["pass"], r["kernel"]) == ("gated_residual_norm", "forward", static_report.ALL))
    # x and x1 in fp32, branch and h in bf16
    assert norm["floor_bytes"] == 16 * 256 * 384 * (4 + 2 + 4 + 2)
    assert math.isclose(norm["floor_ms"], norm["floor_bytes"] / 1e9)


@pytest.mark.skipif(static_report.why_not("cuda") is not None, reason=str(static_report.why_not("cuda")))
def test_proof_that_cuda_holds_the_line(tmp_path: Path) -> None:
    rows = report(tmp_path, "--backends", "cuda", "--models", "S")
    assert_line(rows)
    assert {row["shape"][-1] for row in rows} == {384, 4 * 384, 32_865_056}
    assert {row["op"] for row in rows} == {*PASSES, "adamw_ema"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32+bf16", "bf16", "fp32"])
@pytest.mark.parametrize("backend", static_report.BACKENDS)
def test_every_kernel_on_every_architecture(backend: str, precision: str, tmp_path: Path) -> None:
    archs = ("--archs", "80,90,100")
    assert_line(report(tmp_path, "--backends", backend, "--precisions", precision, *archs))


@pytest.mark.parametrize(
    "reported, architecture, own",
    [(0, "100", 0), (1024, "100", 0), (1536, "90", 512), (0, "80", 0), (1024, "80", 1024)],
)
def test_shared_memory_that_the_driver_reserves_is_not_the_kernels(reported: int, architecture: str, own: int) -> None:
    assert static_report.declared_shared(reported, architecture) == own


def test_a_backend_that_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_report, "why_not", {"triton": "triton is not here", "cuda": "nvcc is not here"}.get)
    rows = report(tmp_path)
    assert [(row["backend"], row["note"]) for row in rows] == [
        ("triton", "triton is not here"),
        ("cuda", "nvcc is not here"),
    ]


SOUND: dict[str, Any] = {
    "pass": "forward",
    "kernel": "forward_rows",
    "programs": 8,
    "threads": 128,
    "registers": 40,
    "spills": 0,
    "shared_bytes": 0,
    "tf32": 0,
    "wide_fraction": {"x": 1.0, "h": 1.0},
    "moved": {"x": [64 * 4, 0], "h": [0, 64 * 2], "shift": [32, 0]},
}


@pytest.mark.parametrize(
    "fault, said",
    [
        ({"spills": 1}, "spills"),
        ({"tf32": 1}, "rounds to TF32"),
        ({"wide_fraction": {"x": 1.0, "h": 0.87}}, "87% of h"),
        ({"wide_fraction": {"x": 1.0}}, "no access found"),
        ({"moved": {**SOUND["moved"], "x": [2 * 64 * 4, 0]}}, "touches an element 2.0 times"),
        ({"moved": {**SOUND["moved"], "x": [64 * 4 - 4, 0]}}, "touches an element 0.98"),
    ],
)
def test_what_falls_short_is_named(fault: dict[str, Any], said: str) -> None:
    case = launches.Case("modulate_norm", 1, 4, 1, "fp32+bf16")
    common = {"model": "DiT-S/4", "backend": "triton", "arch": "sm_90"}
    sound = {**common, **static_report.launch(case, SOUND, "90", 1000.0)}
    everything = static_report.whole(case, "forward", [sound], 1000.0)
    assert_line([sound, {**common, **everything}])
    with pytest.raises(AssertionError, match=said):
        assert_line([{**common, **static_report.launch(case, {**SOUND, **fault}, "90", 1000.0)}])


def test_a_pass_too_many_is_named() -> None:
    case = launches.Case("modulate_norm", 1, 4, 1, "fp32+bf16")
    common = {"model": "DiT-S/4", "backend": "triton", "arch": "sm_90"}
    again = static_report.launch(case, {**SOUND, "kernel": "again"}, "90", 1000.0)
    group = [static_report.launch(case, SOUND, "90", 1000.0), again]
    with pytest.raises(AssertionError, match="all launches of modulate_norm"):
        assert_line([{**common, **static_report.whole(case, "forward", group, 1000.0)}])
