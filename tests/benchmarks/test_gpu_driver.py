"""`make gpu`, run dry: every stage from end to end on the CPU, resuming, time limits, and no speed behind a red gate."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import driver, gpu_tests
from benchmarks.gpu.driver import Stage
from benchmarks.speed import measure
from tests.helpers import commands
from tools.tree import ROOT

OK = ("python", "-c", "print('well')")
BAD = ("python", "-c", "print('ill'); raise SystemExit(3)")


def by_name(machine: dict[str, Any], wheels: Path | None = None) -> dict[str, Stage]:
    return {stage.name: stage for group in driver.stages(machine, wheels) for stage in group}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stages.json").read_text(encoding="utf-8"))


def run(folder: Path, *stages: Stage, code: str = "a", force: bool = False, budget: float = 60) -> dict[str, Any]:
    call = driver.Call(folder, code, force=force, end=time.monotonic() + budget)
    fine = call.run(stages)
    written = record(folder)
    assert fine == all(written[s.name]["status"] in driver.DONE for s in stages)
    return written


@pytest.mark.slow
def test_it_dry_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(driver, "fingerprint", lambda: "code")  # the tree may be edited meanwhile
    stages = by_name({"type": "cpu"})
    # Of the later ones all but latents are the first ones' scripts, or have tests of their own.
    chosen = [name for name in stages if name == "latents" or name not in driver.LATER]
    for name in set(stages) - set(chosen):
        commands.parse([*stages[name].command, "--json", "rows.json", "--resume"])
    command = ["--device", "cpu", "--results", str(tmp_path), "--budget", "3000"]  # other work may slow it
    assert driver.main([*command, "--stages", ",".join(chosen)]) == 0
    written = record(tmp_path)
    assert list(written) == chosen
    skipped = {name for name, found in written.items() if found["status"] == "skipped"}
    assert skipped == {"build", "memcheck", "racecheck", "wheels", "parity-wheels", "attention-wheels"}
    assert all(written[name]["reason"] for name in skipped)
    for name in (*driver.FIRST, "latents"):
        assert json.loads((tmp_path / written[name]["numbers"]).read_text(encoding="utf-8"))["rows"]
    assert json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))["type"] == "cpu"
    numbers = {f"{name}.json" for name in (*driver.FIRST, "latents", "parity-triton", "parity-cuda")}
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "stages.json", *numbers}
    capsys.readouterr()
    assert driver.main([*command, "--stages", "check,ops,training"]) == 0
    assert capsys.readouterr().out.count("passed before") == 3


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    before = driver.fingerprint()
    (tmp_path / "csrc/kernel.cu").write_text("1", encoding="utf-8")
    between = driver.fingerprint()
    (tmp_path / "csrc/kernel.cu").write_text("2", encoding="utf-8")
    after = driver.fingerprint()
    monkeypatch.setattr(driver, "_version", lambda package: f"another {package}")
    assert len({before, between, after, driver.fingerprint()}) == 4


def test_on_a_gpu_every_stage_has_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(driver.shutil, "which", lambda name, path=None: f"/bin/{name}")
    (tmp_path / "xformers-0.0.35-py39-none-manylinux_2_28_x86_64.whl").touch()
    (tmp_path / "flash_attn_4-4.0.0b36-py3-none-any.whl").touch()
    machine = {"type": "cuda", "compute_capability": "9.0"}
    stages = by_name(machine, tmp_path)
    assert not [s.name for s in stages.values() if s.skip]
    assert stages["parity-wheels"].command[-1] == "xformers,flash_attn_4"
    assert str(driver.WHEELS) in stages["attention-wheels"].environment["PYTHONPATH"]
    assert all("PYTHONPATH" not in s.environment for s in stages.values() if "wheels" not in s.name)
    assert set(driver.GATES) <= set(stages)
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    library = stages["parity-cuda"].environment["DITKERNELS_CUDA_LIBRARY"]
    assert all(
        s.environment.get("DITKERNELS_CUDA_LIBRARY") == library for s in stages.values() if s.name not in ("build", "wheels")
    )
    tests = {word for stage in stages.values() for word in stage.command if word.startswith("tests/")}
    assert tests == {f"tests/gpu/{path.name}" for path in (driver.ROOT / "tests/gpu").glob("test_*.py")}
    names = list(stages)
    speeds = [name for name, stage in stages.items() if stage.benchmark]
    assert max(names.index(gate) for gate in driver.GATES) < min(names.index(name) for name in speeds)
    for stage in stages.values():
        if stage.command[0] == "python" and not {"tools/build_native.py", "benchmarks.gpu.wheels"} & set(stage.command):
            more = ["--json", "rows.json", "--resume"] if stage.rows else []
            commands.parse([*stage.command, *more])


def test_without_nvcc_the_stages_of_cuda_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_nvcc", lambda: None)
    stages = by_name({"type": "cuda", "compute_capability": "9.0"})
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
    assert written["ops"]["reason"] == "parity-cuda did not pass: no speed is reported"
    # Nor when it is asked for alone, later; only when the gate is green.
    assert run(tmp_path, speed)["ops"]["status"] == "not run"
    assert run(tmp_path, Stage("parity-cuda", OK, 60), speed)["ops"]["status"] == "passed"


# Waits, beside a process of its own and one that has left its session and still holds its output.
STARTS_OTHERS = """
import subprocess, time
for leaves in (False, True):
    print(subprocess.Popen(["sleep", "30"], start_new_session=leaves).pid, flush=True)
