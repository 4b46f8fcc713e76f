"""Under torch.compile, torch.export, checkpoint policies and forward-mode AD: what they see of an op, and what it says to them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ditkernels
from ditkernels import ops, reference
from ditkernels.diagnostics.check import CASES, PRECISIONS
from ditkernels.ops import _triton, choice, dispatch
from tests.helpers.native_cpu import needs_compiler, needs_library
from tools.kernel_proof import stub_driver

CPU = torch.device("cpu")
CASE = {case.op: case for case in sorted(CASES, key=lambda case: len(case.shapes))}  # with most inputs, of each op
DECLARED = sorted(CASE.keys() - {"attention", "split_qkv"})  # split_qkv has views, and a backward of ours
DIFFERENTIABLE = sorted(CASE.keys() - {"adamw_ema"})
NUMBER = {"torch": 1, "triton": 2, "cuda": 3}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def inputs_of(name: str, **kind: Any) -> dict[str, Tensor]:
    """Those of an example; ``kind`` as of torch.randn."""
    made = CASE[name].inputs(PRECISIONS[0], CPU)
    return {key: torch.randn(tensor.shape, **kind) for key, tensor in made.items()}


def call(name: str, tensors: dict[str, Tensor]) -> Any:
    return getattr(ops, name)(**tensors, **CASE[name].options)


def outputs_of(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    made = call(name, tensors)
    return made if isinstance(made, tuple) else (made,)


def says(answer: str | None) -> dispatch.Refusal:
    return lambda op, args: answer


# ---- The setting: a compiled function follows it ---------------------------------------------------------------------


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend but cpu serves bias_gelu, and returns its number."""
    monkeypatch.setattr(choice, "AUTOMATIC", ["triton", "cuda", "torch"])
    op = dispatch.OPS["bias_gelu"]
    for backend, number in NUMBER.items():

        def kernel(x: Tensor, bias: Tensor | None, number: int = number) -> Tensor:
            return torch.full_like(x, number)

        monkeypatch.setitem(op.implementations, backend, dispatch.Implementation(kernel, kernel, says(None)))
    dispatch.forget()


def probe(x: Tensor) -> Tensor:
    return ops.bias_gelu(x).sum()


