"""Everything that needs a GPU, in one command: parity, compute-sanitizer, benchmarks; resumable, under nine minutes.

make gpu                        with the python3 of the machine; asks for torch and triton, uses nvcc, pytest, compute-sanitizer
make gpu ARGS="--force"         does again what was done for this code
make gpu ARGS="--stages check,ops --results DIR"
make gpu WHEELS=DIR             also the attention packages whose wheels lie there: xformers, flash-attn 2, 3 and 4

Each stage is a process of its own with a time limit. Its exit status, its output and where its numbers lie are written to
stages.json in the folder of results as soon as it ends, so that a run cut short resumes: a stage that passed for the same code
is not repeated. A red stage of parity stops the benchmarks. These share the time that is left in proportion to their limits; one
that runs out keeps the rows it has, and the same command takes it up again. Nothing comes from a network: wheels are unpacked
into build/gpu-wheels, without what they depend on, and only the stages that need them look there.

Without a GPU the same stages run at toy sizes on the CPU, to build/gpu-dry-run: what needs a device is skipped by name.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
LIBRARY = ROOT / "build/gpu"
WHEELS = ROOT / "build/gpu-wheels"
BUDGET = 530  # seconds in all
TAIL = 6000  # characters of a stage's output that are kept
DONE = ("passed", "skipped")
GATES = ("check", "parity-triton", "parity-cuda", "memcheck", "racecheck")
SHORTEST = 5.0  # seconds a benchmark is begun for
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
sys.path.insert(0, sys.argv[1])
import measure
device = measure.resolve_device(sys.argv[2])
print(json.dumps({"type": device.type, **measure.environment(device)}))
"""


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: on the command line and in the results.
        command: what is run; ``python`` stands for this interpreter.
        limit: seconds.
        benchmark: whether it stops where one of ``GATES`` is red; it also writes rows of numbers and shares the time that is left.
        needs: a stage without which it is not run.
        skip: why it is not run here; None if it is.
        environment: variables beside those of this process.
        given: fingerprint of what was handed to it beside the code.
        unsupported: words in the output of a failure which mean that the machine does not allow it: a skip.
    """

    name: str
    command: Sequence[str]
    limit: int
    benchmark: bool = False
    needs: str | None = None
    skip: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    given: str = ""
    unsupported: str | None = None


# ------------------------------------------------------------------------------------------------------------------
# The stages
# ------------------------------------------------------------------------------------------------------------------


def stages(machine: dict[str, Any], wheels: Path | None = None) -> list[Stage]:
    """Most valuable first; ``wheels`` is the folder of those handed in."""
    dry = machine["type"] != "cuda"
    build = _build(machine)
    # What was not built here may still be installed, or named by the user.
    library = {} if build.skip else {"DITKERNELS_CUDA_LIBRARY": str(LIBRARY / "_C.so")}
    return [
        build,
        Stage("check", _check(dry), 100, environment=library),
        _parity(
            "parity-triton", ["adaln", "patches", "adamw", "gelu", "model", "sampler", "beyond"], 180, library
        ),
        _parity("parity-cuda", ["cuda"], 100, library, needs=None if build.skip else "build"),
        _sanitizer("memcheck", dry, build, library),
        _sanitizer("racecheck", dry, build, library),
        *(_benchmark(name, dry, library) for name in SIZES),
        *_of_wheels(dry, wheels, library),
    ]


def _build(machine: dict[str, Any]) -> Stage:
    skip = None
    if machine["type"] != "cuda":
        skip = "no device to build for"
    elif _nvcc() is None:
        skip = "nvcc is not here: the cuda backend is left out"
    capability = str(machine.get("compute_capability"))
    architecture = OWN_CODE.get(capability, capability)
    return Stage(
        "build", ["python", "csrc/nvcc.py", str(LIBRARY)], 240, skip=skip,
        environment={"TORCH_CUDA_ARCH_LIST": architecture},
    )  # fmt: skip


def _nvcc() -> str | None:
    sys.path.insert(0, str(ROOT / "csrc"))
    import nvcc

    return nvcc.find_nvcc()


def _check(dry: bool) -> list[str]:
    return [
        "python",
        "-m",
        "ditkernels",
        "check",
        *(["--device", "cpu", "--backend", "torch"] if dry else []),
    ]


def _parity(
    name: str, files: list[str], limit: int, library: dict[str, str], needs: str | None = None
) -> Stage:
    missing = importlib.util.find_spec("pytest") is None
    tests = [f"tests/gpu/test_{file}_gpu.py" for file in files]
    return Stage(
        name, ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests], limit, needs=needs,
        skip="pytest is not installed; the stage check stands alone" if missing else None, environment=library,
    )  # fmt: skip


def _sanitizer(tool: str, dry: bool, build: Stage, library: dict[str, str]) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    skip = None
    if program is None:
        skip = "compute-sanitizer is not here"
    elif dry:
        skip = "no device"
    elif build.skip:
        skip = build.skip
    command = [program or "", "--tool", tool, "--error-exitcode", "9", "python", "benchmarks/sanitize.py"]
    return Stage(
        tool, [*command, "--backend", "cuda"], 90, skip=skip,
        # Without torch's pool every tensor is an allocation of its own, whose ends memcheck watches.
        environment={**library, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        unsupported="Device not supported",
    )  # fmt: skip


class Size(NamedTuple):
    """Of a benchmark: seconds at most, its flags on a GPU, and those that make it a toy."""

    limit: int
    real: str
    toy: str


SIZES = {
    "ceilings": Size(40, "", "--model DiT-S/8 --batch 1 --input-size 16 --copy-mib 1 --dtype fp32"),
    "ops": Size(150, "", "--batch 2 --tokens 6 --width 32 --copy-mib 1 --contenders eager,torch"),
    "optimizer": Size(20, "", "--models DiT-S/8 --copy-mib 1 --rounds 2"),
    "attention": Size(80, "", "--batch 2 --heads 2 --tokens 5 --dtype fp32"),
    "training": Size(
        180,
        "--batches 256,128,64 --rounds 8 --contenders ours-bf16-residual,compiled-bf16,ours-bf16,eager-bf16,"
        "ours-compiled-bf16-residual,eager-tf32,ours-compiled-bf16,max-autotune-bf16",
        "--models DiT-S/8 --input-sizes 16 --batches 2 --contenders eager-fp32,ours-fp32",
    ),
    "sampling": Size(
        120,
        "--batches 1,64,8 --lengths 4,12 --rounds 3 --contenders sampler-bf16-weights,compiled-bf16-weights,"
        "eager-bf16,sampler-bf16,ours-compiled-bf16-weights",
        "--model DiT-S/8 --input-size 16 --batches 1 --lengths 2,6 --contenders eager-fp32,sampler-fp32",
    ),
    "trainer_overhead": Size(
        60,
        "--model DiT-XL/2 --batch 256 --precision bf16 --rounds 5",
        "--batch 2 --input-size 8 --steps 2 --log-every 2",
    ),
}


def _benchmark(name: str, dry: bool, library: dict[str, str]) -> Stage:
    limit, real, toy = SIZES[name]
    flags = ["--rounds", "2", "--device", "cpu", *toy.split()] if dry else real.split()
    return Stage(
        name, ["python", f"benchmarks/{name}.py", *flags], limit, benchmark=True, environment=library
    )


def _of_wheels(dry: bool, wheels: Path | None, library: dict[str, str]) -> list[Stage]:
    """Unpacks the wheels, then parity and speed of the attention they bring."""
    skip = "no folder of wheels was named: WHEELS=DIR" if wheels is None else None
    files = sorted(wheels.glob("*.whl*")) if wheels else []
    names = {path.name.partition("-")[0].lower() for path in files}
    given = "".join(f" {path.name} {path.stat().st_size}" for path in files)
    backends = ",".join(backend for package, backend in PACKAGES.items() if package in names)
    idle = skip or ("no device" if dry else None)
    if idle is None and not backends:
        idle = f"no wheel of {', '.join(PACKAGES)} is among them"
    beside = {**library, "PYTHONPATH": os.pathsep.join((_paths()["PYTHONPATH"], str(WHEELS)))}
    parity = f"python benchmarks/attention_parity.py --backends {backends}"
    speed = f"python benchmarks/attention.py --tokens 256,1024 --backends {backends},cudnn,torch_flash"
    more: dict[str, Any] = {"needs": "wheels", "skip": idle, "environment": beside, "given": given}
    unpack = ["python", "benchmarks/wheels.py", str(wheels), str(WHEELS)]
    return [
        Stage("wheels", unpack, 60, skip=skip, given=given),
        Stage("parity-wheels", parity.split(), 90, **more),
        Stage("attention-wheels", speed.split(), 60, benchmark=True, **more),
    ]


# ------------------------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs a stage for at most so long; returns what is written down of it."""
    if stage.skip is not None:
        return {"status": "skipped", "reason": stage.skip}
    command = [sys.executable if word == "python" else word for word in stage.command]
    numbers, part = folder / f"{stage.name}.json", folder / f"{stage.name}.part.json"
    if stage.benchmark:
        command += ["--json", str(part)]
    limit = min(stage.limit, seconds)
    began = time.monotonic()
    rc, output = _bounded(command, {**os.environ, **_paths(), **stage.environment}, limit)
    found: dict[str, Any] = {
        "status": "passed" if rc == 0 else "failed",
        "command": command,
        "exit_status": rc,
        "seconds": round(time.monotonic() - began, 1),
        "output_tail": output[-TAIL:],
    }
    if rc is None:
        found |= {"status": "timed out", "reason": f"took more than {limit:.0f} s"}
    elif rc != 0 and stage.unsupported is not None and stage.unsupported in output:
        found |= {"status": "skipped", "reason": f"the machine does not allow it: {stage.unsupported}"}
    if stage.benchmark:
        kept = _kept(part, numbers)
        if rc is None and kept:
            found |= {"status": "cut short", "reason": f"{kept} rows were had in {limit:.0f} s"}
        if kept:
            found["numbers"] = numbers.name
    return found


