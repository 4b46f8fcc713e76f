"""What the ops launch at a model's shapes, and what each launch is compiled to and moves; found without a GPU.

    launches.code("90", cases)        Triton kernels compiled ahead of time: registers, spills, shared memory, access widths
    launches.traffic("triton", ...)   bytes read and written, by tensor: from the interpreter
    launches.traffic("cuda", ...)     the same, and which instantiations are launched: from the host emulation

Tensors have their real shapes, so that the grids are those of a GPU; of their memory only what is touched is ever used. For
traffic a few programs of every launch are run, the first, the middle and the last where all are alike, and what they move is scaled
to all programs.
Compiling, interpreting and emulating each need a process of their own. Results lie under build/static by content.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

from benchmarks.speed import ops as sites
from ditkernels import ops, reference, use_backend
from ditkernels.diagnostics import check
from ditkernels.ops._triton import ceil_div
from ditkernels.ops.optimizer.triton import CHUNK
from tools.kernel_proof import machine_code
from tools.tree import ROOT, found_from

if TYPE_CHECKING:
    from tools.kernel_proof.ahead import Compiled

LATENTS = 32  # edge, of an image of 256 pixels
OUTPUTS = 8
UPDATE = "adamw_ema"
# Dtypes of the gradients and of the copies of an update, which has no (B, N, D) tensor.
UPDATES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
PASSES = ("forward", "backward", "step")


@functools.cache
def trained_weights(width: int, patch: int) -> list[tuple[int, ...]]:
    """The shapes of the trained weights of the paper's model of this width, in the model's order."""
    size = next(size for size in reference.SIZES.values() if size["hidden_size"] == width)
    with torch.device("meta"):
        model = reference.DiT(patch_size=patch, **size)
    return [tuple(weight.shape) for weight in model.parameters() if weight.requires_grad]


class Case(NamedTuple):
    """An op as a model calls it: DiT-``size``/``patch`` at 256 px, ``batch`` samples; or the update of all of its weights.

    Attributes:
        precision: one of ``ops.PRECISIONS``; of an update one of ``UPDATES``.
    """

    op: str
    width: int
    patch: int
    batch: int
    precision: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N, D); D is the width of the hidden layer where the op is inside the MLP. Of an update the number of parameters."""
        if self.op == UPDATE:
            return (sum(map(math.prod, trained_weights(self.width, self.patch))),)
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
        """The bytes that the op must move at least, forward or backward, or in a step."""
        if self.op == UPDATE:
            touches = {"gradients": 1, "copies": 1}  # the others are read and written
            return self.shape[0] * sum(size * touches.get(name, 2) for name, size in self.big().items())
        site, precision = self.site(), sites.PRECISIONS[self.precision]
        if self.op == "unpatchify":
            return site.image * precision.others.itemsize
        touches = site.forward if phase == "forward" else LAUNCHED.get(self.op, site.backward)
        return sites.floor_bytes(site, touches, precision)

    def big(self) -> dict[str, int]:
        """The kernels' (B, N, D) arguments: bytes of an element, by name; of the packed gradient, of three."""
        if self.op == UPDATE:
            gradient, copied = UPDATES[self.precision]
            states = dict.fromkeys(("weights", "exp_avgs", "exp_avg_sqs", "averages"), 4)
            return {
                **states,
                "gradients": gradient.itemsize,
                **({"copies": copied.itemsize} if copied else {}),
            }
        precision = sites.PRECISIONS[self.precision]
        stream, others = precision.stream.itemsize, precision.others.itemsize
        if self.op == "unpatchify":
            return {}
        if self.op == "patch_embed":
            return {"y": stream, "dy": stream}
        if self.op == "bias_gelu":
            return dict.fromkeys(("x", "y", "dx", "dy"), others)
        if self.op == "split_qkv":
            return {**dict.fromkeys(("dq", "dk", "dv"), others), "dpacked": 3 * others}
        return {
            **dict.fromkeys(("x", "x1", "dx", "dx1"), stream),
            **dict.fromkeys(("branch", "dbranch", "h", "dh"), others),
        }


OPS = (*sites.sites(1, (1, 1), 8, 1), "unpatchify", UPDATE)
# Of backwards that are made of ops and of products: what the ops touch. The library's products are no launches of ours.
LAUNCHED = {"patch_embed": "", "final_layer": "soso" + "osoos"}


