"""split_qkv: parity, gradients, torch citizenship; attention that gives a linear's bias its gradient."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ditkernels import models, ops, reference
from ditkernels.ops import dispatch, qkv
from tests import numerics
from tests.helpers.native_cpu import on_both_backends  # noqa: F401
from tests.helpers.subsets import WholeWay, subsets
from tests.ops.test_bias_gelu import poisoned

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LAYOUTS = ("packed", "heads first", "channels apart", "samples apart", "parts of one", "each its own")
Shape = tuple[int, int, int, int, int]


def gradients(shape: Shape, dtype: torch.dtype, layout: str = "packed", seed: int = 0) -> list[Tensor]:
    """dq, dk and dv, or dk and dv, of attention over packed (B, N, parts, heads, head_dim), as a backward may leave them."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    whole = torch.randn(shape, generator=generator).to(dtype)
    parts = [part.contiguous() for part in whole.unbind(2)]
    views = {
        "packed": lambda t: t,
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "channels apart": lambda t: torch.stack([t, t], -1)[..., 0],
        "samples apart": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    }
    if layout == "parts of one":
        return list(whole.unbind(2))
    if layout == "each its own":
        return [views[name](part) for name, part in zip(("channels apart", "heads first", "packed"), parts)]
    return [views[layout](part) for part in parts]


def backward(parts: list[Tensor], dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    *dq, dk, dv = parts
    return qkv.SPLIT_QKV_BACKWARD((dq[0] if dq else None, dk, dv), (dtype,))


def assert_parity(parts: list[Tensor], dtype: torch.dtype = F32) -> None:
    """Bits are moved; sums are held to the contract, against what the reference makes of them in its own dtypes and in fp64."""
    with poisoned():
        dpacked, dbias = backward(parts, dtype)
    assert torch.equal(dpacked, torch.stack(parts, 2)), "dpacked: not equal to what was read"
    assert dpacked.is_contiguous()
    low, exact = (
        through(reference.split_qkv, [part.to(kind) for part in parts], own)[1]
        for kind, own in ((parts[0].dtype, dtype), (F64, F64))
    )
    numerics.assert_contract(dbias, low, exact, "dbias")


def through(function: object, parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The gradients of packed and of the bias."""
    packed = torch.stack(parts, 2).detach().requires_grad_()
    bias = torch.zeros(packed.shape[2:].numel(), dtype=dtype, device=packed.device, requires_grad=True)
    return list(torch.autograd.grad(function(packed, bias), (packed, bias), parts))


def on_device(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """With the strides they have, which a plain copy would close."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t) for t in parts]


# One row; head_dim 72 and 64; several chunks; a masked tile; heads and a head_dim of one; no units of eight.
COVERING: list[tuple[Shape, torch.dtype, torch.dtype]] = [
    ((1, 1, 3, 16, 72), F32, F32),
    ((3, 37, 3, 2, 72), BF16, F32),
    ((2, 150, 3, 2, 64), BF16, BF16),
    ((2, 17, 2, 3, 64), F16, F32),
    ((3, 9, 3, 5, 7), BF16, F32),
    ((2, 130, 2, 1, 33), F32, BF16),
    ((2, 5, 3, 40, 1), F16, F16),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity(case: tuple[Shape, torch.dtype, torch.dtype], layout: str) -> None:
    shape, dtype, sums = case
    assert_parity(gradients(shape, dtype, layout), sums)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 4), (0, 20), (2, 3), (1, 4), (1, 20)))),
    layout=st.sampled_from(LAYOUTS),
)
def test_agreement_in_fp64_at_any_shape(shape: Shape, layout: str) -> None:
    parts = gradients(shape, F64, layout)
    for got, want in zip(through(ops.split_qkv, parts, F64), through(reference.split_qkv, parts, F64)):
        numerics.assert_fp64_agreement(got, want)


@pytest.mark.parametrize("function", [ops.split_qkv, qkv.carry_bias])
def test_the_views_are_views(function: object) -> None:
    packed = torch.randn(2, 3, 3, 2, 4)
    made = function(packed, torch.zeros(24))
    parts = made if isinstance(made, tuple) else made.unbind(2)
    for part, want in zip(parts, packed.unbind(2), strict=True):
        assert (part.data_ptr(), part.stride()) == (want.data_ptr(), want.stride())


def heads_of(x: Tensor, weight: Tensor, bias: Tensor, function: object = ops.split_qkv, parts: int = 3) -> Tensor:
    """What attention sees, of a linear that leaves its bias' gradient."""
    packed = F.linear(x, weight, bias.detach()).unflatten(-1, (parts, 2, -1))
    made = function(packed, bias)
    return made if isinstance(made, Tensor) else torch.stack(made, 2)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("function", [ops.split_qkv, qkv.carry_bias])
