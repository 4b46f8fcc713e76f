"""Declarations and dispatch: schemas, one signature an op, the choice of a backend, settings that nest, a light import."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.checkpoint import checkpoint

import ditkernels
from ditkernels import ops, reference
from ditkernels.diagnostics import check
from ditkernels.ops import choice, dispatch
from ditkernels.ops.spec import decoded, encoded
from tests.helpers.native_cpu import SERVING
from tests.helpers.subsets import WholeWay

# Compiled libraries and exported programs depend on these: change one only together with a new op name.
SCHEMAS = (Path(ops.__file__).parent / "schemas.txt").read_text(encoding="utf-8").splitlines()
DIFFERENTIABLE = [op for op in dispatch.OPS.values() if op.declaration.gradient is not None]


def schema(call: torch._ops.OpOverload) -> str:
    return str(call._schema).removeprefix("ditkernels::")


# ---- Declarations ----------------------------------------------------------------------------------------------------


def test_schemas_are_pinned() -> None:
    assert sorted(schema(op.call) for op in dispatch.OPS.values()) == SCHEMAS


def test_every_op_has_a_torch_kernel_of_the_same_schema() -> None:
    for name, op in dispatch.OPS.items():
        internal = schema(op.implementations["torch"].internal)
        public = schema(op.call).replace(', str backend=""', "").replace(name, f"{name}_torch", 1)
        assert internal == public


@pytest.mark.parametrize("name", [name for name in ops.__all__ if hasattr(reference, name)])
def test_an_argument_list_is_the_reference_s(name: str) -> None:
    """The public function and the reference take the same arguments, which are those of the declaration."""
    ours, meant = (inspect.signature(getattr(room, name)).parameters for room in (ops, reference))
    extra = set(ours) - set(meant)
    assert extra <= {"backend"}
    assert [(p.name, p.kind, p.default) for p in ours.values() if p.name not in extra] == [
        (p.name, p.kind, p.default) for p in meant.values()
    ]
    op = dispatch.OPS.get(name)
    if op is not None:
        declared = {i.name for i in op.declaration.inputs}
        assert declared <= set(ours), f"{name} declares {declared - set(ours)}, which the public function lacks"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", dispatch.OPS.values(), ids=lambda op: op.name)
def test_kernels_take_the_declared_arguments(op: dispatch.Op, backend: str) -> None:
    implementation = op.implementations.get(backend)
    if implementation is None:
        pytest.skip(f"{op.name} has no {backend} kernel")
    parameters = inspect.signature(implementation.kernel).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    assert [p.name for p in parameters] == list(op.declaration.arguments)


def test_wanted_gradients_are_torch_s_numbers_of_dtypes() -> None:
    wanted = (torch.float32, None, torch.bfloat16, torch.float16, torch.float64)
    assert decoded(encoded(wanted)) == wanted
    numbers = encoded(wanted)
    for dtype, number in zip(wanted, numbers):
        if dtype is not None:
            # torch.empty's schema takes the number that c10::ScalarType gives the dtype.
            assert torch.ops.aten.empty.memory_format([0], dtype=dtype).dtype is decoded([number])[0]


# ---- Settings --------------------------------------------------------------------------------------------------------


def test_settings_nest_and_return() -> None:
    assert dispatch.backend_setting() is None
    with ditkernels.use_backend("torch", attention="plain"):
        assert (dispatch.backend_setting(), dispatch.attention_setting()) == ("torch", "plain")
        with ditkernels.use_backend("auto"):
            assert (dispatch.backend_setting(), dispatch.attention_setting()) == (None, "plain")
        assert dispatch.backend_setting() == "torch"
    assert (dispatch.backend_setting(), dispatch.attention_setting()) == (None, None)


def test_a_block_may_be_entered_again_and_decorate() -> None:
    forced = ditkernels.use_backend("torch")
    with forced, ditkernels.use_backend("auto"), forced:
        assert dispatch.backend_setting() == "torch"

    @forced
    def inside() -> str | None:
        return dispatch.backend_setting()

    assert (inside(), inside(), dispatch.backend_setting()) == ("torch", "torch", None)


def test_an_error_leaves_the_block() -> None:
    with pytest.raises(RuntimeError, match="inside"), ditkernels.use_backend("torch"):
        raise RuntimeError("inside")
    assert dispatch.backend_setting() is None


def test_the_setting_of_a_process_is_a_call_of_its_own() -> None:
    ditkernels.set_backend("torch")
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(dispatch.backend_setting()))
    thread.start()
    thread.join()
    with ditkernels.use_backend("auto"):
        seen.append(dispatch.backend_setting())
    ditkernels.set_backend("auto")
    assert (*seen, dispatch.backend_setting()) == ("torch", None, None)


def test_environment_variables_force_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ditkernels.ops.modulate_norm(torch.zeros(1, 1, 4))  # a remembered call sees a later change all the same
    monkeypatch.setenv("DITKERNELS_BACKEND", "torch")
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "plain")
    assert (dispatch.backend_setting(), dispatch.attention_setting()) == ("torch", "plain")
    with ditkernels.use_backend("auto"):
        assert dispatch.backend_setting() is None
    monkeypatch.setenv("DITKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="DITKERNELS_BACKEND: unknown backend 'fast', allowed are auto, cpu, cuda, triton, torch"):
        ditkernels.ops.modulate_norm(torch.zeros(1, 1, 4))


@pytest.mark.parametrize("call", [ditkernels.use_backend, ditkernels.set_backend])
def test_unknown_backends_are_refused(call: Callable[..., Any]) -> None:
    name = call.__name__
    with pytest.raises(ValueError, match=f"{name}: unknown backend 'fast', allowed are auto, cpu, cuda, triton, torch"):
        call("fast")
    with pytest.raises(ValueError, match="unknown backend 'fast', allowed are auto, cudnn"):
        call(attention="fast")


# ---- Each thread, task, backward and recomputation sees its own setting ----------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch, record: Callable[[str, str], None]) -> None:
    """Gives ``gated_residual`` two backends that compute what torch does, and tell ``record`` (backend, op) at each call."""
    op = dispatch.OPS["gated_residual"]
    for one in (op, op.gradients):
        plain = one.implementations["torch"]
        for backend in ("torch", "cuda"):

            def kernel(*args: Any, backend: str = backend, name: str = one.name, plain: Any = plain) -> Any:
                record(backend, name)
                return plain.kernel(*args)

            made = dispatch.Implementation(kernel, plain.internal, lambda op, args: None)
            monkeypatch.setitem(one.implementations, backend, made)


def leaves() -> list[Tensor]:
    return [torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)]


def test_a_forward_s_setting_serves_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = torch.randn(2, 8, requires_grad=True)
    calls: list[tuple[str, str]] = []
    spy(monkeypatch, lambda *call: calls.append(call))
    with ditkernels.use_backend("cuda"):
        out = ops.gated_residual(*leaves(), gate)
    with ditkernels.use_backend("torch"):
        out.sum().backward()
    assert calls == [("cuda", "gated_residual"), ("cuda", "gated_residual_backward")]


def test_a_recomputation_sees_the_forward_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = torch.randn(2, 8, requires_grad=True)
    calls: list[tuple[str, str]] = []
    spy(monkeypatch, lambda *call: calls.append(call))
    with ditkernels.use_backend("cuda"):
        x, branch = leaves()
        call = lambda: ops.gated_residual(x, branch, gate)  # noqa: E731
        out = checkpoint(call, use_reentrant=False, context_fn=ops.remembered)
    out.sum().backward()
    assert {backend for backend, _ in calls} == {"cuda"}
    assert [name for _, name in calls].count("gated_residual") == 2


def test_threads_see_their_own_setting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, 1,000 calls each with their own backend, forward and backward."""
    gate = torch.randn(2, 8, requires_grad=True)
    seen: list[tuple[int, str]] = []
    spy(monkeypatch, lambda backend, name: seen.append((threading.get_ident(), backend)))

    def work(backend: str) -> None:
        for _ in range(1000):
            with ditkernels.use_backend(backend):
                out = ops.gated_residual(*leaves(), gate)
                (grad,) = torch.autograd.grad(out.sum(), [gate])
            assert grad.isfinite().all()

    threads = [threading.Thread(target=work, args=(backend,)) for backend in ("torch", "cuda")]
    idents: dict[int, str] = {}
    for thread, backend in zip(threads, ("torch", "cuda")):
        thread.start()
        idents[thread.ident or 0] = backend
    for thread in threads:
        thread.join()
    assert len(seen) == 4000
    assert all(idents[who] == backend for who, backend in seen)
    assert dispatch.backend_setting() is None


