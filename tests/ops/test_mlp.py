"""mlp: parity, gradients and torch citizenship."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditkernels import ops, reference
from ditkernels.ops import dispatch
from ditkernels.ops.spec import encoded
from tests import numerics
from tests.helpers.native_cpu import on_both_backends  # noqa: F401
from tests.helpers.subsets import WholeWay, assert_every_subset

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("output", "dx", "dfc1_weight", "dfc1_bias", "dfc2_weight")
LAYOUTS = ("packed", "channels apart", "samples apart")


def make_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    biased: bool = True,
    layout: str = "packed",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Of (B, N, D, F, E); weights so large that GELU is met on both sides of its bend."""
    batch, length, width, hidden, out = shape
    generator = torch.Generator().manual_seed(sum(shape) + seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    def strided(*size: int, scale: float = 1.0) -> Tensor:
        if layout == "channels apart":
            return normal(*size, 2, scale=scale)[..., 0]
        if layout == "samples apart":
            return normal(size[0], 2 * size[1], *size[2:], scale=scale)[:, : size[1]]
        return normal(*size, scale=scale)

    return {
        "x": strided(batch, length, width),
        "fc1_weight": strided(hidden, width, scale=2 * width**-0.5),
        "fc1_bias": normal(hidden) if biased else None,
        "fc2_weight": strided(out, hidden, scale=hidden**-0.5),
    }


def run(function: object, inputs: dict[str, Tensor | None], wide: bool = False) -> list[Tensor]:
    """The output and the gradient of every input that is there, for a fixed cotangent."""
    leaves = {name: None if v is None else (v.double() if wide else v).detach().requires_grad_() for name, v in inputs.items()}
    output = function(**leaves)
    dy = torch.randn(tuple(output.shape), generator=torch.Generator().manual_seed(7)).to(inputs["x"].dtype)
    dy = dy.to(output.device)
    there = [v for v in leaves.values() if v is not None]
    return [output, *torch.autograd.grad(output, there, dy.double() if wide else dy)]


def assert_parity(inputs: dict[str, Tensor | None]) -> None:
    results = [run(ops.mlp, inputs), run(reference.mlp, inputs), run(reference.mlp, inputs, wide=True)]
    names = [name for name in NAMES if inputs["fc1_bias"] is not None or name != "dfc1_bias"]
    for actual, low, exact, name in zip(*results, names, strict=True):
        numerics.assert_contract(actual, low, exact, name)


# One row, lengths that fill no tile, widths that tell every axis from every other, the models' ratio.
COVERING = [
    ((2, 17, 96, 384, 96), BF16, True),
    ((3, 5, 24, 40, 8), F16, True),
    ((1, 1, 16, 64, 24), BF16, False),
    ((8, 3, 40, 16, 56), BF16, True),
    ((2, 49, 8, 32, 16), F16, False),
]
UNEVEN = [((3, 7, 45, 31, 13), F32, True), ((2, 1, 5, 3, 1), BF16, True), ((1, 4, 6, 10, 7), F32, False)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING + UNEVEN, ids=str)
def test_parity(case: tuple, layout: str) -> None:
    assert_parity(make_inputs(*case, layout=layout))


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(0, 3), st.integers(0, 9), *[st.integers(1, 20)] * 3), biased=st.booleans())
def test_agreement_in_fp64_at_any_shape(shape: tuple[int, int, int, int, int], biased: bool) -> None:
    inputs = make_inputs(shape, F64, biased)
    for actual, expected in zip(run(ops.mlp, inputs), run(reference.mlp, inputs), strict=True):
        numerics.assert_fp64_agreement(actual, expected)


