"""`make gpu`, run dry: every stage from end to end on the CPU, resuming, time limits, and no speed behind a red gate."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
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
    command = ["--device", "cpu", "--results", str(tmp_path), "--seconds", "3000"]  # other work may slow it
    assert gpu.main(command) == 0
    written = record(tmp_path)
    assert list(written) == [s.name for s in gpu.stages({"type": "cpu"})]
    skipped = {name for name, found in written.items() if found["status"] == "skipped"}
    assert skipped == {"build", "memcheck", "racecheck", "wheels", "parity-wheels", "attention-wheels"}
    assert all(written[name]["reason"] for name in skipped)
    for name in gpu.SIZES:
        assert json.loads((tmp_path / written[name]["numbers"]).read_text())["rows"]
    assert json.loads((tmp_path / "environment.json").read_text())["type"] == "cpu"
    numbers = {f"{name}.json" for name in gpu.SIZES}
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "stages.json", *numbers}
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


def test_on_a_gpu_every_stage_has_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")
    (tmp_path / "xformers-0.0.35-py39-none-manylinux_2_28_x86_64.whl").touch()
    (tmp_path / "flash_attn_4-4.0.0b36-py3-none-any.whl").touch()
    machine = {"type": "cuda", "compute_capability": "9.0"}
    stages = {s.name: s for s in gpu.stages(machine, tmp_path)}
    assert not [s.name for s in stages.values() if s.skip]
    assert stages["parity-wheels"].command[-1] == "xformers,flash_attn_4"
    assert str(gpu.WHEELS) in stages["attention-wheels"].environment["PYTHONPATH"]
    assert all("PYTHONPATH" not in s.environment for s in stages.values() if "wheels" not in s.name)
    assert set(gpu.GATES) <= set(stages)
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    library = stages["parity-cuda"].environment["DITKERNELS_CUDA_LIBRARY"]
    assert all(
        s.environment.get("DITKERNELS_CUDA_LIBRARY") == library
        for s in stages.values()
        if s.name not in ("build", "wheels")
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


def writes_rows(rows: int, complete: bool, hangs: bool = False) -> tuple[str, ...]:
    """A benchmark that leaves so many rows."""
    result = {"complete": complete, "rows": [{}] * rows}
    program = (
        f"import json, sys, time; json.dump({result!r}, open(sys.argv[sys.argv.index('--json') + 1], 'w')); "
        f"time.sleep({60 if hangs else 0})"
    )
    return "python", "-c", program


def test_a_benchmark_cut_short_keeps_its_rows_and_is_taken_up_again(tmp_path: Path) -> None:
    def rows() -> int:
        return len(json.loads((tmp_path / "ops.json").read_text())["rows"])

    def ops(command: tuple[str, ...], limit: int = 60) -> Stage:
        return Stage("ops", command, limit, benchmark=True)

    found = run(tmp_path, ops(writes_rows(5, complete=False, hangs=True), 3))["ops"]
    assert (found["status"], found["reason"], found["numbers"]) == (
        "cut short",
        "5 rows were had in 3 s",
        "ops.json",
    )
    # A shorter try of the same code takes nothing away, a whole one replaces it, whatever it holds.
    run(tmp_path, ops(writes_rows(2, complete=False, hangs=True), 3))
    assert rows() == 5
    assert run(tmp_path, ops(writes_rows(3, complete=True)))["ops"]["status"] == "passed"
    assert rows() == 3
    # Other code begins anew.
    run(tmp_path, ops(writes_rows(1, complete=False, hangs=True), 3), code="b")
    assert rows() == 1
    assert not list(tmp_path.glob("*.part.json"))


def test_benchmarks_share_the_time_that_is_left() -> None:
    gate, ops, absent, sampling = (
        Stage("check", OK, 100),
        Stage("ops", OK, 150, benchmark=True),
        Stage("wheels", OK, 50, benchmark=True, skip="no wheels"),
        Stage("sampling", OK, 50, benchmark=True),
    )
    assert gpu._share([gate, ops, sampling], 90) == 90
    assert gpu._share([ops, absent, sampling], 100) == 75
    assert gpu._share([sampling], 25) == 25
    assert gpu._share([absent, sampling], 0) == 0


def test_a_share_too_short_to_begin_with_waits_for_the_next_run(tmp_path: Path) -> None:
    first, second = (Stage(name, OK, limit, benchmark=True) for name, limit in (("ops", 1), ("training", 99)))
    written = run(tmp_path, first, second, budget=20)
    assert [written[name]["status"] for name in ("ops", "training")] == ["not run", "passed"]


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-to-be-had\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in files.items():
            wheel.writestr(inner, text)
        wheel.writestr(f"{about}/RECORD", "".join(f"{inner},,\n" for inner in (*files, f"{about}/RECORD")))
    return path


def test_wheels_are_unpacked_beside_the_users_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = tmp_path / "handed"
    handed.mkdir()
    make_wheel(handed, "standin_one", "1.0", {"standin_one.py": "value = 1\n"})
    whole = make_wheel(handed, "standin_two", "2.0", {"standin_two.py": "value = 2\n"})
    for index, start in enumerate(range(0, whole.stat().st_size, 300)):
        (handed / f"{whole.name}.{index:02}").write_bytes(whole.read_bytes()[start : start + 300])
    whole.unlink()
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "target")
    stages = {s.name: s for s in gpu.stages({"type": "cpu"}, handed)}
    found = run(tmp_path / "results", stages["wheels"])["wheels"]
    assert found["status"] == "passed", found["output_tail"]
    program = "import standin_one, standin_two; print(standin_one.value + standin_two.value)"
    for folder, said in ((tmp_path / "target", "3\n"), (tmp_path, "")):
        environment = {"PYTHONPATH": str(folder), "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout == said
    # Other wheels are unpacked again, the same ones not.
    assert run(tmp_path / "results", stages["wheels"])["wheels"] == found
    (handed / f"{whole.name}.00").write_bytes(b"1")
    again = {s.name: s for s in gpu.stages({"type": "cpu"}, handed)}["wheels"]
    assert run(tmp_path / "results", again)["wheels"]["status"] == "failed"


@pytest.mark.parametrize(
    "names, said",
    [
        ([], "got no wheel"),
        (["torch-2.11.0-py3-none-any.whl"], "got a wheel of torch"),
        (
            ["big-1-py3-none-any.whl.00", "big-1-py3-none-any.whl.02"],
            "got 2 pieces up to big-1-py3-none-any.whl.02",
        ),
    ],
)
def test_a_folder_of_wheels_that_cannot_be_used_is_named(
    names: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import wheels

    for name in names:
        (tmp_path / name).touch()
    assert wheels.main([str(tmp_path), str(tmp_path / "target")]) == 2
    assert said in capsys.readouterr().err


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