def run(case: Case, done: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Forward and backward of a case, or its step, on values that nobody set; ``done`` is told after each.

    Returns:
        of an update its tensors by name, "weights[3]": its kernels reach them by addresses in a table.
    """
    if case.op == UPDATE:
        state = update_state(case)
        numbers = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
        ops.adamw_ema(**state, lr=1e-4, decay=0.9999, **numbers)
        done("step")
        return {f"{name}[{i}]": tensor for name, tensors in state.items() for i, tensor in enumerate(tensors)}
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
    return {}


def update_state(case: Case) -> dict[str, list[torch.Tensor]]:
    """The lists of an update, memory that is not used but for the steps."""
    gradient, copied = UPDATES[case.precision]
    shapes = trained_weights(case.width, case.patch)
    dtypes = {"gradients": gradient, "copies": copied}
    lists = {name: [torch.empty(s, dtype=dtypes.get(name, torch.float32)) for s in shapes] for name in case.big()}
    return {**lists, "steps": [torch.zeros(()) for _ in shapes]}


# ---- Asked of other processes ----------------------------------------------------------------------------------------


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
        written. For cuda also ``threads`` and ``shared_bytes``. What one launch after the other makes of an update is one row.
    """
    return _asked("traffic", backend, cases, {"TRITON_INTERPRET": "1"} if backend == "triton" else {})


def _asked(what: str, of: str, cases: list[Case], variables: dict[str, str]) -> list[dict[str, Any]]:
    folder = ROOT / "build/static" / _key(what, of, cases)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "rows.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DITKERNELS", "TRITON_INTERPRET"))}
    command = [
        sys.executable,
        "-m",
        "tools.kernel_proof.launches",
        what,
        of,
        json.dumps(cases),
        str(done.with_suffix(".tmp")),
    ]
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            ended = subprocess.run(command, env=found_from({**environment, **variables}), capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"{what} of {of}: {ended.stderr[-4000:]}")
            done.with_suffix(".tmp").replace(done)
    found: list[dict[str, Any]] = json.loads(done.read_text(encoding="utf-8"))
    return found


def _key(*asked: object) -> str:
    versions = [metadata.version(name) for name in ("torch", "triton")]
    key = hashlib.sha256(repr((asked, versions, sys.version)).encode())
    for pattern in (
        "ditkernels/ops/**/*.py",
        "csrc/cuda/*",
        "tests/ops/emulation/*",
        "tools/kernel_proof/*.py",
        "benchmarks/speed/*.py",
    ):
        for path in sorted(ROOT.glob(pattern)):
            key.update(path.read_bytes())
    return key.hexdigest()[:16]


# ---- Answers ---------------------------------------------------------------------------------------------------------


