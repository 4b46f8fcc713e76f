"""Parity: every op, on every backend this machine has, held against the reference in fp64.

Forward and every gradient, in shapes that are tiny and awkward: a batch of 3, because one sample hides a mixed-up
batch index; odd numbers of tokens and channels, because powers of two hide a missing mask; gates that are not zero,
because adaLN-Zero starts where nothing shows.

The numerical contract: against fp64 an op may err at most ``CONTRACT_FACTOR`` times as much as plain PyTorch does at
the same dtypes, plus ``CONTRACT_ULPS``·eps(dtype)·max|result|; ``ATTENTION_ULPS`` says what attention may on top.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels import ops, reference
from ditkernels.ops import _native, _triton, dispatch
from ditkernels.ops.attention import explain
from ditkernels.runtime import resolve_device

CONTRACT_FACTOR = 2.0
CONTRACT_ULPS = 2.0
ATTENTION_ULPS = 20.0
"""In fp32, on attention: fused kernels trade accuracy of the exponential for speed. PyTorch's own on CPUs is declared to err
by 20 units in the last place (``exp_u20`` in ATen/cpu/vec and FlashAttentionKernel.cpp), where plain PyTorch errs by one."""

FAULTS = (RuntimeError, ValueError, TypeError)
"""What an op raises when it cannot do what it should, BackendError and CUDA errors among them."""

_EPS_FP32 = torch.finfo(torch.float32).eps
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Precision:
    """The dtypes of a check: of the residual stream, the argument ``x``, and of all other tensors."""

    name: str
    stream: torch.dtype
    others: torch.dtype

    @property
    def mixed(self) -> bool:
        return self.stream != self.others


PRECISIONS = (
    Precision("fp32", torch.float32, torch.float32),
    Precision("bf16", torch.bfloat16, torch.bfloat16),
    Precision("fp32+bf16", torch.float32, torch.bfloat16),
)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: the function's name in ``ditkernels.ops``, and in ``ditkernels.reference``.
        shapes: of its tensor arguments, by name.
        options: its other arguments.
    """

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def updates(self) -> bool:
        """Whether the op changes its arguments, which are lists of tensors, in place of returning something."""
        return self.op == "adamw_ema"

    @property
    def has_stream(self) -> bool:
        """Whether ``x`` is a residual stream (B, N, D), whose dtype is independent of the others'."""
        return len(self.shapes.get("x", ())) == 3 and not self.of_one_dtype

    @property
    def of_one_dtype(self) -> bool:
        """Whether the op takes no tensors of different dtypes, as a linear does not."""
        return self.op == "mlp"

    def inputs(self, precision: Precision, device: torch.device) -> Inputs:
        """Standard normal tensors, the same on every run."""
        dtypes = {name: precision.stream if name == "x" else precision.others for name in self.shapes}
        return {name: _normal(f"{self.op}.{name}", shape, dtypes[name], device) for name, shape in self.shapes.items()}


def _normal(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Drawn on the CPU, so that a GPU is given the same numbers. Dtype and device are named: the process may have other defaults.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(device)


def _cases() -> Iterator[Case]:
    for op in dispatch.OPS.values():
        for example in op.declaration.examples:
            present = None if example.present is None else example.present.split()
            yield Case(op.declaration.called or op.name, op.declaration.shapes(example.sizes, present), example.options)

    # What no declaration can say: views, lists that are changed in place, and attention, which is no op of ours.
    yield Case("split_qkv", {"packed": (3, 37, 3, 2, 72), "bias": (432,)})
    yield Case("split_qkv", {"packed": (3, 5, 2, 3, 15), "bias": (90,)})

    for shape in ((3, 1157), (3, 9, 40)):
        yield Case("adamw_ema", dict.fromkeys(_STATE, shape), {"lr": 0.1, "weight_decay": 0.1, "decay": 0.9})

    yield Case("attention", {"qkv_or_q": (3, 37, 3, 2, 72)})
    yield Case("attention", {"qkv_or_q": (3, 128, 3, 2, 64)})
    yield Case("attention", {"qkv_or_q": (3, 37, 2, 72), "kv": (3, 2, 2, 2, 72)})


_STATE = ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "averages", "copies")
CASES = tuple(_cases())