time.sleep(60)
"""


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SHORTEST", 0.5)
    began = time.monotonic()
    found = run(tmp_path, Stage("check", ("python", "-c", STARTS_OTHERS), 4), budget=4)["check"]
    assert time.monotonic() - began < 25
    assert (found["status"], found["exit_status"]) == ("cut short", None)
    stayed, left = map(int, found["output_tail"].split())
    os.kill(left, signal.SIGKILL)
    # What is killed takes its time where the machine is busy; the child would sleep until then.
    while lives(stayed):
        assert time.monotonic() - began < 25
        time.sleep(0.05)


def lives(process: int) -> bool:
    """Whether it runs; nobody may have asked a dead one for its status yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_when_the_time_is_used_up_the_rest_waits_for_the_next_run(tmp_path: Path) -> None:
    stages = Stage("check", OK, 60), Stage("parity-triton", OK, 60)
    written = run(tmp_path, *stages, budget=0)
    assert {found["status"] for found in written.values()} == {"not run"}
    assert {found["status"] for found in run(tmp_path, *stages).values()} == {"passed"}


class Simulated:
    """A clock, and stages that take so many seconds of it in all, a try going on where the last one was cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **seconds: float) -> None:
        self.now, self.seconds, self.folder = 0.0, seconds, folder
        self.tries: list[tuple[str, float]] = []
        monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(driver, "run_stage", self.run_stage)

    def run_stage(self, stage: Stage, folder: Path, limit: float) -> dict[str, Any]:
        took = min(limit, self.seconds[stage.name])
        self.now += took
        self.seconds[stage.name] -= took
        self.tries.append((stage.name, took))
        return {"status": "cut short" if self.seconds[stage.name] else "passed"}

    def call(self, *groups: list[Stage]) -> tuple[bool, float, list[tuple[str, float]]]:
        """Whether all is done, seconds taken, and what was tried for how long."""
        began, before = self.now, len(self.tries)
        call = driver.Call(self.folder, "code", force=False, end=self.now + driver.BUDGET)
        fine = [call.run(group) for group in groups]
        return all(fine), self.now - began, self.tries[before:]


def test_a_call_ends_in_time_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = {"check": 30.0, "parity-triton": 150.0, "ops": 130.0, "training": 400.0, "latents": 20.0}
    run = Simulated(monkeypatch, tmp_path, **needed)
    first = [
        Stage("check", OK, 45),
        Stage("parity-triton", OK, 100),
        Stage("ops", OK, 60, rows=True, benchmark=True),
        Stage("training", OK, 70, rows=True, benchmark=True),
    ]
    later = [Stage("latents", OK, 60, rows=True, benchmark=True)]
    # No speed before the gates are through; then the more valuable first, twice as long; then what time is left for.
    assert run.call(first, later) == (
        False,
        driver.BUDGET,
        [
            *(("check", 30), ("parity-triton", 100)),
            *(("parity-triton", 50), ("ops", 120), ("training", 140)),
            *(("ops", 10), ("training", 80)),
        ],
    )
    assert record(tmp_path)["training"]["status"] == "cut short"
    assert record(tmp_path)["latents"]["reason"] == driver.OVER
    assert run.call(first, later) == (True, 200, [("training", 70), ("training", 110), ("latents", 20)])
    assert run.call(first, later) == (True, 0, [])


def test_stages_that_hang_cost_a_call_its_time_and_no_other_stage_its_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, _ = driver.stages({"type": "cuda", "compute_capability": "9.0"})
    first = [replace(stage, skip=None, needs=None) for stage in first]
    run = Simulated(monkeypatch, tmp_path, **{stage.name: math.inf for stage in first if stage.benchmark})
    run.seconds |= {stage.name: float(stage.limit) for stage in first if not stage.benchmark}
    fine, seconds, tries = run.call(first)
    assert (fine, seconds) == (False, driver.BUDGET)
    assert {name for name, _ in tries} == {stage.name for stage in first}
    # So does a gate; the speeds wait for it.
    run = Simulated(monkeypatch, tmp_path / "gate", **{stage.name: 1.0 for stage in first})
    run.seconds["parity-triton"] = math.inf
    fine, seconds, tries = run.call(first)
    assert (fine, seconds) == (False, driver.BUDGET)
    assert {name for name, _ in tries} == {stage.name for stage in first if not stage.benchmark}


def test_nothing_is_said_of_a_library_that_is_not_built_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Simulated(monkeypatch, tmp_path, build=120.0, check=10.0)
    fine, _, tries = run.call([Stage("build", OK, 90), Stage("check", OK, 45)])
    assert (fine, tries) == (True, [("build", 90), ("build", 30), ("check", 10)])


# Two rows, and then it hangs; the next try has one more to get.
THREE_ROWS = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if "--resume" in sys.argv and path.exists() else []
new = 1 if rows else 2
path.write_text(json.dumps({"rows": rows + [{}] * new}), encoding="utf-8")
time.sleep(60 if new == 2 else 0)
"""