def _code(architecture: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
    from ditkernels.ops import _triton
    from tools.kernel_proof.ahead import Compiled, recorded

    with mock.patch.object(_triton, "device_reason", return_value=None), use_backend("triton"):
        for index, case in enumerate(cases):
            with recorded(int(architecture)) as compiled:
                marks, _ = _passes(case, lambda: compiled)
            for kernel, phase in zip(compiled, marks):
                assert isinstance(kernel, Compiled)
                yield {
                    **_described(index, phase, kernel.name, kernel.programs),
                    "threads": kernel.threads,
                    "registers": kernel.resources["REG"],
                    "spills": kernel.spills,
                    "shared_bytes": kernel.shared,
                    "tf32": sum("TF32" in opcode for opcode in kernel.opcodes),
                    "wide_fraction": _wide_fraction(kernel, case),
                }


def _wide_fraction(kernel: Compiled, case: Case) -> dict[str, float]:
    """By big tensor. What is reached by addresses in a table cannot be told apart: each has the share of all of it."""
    if case.op != UPDATE:
        return machine_code.wide_shares(kernel, [name for name in kernel.shapes if name in case.big()])
    if kernel.name != "update_chunks":
        return {}
    by_address = [access.bytes for access in kernel.accesses() if not access.arguments]
    wide = [moved for moved in by_address if moved >= machine_code.WIDE_BYTES]
    assert len(wide) == kernel.wide_instructions, f"{kernel.name}: the assembler split wide accesses"
    return dict.fromkeys(case.big(), sum(wide) / sum(by_address))


def _passes(case: Case, launched: Callable[[], Sized]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Runs the case; for each of its launches, the pass that made it. And what ``run`` returns."""
    marks: list[str] = []
    tensors = run(case, lambda phase: marks.extend([phase] * (len(launched()) - len(marks))))
    return marks, tensors


def _described(index: int, phase: str, kernel: str, programs: int) -> dict[str, Any]:
    return {"case": index, "pass": phase, "kernel": kernel, "programs": programs}


class Sample:
    """Which programs of a launch are run, and how many each stands for.

    Of most kernels the first, the middle and the last, which may have less to do than the others. Of ``update_chunks`` these are of
    weights of many sizes: of those of one size the first program and the last, which may have less to do. Of what few there are of
    ``advance_steps`` all.
    """

    def __init__(self, case: Case) -> None:
        self._weights = [math.prod(shape) for shape in trained_weights(case.width, case.patch)] if case.op == UPDATE else None
        self.counts: list[dict[int, float]] = []

    def __call__(self, kernel: str, programs: int) -> list[int]:
        """Of the next launch; ``counts`` then holds how many each stands for."""
        if self._weights is None:
            *others, last = sorted({0, programs // 2, programs - 1})
            counted = {**dict.fromkeys(others, (programs - 1) / max(1, len(others))), last: 1.0}
        elif kernel.startswith("update_chunks"):
            counted = self._chunks(programs)
        else:
            counted = dict.fromkeys(range(programs), 1.0)
        self.counts.append(counted)
        return list(counted)

    def _chunks(self, programs: int) -> dict[int, float]:
        assert self._weights is not None
        first, by_size = 0, {}
        while first < programs:
            size = self._weights.pop(0)
            last = first + ceil_div(size, CHUNK) - 1
            begin, _, count = by_size.get(size, (first, last, 0))
            by_size[size] = (begin, last, count + 1)
            first = last + 1
        assert first == programs, "a launch ends within a weight"
        counted: Counter[int] = Counter()
        for size, (begin, end, count) in by_size.items():
            counted[end] += count
            if size > CHUNK:
                counted[begin] += count * (ceil_div(size, CHUNK) - 1)
        return {program: float(count) for program, count in sorted(counted.items())}


def _scaled(samples: Iterable[Mapping[str, tuple[int, int]]], counts: Iterable[float]) -> dict[str, list[float]]:
    """Bytes read and written by all programs, by tensor; those of a list are one."""
    moved: dict[str, list[float]] = {}
    for sample, count in zip(samples, counts, strict=True):
        for name, both in sample.items():
            total = moved.setdefault(name.partition("[")[0], [0.0, 0.0])
            for way in (0, 1):
                total[way] += both[way] * count
    return dict(sorted(moved.items()))


def _interpreted(cases: list[Case]) -> Iterator[dict[str, Any]]:
    for index, case in enumerate(cases):
        yield from _interpreted_case(index, case)


def _interpreted_case(index: int, case: Case) -> Iterator[dict[str, Any]]:
    from tools.kernel_proof.interpreted import guarded, in_place, reordered, traced

    sample = Sample(case)
    # An update's addresses are no arguments.
    guard = contextlib.nullcontext() if case.op == UPDATE else guarded()
    with (
        use_backend("triton"),
        in_place(),
        guard,
        reordered(lambda programs: sample(launched[-1].kernel, programs)),
        traced() as launched,
    ):
        marks, tensors = _passes(case, lambda: launched)
    for launch, phase, counts in zip(launched, marks, sample.counts, strict=True):
        launch.arguments |= tensors
        found = launch.traffic()
        row = _described(index, phase, launch.kernel, launch.programs)
        yield {**row, "moved": _scaled([found.get(program, {}) for program in counts], counts.values())}


def _emulated(cases: list[Case]) -> Iterator[dict[str, Any]]:
    from tools.kernel_proof import emulated_cuda

    for index, case in enumerate(cases):
        sample = Sample(case)
        with emulated_cuda.running(sample=sample) as emulation:
            marks, _ = _passes(case, emulation.sampled)
            launched = emulation.sampled()
        rows = []
        for (kernel, blocks, threads, shared, found), phase, counts in zip(launched, marks, sample.counts, strict=True):
            row = _described(index, phase, kernel, blocks)
            rows.append({**row, "threads": threads, "shared_bytes": shared, "moved": _scaled(found, counts.values())})
        yield from _joined(rows) if case.op == UPDATE else rows


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The launches of a kernel as one: of many weights each takes a part."""
    by_kernel: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = by_kernel.setdefault(row["kernel"], row)
        if known is not row:
            known["programs"] += row["programs"]
            known["moved"] = _scaled([known["moved"], row["moved"]], [1.0, 1.0])
    return list(by_kernel.values())


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
    args.out.write_text(json.dumps(list(rows), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