# ---- Which backends can serve a case ---------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of an op, with the arguments of its declaration."""

    op: dispatch.Op
    args: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    """Collects the calls of declared ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "ditkernels" and name in dispatch.OPS:
            op = dispatch.OPS[name]
            self.calls.append(Call(op, args[: len(op.declaration.arguments)]))
        return func(*args, **(kwargs or {}))


def recorded_calls(case: Case, inputs: Inputs) -> list[Call]:
    """The calls of registered ops that a forward and a backward of ``case`` make; none for attention, which is no such op."""
    cotangents = _cotangents(case, inputs)
    # An op that raises here raises in ``parity`` too, which reports it.
    with dispatch.use_backend("torch"), _Recorder() as recorder, suppress(*FAULTS):
        _evaluate(getattr(ops, case.op), case, inputs, cotangents)
    return recorder.calls


def refusals(case: Case, inputs: Inputs) -> dict[str, str | None]:
    """For every backend of the case's op: why it cannot serve forward and backward, or None if it can."""
    if case.op == "attention":
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        q, k, v = _heads(**leaves)
        return dict(explain(q, k, v))
    calls = recorded_calls(case, inputs)
    if not calls:
        return dict.fromkeys(dispatch.BACKENDS, "the function reached no declared op")
    return {
        backend: next(filter(None, (call.op.reasons(*call.args)[backend] for call in calls)), None) for backend in dispatch.BACKENDS
    }


def _heads(qkv_or_q: Tensor, kv: Tensor | None = None) -> tuple[Tensor, ...]:
    return qkv_or_q.unbind(2) if kv is None else (qkv_or_q, *kv.unbind(2))


def _forced(case: Case, backend: str) -> dispatch.use_backend:
    if case.op == "attention":
        return dispatch.use_backend(attention=backend)
    return dispatch.use_backend(backend)


def _by_kernels(case: Case, backend: str) -> AbstractContextManager[object]:
    """Keeps the torch backend from calling the specification in the place of its own kernels."""
    op = dispatch.OPS.get(case.op)
    return nullcontext() if op is None or op.implementations[backend].plain is None else dispatch.WholeWay()


# ---- Parity of one case ----------------------------------------------------------------------------------------------


class Parity(NamedTuple):
    """How far a case is from fp64.

    Attributes:
        ratio: the largest error over the error the contract allows; at most 1 if the contract holds.
        where: the output or gradient it occurs in, or what went wrong.
    """

    ratio: float
    where: str


def parity(case: Case, inputs: Inputs, backend: str) -> Parity:
    """Runs ``case`` forward and backward on ``backend`` and compares every output and gradient with fp64."""
    cotangents = _cotangents(case, inputs)
    specification = getattr(reference, case.op)
    with _plain_arithmetic():
        plain = _evaluate(specification, case, inputs, cotangents)
        exact = _evaluate(specification, case, {k: t.double() for k, t in inputs.items()}, cotangents)
    # An op that raises has failed its check; it must not keep the others from theirs.
    try:
        with _forced(case, backend), _by_kernels(case, backend):
            actual = _evaluate(getattr(ops, case.op), case, inputs, cotangents)
    except FAULTS as error:
        return Parity(math.inf, f"{type(error).__name__}: {' '.join(str(error).split())}")
    ulps_fp32 = ATTENTION_ULPS if case.op == "attention" else 0.0
    found = [_compare(name, actual[name], plain[name], exact[name], ulps_fp32) for name in exact]
    return max(found, key=_badness)


def _badness(found: Parity) -> float:
    return found.ratio


