"""Everything that needs a GPU, in one command: parity, compute-sanitizer, benchmarks; resumable, under nine minutes.

make gpu                        with the python3 of the machine; asks for torch and triton, uses nvcc, pytest, compute-sanitizer
make gpu ARGS="--force"         does again what was done for this code
make gpu ARGS="--stages check,ops --results DIR"
make gpu ARGS="--budget 390"    in so many seconds, the start of this script included; the next call goes on
make gpu ARGS="--library FILE --archive FILE"    with a CUDA library built elsewhere; the results in one file, too
make gpu WHEELS=DIR             also the attention packages whose wheels lie there: xformers, flash-attn 2, 3 and 4

Each stage is a process of its own with a time limit. Its exit status, its output and where its rows lie are written to
stages.json in the folder of results as soon as it ends, so that a run cut short resumes: a stage that passed for the same code
is not repeated, and one that was cut short goes on after the rows it has, tests that passed among them. The limits together are
what one call may take. What they leave is given to the stages they cut, the most valuable first, twice as long in every turn.
Then come, in the same way, the stages that the first ones leave time for. A red stage of parity, or one not through yet, stops
the benchmarks. Nothing comes from a network: wheels are unpacked into build/gpu-wheels, without what they depend on, and only
the stages that need them look there.

Without a GPU the same stages run at toy sizes on the CPU, to build/gpu-dry-run: what needs a device is skipped by name.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ditkernels.files import replacing
from tools import build_native
from tools.tree import ROOT, found_from

BENCHMARKS = ROOT / "benchmarks"
LIBRARY = ROOT / "build/gpu"
WHEELS = ROOT / "build/gpu-wheels"
BUDGET = 530  # seconds from the start to the end of a call
TAIL = 6000  # characters of a stage's output that are kept
DONE = ("passed", "skipped")
OVER = "the time is used up; the same command resumes here"
GATES = ("check", "parity-triton", "parity-cuda", "memcheck", "racecheck")
SHORTEST = 5.0  # seconds a stage is begun for
PROBING = 120  # seconds that the device has to answer
ENDING = 5.0  # seconds that a killed stage has to be gone
# Backends of attention, by the package that brings them.
PACKAGES = {
    "xformers": "xformers",
    "flash_attn": "flash_attn_2",
    "flash_attn_3": "flash_attn_3",
    "flash_attn_4": "flash_attn_4",
}
# A library of kernels for one GPU needs no PTX, but machine code that may use all the GPU has.
OWN_CODE = {"9.0": "9.0a"}

PROBE = """
import json, sys
from benchmarks.speed import measure
device = measure.resolve_device(sys.argv[1])
print(json.dumps({"type": device.type, **measure.environment(device)}))
"""


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: on the command line and in the results.
        command: what is run; ``python`` stands for this interpreter.
        limit: seconds in the first turn.
        rows: whether it writes rows as it gets them, into the file that ``--json`` names, and goes on from there with ``--resume``.
        benchmark: whether it stops where one of ``GATES`` has not passed.
        needs: a stage without which it is not run.
        skip: why it is not run here; None if it is.
        environment: variables beside those of this process.
        given: fingerprint of what was handed to it beside the code.
        unsupported: words in the output of a failure which mean that the machine does not allow it: a skip.
    """

    name: str
    command: Sequence[str]
    limit: int
    rows: bool = False
    benchmark: bool = False
    needs: str | None = None
    skip: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    given: str = ""
    unsupported: str | None = None


# ---- The stages ------------------------------------------------------------------------------------------------------


