"""bias_gelu: parity, gradients and torch citizenship."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditkernels import ops, reference
from ditkernels.ops import dispatch, gelu
from ditkernels.ops.spec import encoded
from tests import numerics
from tests.helpers.native_cpu import as_ops, on_both_backends, run_formulas  # noqa: F401
from tests.helpers.subsets import WholeWay, assert_every_subset

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LAYOUTS = ("packed", "channels apart", "samples apart", "tokens first")


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: torch.dtype | None,
    layout: str = "packed",
    seed: int = 0,
) -> dict[str, Tensor]:
    """x about three times as wide as GELU's bend, so that both its tails are met; the bias of order one."""
    batch, length, width = shape
    generator = torch.Generator().manual_seed(batch * 1000 + length * 10 + width + seed)
    x = 3 * torch.randn(batch, length, width, generator=generator)
    views = {
        "packed": lambda: x.to(dtype),
        "channels apart": lambda: torch.stack([x, x], -1).to(dtype)[..., 0],
        "samples apart": lambda: torch.cat([x, x], 1).to(dtype)[:, :length],
        "tokens first": lambda: x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1),
    }
    made = {"x": views[layout]()}
    if bias is not None:
        made["bias"] = torch.randn(width, generator=generator).to(bias)
    return made


def run(function: object, inputs: dict[str, Tensor], wide: bool = False, cotangent: str = "packed") -> list[Tensor]:
    """The output and the gradient of every input, for a fixed cotangent."""
    leaves = {n: (v.double() if wide else v).detach().requires_grad_() for n, v in inputs.items()}
    output = function(**leaves)
    dy = on_device(make_inputs(tuple(output.shape), inputs["x"].dtype, None, cotangent, seed=7), output.device)
    gradients = torch.autograd.grad(output, list(leaves.values()), dy["x"].double() if wide else dy["x"])
    return [output, *gradients]


def on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """With the strides they have, which a plain copy would close."""
    return {name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device).copy_(v) for name, v in tensors.items()}


def assert_parity(inputs: dict[str, Tensor], cotangent: str = "packed") -> None:
    results = [
        run(ops.bias_gelu, inputs, cotangent=cotangent),
        run(reference.bias_gelu, inputs, cotangent=cotangent),
        run(reference.bias_gelu, inputs, wide=True, cotangent=cotangent),
    ]
    for actual, low, exact, name in zip(*results, ("output", "dx", "dbias")):
        numerics.assert_contract(actual, low, exact, name)


# One row, several chunks, a length that fills no tile; the models' hidden widths, a masked tile, one channel.
COVERING = [
    ((1, 1, 1536), F32, F32),
    ((2, 17, 96), F32, BF16),
    ((3, 49, 100), BF16, BF16),
    ((2, 5, 640), BF16, F32),
    ((3, 33, 130), F16, F16),
    ((2, 130, 64), F32, None),
    ((1, 300, 7), BF16, F32),
    ((4, 3, 1), F32, F32),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity(case: tuple, layout: str) -> None:
    assert_parity(make_inputs(*case, layout), cotangent=LAYOUTS[LAYOUTS.index(layout) - 1])


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 70)), biased=st.booleans())
def test_agreement_in_fp64_at_any_shape(shape: tuple[int, int, int], biased: bool) -> None:
    inputs = make_inputs(shape, F64, F64 if biased else None)
    for actual, expected in zip(run(ops.bias_gelu, inputs), run(reference.bias_gelu, inputs)):
        numerics.assert_fp64_agreement(actual, expected)


def test_formulas_by_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    run_formulas(monkeypatch, "bias_gelu", gelu.formula, gelu.gradients_formula)
    inputs = [v.requires_grad_() for v in make_inputs((2, 3, 5), F64, F64).values()]
    assert torch.autograd.gradcheck(ops.bias_gelu, inputs)