def test_a_benchmark_cut_short_goes_on_after_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "SHORTEST", 0.5)

    def rows() -> int:
        return len(json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))["rows"])

    ops = Stage("ops", ("python", "-c", THREE_ROWS), 3, rows=True, benchmark=True)
    found = run(tmp_path, ops, budget=3)["ops"]
    assert (found["status"], found["numbers"]) == ("cut short", "ops.json")
    assert found["reason"] == "2 rows were had in 3 s"
    # What the end of a call leaves no time for keeps what is known of it.
    capsys.readouterr()
    assert run(tmp_path, ops, budget=0)["ops"] == found
    assert capsys.readouterr().out == f"{'ops':<22} cut short: {driver.OVER}\n"
    assert run(tmp_path, ops)["ops"]["status"] == "passed"
    assert rows() == 3
    # Other code begins anew.
    run(tmp_path, ops, code="b", budget=3)
    assert rows() == 2


def test_a_benchmark_goes_on_after_its_units(tmp_path: Path) -> None:
    out = tmp_path / "units.json"
    measured: list[str] = []

    def rows(what: str) -> Iterator[dict[str, Any]]:
        measured.append(what)
        yield {"what": what}
        if what == "second" and measured.count(what) == 1:
            raise KeyboardInterrupt
        yield {"what": what, "again": True}

    def go(*flags: str) -> dict[str, Any]:
        parser = measure.resumable(measure.parser(None))
        journal = measure.Journal("units", parser.parse_args(["--device", "cpu", "--json", str(out), *flags]))
        for what in ("first", "second"):
            assert [row["what"] for row in journal.unit(what, rows, what)] == [what] * 2
        journal.close(["what"])
        return json.loads(out.read_text(encoding="utf-8"))

    with pytest.raises(KeyboardInterrupt):
        go()
    left = json.loads(out.read_text(encoding="utf-8"))
    assert [row["unit"] for row in left["rows"]] == ["first", "first"]
    assert not left["complete"]
    whole = go("--resume")
    assert measured == ["first", "second", "second"]
    assert [row["unit"] for row in whole["rows"]] == ["first"] * 2 + ["second"] * 2
    assert whole["complete"]
    # Other flags, or a try that is not to go on, begin anew.
    go("--resume", "--rounds", "3")
    go("--rounds", "3")
    assert measured == ["first", "second"] + ["second", "first"] * 2 + ["second"]