def test_gradients_are_those_of_a_linear_with_its_bias(function: object, parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=F64, requires_grad=True)
        for shape in ((2, 3, 5), (parts * 8, 5), (parts * 8,))
    )
    plain = F.linear(x, weight, bias).unflatten(-1, (parts, 2, -1))
    assert torch.equal(heads_of(x, weight, bias, function, parts), plain)
    # Numerically the bias counts where the linear adds it, analytically where its gradient is left.
    assert torch.autograd.gradcheck(lambda *leaves: heads_of(*leaves, function, parts).sin(), (x, weight, bias))


@pytest.mark.parametrize("function", [ops.split_qkv, qkv.carry_bias])
@pytest.mark.parametrize("watched", [False, True])
def test_every_subset_of_inputs_gets_its_gradients_and_saves_nothing(function: object, watched: bool) -> None:
    parts = [part.round() for part in gradients((2, 5, 3, 2, 4), F32)]  # sums of whole numbers are exact in any order
    want = dict(zip(("packed", "bias"), through(reference.split_qkv, parts, F32)))
    for needed in subsets(["packed", "bias"]):
        leaves = {"packed": torch.randn(2, 5, 3, 2, 4), "bias": torch.zeros(24)}
        for name in needed:
            leaves[name].requires_grad_()
        saved: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None)
        with hooks, WholeWay() if watched else nullcontext():
            made = function(**leaves)
        made = made if isinstance(made, tuple) else made.unbind(2)
        order = sorted(needed)
        found = torch.autograd.grad(made, [leaves[name] for name in order], parts)
        assert all(torch.equal(got, want[name]) for got, name in zip(found, order, strict=True))
        assert saved == []


def test_where_the_bias_needs_no_gradient_the_views_are_plain() -> None:
    packed, bias = torch.randn(2, 3, 3, 2, 4, requires_grad=True), torch.zeros(24)
    assert ops.split_qkv(packed, bias)[0].grad_fn.name() == "UnbindBackward0"
    assert qkv.carry_bias(packed, bias) is packed
    with torch.no_grad():
        assert ops.split_qkv(packed, bias.requires_grad_())[0].grad_fn is None


def test_a_backward_runs_on_the_backend_that_was_forced_around_the_forward() -> None:
    packed, bias = torch.randn(2, 3, 3, 2, 4, requires_grad=True), torch.zeros(24, requires_grad=True)
    with dispatch.use_backend("torch"):
        inside = torch.stack(ops.split_qkv(packed, bias)).sum()
    outside = torch.stack(ops.split_qkv(packed, bias)).sum()
    parts = gradients((2, 3, 3, 2, 4), F32)
    unforced = qkv.SPLIT_QKV_BACKWARD.choose(*parts, F32, forced=dispatch.backend_setting())
    for loss, backend in ((inside, "torch"), (outside, unforced)):
        with dispatch.use_backend("cuda"), torch.profiler.profile() as profile:  # which is not there
            loss.backward()
        assert f"ditkernels::split_qkv_backward_{backend}" in {event.name for event in profile.events()}


def test_opcheck() -> None:
    for parts in (gradients((2, 3, 3, 2, 5), F32), gradients((2, 3, 2, 2, 5), BF16, "heads first")):
        *dq, dk, dv = parts
        arguments = (dq[0] if dq else None, dk, dv, BF16)
        torch.library.opcheck(dispatch.OPS["split_qkv_backward"].call, arguments)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("backend", ["torch_flash", "plain"])