def test_tasks_see_their_own_setting_only() -> None:
    async def work(backend: str) -> set[str | None]:
        seen = set()
        with ditkernels.use_backend(backend):
            for _ in range(20):
                await asyncio.sleep(0)
                seen.add(dispatch.backend_setting())
        return seen

    async def both() -> list[set[str | None]]:
        return await asyncio.gather(work("torch"), work("triton"))

    assert asyncio.run(both()) == [{"torch"}, {"triton"}]


# ---- Choice ----------------------------------------------------------------------------------------------------------


def says(reason: str | None) -> Callable[..., str | None]:
    return lambda op, args: reason


def test_a_forced_backend_that_cannot_serve_says_what_all_would(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dispatch.OPS["unpatchify"]
    plain = op.implementations["torch"]
    refusing = dispatch.Implementation(plain.kernel, plain.internal, says("it is Sunday"))
    monkeypatch.setitem(op.implementations, "cuda", refusing)
    arguments = torch.zeros(1, 4, 4)
    ditkernels.ops.unpatchify(arguments, grid=(2, 2), patch_size=2)
    with ditkernels.use_backend("cuda"), pytest.raises(ditkernels.BackendError) as error:
        ditkernels.ops.unpatchify(arguments, grid=(2, 2), patch_size=2)
    assert str(error.value).startswith("unpatchify: backend 'cuda' cannot serve (cpu: ")
    assert "; cuda: it is Sunday; " in str(error.value)
    assert "torch: can serve" in str(error.value)


@pytest.mark.parametrize(
    "willing, preferred, chosen",
    [
        ("torch", None, "torch"),
        ("cuda torch", None, "cuda"),  # Triton is missing, the library is there
        ("cuda triton torch", None, "triton"),
        ("cuda triton torch", "cuda", "cuda"),
        ("cuda triton torch", "torch", "torch"),  # the measured winner may be plain PyTorch
        ("triton torch", "cuda", "triton"),  # the winner is not there
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, willing: str, preferred: str | None, chosen: str) -> None:
    op = dispatch.OPS["unpatchify"]
    plain = op.implementations["torch"]
    for backend in dispatch.BACKENDS:
        reason = None if backend in willing.split() else "no"
        made = dispatch.Implementation(plain.kernel, plain.internal, says(reason))
        monkeypatch.setitem(op.implementations, backend, made)
    monkeypatch.setattr(choice, "fastest", lambda op, device: preferred)
    assert op.choose(torch.zeros(1, 4, 4), 2, 2, 2, False) == chosen


def test_a_winner_counts_on_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.PREFERRED == {}, "nothing is measured, so nothing is claimed"
    monkeypatch.setitem(dispatch.PREFERRED, ("9.0", "modulate_norm"), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert dispatch.fastest("modulate_norm", torch.device("cuda")) == "cuda"
    assert dispatch.fastest("modulate_norm", torch.device("cpu")) is None
    assert dispatch.fastest("gated_residual", torch.device("cuda")) is None


@pytest.mark.parametrize("case", [c for c in check.CASES if not c.updates], ids=lambda c: c.op)
def test_a_symbolic_size_outside_its_mode_is_left_to_torch(case: check.Case) -> None:
    """A size that is a symbol has no hash, so that no memo may look it up."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = case.inputs(check.PRECISIONS[0], torch.device("cpu"))
    fakes = {}
    for name, value in inputs.items():
        # The batch is the first size of what has more than one axis: a weight's first size is made a symbol, too.
        kinds = [DimDynamic.DYNAMIC if value.dim() > 2 and at == 0 else DimDynamic.STATIC for at in range(value.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes[name] = mode.from_tensor(value, symbolic_context=context, source=ConstantSource(name))
    made, plain = (
        getattr(ops, case.op)(**fakes, **case.options),
        getattr(ops, case.op)(**inputs, **case.options),
    )
    for fake, real in zip(*((out if isinstance(out, tuple) else (out,)) for out in (made, plain))):
        assert (tuple(fake.shape[1:]), fake.dtype) == (tuple(real.shape[1:]), real.dtype)
        assert isinstance(fake, FakeTensor)


@pytest.mark.parametrize("backend, way", [("torch", nullcontext), ("torch", WholeWay), (SERVING, nullcontext)])
def test_a_profile_shows_the_backend(backend: str, way: Callable[[], AbstractContextManager[object]]) -> None:
    x, branch = leaves()
    gate = torch.randn(2, 8, requires_grad=True)
    with ditkernels.use_backend(backend), way():
        ops.gated_residual(x, branch, gate).sum().backward()
        with torch.profiler.profile() as profile:
            ops.gated_residual(x, branch, gate).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert f"ditkernels::gated_residual_{backend}" in names
    by_plain_pytorch = backend == "torch" and way is nullcontext
    assert (f"ditkernels::gated_residual_backward_{backend}" in names) != by_plain_pytorch


def test_import_is_light() -> None:
    code = """
import sys, torch
import ditkernels
assert not torch.cuda.is_initialized()
heavy = {"sklearn", "matplotlib", "flash_attn", "xformers", "diffusers", "torch._inductor", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