TESTS = """
import pathlib
import pytest
pytestmark = pytest.mark.gpu
def test_once(): pathlib.Path("once").touch(exist_ok=False)
def test_later(): assert pathlib.Path("now").exists()
def test_never(): pytest.skip("no memory")
@pytest.fixture
def ended():
    yield
    assert pathlib.Path("now").exists()
def test_that_ends_badly_at_first(ended): pass
"""


def test_what_passed_of_a_parity_stage_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test_some.py").write_text(TESTS, encoding="utf-8")
    Path("pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n", encoding="utf-8")
    command = ["test_some.py", "--json", "rows.json", "--resume"]
    assert gpu_tests.main(command) == 1
    Path("now").touch()
    assert gpu_tests.main(command) == 0
    result = json.loads(Path("rows.json").read_text(encoding="utf-8"))
    passed = [row["unit"].removeprefix("test_some.py::") for row in result["rows"]]
    assert passed == ["test_once", "test_later", "test_that_ends_badly_at_first"]
    assert result["complete"]


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


def test_wheels_are_unpacked_beside_the_users_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed = tmp_path / "handed"
    handed.mkdir()
    make_wheel(handed, "standin_one", "1.0", {"standin_one.py": "value = 1\n"})
    whole = make_wheel(handed, "standin_two", "2.0", {"standin_two.py": "value = 2\n"})
    for index, start in enumerate(range(0, whole.stat().st_size, 300)):
        (handed / f"{whole.name}.{index:02}").write_bytes(whole.read_bytes()[start : start + 300])
    whole.unlink()
    monkeypatch.setattr(driver, "WHEELS", tmp_path / "target")
    stages = by_name({"type": "cpu"}, handed)
    found = run(tmp_path / "results", stages["wheels"])["wheels"]
    assert found["status"] == "passed", found["output_tail"]
    program = "import standin_one, standin_two; print(standin_one.value + standin_two.value)"
    for folder, said in ((tmp_path / "target", "3\n"), (tmp_path, "")):
        environment = {"PYTHONPATH": str(folder), "PATH": ""}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout == said
    # Other wheels are unpacked again, the same ones not.
    assert run(tmp_path / "results", stages["wheels"])["wheels"] == found
    (handed / f"{whole.name}.00").write_bytes(b"1")
    again = by_name({"type": "cpu"}, handed)["wheels"]
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
    from benchmarks.gpu import wheels

    for name in names:
        (tmp_path / name).touch()
    assert wheels.main([str(tmp_path), str(tmp_path / "target")]) == 2
    assert said in capsys.readouterr().err


def test_the_limits_of_the_first_stages_add_up_to_one_call() -> None:
    first, _ = driver.stages({"type": "cuda", "compute_capability": "9.0"})
    assert sum(stage.limit for stage in first) <= driver.BUDGET <= 9 * 60 - 2 * driver.ENDING