def test_attention_gives_the_bias_its_gradient(backend: str, cross: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = 2 if cross else 3
    x, weight, bias, q = (
        torch.randn(shape, generator=generator, dtype=F64, requires_grad=True)
        for shape in ((2, 5, 6), (parts * 8, 6), (parts * 8,), (2, 3, 2, 4))
    )

    def results(function: object, own: Tensor, **options: object) -> list[Tensor]:
        packed = F.linear(x, weight, own).unflatten(-1, (parts, 2, 4))
        out = function(*((q, packed) if cross else (packed,)), **options)
        leaves = (x, weight, bias, q) if cross else (x, weight, bias)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    want = results(reference.attention, bias)
    for function, options in ((ops.attention, {"backend": backend}), (reference.attention, {})):
        for got, expected in zip(results(function, bias.detach(), bias=bias, **options), want, strict=True):
            numerics.assert_fp64_agreement(got, expected)


def attended(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=BF16):
        packed = F.linear(x, weight, bias.detach()).unflatten(-1, (3, 2, -1))
        return ops.attention(packed, bias=bias)


def test_compiles_as_one_graph_under_autocast_and_checkpointing() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((2, 5, 12), (36, 12), (36,))]

    def results(function: object) -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    want = results(attended)
    assert want[0].dtype == BF16
    keep = partial(create_selective_checkpoint_contexts, models._selective_policy)
    for function in (
        lambda *leaves: checkpoint(attended, *leaves, use_reentrant=False),
        lambda *leaves: checkpoint(attended, *leaves, use_reentrant=False, context_fn=keep),
        attended,
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ran in (function, compiled):
            assert all(map(torch.equal, results(ran), want))


def check_repeats() -> None:
    parts = gradients((2, 70, 3, 2, 17), BF16, "heads first")
    first = backward(parts)
    with poisoned():
        second = backward(parts)
    assert all(map(torch.equal, first, second))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


def check_far_strides(axis: int) -> None:
    """One axis of dk spans more than 2^31 elements: the storage is made, but hardly any of it used."""
    dq, near, dv = gradients((2, 2, 3, 2, 8), BF16, "samples apart")
    want = backward([dq, near, dv])
    strides = [8 * 3**step for step in (3, 2, 1)] + [1]
    strides[axis] = (1 << 31) // (near.shape[axis] - 1) // 8 * 8 + 24
    extent = 1 + sum((size - 1) * stride for size, stride in zip(near.shape, strides))
    far = torch.empty(extent, dtype=BF16).as_strided(near.shape, strides).copy_(near)
    assert all(map(torch.equal, backward([dq, far, dv]), want))


@pytest.mark.parametrize("function", [ops.split_qkv, qkv.carry_bias])
def test_forward_mode_is_refused(function: object) -> None:
    packed, bias = torch.randn(2, 3, 3, 2, 4), torch.randn(24)
    with pytest.raises(NotImplementedError, match="split_qkv: forward-mode"):
        torch.func.jvp(function, (packed, bias), (packed, bias))


def test_second_derivatives_are_refused() -> None:
    packed, bias = torch.randn(2, 3, 3, 2, 4, requires_grad=True), torch.randn(24, requires_grad=True)
    q, k, v = ops.split_qkv(packed, bias)
    (first,) = torch.autograd.grad((q * k * v).sum(), packed, create_graph=True)
    with pytest.raises(NotImplementedError, match="split_qkv_backward is not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "shape, bias, error, words",
    [
        (
            (2, 3, 24),
            torch.zeros(24),
            ValueError,
            r"packed: got shape \(2, 3, 24\), expected \(B, N, 3, heads",
        ),
        ((2, 3, 4, 2, 4), torch.zeros(32), ValueError, r"packed: got shape \(2, 3, 4, 2, 4\), expected"),
        ((2, 3, 3, 0, 4), torch.zeros(0), ValueError, r"packed: got shape \(2, 3, 3, 0, 4\), expected"),
        ((2, 3, 3, 2, 4), torch.zeros(8), ValueError, r"bias: got shape \(8,\), expected \(24\)"),
        ((2, 3, 3, 2, 4), torch.zeros(24, device="meta"), ValueError, "bias: got device meta"),
        (
            (2, 3, 3, 2, 4),
            torch.zeros(24, dtype=torch.int32),
            TypeError,
            "bias: got dtype torch.int32, allowed",
        ),
    ],
)
def test_errors_name_the_argument(shape: tuple[int, ...], bias: Tensor, error: type, words: str) -> None:
    for function in (ops.split_qkv, qkv.carry_bias):
        function(torch.zeros(2, 3, 3, 2, 4), torch.zeros(24))  # its memory must not let a bad call pass
        for way in (nullcontext(), nullcontext(), WholeWay()):
            with way, pytest.raises(error, match=words):
                function(torch.zeros(shape), bias)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"dq": torch.zeros(2, 3, 2, 5)},
            ValueError,
            r"dq: got shape \(2, 3, 2, 5\), expected \(2, 3, 2, 4\)",
        ),
        ({"dv": torch.zeros(2, 3, 2, 4, dtype=BF16)}, TypeError, "dv: got dtype torch.bfloat16, but dk is"),
        ({"dk": torch.zeros(2, 3, 8)}, ValueError, r"dk: got shape \(2, 3, 8\), expected \(any, any"),
        ({"dtype": torch.int64}, TypeError, "dtype: got dtype torch.int64, allowed are"),
    ],
)
def test_errors_of_the_backward_name_the_argument(change: dict, error: type, words: str) -> None:
    arguments = {**dict.fromkeys(("dq", "dk", "dv"), torch.zeros(2, 3, 2, 4)), "dtype": F32, **change}
    with pytest.raises(error, match=words):
        torch.ops.ditkernels.split_qkv_backward(**arguments)
