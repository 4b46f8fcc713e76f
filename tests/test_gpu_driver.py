"""`make gpu`, run dry: every stage from end to end on the CPU, resuming, time limits, and no speed behind a red gate."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu import Stage

OK = ("python", "-c", "print('well')")
BAD = ("python", "-c", "print('ill'); raise SystemExit(3)")
HANGS = ("python", "-c", "import time; print('waiting', flush=True); time.sleep(60)")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stages.json").read_text())


def run(
    folder: Path, *stages: Stage, code: str = "a", force: bool = False, budget: float = 60
) -> dict[str, Any]:
    fine = gpu.run(stages, folder, code, force=force, budget=budget)
    written = record(folder)
    assert fine == all(written[s.name]["status"] in gpu.DONE for s in stages)
    return written


def test_it_dry_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "fingerprint", lambda: "code")  # the tree may be edited meanwhile
    command = ["--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main(command) == 0
    written = record(tmp_path)
    assert list(written) == [s.name for s in gpu.stages({"type": "cpu"})]
    skipped = {name for name, found in written.items() if found["status"] == "skipped"}
    assert skipped == {"build", "memcheck", "racecheck"}
    assert all(written[name]["reason"] for name in skipped)
    for name in gpu.SIZES:
        assert json.loads((tmp_path / written[name]["numbers"]).read_text())["rows"]
    assert json.loads((tmp_path / "environment.json").read_text())["type"] == "cpu"
    assert len(list(tmp_path.iterdir())) <= 8
    capsys.readouterr()
    assert gpu.main([*command, "--stages", "check,ops,training"]) == 0
    assert capsys.readouterr().out.count("passed before") == 3


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    before = gpu.fingerprint()
    (tmp_path / "csrc/kernel.cu").write_text("1")
    between = gpu.fingerprint()
    (tmp_path / "csrc/kernel.cu").write_text("2")
    assert len({before, between, gpu.fingerprint()}) == 3


def test_on_a_gpu_every_stage_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")
    stages = {s.name: s for s in gpu.stages({"type": "cuda", "compute_capability": "9.0"})}
    assert not [s.name for s in stages.values() if s.skip]
    assert set(gpu.GATES) <= set(stages)
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    library = stages["parity-cuda"].environment["DITKERNELS_CUDA_LIBRARY"]
    assert all(
        s.environment.get("DITKERNELS_CUDA_LIBRARY") == library for s in stages.values() if s.name != "build"
    )
    for stage in stages.values():
        for word in stage.command:
            assert not word.endswith(".py") or (gpu.ROOT / word).exists(), word
    names = list(stages)
    assert max(names.index(gate) for gate in gpu.GATES) < min(names.index(name) for name in gpu.SIZES)


def test_without_nvcc_the_stages_of_cuda_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_nvcc", lambda: None)
    stages = {s.name: s for s in gpu.stages({"type": "cuda", "compute_capability": "9.0"})}
    assert "nvcc is not here" in str(stages["build"].skip)
    assert stages["memcheck"].skip
    assert not any("DITKERNELS_CUDA_LIBRARY" in s.environment for s in stages.values())


def test_what_passed_for_this_code_is_not_done_again(tmp_path: Path) -> None:
    once = Stage("check", OK, 60)
    first = run(tmp_path, once)["check"]
    assert (first["status"], first["exit_status"], first["output_tail"]) == ("passed", 0, "well\n")
    never = Stage("check", BAD, 60)
    assert run(tmp_path, never)["check"] == first
    assert run(tmp_path, never, force=True)["check"]["status"] == "failed"
    assert run(tmp_path, once)["check"]["status"] == "passed"
    assert run(tmp_path, never, code="b")["check"]["exit_status"] == 3


def test_a_red_gate_stops_the_benchmarks_but_not_the_other_gates(tmp_path: Path) -> None:
    red, green, speed = (
        Stage("parity-cuda", BAD, 60),
        Stage("memcheck", OK, 60),
        Stage("ops", OK, 60, benchmark=True),
    )
    written = run(tmp_path, red, green, speed)
    assert [written[n]["status"] for n in ("parity-cuda", "memcheck", "ops")] == [
        "failed",
        "passed",
        "not run",
    ]
    assert written["ops"]["reason"] == "parity-cuda is red: no speed is reported"
    # Nor when it is asked for alone, later; only when the gate is green.
    assert run(tmp_path, speed)["ops"]["status"] == "not run"
    assert run(tmp_path, Stage("parity-cuda", OK, 60), speed)["ops"]["status"] == "passed"


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    written = run(tmp_path, Stage("check", HANGS, 2))
    assert written["check"]["status"] == "timed out"
    assert written["check"]["output_tail"] == "waiting\n"
    assert time.monotonic() - began < 30


def test_when_the_time_is_used_up_the_rest_waits_for_the_next_run(tmp_path: Path) -> None:
    stages = Stage("check", OK, 60), Stage("parity-triton", OK, 60)
    written = run(tmp_path, *stages, budget=0)
    assert {found["status"] for found in written.values()} == {"not run"}
    assert {found["status"] for found in run(tmp_path, *stages).values()} == {"passed"}


def test_a_stage_whose_need_failed_is_not_run(tmp_path: Path) -> None:
    written = run(tmp_path, Stage("build", BAD, 60), Stage("parity-cuda", OK, 60, needs="build"))
    assert written["parity-cuda"]["reason"] == "it needs the stage build, which did not pass"


def test_a_tool_that_the_device_does_not_allow_is_a_named_skip(tmp_path: Path) -> None:
    refused = ("python", "-c", "print('Device not supported'); raise SystemExit(1)")
    found = run(tmp_path, Stage("memcheck", refused, 60, unsupported="Device not supported"))["memcheck"]
    assert (found["status"], found["exit_status"]) == ("skipped", 1)
    assert (
        run(tmp_path, Stage("memcheck", BAD, 60, unsupported="Device not supported"))["memcheck"]["status"]
        == "failed"
    )


def test_a_run_resumes_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    machine = {"type": "cuda", "device": "NVIDIA H200"}
    new = gpu.folder_of(machine, "code")
    assert new.name == f"{gpu._now()[:10]}-nvidia-h200"
    before = new.with_name("2020-01-01-nvidia-h200")
    before.mkdir(parents=True)
    (before / "stages.json").write_text(json.dumps({"check": {"code": "code"}}))
    assert gpu.folder_of(machine, "code") == before
    assert gpu.folder_of(machine, "other") == new


def test_an_unknown_stage_and_an_unknown_device_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--stages", "checks"])
    assert "got checks, allowed are build, check" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"make gpu: .*tpu"):
        gpu.main(["--device", "tpu"])


def test_it_sanitizes_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sanitize

    monkeypatch.setattr(sys, "argv", ["sanitize"])
    sanitize.main(["--backend", "torch", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("forwards and backwards on torch, cpu\n")