def test_the_plan_names_every_stage_and_when_it_begins() -> None:
    stages = [Stage("check", OK, 45), Stage("memcheck", OK, 55, skip="no device"), Stage("ops", OK, 45), Stage("training", OK, 45)]
    head, *lines = driver.plan([stages[:2], stages[2:]], 90)
    assert head.startswith("90 seconds in all")
    assert [line.split() for line in lines] == [
        ["check", "45", "0"],
        ["memcheck", "-", "-", "no", "device"],
        ["ops", "45", "45"],
        ["training", "45", "90", "for", "a", "later", "call"],
    ]


def test_a_library_built_elsewhere_takes_the_place_of_a_build(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"no library")
    first, _ = driver.stages({"type": "cuda", "compute_capability": "9.0"}, built=library)
    by = {stage.name: stage for stage in first}
    assert by["check"].environment["DITKERNELS_CUDA_LIBRARY"] == str(library)
    assert by["parity-cuda"].needs == "build"
    found = run(tmp_path / "results", by["build"])["build"]
    assert (found["status"], found["exit_status"]) == ("failed", 1)
    assert f"the CUDA library {library} is not loaded: it is no library of ditkernels" in found["output_tail"]


def test_results_are_packed_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "probe", lambda device: {"type": "cpu", "device": "a CPU", "torch": "2.14"})
    monkeypatch.setattr(driver, "fingerprint", lambda: "code")
    archive = tmp_path / "all.tar.gz"
    assert driver.main(["--results", str(tmp_path / "r"), "--stages", "build,memcheck", "--archive", str(archive)]) == 0
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == ["r", "r/environment.json", "r/stages.json"]


@pytest.mark.parametrize("flag", ["--library", "--wheels"])
def test_a_path_that_is_not_there_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main([flag, "nowhere"])
    assert f"{flag}: got nowhere, allowed is a f" in capsys.readouterr().err


def test_the_debts_name_the_stages_that_pay_them() -> None:
    debts = (ROOT / "benchmarks/results/README.md").read_text(encoding="utf-8").split("\n## Owed")[1]
    assert set(re.findall(r"stages? ([\w-]+)", debts)) <= set(by_name({"type": "cpu"}))
    assert not [name for name in (*driver.FIRST, *driver.LATER) if not re.search(rf"\b{name}\b", debts)]


def test_a_stage_whose_need_failed_is_not_run(tmp_path: Path) -> None:
    written = run(tmp_path, Stage("build", BAD, 60), Stage("parity-cuda", OK, 60, needs="build"))
    assert written["parity-cuda"]["reason"] == "it needs the stage build, which did not pass"


def test_a_tool_that_the_device_does_not_allow_is_a_named_skip(tmp_path: Path) -> None:
    refused = ("python", "-c", "print('Device not supported'); raise SystemExit(1)")
    found = run(tmp_path, Stage("memcheck", refused, 60, unsupported="Device not supported"))["memcheck"]
    assert (found["status"], found["exit_status"]) == ("skipped", 1)
    assert run(tmp_path, Stage("memcheck", BAD, 60, unsupported="Device not supported"))["memcheck"]["status"] == "failed"


def test_a_run_resumes_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BENCHMARKS", tmp_path)
    machine = {"type": "cuda", "device": "NVIDIA H200"}
    new = driver.folder_of(machine, "code")
    assert new.name == f"{driver._now()[:10]}-nvidia-h200"
    before = new.with_name("2020-01-01-nvidia-h200")
    before.mkdir(parents=True)
    (before / "stages.json").write_text(json.dumps({"check": {"code": "code"}}), encoding="utf-8")
    assert driver.folder_of(machine, "code") == before
    assert driver.folder_of(machine, "other") == new


def test_an_unknown_stage_and_an_unknown_device_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(["--device", "cpu", "--stages", "checks"])
    assert "got checks, allowed are build, check" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"make gpu: .*tpu"):
        driver.main(["--device", "tpu"])


def test_it_sanitizes_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.kernel_proof import sanitize

    monkeypatch.setattr(sys, "argv", ["sanitize"])
    sanitize.main(["--backend", "torch", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("forwards and backwards on torch, cpu\n")