def stages(machine: dict[str, Any], wheels: Path | None = None, built: Path | None = None) -> tuple[list[Stage], list[Stage]]:
    """Most valuable first: those that one call has time for, and those that come where these leave some.

    Args:
        wheels: the folder of those handed in.
        built: a CUDA library that was built elsewhere, in place of one built here.
    """
    dry = machine["type"] != "cuda"
    build = _build(machine, built)
    # What was not built here may still be installed, or named by the user.
    library = {} if build.skip else {"DITKERNELS_CUDA_LIBRARY": str(built or LIBRARY / "_C.so")}
    tests = sorted(f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py"))
    first = [
        build,
        Stage("check", _check(dry), 45, environment=library),
        _parity("parity-triton", [name for name in tests if "cuda" not in name], 75, library),
        _parity(
            "parity-cuda",
            [name for name in tests if "cuda" in name],
            40,
            library,
            None if build.skip else "build",
        ),
        _sanitizer("memcheck", dry, build, library),
        _sanitizer("racecheck", dry, build, library),
        *(_benchmark(name, FIRST, dry, library) for name in FIRST),
    ]
    return first, [
        *_of_wheels(dry, wheels, library),
        *(_benchmark(name, LATER, dry, library) for name in LATER),
    ]


def _build(machine: dict[str, Any], built: Path | None) -> Stage:
    skip = None
    if machine["type"] != "cuda":
        skip = "no device to build for"
    elif built is not None:
        # It has to load, and to be of this tree's ops.
        loads = (
            "from ditkernels.ops import _native; print(_native.cuda_library()); raise SystemExit(_native.CUDA.absence is not None)"
        )
        return Stage("build", ["python", "-c", loads], 20, environment={"DITKERNELS_CUDA_LIBRARY": str(built)}, given=_stamp(built))
    elif _nvcc() is None:
        skip = "nvcc is not here: the cuda backend is left out"
    capability = str(machine.get("compute_capability"))
    architecture = OWN_CODE.get(capability, capability)
    return Stage(
        "build", ["python", "tools/build_native.py", "cuda", str(LIBRARY)], 70, skip=skip,
        environment={"TORCH_CUDA_ARCH_LIST": architecture},
    )  # fmt: skip


def _nvcc() -> str | None:
    return build_native.find_nvcc()


def _check(dry: bool) -> list[str]:
    return [
        "python",
        "-m",
        "ditkernels",
        "check",
        *(["--device", "cpu", "--backend", "torch"] if dry else []),
    ]


def _parity(name: str, tests: list[str], limit: int, library: dict[str, str], needs: str | None = None) -> Stage:
    missing = importlib.util.find_spec("pytest") is None
    return Stage(
        name, ["python", "-m", "benchmarks.gpu.gpu_tests", *tests], limit, rows=True, needs=needs,
        skip="pytest is not installed; the stage check stands alone" if missing else None, environment=library,
    )  # fmt: skip


def _sanitizer(tool: str, dry: bool, build: Stage, library: dict[str, str]) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    skip = None
    if program is None:
        skip = "compute-sanitizer is not here"
    elif dry:
        skip = "no device"
    elif build.skip:
        skip = build.skip
    command = [program or "", "--tool", tool, "--error-exitcode", "9", "python", "-m", "tools.kernel_proof.sanitize"]
    return Stage(
        tool, [*command, "--backend", "cuda"], 55, skip=skip,
        # Without torch's pool every tensor is an allocation of its own, whose ends memcheck watches.
        environment={**library, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        unsupported="Device not supported",
    )  # fmt: skip


class Run(NamedTuple):
    """Of a benchmark: seconds in the first turn, and its flags on a GPU."""

    limit: int
    flags: str = ""


# The script is the name up to its first hyphen.
FIRST = {
    "ceilings": Run(15),
    "ops": Run(45),
    "attention": Run(20),
    "mlp": Run(15),
    "training": Run(
        45,
        "--batches 256,128,64 --rounds 8 --contenders ours-bf16-residual,compiled-bf16,ours-bf16,eager-bf16,"
        "ours-bf16-residual-masters,ours-bf16-residual-epilogues,ours-compiled-bf16-residual,eager-tf32,"
        "ours-compiled-bf16,max-autotune-bf16",
    ),
    "sampling": Run(
        30,
        "--batches 1,64,8 --lengths 4,12 --rounds 3 --contenders sampler-bf16-weights,compiled-bf16-weights,"
        "eager-bf16,sampler-bf16,ours-compiled-bf16-weights",
    ),
    "host": Run(20, "--rounds 7"),
}
LATER = {
    "optimizer": Run(40),
    "trainer_overhead": Run(60, "--model DiT-XL/2 --batch 256 --precision bf16 --rounds 5"),
    "training-checkpointing": Run(
        60,
        "--batches 256,128,64 --rounds 8 --contenders ours-bf16,ours-bf16-selective,ours-bf16-full",
    ),
    "training-512px": Run(
        90,
        "--input-sizes 64 --batches 64,32,16 --rounds 8 --contenders ours-bf16-residual,compiled-bf16,ours-bf16,eager-bf16",
    ),
    "ops-512px": Run(60, "--shapes 64x1024x1152"),
    "ops-patch-4": Run(30, "--ops patch_embed,final_layer --patch-size 4 --shapes 256x64x1152"),
    "ops-patch-8": Run(30, "--ops patch_embed,final_layer --patch-size 8 --shapes 256x16x1152"),
    "ops-384": Run(60, "--shapes 256x256x384"),
    "ops-768": Run(60, "--shapes 256x256x768"),
    "ops-1024": Run(60, "--shapes 256x256x1024"),
    "sampling-more": Run(
        60,
        "--batches 1,8,64 --lengths 4,12 --rounds 3 --contenders sampler-bf16-weights,whole-compiled-bf16-weights,"
        "sampler-compiled-bf16-weights,max-autotune-bf16-weights,ours-bf16-weights",
    ),
    "latents": Run(60, "--rounds 3"),
    "first_use": Run(120),
}
TOYS = {
    "ceilings": "--model DiT-S/8 --batch 1 --input-size 16 --copy-mib 1 --dtype fp32",
    "ops": "--shapes 2x6x32 --copy-mib 1 --contenders eager,torch",
    "attention": "--batch 2 --heads 2 --tokens 5 --dtype fp32",
    "mlp": "--model DiT-S/8 --batch 1 --input-size 8 --contenders eager,torch",
    "training": "--models DiT-S/8 --input-sizes 16 --batches 2 --contenders eager-fp32,ours-fp32",
    "sampling": "--model DiT-S/8 --input-size 16 --batches 1 --lengths 2,6 --contenders eager-fp32,sampler-fp32",
    "host": "--depth 1 --calls 5 --ops gated_residual",
    "optimizer": "--models DiT-S/8 --copy-mib 1",
    "trainer_overhead": "--batch 2 --input-size 8 --steps 2 --log-every 2",
    "first_use": "--model DiT-S/8 --input-size 16 --batch 2 --contenders ours-fp32",
    "latents": "--images 32 --latent-size 4 --batch 4 --batches 2 --workers 0 --dtypes fp16 --cache warm",
}


def _benchmark(name: str, runs: dict[str, Run], dry: bool, library: dict[str, str]) -> Stage:
    limit, flags = runs[name]
    script = name.partition("-")[0]
    if dry:
        flags = f"--rounds 2 --device cpu {TOYS[script]}"
    command = ["python", "-m", f"benchmarks.speed.{script}", *flags.split()]
    # host.py writes its rows when all are there, so it cannot go on after some of them.
    return Stage(name, command, limit, rows=script != "host", benchmark=True, environment=library)


def _of_wheels(dry: bool, wheels: Path | None, library: dict[str, str]) -> list[Stage]:
    """Unpacks the wheels, then parity and speed of the attention they bring."""
    skip = "no folder of wheels was named: WHEELS=DIR" if wheels is None else None
    files = sorted(wheels.glob("*.whl*")) if wheels else []
    names = {path.name.partition("-")[0].lower() for path in files}
    given = "".join(map(_stamp, files))
    backends = ",".join(backend for package, backend in PACKAGES.items() if package in names)
    idle = skip or ("no device" if dry else None)
    if idle is None and not backends:
        idle = f"no wheel of {', '.join(PACKAGES)} is among them"
    beside = {**library, "PYTHONPATH": os.pathsep.join((found_from(os.environ)["PYTHONPATH"], str(WHEELS)))}
    parity = f"python -m benchmarks.studies.attention_parity --backends {backends}"
    speed = f"python -m benchmarks.speed.attention --tokens 256,1024 --backends {backends},cudnn,torch_flash"
    more: dict[str, Any] = {"needs": "wheels", "skip": idle, "environment": beside, "given": given}
    unpack = ["python", "-m", "benchmarks.gpu.wheels", str(wheels), str(WHEELS)]
    return [
        Stage("wheels", unpack, 60, skip=skip, given=given),
        Stage("parity-wheels", parity.split(), 90, **more),
        Stage("attention-wheels", speed.split(), 60, rows=True, benchmark=True, **more),
    ]


def _stamp(path: Path) -> str:
    return f" {path.name} {path.stat().st_size}"


# ---- Running ---------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, folder: Path, limit: float) -> dict[str, Any]:
    """Runs a stage for at most so many seconds; returns what is written down of it."""
    command = [sys.executable if word == "python" else word for word in stage.command]
    numbers = folder / f"{stage.name}.json"
    if stage.rows or stage.benchmark:
        command += ["--json", str(numbers)]
    if stage.rows:
        command += ["--resume"]
    began = time.monotonic()
    rc, output = _bounded(command, {**_environment(), **stage.environment}, limit)
    found: dict[str, Any] = {
        "status": "passed" if rc == 0 else "failed",
        "command": command,
        "exit_status": rc,
        "seconds": round(time.monotonic() - began, 1),
        "output_tail": output[-TAIL:],
    }
    kept = len(json.loads(numbers.read_text(encoding="utf-8"))["rows"]) if numbers.exists() else 0
    if rc is None:
        found |= {"status": "cut short", "reason": f"{kept} rows were had in {limit:.0f} s"}
    elif rc != 0 and stage.unsupported is not None and stage.unsupported in output:
        found |= {"status": "skipped", "reason": f"the machine does not allow it: {stage.unsupported}"}
    if kept:
        found["numbers"] = numbers.name
    return found


def _environment() -> dict[str, str]:
    return {**found_from(os.environ), "PYTHONUNBUFFERED": "1"}


def _bounded(command: Sequence[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status, None past the limit, and output; what the process started ends with it."""
    # A file: a pipe would have to be waited for until nothing holds it any more.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING)
        output.seek(0)
        return status, output.read()


class Call:
    """The stages of one call, and what stages.json says of them.

    Args:
        folder: of the results.
        code: fingerprint of the code; what passed for another is done again.
        force: whether what passed for this one is, too.
        end: on the monotonic clock.
    """

    def __init__(self, folder: Path, code: str, *, force: bool, end: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._code, self._force, self._end = folder, code, force, end
        self._record = folder / "stages.json"
        self._written: dict[str, Any] = {}
        if self._record.exists():
            self._written = json.loads(self._record.read_text(encoding="utf-8"))

    def run(self, chosen: Sequence[Stage]) -> bool:
        """Runs stages in order and in turns of growing length, until all are through or the time is used up.

        Returns:
            whether none failed, none was cut short and none is left.
        """
        waiting = [stage for stage in chosen if not self._passed_before(stage)]
        length = 1
        while waiting:
            for stage in waiting:
                self._take(stage, length * stage.limit)
            waiting = [stage for stage in waiting if self._status(stage) in ("cut short", "not run")]
            if self._left() < SHORTEST or not any(self._status(stage) == "cut short" for stage in waiting):
                break
            length *= 2
        return all(self._status(stage) in DONE for stage in chosen)

    def _passed_before(self, stage: Stage) -> bool:
        """Says so; what is known of a stage that is to be done anew is forgotten."""
        if self._force or self._written.get(stage.name, {}).get("code") != self._code + stage.given:
            self._written.pop(stage.name, None)
            if stage.rows:
                (self._folder / f"{stage.name}.json").unlink(missing_ok=True)
        passed = self._status(stage) == "passed"
        if passed:
            print(f"{stage.name:<22} passed before")
        return passed

    def _take(self, stage: Stage, limit: float) -> None:
        reason = stage.skip or self._obstacle(stage)
        if reason is not None:
            self._note(stage, {"status": "skipped" if stage.skip else "not run", "reason": reason})
        elif self._left() >= SHORTEST:
            self._note(stage, run_stage(stage, self._folder, min(limit, self._left())))
        elif self._status(stage) is None:
            self._note(stage, {"status": "not run", "reason": OVER})
        else:
            print(f"{stage.name:<22} {self._status(stage)}: {OVER}")

    def _note(self, stage: Stage, found: dict[str, Any]) -> None:
        self._written[stage.name] = {**found, "code": self._code + stage.given, "date": _now()}
        self._record.with_suffix(".tmp").write_text(json.dumps(self._written, indent=1) + "\n", encoding="utf-8")
        self._record.with_suffix(".tmp").replace(self._record)
        said = (stage.name.ljust(22), found["status"], found.get("reason", ""), found.get("seconds", ""))
        print(*(str(word) for word in said if word != ""))
        if found["status"] not in DONE:
            print(_indented(found.get("output_tail", "")), end="")

    def _obstacle(self, stage: Stage) -> str | None:
        """Why a stage cannot be run, from what is known of the others for this code."""
        status = {n: w["status"] for n, w in self._written.items() if w["code"].startswith(self._code)}
        if status.get("build") == "cut short" and stage.name != "build":
            return "it waits for the library: the stage build is not through"
        if stage.needs is not None and status.get(stage.needs) != "passed":
            return f"it needs the stage {stage.needs}, which did not pass"
        red = [name for name in GATES if status.get(name) in ("failed", "cut short")]
        return f"{', '.join(red)} did not pass: no speed is reported" if stage.benchmark and red else None

    def _status(self, stage: Stage) -> str | None:
        status: str | None = self._written.get(stage.name, {}).get("status")
        return status

    def _left(self) -> float:
        return self._end - time.monotonic()


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text[-1500:].splitlines())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---- The machine and the code ----------------------------------------------------------------------------------------


def probe(device: str) -> dict[str, Any]:
    """What a result says of itself, and the type of the device; asked in a process of its own, so that none here holds the GPU."""
    command = [sys.executable, "-c", PROBE, device]
    status, output = _bounded(command, _environment(), PROBING)
    last = (output.strip().splitlines() or [f"no answer from {sys.executable} in {PROBING} s"])[-1]
    if status != 0:
        raise SystemExit(f"make gpu: {last}")
    found: dict[str, Any] = json.loads(last)
    return found


def fingerprint() -> str:
    """Of what a stage's outcome depends on: this tree, Python, torch, Triton. Git is not asked, since a copied tree has none."""
    key = hashlib.sha256(repr([sys.version, *map(_version, ("torch", "triton"))]).encode())
    for folder in ("ditkernels", "csrc", "tools", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".json"} and "results" not in path.parts:
                key.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def folder_of(machine: dict[str, Any], code: str) -> Path:
    """build/gpu-dry-run without a GPU; else that of an unfinished run of this code on such a device, or a new one of today."""
    if machine["type"] != "cuda":
        return ROOT / "build/gpu-dry-run"
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    for before in sorted((BENCHMARKS / "results").glob(f"*-{device}/stages.json")):
        if code in before.read_text(encoding="utf-8"):
            return before.parent
    return BENCHMARKS / "results" / f"{_now()[:10]}-{device}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every stage passed or was skipped by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu is the dry run; auto is cuda if there is one")
    parser.add_argument("--stages", help="names separated by commas; all of them by default")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="attention packages to try, as wheels")
    parser.add_argument("--force", action="store_true", help="repeat what has passed for this code")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of this call in all")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a CUDA library that was built elsewhere")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="write the results, as .tar.gz, here too")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels: got {args.wheels}, allowed is a folder")
    if args.library is not None and not args.library.is_file():
        parser.error(f"--library: got {args.library}, allowed is a file")
    machine, code = probe(args.device), fingerprint()
    groups = stages(machine, args.wheels and args.wheels.resolve(), args.library and args.library.resolve())
    known = {stage.name: stage for group in groups for stage in group}
    names = args.stages.split(",") if args.stages else []
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, allowed are {', '.join(known)}")
    folder = args.results or folder_of(machine, code)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps({**machine, "code": code}, indent=1) + "\n", encoding="utf-8")
    print(f"{machine['device']}, torch {machine['torch']}: {folder}")
    chosen = [[known[name] for name in names]] if names else groups
    print("\n".join(plan(chosen, args.budget)))
    call = Call(folder, code, force=args.force, end=end)
    fine = [call.run(group) for group in chosen]
    if args.archive is not None:
        _pack(folder, args.archive)
    return 0 if all(fine) else 1


def plan(groups: Sequence[Sequence[Stage]], budget: float) -> Iterator[str]:
    """The order of the stages, with the seconds that each may take in the first turn and when it then begins."""
    yield f"{budget:.0f} seconds in all; a stage, its seconds, and the latest it begins after"
    begins = 0
    for stage in (stage for group in groups for stage in group):
        if stage.skip is not None:
            yield f"  {stage.name:<22}    -      - {stage.skip}"
        else:
            yield f"  {stage.name:<22} {stage.limit:4d} {begins:6d}{'' if begins < budget else ' for a later call'}"
            begins += stage.limit


def _pack(folder: Path, archive: Path) -> None:
    """Puts the results into one file."""
    with replacing(archive) as unfinished, tarfile.open(unfinished, "w:gz") as packed:
        packed.add(folder, arcname=folder.name)


if __name__ == "__main__":
    sys.exit(main())