def _compare(name: str, actual: Tensor, plain: Tensor, exact: Tensor, ulps_fp32: float) -> Parity:
    got, expected = (tuple(actual.shape), actual.dtype), (tuple(exact.shape), plain.dtype)
    if got != expected:
        return Parity(math.inf, f"{name} is {got[0]} {got[1]}, not {expected[0]} {expected[1]}")
    if not actual.isfinite().all():
        return Parity(math.inf, f"{name} is not finite")
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    rounding = CONTRACT_ULPS * torch.finfo(plain.dtype).eps + ulps_fp32 * _EPS_FP32
    allowed = CONTRACT_FACTOR * plain_error + rounding * exact.abs().max().item()
    if error == 0:
        return Parity(0.0, name)
    return Parity(error / allowed if allowed > 0 else math.inf, name)


def _call(function: Callable[..., Any], case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    outputs = function(**inputs, **case.options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cotangents(case: Case, inputs: Inputs) -> list[Tensor]:
    """Gradients to feed backward, in the dtypes of the outputs; none for an op that has none."""
    if case.updates:
        return []
    with torch.no_grad():
        outputs = _call(getattr(reference, case.op), case, inputs)
    return [_normal(f"{case.op}.output{i}", tuple(output.shape), output.dtype, output.device) for i, output in enumerate(outputs)]


def _evaluate(function: Callable[..., Any], case: Case, inputs: Inputs, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Every output, and the gradient of every input, by name; of an op that updates its arguments, these."""
    if case.updates:
        return updated(function, case, inputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = _call(function, case, leaves)
    weights = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs)]
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), weights)
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    return {
        **{name: output.detach() for name, output in zip(names, outputs)},
        **{f"d{name}": gradient for name, gradient in zip(leaves, gradients)},
    }


def updated(function: Callable[..., Any], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What a step of the optimizer makes of one weight and its state: in fp32, but for gradient and copy, or all in fp64."""
    exact = inputs["weights"].dtype == torch.float64
    own = {"gradients": inputs["gradients"].dtype, "copies": torch.float64 if exact else torch.bfloat16}
    state = {
        name: [tensor.to(own.get(name, torch.float64 if exact else torch.float32), copy=True)] for name, tensor in inputs.items()
    }
    state["exp_avg_sqs"][0].square_()
    state["steps"] = [torch.tensor(3.0, dtype=torch.float32, device=inputs["weights"].device)]
    function(**state, **case.options)
    return {name: tensors[0] for name, tensors in state.items() if name != "gradients"}


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    # What the ops are held against must not itself be loose: no TF32, which convolutions have by default on a GPU,
    # and attention by its definition, whichever kernel PyTorch would prefer.
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


# ---- All of them -----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One op on one backend in one precision, over all its cases.

    Attributes:
        op, backend, precision: names.
        ratio: of the worst case; None if nothing ran.
        note: where the worst error is, or what went wrong, or why nothing ran.
    """

    op: str
    backend: str
    precision: str
    ratio: float | None
    note: str

    @property
    def failed(self) -> bool:
        return self.ratio is not None and not self.ratio <= 1


def results(device: torch.device, only: str | None = None) -> Iterator[Result]:
    """Every op on every backend, or on the one named ``only``, in every precision, on ``device``."""
    for op, cases_of_op in groupby(CASES, key=lambda case: case.op):
        cases = tuple(cases_of_op)
        for precision in PRECISIONS:
            if not precision.mixed or cases[0].has_stream:
                yield from _results_of(op, cases, precision, device, only)


def _results_of(op: str, cases: tuple[Case, ...], precision: Precision, device: torch.device, only: str | None) -> Iterator[Result]:
    found: dict[str, list[Parity]] = {}
    reasons: dict[str, str] = {}
    for case in cases:
        inputs = case.inputs(precision, device)
        for backend, reason in refusals(case, inputs).items():
            if only not in (None, backend):
                continue
            ran = found.setdefault(backend, [])
            if reason is None:
                ran.append(parity(case, inputs, backend))
            else:
                reasons[backend] = reason
    for backend, ran in found.items():
        if ran:
            worst = max(ran, key=_badness)
            yield Result(op, backend, precision.name, worst.ratio, worst.where)
        else:
            yield Result(op, backend, precision.name, None, reasons[backend])


def passed(found: list[Result]) -> bool:
    """Whether no result failed, and every op ran somewhere in every precision asked for."""
    asked = {(result.op, result.precision) for result in found}
    ran = {(result.op, result.precision) for result in found if result.ratio is not None}
    return asked == ran and not any(result.failed for result in found)


# ---- The report ------------------------------------------------------------------------------------------------------


def everything(device: torch.device, only: str | None = None) -> bool:
    """Prints the table of :func:`report`; returns whether everything held.

    On a CPU the Triton kernels follow in a process of their own, in Triton's interpreter.

    Args:
        only: a backend of the ops, to check that one alone.

    Raises:
        ValueError: there is no such backend.
    """
    if only is not None and only not in dispatch.BACKENDS:
        raise ValueError(f"--backend: got {only!r}, allowed are {', '.join(dispatch.BACKENDS)}")
    interpret = device.type == "cpu" and _triton.MISSING is None and not _triton.INTERPRETED
    if interpret and only == "triton":
        return _interpreted()
    held = report(sys.stdout, device, only)
    if interpret and only is None:
        held = _interpreted() and held
    return held


def _interpreted() -> bool:
    """Checks the Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported."""
    print("\nThe Triton kernels, in Triton's interpreter:", flush=True)
    command = [sys.executable, "-m", "ditkernels", "check", "--device", "cpu", "--backend", "triton"]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode == 0


def report(file: TextIO, device: torch.device | None = None, only: str | None = None) -> bool:
    """Checks every op on every backend on ``device`` (default: a GPU if there is one) and prints a table.

    Args:
        only: a backend of the ops, to check that one alone.

    Returns:
        Whether everything held, and the libraries are the files that were built.
    """
    device = device or resolve_device("auto")
    print(f"Checking every op against fp64 on {_device_name(device)}, forward and every gradient", file=file)
    print(_ROW.format("op", "backend", "dtype", "error/allowed", "worst in"), file=file)
    found = []
    for result in results(device, only):
        found.append(result)
        if result.ratio is not None:
            print(_line(result), file=file)
    for line in _not_run(found):
        print(line, file=file)
    changed = _native.changed_libraries()
    for sentence in changed:
        print(f"  FAILED: {sentence}", file=file)
    print(_verdict(found), file=file, flush=True)
    return passed(found) and not changed


_ROW = "  {:<20} {:<15} {:<10} {:>13}  {}"


def _line(result: Result) -> str:
    note = f"{result.note}  FAILED" if result.failed else result.note
    return _ROW.format(result.op, result.backend, result.precision, f"{result.ratio:.2f}", note)


def _not_run(found: list[Result]) -> Iterator[str]:
    """One line a reason, with the backends that give it."""
    served = {(result.op, result.backend) for result in found if result.ratio is not None}
    backends: dict[str, dict[str, None]] = {}
    for result in found:
        if result.ratio is None:
            partly = (result.op, result.backend) in served
            name = f"{result.backend} in {result.precision}" if partly else result.backend
            backends.setdefault(result.note, {})[name] = None
    for reason, names in backends.items():
        yield f"  not run: {', '.join(names)}: {reason}"


def _verdict(found: list[Result]) -> str:
    ran = [result for result in found if result.ratio is not None]
    failures = sum(result.failed for result in ran)
    if failures:
        return f"{failures} of {len(ran)} checks FAILED: an error over 1 breaks the numerical contract."
    if not passed(found):
        return "FAILED: some op has no backend that serves here."
    return f"All {len(ran)} checks passed."


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