class Compiled:
    """A compiled function, and how often it was compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.count = 0
        self.function = torch.compile(function, fullgraph=True, backend=self.backend)

    def backend(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return aot_module_simplified(graph, inputs, fw_compiler=lambda g, _: make_boxed_func(g.forward))

    def __call__(self) -> Any:
        with torch.no_grad():
            made = self.function(torch.zeros(1, 1, 1))
        return [int(number) for number in made] if isinstance(made, tuple) else int(made)


@pytest.mark.usefixtures("numbered")
def test_a_compiled_function_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(probe)
    ran = [compiled()]
    for backend in ("torch", "cuda", "torch"):
        with ditkernels.use_backend(backend):
            ran.append(compiled())
    ran.append(compiled())
    assert ran == [2, 1, 3, 1, 2]
    assert compiled.count == 3, "once for each setting"

    ditkernels.set_backend("torch")
    assert compiled() == 1
    with ditkernels.use_backend("auto"):
        assert compiled() == 2
    ditkernels.set_backend("auto")
    assert compiled() == 2


@pytest.mark.usefixtures("numbered")
def test_a_compiled_function_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(probe)
    assert compiled() == 2
    monkeypatch.setenv("DITKERNELS_BACKEND", "cuda")
    assert compiled() == 3
    with ditkernels.use_backend("torch"):
        assert compiled() == 1
    monkeypatch.delenv("DITKERNELS_BACKEND")
    assert compiled() == 2


@pytest.mark.usefixtures("numbered")
def test_two_threads_share_a_compiled_function() -> None:
    compiled = Compiled(probe)
    ran: dict[str, set[int]] = {}

    def work(backend: str) -> None:
        ran[backend] = set()
        for _ in range(50):
            with ditkernels.use_backend(backend):
                ran[backend].add(compiled())

    threads = [threading.Thread(target=work, args=(backend,)) for backend in ("torch", "cuda")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == {"torch": {1}, "cuda": {3}}
    assert compiled() == 2


@pytest.mark.usefixtures("numbered")
def test_blocks_inside_a_compiled_function() -> None:
    @ditkernels.use_backend("cuda")
    def decorated(x: Tensor) -> Tensor:
        return probe(x)

    def blocks(x: Tensor) -> tuple[Tensor, ...]:
        with ditkernels.use_backend("torch"):
            first = probe(x)
            with ditkernels.use_backend("triton"):
                inner = probe(x)
            again = probe(x)
        return first, inner, again, decorated(x), probe(x)

    compiled = Compiled(blocks)
    assert compiled() == compiled() == [1, 2, 1, 3, 2]
    with ditkernels.use_backend("torch"):
        assert compiled() == [1, 2, 1, 3, 1]
    assert compiled.count == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_forced_backend_that_cannot_serve_says_why(backend: str) -> None:
    x = torch.zeros(1, 1, 4)
    with ditkernels.use_backend("cuda"), pytest.raises(ditkernels.BackendError) as plainly:
        probe(x)
    assert "cannot serve" in str(plainly.value)
    with ditkernels.use_backend("cuda"), pytest.raises(RuntimeError) as compiled:
        torch.compile(probe, backend=backend, fullgraph=True)(x)
    assert str(plainly.value) in str(compiled.value)


# ---- What the graphs hold --------------------------------------------------------------------------------------------

LAUNCH = "triton_kernel_wrapper_functional"


def traced(name: str, backend: str, device: str) -> dict[str, Any]:
    """The graphs of an op's example by name: Dynamo's, and forward and, on the CPU, backward of AOTAutograd."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, inputs: Any) -> Any:
            found[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    def compiler(graph: Any, inputs: Any) -> Any:
        found["dynamo"] = graph
        return aot_module_simplified(graph, inputs, fw_compiler=keep("forward"), bw_compiler=keep("backward"))

    grad = device == "cpu"  # autograd's threads need the device
    with stub_driver.installed(), FakeTensorMode(), ditkernels.use_backend(backend):
        tensors = inputs_of(name, device=device, requires_grad=grad)
        compiled = torch.compile(lambda tensors: outputs_of(name, tensors), backend=compiler, fullgraph=True)
        outputs = compiled(tensors)
        if grad:
            torch.autograd.grad(outputs, list(tensors.values()), [torch.empty_like(o) for o in outputs])
    return found


def targets(graph: Any) -> Counter[str]:
    """How often each function is called."""
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def ours(graph: Any) -> list[Any]:
    """The nodes that call an op of the package."""
    nodes = (node for node in graph.graph.nodes if node.op == "call_function")
    return [node for node in nodes if "ditkernels" in str(node.target)]


def names_of_ours(graph: Any) -> list[str]:
    return [str(node.target) for node in ours(graph)]


LAUNCHING = sorted(set(DECLARED) - {"adamw_ema"})


@pytest.mark.parametrize("name", LAUNCHING)
def test_the_torch_backend_is_plain_pytorch_to_a_compiler(name: str) -> None:
    graphs = traced(name, "torch", "cpu")
    (node,) = ours(graphs["dynamo"])
    assert node.args[-1] == f"torch:{dispatch.fingerprint()}"
    for way in ("forward", "backward"):
        found = targets(graphs[way])
        assert found, way
        assert all(target.startswith(("aten.", "prims.", "<built-in")) for target in found), found


@pytest.mark.parametrize("name", LAUNCHING)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compiler_sees_the_launches(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "device_reason", lambda device: None)
    graphs = traced(name, "triton", device)
    assert names_of_ours(graphs.pop("dynamo")) == [f"ditkernels.{name}.default"]
    assert list(graphs) == (["forward", "backward"] if device == "cpu" else ["forward"])
    for way, graph in graphs.items():
        assert targets(graph)[LAUNCH], way
        assert not ours(graph), way


def test_a_launch_can_be_traced_after_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "device_reason", lambda device: None)
    traced("bias_gelu", "triton", "cuda")
    traced("unpatchify", "triton", "cuda")  # torch's second kernel
    torch._dynamo.reset()
    assert targets(traced("unpatchify", "triton", "cuda")["forward"])[LAUNCH]  # and its first


def test_a_compiled_library_stays_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dispatch.OPS["bias_gelu"]
    for which in (op, op.gradients):
        plain = which.implementations["torch"]
        library = dispatch.Implementation(plain.kernel, plain.internal, says(None))
        monkeypatch.setitem(which.implementations, "cuda", library)
    graphs = traced("bias_gelu", "cuda", "cpu")
    assert names_of_ours(graphs["forward"]) == ["ditkernels.bias_gelu.default"]
    assert names_of_ours(graphs["backward"]) == ["ditkernels.bias_gelu_backward.default"]
    assert LAUNCH not in targets(graphs["forward"])


