"""What the ops launch at a model's shapes, and what each launch is compiled to and moves; found without a GPU.

    launches.code("90", cases)        Triton kernels compiled ahead of time: registers, spills, shared memory, access widths
    launches.traffic("triton", ...)   bytes read and written, by tensor: from the interpreter
    launches.traffic("cuda", ...)     the same, and which instantiations are launched: from the host emulation

Tensors have their real shapes, so that the grids are those of a GPU; of their memory only what is touched is ever used. For
traffic the first, the middle and the last program of every launch are run, and what they move is scaled to all programs.
Compiling, interpreting and emulating each need a process of their own. Results lie under build/static by content.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sized
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ditkernels import check, ops, use_backend

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ops as sites  # noqa: E402

LATENTS = 32  # edge, of an image of 256 pixels
OUTPUTS = 8


class Case(NamedTuple):
    """An op as a model calls it: DiT-``size``/``patch`` at 256 px, ``batch`` samples."""

    op: str
    width: int
    patch: int
    batch: int
    precision: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, D); D is the width of the hidden layer where the op is inside the MLP."""
        width = sites.MLP_RATIO * self.width if self.op == "bias_gelu" else self.width
        return self.batch, (LATENTS // self.patch) ** 2, width

    def site(self) -> sites.Site:
        """The op's arguments as our model passes them, biases of branches among them; how often it touches what at least."""
        side = LATENTS // self.patch
        known = sites.sites(self.batch, (side, side), self.width, self.patch)
        values = OUTPUTS * self.patch**2
        known["unpatchify"] = sites.Site(
            check.Case(
                "unpatchify",
                {"tokens": (self.batch, side * side, values)},
                {"grid": (side, side), "patch_size": self.patch},
            ),
            *("", ""),
            2 * self.batch * side * side * values,
        )
        found = known[self.op]
        if "branch" not in found.case.shapes:
            return found
        shapes = {**found.case.shapes, "branch_bias": (self.width,)}
        return found._replace(case=check.Case(self.op, shapes, found.case.options))

    def floor_bytes(self, phase: str) -> int:
        """The bytes that the op must move at least, forward or backward."""
        site, precision = self.site(), sites.PRECISIONS[self.precision]
        if self.op == "unpatchify":
            return site.image * precision.others.itemsize
        return sites.floor_bytes(site, site.forward if phase == "forward" else site.backward, precision)

    def big(self) -> dict[str, int]:
        """The kernels' (B, N, D) arguments: bytes of an element, by name."""
        precision = sites.PRECISIONS[self.precision]
        stream, others = precision.stream.itemsize, precision.others.itemsize
        if self.op == "unpatchify":
            return {}
        if self.op == "patch_embed":
            return {"y": stream, "dy": stream}
        if self.op == "bias_gelu":
            return dict.fromkeys(("x", "y", "dx", "dy"), others)
        return {
            **dict.fromkeys(("x", "x1", "dx", "dx1"), stream),
            **dict.fromkeys(("branch", "dbranch", "h", "dh"), others),
        }


OPS = (*sites.sites(1, (1, 1), 8, 1), "unpatchify")


def run(case: Case, done: Callable[[str], None]) -> None:
    """Forward and backward of a case on values that nobody set; ``done`` is told after each."""
    site, precision = case.site(), sites.PRECISIONS[case.precision]
    arguments = {}
    for name, shape in site.case.shapes.items():
        made = torch.empty(shape, dtype=sites.dtype_of(name, site.case, precision))
        arguments[name] = made.requires_grad_(sites.needs_gradient(name, site.case))
    outputs = sites.call(getattr(ops, case.op), site.case, arguments, precision)
    done("forward")
    leaves = [leaf for leaf in arguments.values() if leaf.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    done("backward")


# ------------------------------------------------------------------------------------------------------------------
# Asked of other processes
# ------------------------------------------------------------------------------------------------------------------


def code(architecture: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Every launch of the Triton kernels in these cases, compiled for an architecture such as "90".

    Returns:
        rows of ``case`` (its index), ``pass``, ``kernel``, ``programs``, ``threads``, ``registers``, ``spills``, ``shared_bytes``,
        ``tf32`` (instructions) and ``wide_fraction`` by (B, N, D) tensor.
    """
    return _asked("code", architecture, cases, {})


def traffic(backend: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Every launch of a backend in these cases.

    Returns:
        rows of ``case``, ``pass``, ``kernel`` (with its template arguments), ``programs``, ``moved``: by tensor the bytes read and
        written. For cuda also ``threads`` and ``shared_bytes``.
    """
    return _asked("traffic", backend, cases, {"TRITON_INTERPRET": "1"} if backend == "triton" else {})


def _asked(what: str, of: str, cases: list[Case], variables: dict[str, str]) -> list[dict[str, Any]]:
    folder = ROOT / "build/static" / _key(what, of, cases)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "rows.json"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DITKERNELS", "TRITON_INTERPRET"))
    }
    command = [
        sys.executable,
        str(Path(__file__)),
        what,
        of,
        json.dumps(cases),
        str(done.with_suffix(".tmp")),
    ]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            ended = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"{what} of {of}: {ended.stderr[-4000:]}")
            done.with_suffix(".tmp").replace(done)
    found: list[dict[str, Any]] = json.loads(done.read_text())
    return found


def _key(*asked: object) -> str:
    versions = [metadata.version(name) for name in ("torch", "triton")]
    key = hashlib.sha256(repr((asked, versions, sys.version)).encode())
    for pattern in ("ditkernels/ops/*.py", "csrc/*.cu*", "tests/emulation/*", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            key.update(path.read_bytes())
    return key.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------------


def _code(architecture: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
    import machine_code
    from ahead import Compiled, recorded

    from ditkernels.ops import _triton

    with mock.patch.object(_triton, "device_reason", return_value=None), use_backend("triton"):
        for index, case in enumerate(cases):
            with recorded(int(architecture)) as compiled:
                marks = _passes(case, lambda: compiled)
            for kernel, phase in zip(compiled, marks):
                assert isinstance(kernel, Compiled)
                big = [name for name in kernel.shapes if name in case.big()]
                yield {
                    **_described(index, phase, kernel.name, kernel.programs),
                    "threads": kernel.threads,
                    "registers": kernel.resources["REG"],
                    "spills": kernel.spills,
                    "shared_bytes": kernel.shared,
                    "tf32": sum("TF32" in opcode for opcode in kernel.opcodes),
                    "wide_fraction": machine_code.wide_shares(kernel, big),
                }


def _passes(case: Case, launched: Callable[[], Sized]) -> list[str]:
    """Runs the case; for each of its launches, the pass that made it."""
    marks: list[str] = []
    run(case, lambda phase: marks.extend([phase] * (len(launched()) - len(marks))))
    return marks


def _described(index: int, phase: str, kernel: str, programs: int) -> dict[str, Any]:
    return {"case": index, "pass": phase, "kernel": kernel, "programs": programs}


def _scaled(samples: list[dict[str, tuple[int, int]]], programs: int) -> dict[str, list[float]]:
    """Bytes read and written by all programs: the last one alone, the others as the first and the middle one."""
    names = sorted({name for sample in samples for name in sample})
    *others, last = samples

    def total(name: str, way: int) -> float:
        each = [sample.get(name, (0, 0))[way] for sample in others]
        rest = (programs - 1) * sum(each) / len(each) if each else 0.0
        return rest + last.get(name, (0, 0))[way]

    return {name: [total(name, 0), total(name, 1)] for name in names}


def _interpreted(cases: list[Case]) -> Iterator[dict[str, Any]]:
    from interpreted import guarded, in_place, reordered, traced

    def few(programs: int) -> list[int]:
        return sorted({0, programs // 2, programs - 1})

    for index, case in enumerate(cases):
        with use_backend("triton"), in_place(), guarded(), reordered(few), traced() as launched:
            marks = _passes(case, lambda: launched)
        for launch, phase in zip(launched, marks):
            found = launch.traffic()
            samples = [found.get(program, {}) for program in few(launch.programs)]
            row = _described(index, phase, launch.kernel, launch.programs)
            yield {**row, "moved": _scaled(samples, launch.programs)}


def _emulated(cases: list[Case]) -> Iterator[dict[str, Any]]:
    import emulated_cuda

    for index, case in enumerate(cases):
        with emulated_cuda.running(sampling=True) as emulation:
            marks = _passes(case, emulation.sampled)
            launched = emulation.sampled()
        for (kernel, blocks, threads, shared, samples), phase in zip(launched, marks):
            row = _described(index, phase, kernel, blocks)
            yield {**row, "threads": threads, "shared_bytes": shared, "moved": _scaled(samples, blocks)}


def main() -> None:
    """Answers one question: writes the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("code", "traffic"))
    parser.add_argument("of")
    parser.add_argument("cases", type=lambda text: [Case(*case) for case in json.loads(text)])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "code":
        rows = _code(args.of, args.cases)
    else:
        rows = _interpreted(args.cases) if args.of == "triton" else _emulated(args.cases)
    args.out.write_text(json.dumps(list(rows), indent=1))


if __name__ == "__main__":
    main()
