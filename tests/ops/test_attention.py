"""attention: every backend that runs here against fp64, and the choice among all of them."""

from __future__ import annotations

import importlib
import math
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditkernels import reference
from ditkernels.ops import settings
from ditkernels.ops.attention import BACKENDS, Problem, attention, choose, describe, explain, explain_problem
from ditkernels.ops.dispatch import ATTENTION_BACKENDS, BackendError, set_backend, use_backend
from tests import numerics
from tests.helpers.native_cpu import needs_compiler

module = importlib.import_module("ditkernels.ops.attention")

CPU_BACKENDS = ("plain", "torch_flash")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, tokens, heads, head_dim: the lengths of 256 px at p = 2 and 8, odd ones, one token; head_dim of XL,
# of the other models, and odd.
PACKED = ((2, 256, 2, 72), (3, 17, 4, 64), (2, 49, 3, 20), (2, 16, 2, 5), (2, 1, 3, 72))
# The same with a context length: two conditioning vectors, more keys than queries.
CROSS = ((2, 17, 2, 3, 72), (3, 16, 2, 2, 64), (2, 5, 33, 2, 20))
COPIES = {"clone", "copy_", "_to_copy", "contiguous", "constant_pad_nd", "cat"}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(module, "_memory", {})
    monkeypatch.setattr(module, "_newest", [((), None)])


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it in this mode, on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def textbook(qkv_or_q: Tensor, kv: Tensor | None = None) -> Tensor:
    """Attention as anybody would write it, in the dtype of its inputs."""
    q, k, v = qkv_or_q.unbind(2) if kv is None else (qkv_or_q, *kv.unbind(2))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def with_gradients(function, inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def assert_right(inputs: tuple[Tensor, ...], **kwargs) -> None:
    """Output and every gradient of ``attention`` against fp64, by the contract on numerics."""
    batch, tokens, heads, head_dim = (inputs[0][:, :, 0] if len(inputs) == 1 else inputs[0]).shape
    grad_out = random(batch, tokens, heads * head_dim, seed=9, dtype=inputs[0].dtype, device=inputs[0].device.type)
    actual = with_gradients(lambda *t: attention(*t, **kwargs), inputs, grad_out)
    low = with_gradients(textbook, inputs, grad_out)
    exact = with_gradients(textbook, tuple(t.double() for t in inputs), grad_out.double())
    for a, b, c in zip(actual, low, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        numerics.assert_contract(a, b, c)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_forward_and_gradient(backend, shape, dtype):
    batch, tokens, heads, head_dim = shape
    assert_right((random(batch, tokens, 3, heads, head_dim, dtype=dtype),), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CROSS, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cross_attention_forward_and_gradients(backend, shape, dtype):
    batch, tokens, context, heads, head_dim = shape
    q = random(batch, tokens, heads, head_dim, dtype=dtype)
    kv = random(batch, context, 2, heads, head_dim, seed=1, dtype=dtype)
    assert_right((q, kv), backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_single_key_returns_its_value(backend):
    q, kv, grad_out = random(3, 16, 2, 64), random(3, 1, 2, 2, 64, seed=1), random(3, 16, 128, seed=2)
    out, *gradients = with_gradients(lambda *t: attention(*t, backend=backend), (q, kv), grad_out)
    value = kv[:, :, 1].flatten(2).expand_as(out)
    numerics.assert_contract(out, value, value.double())
    # The gradients of q and k are zero, up to rounding on the scale of the one of v.
    exact = torch.stack([torch.zeros(3, 2, 64), grad_out.double().sum(1).unflatten(-1, (2, 64))], dim=1).unsqueeze(1)
    numerics.assert_contract(gradients[1], exact.float(), exact)
    dv = exact[:, :, 1].expand_as(q)
    numerics.assert_contract(gradients[0] + dv.float(), dv.float(), dv)


def strided_packed() -> dict[str, Tensor]:
    sliced = random(4, 34, 3, 2, 80)[::2, ::2, :, :, 4:76]
    qkv_first = random(3, 2, 17, 2, 72).permute(1, 2, 0, 3, 4)
    heads_first = random(2, 2, 17, 3, 72).permute(0, 2, 3, 1, 4)
    channels_strided = random(2, 17, 3, 2, 144)[..., ::2]
    expanded = random(1, 17, 3, 2, 72).expand(2, -1, -1, -1, -1)
    return {
        "sliced": sliced,
        "qkv first": qkv_first,
        "heads first": heads_first,
        "channels strided": channels_strided,
        "expanded": expanded,
    }


@pytest.mark.parametrize("layout", strided_packed())
def test_strided_views_give_the_same_as_contiguous_ones(layout):
    qkv = strided_packed()[layout]
    assert not qkv.is_contiguous()
    assert_right((qkv,))


def test_channels_that_are_not_contiguous_are_refused_by_the_kernel_and_served_by_plain():
    qkv = strided_packed()["channels strided"]
    assert choose(describe(*qkv.unbind(2))) == "plain"
    with pytest.raises(BackendError, match=r"'torch_flash' cannot serve: the last axis .* must have stride 1"):
        attention(qkv, backend="torch_flash")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend):
    qkv = random(2, 5, 3, 2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: attention(t, backend=backend), (qkv,))
    q = random(2, 5, 2, 6, dtype=torch.float64).requires_grad_()
    kv = random(2, 3, 2, 2, 6, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: attention(*t, backend=backend), (q, kv))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scale(backend):
    qkv = random(2, 17, 3, 2, 72)
    out = attention(qkv, scale=0.5, backend=backend)
    exact = textbook(torch.cat([qkv[:, :, :1].double() * 0.5 * math.sqrt(72), qkv[:, :, 1:].double()], dim=2))
    low = textbook(torch.cat([qkv[:, :, :1] * 0.5 * math.sqrt(72), qkv[:, :, 1:]], dim=2))
    numerics.assert_contract(out, low, exact)


def test_agrees_with_the_reference():
    q, kv, qkv = random(2, 17, 3, 72), random(2, 2, 2, 3, 72, seed=1), random(2, 17, 3, 3, 72, seed=2)
    for inputs in ((qkv,), (q, kv)):
        exact = reference.attention(*(t.double() for t in inputs))
        numerics.assert_contract(attention(*inputs), reference.attention(*inputs), exact)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_large_logits_do_not_overflow_half_precision(backend):
    qkv = random(2, 17, 3, 2, 72) * torch.tensor([60.0, 60.0, 1.0])[:, None, None]
    assert_half = attention(qkv.half(), backend=backend)
    assert assert_half.isfinite().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_same_bits_twice(backend):
    qkv, grad_out = (
        random(2, 49, 3, 2, 72, dtype=torch.bfloat16),
        random(2, 49, 144, seed=1, dtype=torch.bfloat16),
    )
    first, second = (with_gradients(lambda t: attention(t, backend=backend), (qkv,), grad_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- A citizen of torch ----------------------------------------------------------------------------------------------


class RecordOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_copies_around_the_kernel():
    qkv = random(2, 49, 3, 2, 72)
    with RecordOps() as ops:
        out = attention(qkv, backend="torch_flash")
    assert any("flash_attention" in name for name in ops.names)
    assert not COPIES & set(ops.names)
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
def test_compiles_as_one_graph(backend):
    qkv, grad_out = random(2, 17, 3, 2, 72), random(2, 17, 144, seed=1)
    compiled = torch.compile(lambda t: attention(t, backend=backend), fullgraph=True, backend="aot_eager")
    for n in (17, 49):
        qkv, grad_out = random(3, n, 3, 2, 72), random(3, n, 144, seed=1)
        expected = with_gradients(lambda t: attention(t, backend=backend), (qkv,), grad_out)
        actual = with_gradients(compiled, (qkv,), grad_out)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


SDPA = torch.ops.aten.scaled_dot_product_attention.default
FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Attention(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return attention(qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [72, 20])
def test_a_graph_names_the_kernel_that_sdpa_would_run(head_dim, dtype):
    """With no switch in the graph, which would keep it out of the compiler's cache on disk."""
    qkv, grad_out = random(2, 17, 3, 2, head_dim, dtype=dtype), random(2, 17, 2 * head_dim, seed=1, dtype=dtype)
    targets = []

    def keep(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        check_cacheable(graph)
        return graph

    actual = with_gradients(torch.compile(Attention(), fullgraph=True, backend=keep), (qkv,), grad_out)
    assert FLASH_FOR_CPU in targets
    expected = with_gradients(Attention(), (qkv,), grad_out)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("head_dim", [72, 20])
def test_an_export_keeps_sdpa(head_dim, strict):
    """It may run on another device, whose kernel is another."""
    qkv, grad_out = random(2, 17, 3, 2, head_dim), random(2, 17, 2 * head_dim, seed=1)
    exported = torch.export.export(Attention(), (qkv,), strict=strict)
    targets = {node.target for graph in exported.graph_module.modules() for node in graph.graph.nodes}
    assert SDPA in targets
    assert FLASH_FOR_CPU not in targets
    actual, expected = (with_gradients(module, (qkv,), grad_out) for module in (exported.module(), Attention()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_second_compilation_is_read_from_disk():
    counters = torch._dynamo.utils.counters
    found = []
    with fresh_cache(), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            # Kernels of torch and views alone: Inductor has no C++ to compile.
            torch.compile(Attention(), fullgraph=True)(random(2, 17, 3, 2, 72))
            found.append([counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass")])
    assert found == [[1, 0, 0], [0, 1, 0]]


def _attend_as_flash_on_gpus(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor]:
    assert q.shape[-1] % 8 == 0, "torch's flash kernel takes multiples of 8 only"
    return (torch.softmax((q @ k.transpose(-1, -2)) * scale, dim=-1) @ v,)


@pytest.mark.parametrize("head_dim", [72, 20])
def test_flash_on_a_gpu_is_padded_as_sdpa_pads_it(monkeypatch, head_dim):
    monkeypatch.setattr(torch.ops.aten._scaled_dot_product_flash_attention, "default", _attend_as_flash_on_gpus)
    q, k, v = (random(2, 3, 17, head_dim, seed=seed, dtype=torch.float64) for seed in range(3))
    grad_out = random(2, 3, 17, head_dim, seed=3, dtype=torch.float64)
    actual = with_gradients(partial(module._flash_on_gpu, scale=0.2), (q, k, v), grad_out)
    expected = with_gradients(partial(F.scaled_dot_product_attention, scale=0.2), (q, k, v), grad_out)
    for a, b in zip(actual, expected, strict=True):
        numerics.assert_fp64_agreement(a, b)


class RecordCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function.overloadpacket.__name__, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("backend", ["cudnn", "torch_efficient"])
def test_a_log_sum_exp_is_computed_where_a_backward_will_read_it(backend, needs_grad):
    with FakeTensorMode(), RecordCalls() as recorded:
        q, k, v = (torch.empty(2, 3, 128, 72, dtype=torch.bfloat16, device="cuda", requires_grad=needs_grad) for _ in range(3))
        out = BACKENDS[backend].kernel_of_torch(q, k, v, 0.2)
    ((_, args, kwargs),) = (call for call in recorded.calls if "scaled_dot_product" in call[0])
    assert args[3:] == (None, needs_grad)
    assert kwargs == {"scale": 0.2}
    assert out.shape == q.shape


@needs_compiler
def test_cross_attention_compiles_with_inductor():
    q, kv = random(2, 17, 2, 72), random(2, 2, 2, 2, 72, seed=1)
    grad_out = random(2, 17, 144, seed=2)
    actual = with_gradients(torch.compile(attention, fullgraph=True), (q, kv), grad_out)
    low = with_gradients(textbook, (q, kv), grad_out)
    exact = with_gradients(textbook, (q.double(), kv.double()), grad_out.double())
    for a, b, c in zip(actual, low, exact, strict=True):
        numerics.assert_contract(a, b, c)


def test_a_compiled_call_follows_the_settings():
    qkv = random(2, 17, 3, 2, 72)
    kernels = []

    def count(graph, inputs):
        kernels.append(any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(attention, fullgraph=True, backend=count)
    compiled(qkv)
    with use_backend(attention="plain"):
        compiled(qkv)
    assert kernels == [True, False]


def test_autocast_computes_in_its_dtype():
    qkv, grad_out = random(2, 17, 3, 2, 72), random(2, 17, 144, seed=1)
    for backend in CPU_BACKENDS:
        half = qkv.bfloat16()
        expected = with_gradients(lambda t, b=backend: attention(t, backend=b), (half,), grad_out)
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(qkv, backend=backend)
            leaf = qkv.clone().requires_grad_()
            out_of_leaf = attention(leaf, backend=backend)
            double = attention(qkv.double(), backend=backend)
        (gradient,) = torch.autograd.grad(out_of_leaf, leaf, grad_out.bfloat16())
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected[0])
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[1].float())
        assert double.dtype == torch.float64


def test_autocast_brings_q_and_kv_together():
    q, kv = random(2, 17, 2, 72), random(2, 2, 2, 2, 72, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, kv), attention(q.bfloat16(), kv))


def test_meta_tensors_count_the_products():
    batch, n, m, heads, head_dim = 2, 17, 5, 3, 72
    q, kv = (
        torch.empty(batch, n, heads, head_dim, device="meta"),
        torch.empty(batch, m, 2, heads, head_dim, device="meta"),
    )
    with FlopCounterMode(display=False) as counter:
        assert attention(q, kv).shape == (batch, n, heads * head_dim)
    assert counter.get_total_flops() == 2 * 2 * batch * heads * n * m * head_dim


@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_forward_mode_is_right_or_refused(how):
    qkv, tangent = (
        random(2, 5, 3, 2, 8, dtype=torch.float64),
        random(2, 5, 3, 2, 8, seed=1, dtype=torch.float64),
    )

    def derivative(backend: str | None) -> Tensor:
        if how == "jvp":
            return torch.func.jvp(lambda t: attention(t, backend=backend), (qkv,), (tangent,))[1]
        with forward_ad.dual_level():
            out = attention(forward_ad.make_dual(qkv, tangent), backend=backend)
            return forward_ad.unpack_dual(out).tangent

    jacobian = torch.autograd.functional.jacobian(textbook, qkv)
    expected = torch.tensordot(jacobian, tangent, dims=tangent.ndim)
    numerics.assert_contract(derivative("plain"), expected, expected)
    numerics.assert_contract(derivative(None), expected, expected)
    with pytest.raises(BackendError, match=r"it has no forward-mode derivative.*plain: can serve"):
        derivative("torch_flash")


# ---- Edges and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "auto", *ATTENTION_BACKENDS])
@pytest.mark.parametrize("batch, tokens", [(0, 17), (2, 0)])
def test_nothing_to_compute(batch, tokens, backend):
    qkv = torch.empty(batch, tokens, 3, 2, 72, requires_grad=True)
    out = attention(qkv, backend=backend)
    assert out.shape == (batch, tokens, 144)
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


def test_integers_do_not_slip_through_autocast():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"qkv: got dtype torch\.int32"),
    ):
        attention(torch.ones(2, 17, 3, 2, 72, dtype=torch.int32))


BAD = {
    "backend, empty": ((random(0, 17, 3, 2, 72),), {"backend": "cuddn"}, ValueError, "backend: got 'cuddn'"),
    "too few axes": ((random(2, 17, 3, 144),), {}, ValueError, r"qkv: got shape \(2, 17, 3, 144\)"),
    "packed 2": ((random(2, 17, 2, 2, 72),), {}, ValueError, r"qkv: .*expected \(B, N, 3, heads, head_dim\)"),
    "no heads": ((random(2, 17, 3, 0, 72),), {}, ValueError, "qkv: .*at least 1"),
    "no channels": ((random(2, 17, 3, 2, 0),), {}, ValueError, "qkv: .*at least 1"),
    "integers": (
        (torch.ones(2, 17, 3, 2, 72, dtype=torch.int32),),
        {},
        TypeError,
        "qkv: got dtype torch.int32",
    ),
    "q packed": ((random(2, 17, 3, 2, 72), random(2, 2, 2, 2, 72)), {}, ValueError, "q: got shape"),
    "kv packed 3": ((random(2, 17, 2, 72), random(2, 2, 3, 2, 72)), {}, ValueError, "kv: .*heads, head_dim"),
    "batch": ((random(2, 17, 2, 72), random(3, 2, 2, 2, 72)), {}, ValueError, "kv: got shape .* must agree"),
    "heads": ((random(2, 17, 2, 72), random(2, 2, 2, 3, 72)), {}, ValueError, "kv: got shape .* must agree"),
    "head_dim": (
        (random(2, 17, 2, 72), random(2, 2, 2, 2, 64)),
        {},
        ValueError,
        "kv: got shape .* must agree",
    ),
    "no keys": ((random(2, 17, 2, 72), random(2, 0, 2, 2, 72)), {}, ValueError, "over no keys is undefined"),
    "dtypes": (
        (random(2, 17, 2, 72), random(2, 2, 2, 2, 72).half()),
        {},
        TypeError,
        "kv: got dtype torch.float16",
    ),
    "devices": (
        (random(2, 17, 2, 72), random(2, 2, 2, 2, 72).to("meta")),
        {},
        ValueError,
        "kv: got device meta",
    ),
    "backend": (
        (random(2, 17, 3, 2, 72),),
        {"backend": "cuddn"},
        ValueError,
        "backend: got 'cuddn', .*xformers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    args, kwargs, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention(*args, **kwargs)


# ---- Choice ----------------------------------------------------------------------------------------------------------


def used_backend(monkeypatch, call) -> str:
    used = []
    with monkeypatch.context() as patched:
        for place, function, name in (
            (module, "attention_by_products", "plain"),
            (F, "scaled_dot_product_attention", "torch_flash"),
        ):
            run = getattr(place, function)
            patched.setattr(place, function, lambda *a, n=name, r=run, **k: used.append(n) or r(*a, **k))
        call()
    assert len(used) == 1
    return used[0]


def test_the_argument_goes_before_the_setting_and_the_setting_before_the_environment(monkeypatch):
    qkv = random(2, 17, 3, 2, 72)
    assert used_backend(monkeypatch, lambda: attention(qkv)) == "torch_flash"
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "plain")
    assert used_backend(monkeypatch, lambda: attention(qkv)) == "plain"
    with use_backend(attention="torch_flash"):
        assert used_backend(monkeypatch, lambda: attention(qkv)) == "torch_flash"
        assert used_backend(monkeypatch, lambda: attention(qkv, backend="plain")) == "plain"
    assert used_backend(monkeypatch, lambda: attention(qkv, backend="auto")) == "torch_flash"
    set_backend(attention="auto")
    assert used_backend(monkeypatch, lambda: attention(qkv)) == "torch_flash"


def test_a_forced_backend_that_cannot_serve_says_why_and_what_the_others_say():
    with pytest.raises(BackendError) as caught:
        attention(random(2, 17, 3, 2, 72), backend="cudnn")
    message = str(caught.value)
    assert "backend 'cudnn' cannot serve: it needs a CUDA device, and the tensors are on cpu" in message
    assert all(f"{name}: " in message for name in ATTENTION_BACKENDS if name != "cudnn")
    assert "plain: can serve" in message


def test_explain_tells_of_every_backend():
    reasons = dict(explain(*random(2, 17, 3, 2, 72).unbind(2)))
    assert tuple(reasons) == ATTENTION_BACKENDS == tuple(BACKENDS)
    assert [name for name, reason in reasons.items() if reason is None] == ["torch_flash", "plain"]


def test_every_backend_declares_itself():
    for backend in BACKENDS.values():
        assert isinstance(backend.deterministic_backward, bool)
        assert backend.status
    untested = {name for name, backend in BACKENDS.items() if backend.status.startswith("untested")}
    assert untested == {"flash_attn_4", "flash_attn_3", "flash_attn_2", "xformers"}


def test_a_kernel_that_the_user_switched_off_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "_switched_off", lambda kernel: kernel == SDPBackend.FLASH_ATTENTION)
    assert choose(describe(*random(2, 17, 3, 2, 72).unbind(2))) == "plain"


def test_switches_of_torch_are_read():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert module._switched_off(SDPBackend.FLASH_ATTENTION)
        assert not module._switched_off(SDPBackend.CUDNN_ATTENTION)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_describe():
    qkv = random(2, 17, 3, 4, 72, dtype=torch.bfloat16).requires_grad_()
    problem = describe(*qkv.unbind(2))
    assert problem == Problem(qkv.device, torch.bfloat16, 2, 17, 17, 4, 72, needs_grad=True)
    with torch.no_grad():
        assert not describe(*qkv.unbind(2)).needs_grad
    assert module._rows_aligned(qkv[:, :, 0])
    assert not module._rows_aligned(qkv[:, :, 0, :, 4:])
    assert not module._rows_aligned(random(2, 17, 3, 4, 20, dtype=torch.bfloat16)[:, :, 0])


def test_determinism_is_described(deterministic):
    q = random(2, 17, 2, 8)
    assert describe(q, q, q).deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not describe(q, q, q).deterministic


# A stand-in for a GPU: what the machine would say of itself. The kernels are not run.
HOPPER, AMPERE, ADA, BLACKWELL, RTX50, TURING = 90, 80, 89, 100, 120, 75


@pytest.fixture
def gpu(monkeypatch):
    """Sets the compute capability that torch is taken to see, with every optional package there."""

    def pretend(capability: int, cudnn: int = 92400) -> None:
        facts = {
            "_capability": lambda index: capability,
            "_cudnn_version": lambda: cudnn,
            "_package_reason": lambda module, function: None,
        }
        for name, fact in facts.items():
            monkeypatch.setattr(module, name, torch.compiler.assume_constant_result(fact))

    return pretend


XL = Problem(torch.device("cuda", 0), torch.bfloat16, 256, 256, 256, 16, 72, needs_grad=True)


@pytest.mark.parametrize(
    "capability, change, expected",
    [
        (HOPPER, {}, "cudnn"),
        (BLACKWELL, {}, "cudnn"),
        (AMPERE, {}, "torch_flash"),
        (ADA, {}, "torch_flash"),
        (RTX50, {}, "torch_flash"),
        (TURING, {}, "plain"),
        (HOPPER, {"dtype": torch.float32}, "torch_efficient"),
        (HOPPER, {"dtype": torch.float64}, "plain"),
        (HOPPER, {"deterministic": True}, "torch_flash"),
        (HOPPER, {"q_len": 64, "kv_len": 64}, "torch_flash"),
        (HOPPER, {"q_len": 64, "kv_len": 64, "needs_grad": False}, "cudnn"),
        (HOPPER, {"kv_len": 2}, "torch_flash"),
        (HOPPER, {"kv_len": 1, "needs_grad": False}, "torch_flash"),
        (HOPPER, {"batch": 70000}, "torch_flash"),
        (HOPPER, {"head_dim": 20, "aligned": False}, "torch_flash"),
        (HOPPER, {"head_dim": 72, "aligned": False}, "plain"),
        (HOPPER, {"head_dim": 512}, "torch_efficient"),
        (HOPPER, {"unit_stride": False}, "plain"),
        (HOPPER, {"forward_ad": True}, "plain"),
        (ADA, {"head_dim": 256}, "torch_efficient"),
        (ADA, {"head_dim": 256, "needs_grad": False}, "torch_flash"),
    ],
)
def test_the_automatic_choice(gpu, capability, change, expected):
    gpu(capability)
    assert choose(XL._replace(**change)) == expected


def test_the_automatic_choice_elsewhere(gpu, monkeypatch):
    gpu(HOPPER, cudnn=91500)
    assert choose(XL) == "torch_flash"
    monkeypatch.setattr(module, "_capability", lambda index: 0)
    assert choose(XL) == "plain"
    assert choose(XL._replace(device=torch.device("meta"))) == "plain"


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, ADA])
def test_the_choice_on_a_gpu_can_be_traced(gpu, capability):
    gpu(capability)

    def reasons(t: Tensor) -> tuple[Tensor, str, list]:
        q, k, v = t.unbind(2)
        problem = describe(q, k, v)._replace(device=torch.device("cuda", 0))
        return t + 1, choose(problem), [reason for _, reason in explain_problem(problem)]

    torch._dynamo.reset()  # facts about the machine are baked into what was compiled before
    qkv = random(2, 128, 3, 2, 72, dtype=torch.bfloat16).requires_grad_()
    assert torch.compile(reasons, fullgraph=True, backend="eager")(qkv)[1:] == reasons(qkv)[1:]


def serving(problem: Problem) -> set[str]:
    return {name for name, reason in explain_problem(problem) if reason is None}


PACKAGES = {"flash_attn_4", "flash_attn_3", "flash_attn_2", "xformers"}


@pytest.mark.parametrize(
    "capability, change, expected",
    [
        (HOPPER, {"head_dim": 64}, PACKAGES),
        (HOPPER, {"head_dim": 72}, PACKAGES - {"flash_attn_4"}),
        (HOPPER, {"head_dim": 72, "needs_grad": False}, PACKAGES),
        (BLACKWELL, {"head_dim": 72}, {"flash_attn_2", "xformers"}),
        (BLACKWELL, {"head_dim": 64}, {"flash_attn_4", "flash_attn_2", "xformers"}),
        (AMPERE, {"head_dim": 64}, {"flash_attn_2", "xformers"}),
        (TURING, {"head_dim": 64}, set()),
        (HOPPER, {"head_dim": 64, "deterministic": True}, PACKAGES - {"xformers"}),
        (HOPPER, {"head_dim": 20}, set()),
        (HOPPER, {"head_dim": 264}, set()),
        (HOPPER, {"head_dim": 64, "dtype": torch.float32}, set()),
        (HOPPER, {"head_dim": 64, "aligned": False}, set()),
        (ADA, {"head_dim": 200}, {"xformers"}),
    ],
)
def test_what_the_optional_packages_take(gpu, capability, change, expected):
    gpu(capability)
    assert serving(XL._replace(**change)) & PACKAGES == expected


def test_the_silently_wrong_gradient_of_flash_attention_4_is_refused_wherever_it_hides(gpu, monkeypatch):
    gpu(HOPPER)
    assert "wrong gradients, silently" in str(BACKENDS["flash_attn_4"].refuse(XL))
    assert BACKENDS["torch_flash"].refuse(XL) is None
    monkeypatch.setattr(module, "_flash_implementation", lambda: "FA4")
    assert "wrong gradients, silently" in str(BACKENDS["torch_flash"].refuse(XL))
    assert BACKENDS["torch_flash"].refuse(XL._replace(head_dim=64)) is None


# ---- What an eager call remembers ------------------------------------------------------------------------------------


def warm() -> None:
    """Good calls that resemble the bad ones."""
    q, kv, bias = random(2, 17, 2, 72), random(2, 2, 2, 2, 72), random(3 * 2 * 72)
    qkv = random(2, 17, 3, 2, 72)
    for dtype in DTYPES:
        for backend in (None, "auto", *CPU_BACKENDS):
            attention(q.to(dtype), kv.to(dtype), backend=backend)
            attention(qkv.to(dtype), backend=backend)
    attention(random(0, 17, 3, 2, 72))
    attention(qkv, bias=bias)
    attention(qkv)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_after_a_good_one_still_names_the_argument(case):
    warm()
    args, kwargs, error, message = BAD[case]
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(*args, **kwargs)


def test_a_refused_call_after_a_good_one_is_still_refused():
    warm()
    qkv, q, kv = random(2, 17, 3, 2, 72), random(2, 17, 2, 72), random(2, 2, 2, 2, 72)
    strided = strided_packed()["channels strided"]
    for _ in range(2):
        for name in set(ATTENTION_BACKENDS) - set(CPU_BACKENDS):
            with pytest.raises(BackendError, match=f"'{name}' cannot serve: it needs a CUDA device"):
                attention(qkv, backend=name)
            with (
                use_backend(attention=name),
                pytest.raises(BackendError, match=f"'{name}' cannot serve: it needs a CUDA device"),
            ):
                attention(q, kv)
        with pytest.raises(BackendError, match=r"the last axis .* must have stride 1"):
            attention(strided, backend="torch_flash")
        with pytest.raises(TypeError, match=r"kv: got dtype torch\.bfloat16"):
            attention(q, kv.bfloat16())
        with pytest.raises(ValueError, match="bias: got shape"):
            attention(qkv, bias=random(7))
        with forward_ad.dual_level(), pytest.raises(BackendError, match="no forward-mode derivative"):
            attention(forward_ad.make_dual(qkv, qkv), backend="torch_flash")


def test_a_change_after_a_good_call_is_seen(monkeypatch):
    warm()
    qkv, strided = random(2, 17, 3, 2, 72), strided_packed()["channels strided"]
    assert qkv.shape == strided.shape
    used = partial(used_backend, monkeypatch)
    assert used(lambda: attention(qkv)) == "torch_flash"
    assert used(lambda: attention(strided)) == "plain"
    with use_backend(attention="plain"):
        assert used(lambda: attention(qkv)) == "plain"
    set_backend(attention="plain")
    assert used(lambda: attention(qkv)) == "plain"
    set_backend(attention="auto")
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert used(lambda: attention(qkv)) == "plain"
        with pytest.raises(BackendError, match="switched off"):
            attention(qkv, backend="torch_flash")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv).dtype == torch.bfloat16
    assert attention(qkv).dtype == torch.float32
    leaf = qkv.clone().requires_grad_()
    assert attention(leaf).requires_grad
    with torch.no_grad():
        assert not attention(leaf).requires_grad
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "cuddn")
    set_backend(attention="plain")
    assert used(lambda: attention(qkv)) == "plain"
    set_backend(attention="auto")
    attention(qkv)
    monkeypatch.setattr(settings, "_process", settings._Process())
    with pytest.raises(ValueError, match="DITKERNELS_ATTENTION_BACKEND"):
        attention(qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_without_the_switch_of_sdpa_has_the_bits_of_one_with_it(monkeypatch, dtype):
    qkv, grad_out = random(3, 17, 3, 2, 72, dtype=dtype), random(3, 17, 144, seed=1)
    q, kv = random(3, 17, 2, 72, dtype=dtype), random(3, 5, 2, 2, 72, seed=1, dtype=dtype)
    flash = BACKENDS["torch_flash"]
    scale = 72**-0.5
    pairs = (
        ((qkv,), lambda t: flash.run_packed(t, None, scale).flatten(2)),
        ((q, kv), lambda q, kv: flash.run(q, *kv.unbind(2), scale).flatten(2)),
    )
    expected = [[*with_gradients(run, inputs, grad_out), run(*inputs)] for inputs, run in pairs]
    monkeypatch.setattr(module, "sdpa_kernel", None)
    for (inputs, _), values in zip(pairs, expected, strict=True):
        for _ in range(2):
            actual = [*with_gradients(attention, inputs, grad_out), attention(*inputs)]
            for a, b in zip(actual, values, strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


def test_torch_is_told_where_it_would_take_another_kernel(monkeypatch):
    told = []
    monkeypatch.setattr(module, "sdpa_kernel", lambda kernel: told.append(kernel) or sdpa_kernel(kernel))
    qkv = random(2, 17, 3, 2, 72)
    attention(qkv)
    assert told == []
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **k: SDPBackend.MATH.value)
    module._memory.clear()
    attention(qkv.bfloat16())
    attention(qkv.bfloat16())
    assert told == [SDPBackend.FLASH_ATTENTION] * 2


def test_only_eager_calls_of_plain_tensors_are_remembered():
    class Subclass(Tensor):
        pass

    qkv = random(2, 17, 3, 2, 72)
    expected = module.attention_by_products(*qkv.unbind(2), 72**-0.5).flatten(2)
    with RecordOps():
        attention(qkv)
    torch.func.vmap(lambda t: attention(t, backend="plain"))(qkv[None])
    attention(qkv.as_subclass(Subclass))
    torch.compile(lambda t: attention(t), fullgraph=True, backend="eager")(qkv)
    torch.export.export(Attention(), (qkv,))
    with FakeTensorMode() as mode:
        attention(mode.from_tensor(qkv))
    assert module._memory == {}
    torch.testing.assert_close(attention(qkv), expected)
    assert len(module._memory) == 1


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MEMORY", 3)
    for n in range(1, 9):
        attention(random(2, n, 3, 2, 72))
        assert 1 <= len(module._memory) <= 3


# ---- Optional packages: stand-ins with the documented signatures, computing with plain products ----------------------


def flash_attn_2(seen: list) -> dict[str, object]:
    """flash-attn 2.8: flash_attn/flash_attn_interface.py."""

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert (dropout_p, causal) == (0.0, False)
        seen.append(("flash_attn_func", deterministic))
        return module.attention_by_products(q, k, v, softmax_scale)

    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert (dropout_p, causal) == (0.0, False)
        seen.append(("flash_attn_qkvpacked_func", deterministic))
        return module.attention_by_products(*qkv.unbind(2), softmax_scale)

    return {"flash_attn_func": flash_attn_func, "flash_attn_qkvpacked_func": flash_attn_qkvpacked_func}


def flash_attn_3(seen: list, with_lse: bool = False) -> dict[str, object]:
    """flash-attention 3: hopper/flash_attn_interface.py; its first versions returned the log-sum-exp too."""

    def result(out):
        return (out, torch.zeros(())) if with_lse else out

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert (causal, qv) == (False, None)
        seen.append(("flash_attn_func", deterministic))
        return result(module.attention_by_products(q, k, v, softmax_scale))

    def flash_attn_qkvpacked_func(
        qkv,
        softmax_scale=None,
        causal=False,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert (causal, num_heads_q) == (False, None)
        seen.append(("flash_attn_qkvpacked_func", deterministic))
        return result(module.attention_by_products(*qkv.unbind(2), softmax_scale))

    return {"flash_attn_func": flash_attn_func, "flash_attn_qkvpacked_func": flash_attn_qkvpacked_func}


def flash_attn_3_with_lse(seen: list) -> dict[str, object]:
    return flash_attn_3(seen, with_lse=True)


def flash_attn_4(seen: list) -> dict[str, object]:
    """flash-attn-4 4.0.0b36: flash_attn/cute/interface.py."""

    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        assert (causal, qv, gather_kv_indices) == (False, None, None)
        seen.append(("flash_attn_func", deterministic))
        return module.attention_by_products(q, k, v, softmax_scale), None

    return {"flash_attn_func": flash_attn_func}


def xformers(seen: list) -> dict[str, object]:
    """xformers 0.0.35: xformers/ops/fmha/__init__.py."""

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert (attn_bias, p, op, output_dtype) == (None, 0.0, None, None)
        seen.append(("memory_efficient_attention", False))
        return module.attention_by_products(query, key, value, scale)

    return {"memory_efficient_attention": memory_efficient_attention}


STAND_INS = {
    "flash_attn_2": ("flash_attn", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", flash_attn_3),
    "flash_attn_3 with lse": ("flash_attn_interface", flash_attn_3_with_lse),
    "flash_attn_4": ("flash_attn.cute", flash_attn_4),
    "xformers": ("xformers.ops", xformers),
}


@pytest.fixture
def installed(monkeypatch):
    """Installs a stand-in for a package, lets CPU tensors through to it, returns the list of its calls."""

    def install(case: str) -> list:
        path, functions = STAND_INS[case]
        seen: list = []
        for depth in range(len(path.split("."))):
            name = ".".join(path.split(".")[: depth + 1])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name, function in functions(seen).items():
            monkeypatch.setattr(sys.modules[path], name, function, raising=False)
        monkeypatch.setattr(module, "_loaded", {})
        monkeypatch.setattr(module, "_cuda_device_reason", lambda problem: None)
        monkeypatch.setattr(module, "_capability", torch.compiler.assume_constant_result(lambda index: HOPPER))
        return seen

    return install


@pytest.mark.parametrize("case", STAND_INS)
def test_packages_are_called_by_their_documented_signatures(installed, case, deterministic):
    seen = installed(case)
    name = case.split()[0]
    head_dim = 64 if name == "flash_attn_4" else 72
    qkv = random(2, 17, 3, 2, head_dim, dtype=torch.bfloat16)
    q, kv = (
        random(2, 17, 2, head_dim, dtype=torch.bfloat16),
        random(2, 2, 2, 2, head_dim, dtype=torch.bfloat16),
    )
    if name == "xformers":
        with pytest.raises(BackendError, match="its backward is not deterministic"):
            attention(qkv.requires_grad_(), backend=name)
        torch.use_deterministic_algorithms(False)
    grad_out = random(2, 17, 2 * head_dim, seed=1)
    for inputs in ((qkv,), (q, kv)):
        actual = with_gradients(lambda *t: attention(*t, scale=0.3, backend=name), inputs, grad_out)
        expected = with_gradients(lambda *t: attention(*t, scale=0.3, backend="plain"), inputs, grad_out)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(seen) == 2
    assert all(deterministic == (name != "xformers") for _, deterministic in seen)
    assert (seen[0][0] == "flash_attn_qkvpacked_func") == (name in ("flash_attn_2", "flash_attn_3"))


@pytest.mark.parametrize("case", ["flash_attn_2", "flash_attn_3", "xformers"])
def test_a_bias_left_to_a_package_takes_its_gradient(installed, case):
    seen = installed(case)
    x, weight, bias = random(2, 17, 12), random(3 * 2 * 72, 12), random(3 * 2 * 72)

    def left(x: Tensor, weight: Tensor, bias: Tensor, backend: str = case) -> Tensor:
        qkv = F.linear(x, weight, bias.detach()).to(torch.bfloat16).unflatten(-1, (3, 2, 72))
        return attention(qkv, bias=bias, backend=backend)

    grad_out = random(2, 17, 2 * 72, seed=1)
    actual = with_gradients(left, (x, weight, bias), grad_out)
    expected = with_gradients(partial(left, backend="plain"), (x, weight, bias), grad_out)
    *same, of_bias = actual
    assert all(torch.equal(a, b) for a, b in zip(same, expected))
    torch.testing.assert_close(of_bias, expected[-1], rtol=2**-7, atol=2**-7)  # summed in bf16 and in fp32
    # A packed function's backward leaves nothing to stack.
    assert [name for name, _ in seen] == ["memory_efficient_attention" if case == "xformers" else "flash_attn_qkvpacked_func"]


@pytest.mark.parametrize("case", ["flash_attn_2", "flash_attn_3"])
def test_packages_compile_as_one_graph(installed, case):
    installed(case)
    qkv = random(2, 17, 3, 2, 72, dtype=torch.bfloat16)
    compiled = torch.compile(lambda t: attention(t, backend=case), fullgraph=True, backend="eager")
    assert torch.equal(compiled(qkv), attention(qkv, backend="plain"))


def test_autocast_reaches_the_packages(installed):
    installed("xformers")
    qkv = random(2, 17, 3, 2, 72)
    with pytest.raises(BackendError, match=r"it takes torch\.float16, .* are torch\.float32"):
        attention(qkv, backend="xformers")
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv, backend="xformers").dtype == torch.bfloat16


def test_packages_that_are_missing_or_broken_say_so(monkeypatch, gpu):
    find_reason = module._package_reason
    gpu(HOPPER)
    monkeypatch.setattr(module, "_package_reason", find_reason)
    monkeypatch.setattr(module, "_loaded", {})
    # With flash-attn-4 alone, flash_attn is a namespace without functions.
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    problem = XL._replace(head_dim=64)
    assert "flash_attn.flash_attn_func cannot be imported" in str(BACKENDS["flash_attn_2"].refuse(problem))
    assert "flash_attn_interface.flash_attn_func cannot be" in str(BACKENDS["flash_attn_3"].refuse(problem))

    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    assert "libcudart.so.12" in str(BACKENDS["xformers"].refuse(problem))


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 256, 16, 72), (8, 1024, 4, 64), (8, 64, 6, 64), (3, 17, 4, 72), (2, 49, 3, 20)], ids=str)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_gpu_packed(backend, shape, dtype):
    batch, tokens, heads, head_dim = shape
    qkv = random(batch, tokens, 3, heads, head_dim, dtype=dtype, device="cuda").requires_grad_()
    reason = BACKENDS[backend].refuse(describe(*qkv.unbind(2)))
    if reason is not None:
        pytest.skip(reason)
    assert_right((qkv.detach(),), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *ATTENTION_BACKENDS])
def test_gpu_cross_attention_compiled_and_deterministic(backend, deterministic):
    q = random(4, 256, 16, 72, dtype=torch.bfloat16, device="cuda").requires_grad_()
    kv = random(4, 2, 2, 16, 72, seed=1, dtype=torch.bfloat16, device="cuda")
    reason = None if backend == "auto" else BACKENDS[backend].refuse(describe(q, *kv.unbind(2)))
    if reason is not None:
        pytest.skip(reason)
    assert_right((q.detach(), kv), backend=backend)
    grad_out = random(4, 256, 16 * 72, seed=2, device="cuda")
    eager, again = (with_gradients(lambda *t: attention(*t, backend=backend), (q.detach(), kv), grad_out) for _ in range(2))
    compiled = torch.compile(lambda *t: attention(*t, backend=backend), fullgraph=True, backend="aot_eager")
    traced = with_gradients(compiled, (q.detach(), kv), grad_out)
    for a, b, c in zip(eager, again, traced, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
