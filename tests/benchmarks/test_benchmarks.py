"""The benchmark scripts run from end to end, at sizes a CPU can bear, and leave the JSON they promise."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import commands
from tests.helpers.commands import BENCHMARKS
from tools.tree import ROOT

ENVIRONMENT = {"date", "commit", "device", "driver", "cuda", "python", "torch", "triton", "platform"}
TIMING = {"median_ms", "low_ms", "high_ms"}


def run(name: str, *arguments: str, out: Path) -> list[dict[str, Any]]:
    """Runs a script as the shell would, and returns the rows of its JSON."""
    commands.run(commands.module_of(name), "--device", "cpu", "--rounds", "2", "--json", str(out), *arguments)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert set(result["environment"]) >= ENVIRONMENT
    assert result["settings"]["rounds"] == 2
    assert result["complete"]
    for row in result["rows"]:
        if "median_ms" in row:
            assert set(row) >= TIMING
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    return result["rows"]


def test_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--model", "DiT-S/8", "--batch", "1", "--input-size", "16", "--copy-mib", "1", "--dtype", "fp32")
    rows = run("ceilings", *size, out=tmp_path / "c.json")
    assert [row["what"] for row in rows] == ["copy", "qkv", "proj", "fc1", "fc2"]
    assert rows[1]["shape"] == [4, 1152, 384]
    assert all(row.get("gbps", row.get("tflops")) > 0 for row in rows)
    assert "4x1152x384" in capsys.readouterr().out


OPS = "modulate_norm,gated_residual,gated_residual_norm,patch_embed,final_layer,bias_gelu,split_qkv"


def test_ops(tmp_path: Path) -> None:
    size = (
        *("--ops", OPS, "--shapes", "2x6x32", "--precisions", "bf16,fp32+bf16", "--passes", "forward,backward"),
        *("--copy-mib", "1", "--contenders", "eager,torch,cuda"),
    )
    rows = run("ops", *size, out=tmp_path / "o.json")
    timed = [row for row in rows if "median_ms" in row]
    # six ops in two passes and split_qkv's backward, two precisions, two contenders that can serve
    assert len(timed) == 52
    assert all(row["error_over_allowed"] <= 1 for row in timed if row["contender"] == "torch")
    assert sum("cannot serve" in row.get("note", "") for row in rows) == 14
    forward = next(r for r in timed if (r["op"], r["precision"]) == ("gated_residual_norm", "fp32+bf16"))
    # x and x1 in fp32, branch and h in bf16
    assert forward["floor_bytes"] == 2 * 6 * 32 * (4 + 2 + 4 + 2)


def test_a_wrong_op_gets_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ditkernels import ops

    right = ops.modulate_norm
    monkeypatch.setattr(ops, "modulate_norm", lambda x, *args, **options: 1.01 * right(x, *args, **options))
    size = ("--shapes", "2x6x32", "--copy-mib", "1", "--precisions", "fp32", "--passes", "forward")
    named = ("--ops", "modulate_norm", "--contenders", "eager,torch")
    rows = run("ops", *size, *named, out=tmp_path / "o.json")
    assert {row["contender"] for row in rows if "median_ms" in row} == {"eager"}
    assert any("WRONG" in row.get("note", "") for row in rows)


def test_contenders_are_compared_within_a_round_and_over_processes(tmp_path: Path) -> None:
    named = ("--ops", "gated_residual,gelu", "--contenders", "eager,cpu,copy", "--precisions", "fp32")
    size = ("--shapes", "1x4x32,2x6x32", "--copy-mib", "1", "--passes", "inference,forward+backward")
    processes = ("--processes", "2", "--threads", "1,2")
    rows = run("ops", *named, *size, *processes, out=tmp_path / "o.json")
    timed = [row for row in rows if "median_ms" in row and row["contender"] != "cpu"]
    assert len(timed) == 2 * 2 * 2 * 2 * 2
    assert len({json.dumps([row[key] for key in ("op", "contender", "pass", "shape", "threads")]) for row in timed}) == len(timed)
    for row in timed:
        assert row["processes"] == 2
        assert row[f"over_{row['contender']}"] == 1
        for name, least in row["least"].items():
            assert least <= row[name] <= row["most"][name]
    forward = next(row for row in timed if (row["op"], row["pass"]) == ("gated_residual", "inference"))
    assert forward["floor_bytes"] == 3 * 4 * 4 * 32
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["environment"]["threads"] == [1, 2]
    assert list(tmp_path.iterdir()) == [tmp_path / "o.json"]


def test_processes_that_were_cut_short_are_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.speed import measure, ops

    named = ("--ops", "gated_residual", "--contenders", "eager", "--precisions", "fp32", "--passes", "inference")
    out = tmp_path / "o.json"
    size = ("--device", "cpu", "--rounds", "1", "--shapes", "1x4x32", "--copy-mib", "1", "--json", str(out))
    command = [*named, *size, "--processes", "2", "--threads", "1", "--resume"]
    right = subprocess.run

    def cut_short(words: list[str], **options: Any) -> Any:
        if words[-1].endswith("1-1.json"):
            raise KeyboardInterrupt
        return right(words, **options)

    monkeypatch.setattr(measure.subprocess, "run", cut_short)
    with pytest.raises(KeyboardInterrupt):
        ops.main(command)
    first = json.loads((tmp_path / "o.json.processes/0-1.json").read_text(encoding="utf-8"))["rows"]
    monkeypatch.setattr(measure.subprocess, "run", right)
    ops.main(command)
    copy, eager = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (copy["processes"], eager["processes"]) == (2, 2)
    assert first[1]["median_ms"] in (eager["least"]["median_ms"], eager["most"]["median_ms"])


def test_medians_over_processes_keep_apart_what_is_not_measured() -> None:
    from benchmarks.speed import measure

    rows = [{"contender": name, "batch": 2, "gbps": gbps, "ratio": None} for gbps in (3.0, 1.0, 2.0) for name in ("a", "b")]
    note = {"contender": "a", "note": "out of memory"}
    a, b, told = measure.over_processes([*rows, note])
    assert a == {**rows[0], "gbps": 2.0, "processes": 3, "least": {"gbps": 1.0}, "most": {"gbps": 3.0}}
    assert (b["contender"], told["processes"], told["note"]) == ("b", 1, "out of memory")
    samples = {"plain": [4.0, 9.0, 2.0], "ours": [2.0, 3.0, 2.0]}
    assert measure.gains(samples, "ours", {"eager": "plain", "compiled": "absent"}) == {"over_eager": 2.0}


def test_on_a_cpu_sizes_are_smaller_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.speed import measure

    def batch(*argv: str) -> int:
        parser = measure.parser(None)
        parser.add_argument("--batch", type=int, default=256)
        return measure.arguments(parser, argv, batch=4).batch

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [batch("--device", "cpu"), batch("--device", "cpu", "--batch", "8"), batch("--device", "cuda"), batch()] == [
        4,
        8,
        256,
        256,
    ]


def test_attention(tmp_path: Path) -> None:
    size = ("--batch", "2", "--heads", "2", "--tokens", "5,16", "--dtype", "fp32")
    rows = run("attention", *size, out=tmp_path / "a.json")
    timed = [row for row in rows if "median_ms" in row]
    assert {row["backend"] for row in timed} == {"torch_flash", "plain"}
    assert {row["shape"][1] for row in timed} == {5, 16}
    assert {row["shape"][4] for row in timed} == {64, 72}
    assert all("cannot serve" in row["note"] for row in rows if "median_ms" not in row)


PARITY = ("--device", "cpu", "--tokens", "5", "--dtypes", "bf16,fp32")


def test_attention_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.studies import attention_parity

    out = tmp_path / "p.json"
    assert attention_parity.main([*PARITY, "--backends", "torch_flash,plain", "--json", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {(row["backend"], row["shape"][4], row["dtype"]) for row in rows} == {
        (backend, head_dim, dtype)
        for backend in ("torch_flash", "plain")
        for head_dim in (64, 72)
        for dtype in ("bfloat16", "float32")
    }
    assert all(row["refused"] is None and 0 < row["error_over_allowed"] <= 1 for row in rows)
    capsys.readouterr()
    assert attention_parity.main([*PARITY, "--backends", "plain,xformers"]) == 1
    assert capsys.readouterr().err == "xformers serves nowhere: it needs a CUDA device, and the tensors are on cpu\n"


def test_a_wrong_attention_backend_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.studies import attention_parity

    attention = sys.modules["ditkernels.ops.attention"]
    right = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *args: right(*args) * 1.02)
    assert attention_parity.main([*PARITY, "--backends", "torch_flash", "--head-dims", "72"]) == 1
    said = capsys.readouterr().err
    assert "torch_flash at [2, 5, 3, 4, 72] in float32: " in said
    assert "x the error allowed" in said


def test_training(tmp_path: Path) -> None:
    size = ("--models", "DiT-S/8", "--input-sizes", "16", "--batches", "2", "--passes", "step")
    rows = run(
        "training",
        *size,
        "--contenders",
        "eager-fp32,ours-bf16-residual,ours-bf16-residual-epilogues",
        out=tmp_path / "t.json",
    )
    product, without, eager, ours = rows
    assert without["note"].startswith("cannot serve: ")
    assert (eager["residual"], ours["residual"]) == ("fp32", "bf16")
    assert product["mfu"] == 1.0
    assert (eager["batch"], ours["batch"]) == (2, 2)
    assert ours["error_over_allowed"] <= 1
    # three forwards' worth of multiply-adds an image
    per_image = ours["gflops_per_s"] / ours["images_per_s"]
    assert math.isclose(per_image, eager["gflops_per_s"] / eager["images_per_s"], rel_tol=1e-9)
    assert torch.get_float32_matmul_precision() == "highest"


def test_passes_of_training_are_paired_with_the_plain_model(tmp_path: Path) -> None:
    size = ("--models", "64x1/2", "--input-sizes", "8", "--batches", "2", "--contenders", "eager-fp32,ours-fp32")
    _, *rows = run("training", *size, out=tmp_path / "t.json")
    assert [(row["contender"], row["pass"]) for row in rows] == [
        (name, which) for which in ("forward", "forward+backward") for name in ("eager-fp32", "ours-fp32")
    ]
    macs = [row["gflops_per_s"] / row["images_per_s"] for row in rows]
    assert math.isclose(macs[2], 3 * macs[0])
    assert [row["over_eager"] == 1 for row in rows] == [True, False, True, False]


def test_a_contender_with_epilogues_takes_them_unmeasured_and_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.speed import training
    from ditkernels.ops import dispatch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name, fastest in (("ours-bf16-residual-epilogues", "cuda"), ("ours-bf16-residual", None)):
        with training.RECIPES[name].choices():
            for op in ("mlp", "mlp_backward"):
                assert dispatch.fastest(op, torch.device("cuda")) == fastest
            assert dispatch.fastest("modulate_norm", torch.device("cuda")) is None
    assert dispatch.PREFERRED == {}


def test_mlp(tmp_path: Path) -> None:
    size = ("--model", "DiT-S/8", "--batch", "2", "--input-size", "16", "--contenders", "eager,torch,cuda")
    missing, *timed = run("mlp", *size, out=tmp_path / "mlp.json")
    assert missing["note"].startswith("cannot serve: ")
    assert [(row["pass"], row["contender"]) for row in timed] == [
        *(("forward", "eager"), ("forward", "torch"), ("backward", "eager"), ("backward", "torch"))
    ]
    assert timed[1]["error_over_allowed"] <= 1
    # two products of 8 rows forward, four backward
    for row, products in zip(timed, (2, 2, 4, 4), strict=True):
        assert math.isclose(row["tflops"] * row["median_ms"] * 1e9, products * 2 * 8 * 384 * 1536)


def test_modulations(tmp_path: Path) -> None:
    rows = run("modulations", "--ops", "modulate_norm", "--kinds", "token,index", out=tmp_path / "m.json")
    assert [(row["shape"], row["kind"], row["pass"]) for row in rows] == [
        (shape, kind, which)
        for shape in ([1, 256, 384], [4, 256, 1152])
        for kind in ("token", "index")
        for which in ("forward", "forward+backward")
    ]
    assert all(row["times faster"] > 0 for row in rows)


def test_first_use(tmp_path: Path) -> None:
    size = ("--model", "64x2/2", "--input-size", "4", "--batch", "2", "--starts", "2", "--contenders", "eager-fp32")
    cold, warm = run("first_use", *size, out=tmp_path / "f.json")
    assert [(row["caches"], row["starts"]) for row in (cold, warm)] == [("cold", 1), ("warm", 2)]
    assert warm["over_eager"] == 1
    assert not list(tmp_path.glob("*.processes"))
    for row in (cold, warm):
        parts = [row[part] for part in ("imported", "built", "first", "second")]
        assert min(parts) > 0
        assert math.isclose(row["until_first"], sum(parts[:3]))


def test_accelerate_time() -> None:
    from benchmarks.speed import accelerate_time

    other, ours = accelerate_time.rows("DiT-S/8", ROOT, threads=1, rounds=1, device="cpu")
    assert [row["contender"] for row in (other, ours)] == ["other", "ours"]
    assert ours["fused"] == other["fused"] == 3 * 12 + 3
    assert math.isclose(ours["over_other"], ours["seconds"] / other["seconds"])


def test_a_process_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    size = ("--model", "DiT-S/8", "--input-size", "7", "--contenders", "ours-fp32")
    with pytest.raises(RuntimeError, match=r"(?s)ours-fp32 ended with 1: .*input_size: got"):
        run("first_use", *size, out=tmp_path / "f.json")


SAMPLING = ("--model", "DiT-S/8", "--input-size", "16", "--batches", "2", "--steps", "50,250", "--lengths", "2,6")


def test_training_goes_through_all_models_and_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.speed import training

    def told(names: list[str], network: Any, *_: Any) -> Iterator[dict[str, Any]]:
        yield from ({**network._asdict(), "contender": name} for name in names)

    monkeypatch.setattr(training, "rows_together", told)
    out = tmp_path / "all.json"
    sizes = ("--models", "all", "--input-sizes", "32,64", "--peak-tflops", "1", "--repeats", "2")
    training.main(["--device", "cpu", "--json", str(out), *sizes, "--contenders", "ours-bf16,eager-bf16"])
    _, *rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 12 * 2 * 2 * 2
    assert len({(row["model"], row["input_size"], row["contender"], row["repeat"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_sampling(solver: str, tmp_path: Path) -> None:
    named = ("--solver", solver, "--contenders", "eager-fp32,sampler-fp32")
    rows = run("sampling", *SAMPLING, *named, out=tmp_path / "s.json")
    assert [(row["contender"], row["steps"]) for row in rows] == [
        *(("eager-fp32", 50), ("eager-fp32", 250)),
        *(("sampler-fp32", 50), ("sampler-fp32", 250)),
    ]
    for row in rows:
        assert math.isclose(row["images_per_s"], 2e3 / row["drawing_ms"])
        # of two rounds the median is the mean, and the mean of drawings is the drawing of means
        assert math.isclose(row["drawing_ms"], row["fixed_ms"] + row["steps"] * row["median_ms"])
        assert (row["batch"], row["timed_steps"], row["cuda_graphs"]) == (2, [2, 6], False)
    assert 0 < rows[2]["error_over_allowed"] <= 1
    assert rows[0]["over_eager"] == 1 != rows[2]["over_eager"]


def test_the_plain_model_with_modulation_ahead_is_held_to_the_contract_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ditkernels.sampling import drawing as sampler

    size = ("--model", "64x1/4", "--input-size", "8", "--batches", "1", "--contenders", "eager-fp32,ahead-fp32", "--rounds", "1")
    right = sampler.sample
    for factor, timed in ((1.0, ["eager-fp32", "ahead-fp32"]), (1.1, ["eager-fp32"])):
        monkeypatch.setattr(sampler, "sample", lambda *args, factor=factor, **options: factor * right(*args, **options))
        commands.run("benchmarks.speed.sampling", "--device", "cpu", *size, "--json", str(tmp_path / "s.json"))
        rows = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["rows"]
        assert list(dict.fromkeys(row["contender"] for row in rows if "median_ms" in row)) == timed


def test_a_wrong_model_draws_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ditkernels import ops

    right = ops.gated_residual_norm

    def wrong(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = right(*args, **options)
        return x, 1.001 * h

    monkeypatch.setattr(ops, "gated_residual_norm", wrong)
    named = ("--contenders", "eager-bf16,ours-fp32,sampler-fp32")
    rows = run("sampling", *SAMPLING, *named, out=tmp_path / "s.json")
    assert {row["contender"] for row in rows if "median_ms" in row} == {"eager-bf16"}
    assert [row["contender"] for row in rows if "WRONG" in row.get("note", "")] == [
        "ours-fp32",
        "sampler-fp32",
    ]


def test_a_benchmark_cut_short_leaves_what_it_had(tmp_path: Path) -> None:
    from benchmarks.speed import measure

    def rows() -> Iterator[dict[str, Any]]:
        yield {"what": "first"}
        raise KeyboardInterrupt

    out = tmp_path / "cut.json"
    args = measure.parser(None).parse_args(["--device", "cpu", "--json", str(out)])
    with pytest.raises(KeyboardInterrupt):
        measure.report("cut", args, rows(), ["what"])
    left = json.loads(out.read_text(encoding="utf-8"))
    assert left["rows"] == [{"what": "first"}]
    assert not left["complete"]


def test_the_suites_of_pytest_benchmark_run_and_are_no_part_of_the_test_suite(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    out = tmp_path / "b.json"
    few = "(modulate_norm and fp32) or (test_attention and 72) or (test_guided_steps and sampler)"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={out}", "-k", few)
    # pytest-benchmark measures nothing in a worker of xdist, which the suite itself may run in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    timed = {row["name"].partition("[")[0] for row in json.loads(out.read_text(encoding="utf-8"))["benchmarks"]}
    assert timed == {"test_op", "test_attention", "test_guided_steps"}
    assert "the kernels need CUDA" in done.stdout
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_optimizer(tmp_path: Path) -> None:
    size = ("--models", "DiT-S/8", "--copy-mib", "1", "--contenders", "fused,foreach,torch,triton,cuda")
    rows = run("optimizer", *size, out=tmp_path / "o.json")
    timed = [row for row in rows if "median_ms" in row]
    assert [(row["contender"], row["copied"]) for row in timed] == [
        *(("torch", False), ("fused", False), ("foreach", False), ("torch", True))
    ]
    assert all(row["error_over_allowed"] <= 1 for row in timed if row["contender"] == "torch")
    assert timed[0]["over_foreach"] > 0
    assert timed[1]["over_fused"] == 1
    assert {row["floor_bytes"] for row in timed} == {36 * 33_142_016}
    notes = {row["contender"]: row["note"][:12] for row in rows if "note" in row}
    assert notes == {"triton": "cannot serve", "cuda": "cannot serve"}


def test_cost_model(tmp_path: Path) -> None:
    size = ("--models", "DiT-S/8", "--batch", "64", "--detail", "--tflops", "100", "--bandwidth", "1000")
    rows = run("cost_model", *size, out=tmp_path / "m.json")
    steps = {row["variant"]: row for row in rows if "step_ms" in row}
    assert steps["ours, bf16 residual"]["moving_ms"] < steps["ours"]["moving_ms"] < steps["plain"]["moving_ms"]
    assert len({row["products_ms"] for row in steps.values()}) == 1
    # 2 operations a multiply-add, three forwards' worth, attention's backward half a product dearer
    assert math.isclose(steps["plain"]["products_ms"], 3 * 2 * 64 * 0.36 / 100, rel_tol=0.02)
    fused = next(row for row in rows if (row["variant"], row.get("kernel")) == ("ours", "ditkernels::gated_residual_norm"))
    one_pass = steps["ours, bf16 residual, fused optimizer"]
    assert math.isclose(one_pass["optimizer_ms"], 0.9 * steps["ours"]["optimizer_ms"])
    best = "ours, bf16 residual, fused optimizer, master weights"
    saved = steps[best]["moving_ms"] - steps[f"{best}, epilogues"]["moving_ms"]
    # 3 of 5 passes over the 4·D channels of 12 blocks in bf16; beside them five biases of an MLP read or written
    assert math.isclose(saved, 12 * 3 * 64 * 16 * 4 * 384 * 2 / 1e9, rel_tol=0.01)
    # 23 sites, and the last one once more in final_layer's backward
    # x and x1 in fp32, branch and h in bf16; gate, shift and scale; the branch's bias in fp32; mean and rstd
    batch, tokens, width = 64, 16, 384
    moved = 24 * (batch * tokens * width * 12 + 3 * batch * width * 2 + width * 4 + 2 * batch * tokens * 4)
    assert fused["gbytes"] == moved / 1e9
    (of_host,) = [row for row in rows if row["variant"] == "the host"]
    assert of_host["ours_kernels"] < 0.6 * of_host["plain_kernels"]
    assert math.isclose(of_host["plain_host_ms"], of_host["plain_kernels"] * 8e-3)
    for name in ("plain", "ours"):
        # A step grows by less than its images where the optimizer is part of it, so that the bound lies above the proportion.
        assert of_host[f"{name}_host_bound_to"] > 0.9 * 64 * (of_host["plain_host_ms"] - 1.4) / steps[name]["step_ms"]


def test_more_layers_are_more_kernels() -> None:
    from benchmarks.predicted import cost_model

    for ours in (False, True):
        of_two, of_three, of_four = (cost_model.kernels(ours, depth) for depth in (2, 3, 4))
        assert of_four - of_three == of_three - of_two > 10


@pytest.mark.parametrize(
    "names",
    [["DiT-S/8"], pytest.param(["DiT-S/8", "DiT-B/4", "DiT-XL/2"], marks=pytest.mark.slow)],
    ids=["one model", "three"],
)
def test_the_tables_of_predictions_in_the_docs_are_the_scripts(names: list[str], tmp_path: Path) -> None:
    written = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(written, encoding="utf-8")
    flags = ("--models", ",".join(names), "--docs", str(page))
    run("cost_model", *flags, out=tmp_path / "m.json")
    anew = page.read_text(encoding="utf-8")
    rows = [line for line in anew.splitlines() if line not in written.splitlines()]
    assert rows == [], "python -m benchmarks.predicted.cost_model --docs docs/performance.md writes them"
    assert f"| {names[0].removeprefix('DiT-')} |" in anew
    assert len(anew) < len(written)


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("ops", ("--ops", "softmax"), "got softmax, allowed are modulate_norm"),
        ("ops", ("--shapes", "4x384"), "got 4x384, allowed is BxNxD"),
        ("attention", ("--tokens", "0"), "got 0, allowed is 1 or more"),
        ("training", ("--models", "DiT-S/3"), "got DiT-S/3, allowed are DiT-XL/2"),
        ("training", ("--contenders", "fastest"), "got fastest, allowed are eager-fp32"),
        ("sampling", ("--lengths", "5,5"), "got 5,5, allowed are two numbers of steps"),
    ],
)
def test_a_bad_flag_is_named(script: str, arguments: tuple[str, ...], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        commands.run(commands.module_of(script), *arguments)
    assert said in capsys.readouterr().err


def test_trainer_overhead(tmp_path: Path) -> None:
    size = ("--batch", "2", "--input-size", "8", "--steps", "2", "--log-every", "2")
    bare, trainer = run("trainer_overhead", *size, out=tmp_path / "o.json")
    assert (bare["contender"], trainer["contender"]) == ("bare", "trainer")
    assert bare["ms_a_step"] > 0
    assert -1 < trainer["overhead"] < math.inf
    # Three turns of two steps, of which the last has not reached the host.
    assert trainer["logged_lines"] == 2


CPU_ROW = {"contender": "cpu", "processes": 2, "median_ms": 1.0, "copied": False}


def cpu_results(folder: Path) -> None:
    """What benchmarks/speed/cpu.py would have measured of one op, at toy size."""
    gains = {"over_eager": 2.0, "over_compiled": 1.5, "over_copy": 0.5}
    measured = {**gains, "least": dict.fromkeys(gains, 1.0), "most": dict.fromkeys(gains, 3.0)}
    op = {**CPU_ROW, **measured, "op": "gated_residual_norm", "precision": "fp32", "pass": "inference"}
    rows = [{**op, "shape": [4, 256, 384], "threads": threads} for threads in (1, 2)]
    rows += [{**row, "contender": "compiled"} for row in rows]
    of = {"device": "a CPU", "instruction_set": "avx2", "python": "3.11", "torch": "2.14", "date": "2030-01-02T", "commit": "abc"}
    of = {**of, "compute_capability": None}
    for name in ("ops", "large"):
        (folder / f"cpu-{name}.json").write_text(json.dumps({"environment": of, "complete": True, "rows": rows}), encoding="utf-8")


def test_what_a_cpu_measured_is_written_between_the_marks_of_a_page(tmp_path: Path) -> None:
    from benchmarks import figures
    from benchmarks.speed import cpu

    page = tmp_path / "page.md"
    marks = "".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in cpu.TABLES)
    page.write_text(f"before\n{marks}after\n", encoding="utf-8")
    command = ["--results", str(tmp_path), "--docs", str(page)]
    with pytest.raises(ValueError, match=r"no complete cpu-\*\.json"):
        cpu.main(command)
    cpu_results(tmp_path)
    cpu.main(command)
    written = page.read_text(encoding="utf-8")
    assert "a CPU, avx2; Python 3.11, torch 2.14; 2030-01-02." in written
    short, longer = (
        written.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0] for name in ("cpu short", "cpu summary")
    )
    assert "| `gated_residual_norm`, forward | plain PyTorch | 2.00 (1.00 to 3.00) | – |" in short
    assert "torch.compile" not in short
    assert "| `gated_residual_norm`, forward | torch.compile | 1.50 (1.00 to 3.00) | – |" in longer
    assert "moves what it must at 50% in fp32 of the rate" in written
    assert "| `gated_residual_norm` | 4x256x384 | fp32 | inference | 2.00 (1.00 to 3.00) |" in written
    cpu.main(command)
    assert page.read_text(encoding="utf-8") == written
    assert (written[:7], written[-6:]) == ("before\n", "after\n")
    figures.main(["--results", str(tmp_path), "--out", str(tmp_path), "--only", "cpu.png"])
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="no marks of cpu short or cpu summary or cpu ops"):
        cpu.main(command)


def test_the_docs_have_the_marks() -> None:
    pages = {"cpu short": "README.md", "cpu summary": "docs/measured.md", "cpu ops": "benchmarks/results/README.md"}
    for name, page in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert 0 < text.find(f"<!-- {name} -->\n") < text.find(f"<!-- end of {name} -->")


def test_the_measurements_of_a_cpu_parse() -> None:
    from benchmarks.speed import cpu

    for script, *flags in cpu.MEASUREMENTS.values():
        assert commands.parse(["python", "-m", commands.module_of(script), "--device", "cpu", *flags]).processes == 1


@pytest.mark.parametrize("script", ["figures", "speed/ops", "studies/solvers", "predicted/cost_model", "gpu/driver", "gpu/fastest"])
def test_a_script_run_by_its_path_tells_in_one_line_how_it_is_run(script: str) -> None:
    done = subprocess.run([sys.executable, f"benchmarks/{script}.py"], capture_output=True, text=True, cwd=ROOT)
    module = f"benchmarks.{script.replace('/', '.')}"
    assert (done.returncode, done.stderr) == (1, f"benchmarks/{script}.py: run it in {ROOT} as python -m {module}\n")


def test_every_script_finds_a_link_in_place_of_the_first_package_that_it_imports() -> None:
    for file in sorted(BENCHMARKS.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        first = re.search(r"^from (benchmarks|tools)\b", text, flags=re.MULTILINE)
        if first and '__name__ == "__main__"' in text:
            assert file.with_name(f"{first[1]}.py").is_symlink(), file