@needs_library
def test_a_kernel_for_cpus_stands_in_the_graph_itself() -> None:
    """So that no Python of ours runs per call."""
    graphs = traced("bias_gelu", "cpu", "cpu")
    assert names_of_ours(graphs["forward"]) == ["ditkernels.bias_gelu_cpu.default"]
    assert names_of_ours(graphs["backward"]) == ["ditkernels.bias_gelu_backward_cpu.default"]


# ---- Export ----------------------------------------------------------------------------------------------------------


class Calling(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, tensors: dict[str, Any]) -> Any:
        return call(self.name, tensors)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", LAUNCHING)
def test_an_export_keeps_the_op(name: str, strict: bool) -> None:
    tensors = inputs_of(name)
    with ditkernels.use_backend("torch"):
        program = torch.export.export(Calling(name), (tensors,), strict=strict)
        lowered = program.run_decompositions()
    for found in (program, lowered):
        (node,) = ours(found)
        assert str(node.target) == f"ditkernels.{name}.default"
        assert "torch" not in node.args, "an export runs on the backend that is chosen where it runs"
    torch.testing.assert_close(lowered.module()(tensors), call(name, tensors))


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_keeps_the_op_that_changes_its_arguments(strict: bool) -> None:
    state: dict[str, Any] = {name: [tensor.abs()] for name, tensor in inputs_of("adamw_ema").items()}
    state |= {"steps": [torch.tensor(3.0)], "copies": [state["copies"][0].bfloat16()]}
    with torch.no_grad():
        program = torch.export.export(Calling("adamw_ema"), (state,), strict=strict)
    for found in (program, program.run_decompositions()):
        assert "ditkernels.adamw_ema.default" in str(found.graph)


# ---- Selective checkpointing -----------------------------------------------------------------------------------------


# What the kernel of gated_residual_norm leaves in a compiled graph.
TRACES = {"torch": "aten.native_layer_norm.default", "cpu": "ditkernels.gated_residual_norm_cpu.default"}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_library)])
def test_selective_checkpointing_decides_by_op(backend: str, saved: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the norm's kernel in an eager run, and what it leaves in a compiled backward."""
    op, ran, found = dispatch.OPS["gated_residual_norm"], [], {}
    plain = op.implementations[backend]

    def counting(*args: Any) -> Any:
        ran.append(args)
        return plain.internal(*args)

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = saved and function is torch.ops.ditkernels.gated_residual_norm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x: Tensor, branch: Tensor) -> Tensor:
        x1, h = ops.gated_residual_norm(x.sin(), branch)
        return (x1.cos() * h).sum()

    def step(x: Tensor, branch: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, x, branch, use_reentrant=False, context_fn=contexts)

    def compiler(graph: Any, inputs: Any) -> Any:
        def keep(graph: Any, inputs: Any) -> Any:
            found["backward"] = graph
            return make_boxed_func(graph.forward)

        forward = lambda graph, inputs: make_boxed_func(graph.forward)  # noqa: E731
        partition = functools.partial(torch._functorch.partitioners.min_cut_rematerialization_partition, compiler="inductor")
        return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=keep, partition_fn=partition)

    if not compiled:
        monkeypatch.setitem(op.implementations, backend, dispatch.Implementation(plain.kernel, counting, plain.refuse))
    x, branch = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    with dispatch.use_backend(backend):
        expected = torch.autograd.grad(block(x, branch), (x, branch))
        ran.clear()
        run = torch.compile(step, backend=compiler, fullgraph=True) if compiled else step
        torch.testing.assert_close(torch.autograd.grad(run(x, branch), (x, branch)), expected)
    again = targets(found["backward"])[TRACES[backend]] if compiled else len(ran) - 1
    assert again == (0 if saved else 1)


# ---- Forward-mode AD -------------------------------------------------------------------------------------------------


def with_tangents(function: Callable[..., Any], *tensors: Tensor) -> Any:
    with dual_level():
        made = function(*[make_dual(tensor, tensor.cos()) for tensor in tensors])
        return unpack_dual(made).tangent