def test_hand_derived_backward_by_gradcheck() -> None:
    inputs = [v.requires_grad_() for v in make_inputs((2, 3, 5, 4, 6), F64).values()]
    assert torch.autograd.gradcheck(ops.mlp, inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_the_gradients_that_are_needed_are_computed(needed: tuple[int, ...]) -> None:
    """And each of them is what it is beside the others."""
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    want = run(ops.mlp, inputs)[1:]
    leaves = [v.detach().requires_grad_(i in needed) for i, v in enumerate(inputs.values())]
    output = ops.mlp(*leaves)
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    with FlopCounterMode(display=False) as counted:
        got = torch.autograd.grad(output, [leaves[i] for i in needed], dy)
    assert all(torch.equal(g, want[i]) for g, i in zip(got, needed, strict=True))
    products = [24] * (needed != (3,)) + [8] * (0 in needed) + [8] * (1 in needed) + [24] * (3 in needed)
    assert counted.get_total_flops() == 2 * 6 * 16 * sum(products)


class _Filled(TorchDispatchMode):
    """Shapes of tensors filled with zeros outside ops."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros):
            self.shapes.append(tuple(args[0]))
        return func(*args, **(kwargs or {}))


def test_autograd_makes_no_gradients_of_zeros_for_what_is_kept() -> None:
    with _Filled() as filled:
        run(ops.mlp, make_inputs((2, 3, 8, 16, 24), F32))
    assert filled.shapes == []


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> None:
        return None


def test_behind_a_function_without_a_gradient_there_is_none() -> None:
    leaves = [v.requires_grad_() for v in make_inputs((2, 3, 5, 4, 6), F32).values()]
    (_WithoutGradient.apply(ops.mlp(*leaves)).sum() + leaves[0].sum()).backward()
    assert torch.equal(leaves[0].grad, torch.ones(2, 3, 5))
    assert [leaf.grad for leaf in leaves[1:]] == [None] * 3


def test_nothing_is_kept_where_no_gradient_is_needed() -> None:
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        y, z, h = torch.ops.ditkernels.mlp(*inputs.values(), False)
    assert (z.numel(), h.numel()) == (0, 0)
    assert torch.equal(y, ops.mlp(**inputs))
    assert counted.get_total_flops() == 2 * 6 * 16 * (8 + 24)


def test_opcheck() -> None:
    for biased in (True, False):
        inputs = make_inputs((2, 3, 5, 4, 6), F32, biased)
        wanted = encoded((F32, None, F32 if biased else None, F32))
        leaves = [None if v is None else v.requires_grad_() for v in inputs.values()]
        torch.library.opcheck(dispatch.OPS["mlp"].call, (*leaves, True))
        still = [None if v is None else v.detach() for v in leaves]
        torch.library.opcheck(dispatch.OPS["mlp"].call, (*still, False))
        saved = (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
        x, fc1_weight, _, fc2_weight = still
        arguments = (torch.randn(2, 3, 6), x, fc1_weight, fc2_weight, *saved, wanted)
        torch.library.opcheck(dispatch.OPS["mlp_backward"].call, arguments)
    alone = (
        torch.randn(2, 3, 6),
        None,
        None,
        None,
        None,
        torch.randn(2, 3, 4),
        encoded((None,) * 3 + (F32,)),
    )
    torch.library.opcheck(dispatch.OPS["mlp_backward"].call, alone)


@pytest.mark.parametrize("biased", [True, False])
def test_every_subset_of_inputs_gets_its_gradients_and_saves_what_they_need(biased: bool) -> None:
    assert_every_subset(dispatch.OPS["mlp"], ops.mlp, make_inputs((2, 3, 8, 16, 24), F32, biased))


def test_compiles_as_one_graph() -> None:
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    compiled = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, inputs), run(ops.mlp, inputs)))


def test_under_autocast_all_is_in_its_dtype_as_in_the_linears() -> None:
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    with torch.autocast("cpu", dtype=BF16):
        got = run(lambda **a: ops.mlp(**a).float(), inputs)
        low = run(lambda **a: reference.mlp(**a).float(), inputs)
        assert ops.mlp(**inputs).dtype == BF16
    exact = run(reference.mlp, inputs, wide=True)
    for actual, plain, wide, name in zip(got, low, exact, NAMES, strict=True):
        assert actual.dtype == F32
        numerics.assert_contract(actual, plain, wide, name)


@pytest.mark.parametrize("watched", [False, True])
def test_a_backward_inside_autocast_computes_in_the_saved_dtypes(watched: bool) -> None:
    """fp32 inputs outside autocast give the bits of an fp32 backward, wherever it runs."""
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    want = run(ops.mlp, inputs)[1:]
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    with WholeWay() if watched else nullcontext():
        output = ops.mlp(**leaves)
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", dtype=BF16):
        output.backward(dy)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves.values(), want, strict=True))


def test_on_meta_there_are_shapes_alone() -> None:
    inputs = {name: v.to("meta") for name, v in make_inputs((2, 3, 8, 16, 24), F32).items()}
    leaves = [v.requires_grad_() for v in inputs.values()]
    for off in (nullcontext(), torch.autocast("cpu", dtype=BF16)):
        with off:
            y = ops.mlp(*leaves)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), F32, "meta")
    assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [leaf.shape for leaf in leaves]


def test_fp64_under_autocast_stays_as_it_is() -> None:
    inputs = make_inputs((2, 3, 8, 16, 24), F64)
    with torch.autocast("cpu", dtype=BF16):
        assert ops.mlp(**inputs).dtype == F64
        with pytest.raises(TypeError, match="fc1_weight: got dtype"):
            ops.mlp(**{**make_inputs((2, 3, 8, 16, 24), F32), "x": inputs["x"]})


def check_repeats() -> None:
    inputs = make_inputs((2, 17, 96, 384, 96), BF16)
    first = run(ops.mlp, inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(ops.mlp, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


def test_forward_mode_and_second_derivatives_are_refused() -> None:
    leaves = [v.requires_grad_() for v in make_inputs((2, 3, 5, 4, 6), F32).values()]
    with pytest.raises(NotImplementedError, match="mlp: forward-mode"):
        torch.func.jvp(lambda x: ops.mlp(x, *leaves[1:]), (leaves[0],), (leaves[0],))
    (first,) = torch.autograd.grad(ops.mlp(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x: got shape \(2, 8\)"),
        (
            {"fc1_weight": torch.zeros(16, 9)},
            ValueError,
            r"fc1_weight: got shape \(16, 9\), expected \(any, 8\)",
        ),
        (
            {"fc1_weight": torch.zeros(0, 8), "fc1_bias": None, "fc2_weight": torch.zeros(24, 0)},
            ValueError,
            r"fc1_weight: got shape \(0, 8\); the first axis must not be empty",
        ),
        ({"fc1_bias": torch.zeros(15)}, ValueError, r"fc1_bias: got shape \(15,\), expected \(16\)"),
        (
            {"fc2_weight": torch.zeros(24, 15)},
            ValueError,
            r"fc2_weight: got shape \(24, 15\), expected \(any, 16\)",
        ),
        ({"fc2_weight": torch.zeros(0, 16)}, ValueError, r"fc2_weight: got shape \(0, 16\); the first axis"),
        ({"fc2_weight": torch.zeros(24, 16, device="meta")}, ValueError, "fc2_weight: got device meta"),
        (
            {"fc1_weight": torch.zeros(16, 8, dtype=BF16)},
            TypeError,
            "fc1_weight: got dtype torch.bfloat16, expected x's",
        ),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int8)}, TypeError, "x: got dtype torch.int8, allowed are"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, words: str) -> None:
    inputs = make_inputs((2, 3, 8, 16, 24), F32)
    ops.mlp(**inputs)  # what a good call leaves behind must not let a bad one pass
    for way in (nullcontext(), nullcontext(), WholeWay()):
        with way, pytest.raises(error, match=words):
            ops.mlp(**{**inputs, **change})