def _kept(part: Path, numbers: Path) -> int:
    """Of the rows just measured and those of an earlier try keeps the whole, or else the more; returns how many."""

    def worth(path: Path) -> tuple[bool, int]:
        result = json.loads(path.read_text()) if path.exists() else {"complete": False, "rows": []}
        return result["complete"], len(result["rows"])

    if part.exists() and worth(part) >= worth(numbers):
        part.replace(numbers)
    part.unlink(missing_ok=True)
    return worth(numbers)[1]


def _paths() -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(ROOT) + (os.pathsep + before if before else ""), "PYTHONUNBUFFERED": "1"}


def _bounded(command: Sequence[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status, None past the limit, and output; what the process started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def run(chosen: Sequence[Stage], folder: Path, code: str, *, force: bool, budget: float) -> bool:
    """Runs the stages in order and writes stages.json after each.

    Args:
        code: fingerprint of the code; what passed for another is done again.

    Returns:
        whether none failed, none was cut short and none is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "stages.json"
    written: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    end, fine = time.monotonic() + budget, True

    def passed(stage: Stage) -> bool:
        before = written.get(stage.name, {})
        return not force and (before.get("status"), before.get("code")) == ("passed", code + stage.given)

    for place, stage in enumerate(chosen):
        if passed(stage):
            print(f"{stage.name:<16} passed before")
            continue
        left = _share([s for s in chosen[place:] if not passed(s)], end - time.monotonic())
        why = _obstacle(
            stage, {n: w["status"] for n, w in written.items() if w["code"].startswith(code)}, left
        )
        if stage.benchmark and (force or written.get(stage.name, {}).get("code") != code + stage.given):
            (folder / f"{stage.name}.json").unlink(missing_ok=True)  # numbers of other code
        found = {"status": "not run", "reason": why} if why else run_stage(stage, folder, left)
        written[stage.name] = {**found, "code": code + stage.given, "date": _now()}
        record.with_suffix(".tmp").write_text(json.dumps(written, indent=1) + "\n")
        record.with_suffix(".tmp").replace(record)
        print(
            f"{stage.name:<16} {found['status']} {found.get('reason', '')} {found.get('seconds', '')}".rstrip()
        )
        if found["status"] not in DONE:
            fine = False
            print(_indented(found.get("output_tail", "")), end="")
    return fine


def _share(waiting: Sequence[Stage], left: float) -> float:
    """Seconds for the first of the stages that wait: all that is left for a gate, for a benchmark its part of it."""
    if not waiting[0].benchmark:
        return left
    limits = [stage.limit for stage in waiting if stage.benchmark and stage.skip is None]
    return left * waiting[0].limit / sum(limits) if limits else left


def _obstacle(stage: Stage, status: dict[str, str], left: float) -> str | None:
    """Why a stage cannot be run now, from what is known of the others for this code."""
    if stage.skip is not None:
        return None
    if stage.needs is not None and status.get(stage.needs) != "passed":
        return f"it needs the stage {stage.needs}, which did not pass"
    red = [name for name in GATES if status.get(name) in ("failed", "timed out")]
    if stage.benchmark and red:
        return f"{', '.join(red)} is red: no speed is reported"
    short = SHORTEST if stage.benchmark else 1
    return "the time is used up; the same command resumes here" if left < short else None


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text[-1500:].splitlines())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------------------
# The machine and the code
# ------------------------------------------------------------------------------------------------------------------


def probe(device: str) -> dict[str, Any]:
    """What a result says of itself, and the type of the device; asked in a process of its own, so that none here holds the GPU."""
    command = [sys.executable, "-c", PROBE, str(BENCHMARKS), device]
    done = subprocess.run(
        command, env={**os.environ, **_paths()}, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise SystemExit(f"make gpu: {(done.stderr.strip().splitlines() or ['no python that works'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fingerprint() -> str:
    """Of all that a stage's outcome depends on in this tree; git is not asked, since a copied tree has none."""
    key = hashlib.sha256()
    for folder in ("ditkernels", "csrc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".json"} and "results" not in path.parts:
                key.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


def folder_of(machine: dict[str, Any], code: str) -> Path:
    """build/gpu-dry-run without a GPU; else that of an unfinished run of this code on such a device, or a new one of today."""
    if machine["type"] != "cuda":
        return ROOT / "build/gpu-dry-run"
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    for before in sorted((BENCHMARKS / "results").glob(f"*-{device}/stages.json")):
        if code in before.read_text():
            return before.parent
    return BENCHMARKS / "results" / f"{_now()[:10]}-{device}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every stage passed or was skipped by name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="cpu is the dry run; auto is cuda if there is one")
    parser.add_argument("--stages", help="names separated by commas; all of them by default")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="attention packages to try, as wheels")
    parser.add_argument("--force", action="store_true", help="repeat what has passed for this code")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="in all")
    args = parser.parse_args(argv)
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels: got {args.wheels}, allowed is a folder")
    machine, code = probe(args.device), fingerprint()
    known = {stage.name: stage for stage in stages(machine, args.wheels and args.wheels.resolve())}
    names = args.stages.split(",") if args.stages else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, allowed are {', '.join(known)}")
    folder = args.results or folder_of(machine, code)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps({**machine, "code": code}, indent=1) + "\n")
    print(f"{machine['device']}, torch {machine['torch']}: {folder}")
    fine = run([known[name] for name in names], folder, code, force=args.force, budget=args.seconds)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