def attempts(name: str, way: str, tensors: dict[str, Tensor]) -> list[Callable[[], Tensor]]:
    """Ways to ask for the tangent: jvp around or inside, dual tensors in a function that was compiled for others, or not yet."""
    given = tuple(tensors.values())

    def function(*values: Tensor) -> Tensor:
        return outputs_of(name, dict(zip(tensors, values)))[0]

    def through_jvp(*values: Tensor) -> Tensor:
        return torch.func.jvp(function, values, tuple(value.cos() for value in values))[1]

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        if way == "eager":
            return function
        return torch.compile(function, backend="aot_eager", fullgraph=way == "fullgraph")

    def warm() -> Callable[..., Any]:
        compiled = made(function)
        compiled(*given)
        return compiled

    return [
        lambda: made(through_jvp)(*given),
        lambda: with_tangents(made(function), *given),
        lambda: with_tangents(warm(), *given),
    ]


WAYS = ("eager", "compiled", "fullgraph")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - {"attention"}))
def test_forward_mode_is_refused(name: str, way: str) -> None:
    """By us, or by a compiler that was told to take the whole graph and met the dual tensor first."""
    sentence = f"{name}: forward-mode differentiation is not supported; use ditkernels.reference.{name}"
    refusal = torch._dynamo.exc.Unsupported if way == "fullgraph" else NotImplementedError
    for attempt in attempts(name, way, inputs_of(name)):
        with pytest.raises(refusal) as error:
            attempt()
        torch_came_first = way == "fullgraph" and "Attempted to wrap a dual tensor input" in str(error.value)
        assert torch_came_first or sentence in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_attention_keeps_the_tangent(way: str) -> None:
    """Or torch refuses dual tensors."""
    tensors = inputs_of("attention", dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_tangents(reference.attention, *tensors.values())
    for attempt in attempts("attention", way, tensors):
        try:
            tangent = attempt()
        except torch._dynamo.exc.Unsupported as error:
            if "dual tensor" not in str(error):
                raise
        else:
            torch.testing.assert_close(tangent, expected)


# ---- Caches on disk --------------------------------------------------------------------------------------------------

PROCESSES = """
import json, multiprocessing, sys, torch, torch._functorch.config, torch._inductor.compile_fx
from pathlib import Path
from torch._dynamo.utils import counters
import ditkernels
from ditkernels.ops import dispatch

torch.set_num_threads(1)
torch._functorch.config.enable_autograd_cache = True
# Neither leaves Inductor C++ to compile, which would take longest here.
kernels = {"torch": lambda x, bias: torch.bmm(x, x), "cuda": lambda x, bias: torch.full_like(x, 3)}
for backend, kernel in kernels.items():
    made = dispatch.Implementation(kernel, kernel, lambda op, args: None)
    dispatch.OPS["bias_gelu"].implementations[backend] = made

def work(*backends):
    found = []
    for backend in backends:
        torch._dynamo.reset(), counters.clear()
        with ditkernels.use_backend(backend), torch.no_grad():
            made = torch.compile(lambda x: ditkernels.ops.bias_gelu(x), fullgraph=True)(torch.ones(2, 4, 4))
        counted = counters["aot_autograd"]
        found.append([counted["autograd_cache_miss"], counted["autograd_cache_hit"], made.sum().item()])
    return found

def process(*backends):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, backends)

found = [process("torch"), process("cuda", "cuda", "torch")]
file = Path(ditkernels.__file__).parent / "ops" / "norm" / "triton.py"
file.write_text(file.read_text(encoding="utf-8") + "# Another kernel.", encoding="utf-8")
found.append(process("torch"))
print(json.dumps(found))
"""


@needs_compiler
def test_caches_on_disk_tell_backends_and_kernels_apart(tmp_path: Path) -> None:
    """Three processes share a folder; before the last one a kernel changes. They are forks of one, which has imported torch."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(ditkernels.__file__).parent, tmp_path / "ditkernels", ignore=ignored)
    settings = {
        "PYTHONPATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", PROCESSES]
    ran = subprocess.run(command, env=os.environ | settings, cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    miss, hit, product, library = [1, 0], [0, 1], 128.0, 96.0
    first, second, edited = json.loads(ran.stdout)
    assert first == [[*miss, product]]
    assert second == [[*miss, library], [*hit, library], [*hit, product]]
    assert edited == [[*miss, product]]