def check_both_tails() -> None:
    """Far from zero GELU is x or 0 and its slope 1 or 0; nothing overflows on the way."""
    x = torch.tensor([-3e4, -60.0, -12.0, 12.0, 60.0, 3e4]).reshape(1, 1, 6).requires_grad_()
    y = ops.bias_gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.detach(), torch.where(x > 0, x, 0.0 * x).detach())
    assert torch.equal(dx, (x > 0).float())


def test_both_tails() -> None:
    check_both_tails()


def test_it_is_the_linear_and_gelu_of_an_mlp() -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*s, generator=generator) for s in ((2, 5, 12), (48, 12), (48,)))
    plain = F.gelu(F.linear(h, weight, bias), approximate="tanh")
    exact = F.gelu(F.linear(h.double(), weight.double(), bias.double()), approximate="tanh")
    numerics.assert_contract(ops.bias_gelu(F.linear(h, weight), bias), plain, exact)


def test_opcheck() -> None:
    inputs = [v.requires_grad_() for v in make_inputs((2, 3, 5), F32, BF16).values()]
    torch.library.opcheck(dispatch.OPS["bias_gelu"].call, tuple(inputs))
    torch.library.opcheck(dispatch.OPS["bias_gelu"].call, (inputs[0], None))
    for bias, wanted in ((torch.randn(5), (F32, F32)), (None, (F32, None)), (None, (None, F32))):
        arguments = (torch.randn(2, 3, 5), torch.randn(2, 3, 5), bias, encoded(wanted))
        torch.library.opcheck(dispatch.OPS["bias_gelu_backward"].call, arguments)


def test_every_subset_of_inputs_gets_its_gradients_and_saves_what_they_need() -> None:
    for inputs in (make_inputs((2, 5, 12), F32, BF16), make_inputs((2, 5, 12), BF16, None)):
        assert_every_subset(dispatch.OPS["bias_gelu"], ops.bias_gelu, inputs)


def test_compiles_as_one_graph_under_autocast_and_checkpointing() -> None:
    inputs = make_inputs((2, 5, 12), BF16, F32)

    def hidden(x: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return checkpoint(ops.bias_gelu, x, bias, use_reentrant=False)

    compiled = torch.compile(hidden, fullgraph=True, backend="aot_eager")
    want = run(ops.bias_gelu, inputs)
    assert want[0].dtype == BF16
    for got in (run(hidden, inputs), run(compiled, inputs)):
        assert all(map(torch.equal, got, want))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills fresh memory with NaN, where the results of an earlier run may lie."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_repeats() -> None:
    inputs = make_inputs((3, 70, 100), BF16, BF16)
    first = run(ops.bias_gelu, inputs)
    with poisoned():
        second = run(ops.bias_gelu, inputs)
    assert all(map(torch.equal, first, second))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


def test_forward_mode_and_second_derivatives_are_refused(on_both_backends: str) -> None:  # noqa: F811
    x = torch.randn(2, 3, 5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="bias_gelu: forward-mode"):
        torch.func.jvp(ops.bias_gelu, (x,), (x,))
    with as_ops(on_both_backends):
        y = ops.bias_gelu(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.zeros(2, 3),), ValueError, r"x: got shape \(2, 3\)"),
        ((torch.zeros(2, 3, 4), torch.zeros(5)), ValueError, r"bias: got shape \(5,\), expected \(4\)"),
        ((torch.zeros(2, 3, 4), torch.zeros(4, device="meta")), ValueError, "bias: got device meta"),
        ((torch.zeros(2, 3, 4, dtype=torch.int32),), TypeError, "x: got dtype torch.int32, allowed are"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, error: type, words: str) -> None:
    ops.bias_gelu(torch.zeros(2, 3, 4), torch.zeros(4))  # what a good call leaves behind must not let a bad one pass
    for way in (nullcontext(), nullcontext(), WholeWay()):
        with way, pytest.raises(error, match=words):
            ops.bias_gelu(*arguments)
