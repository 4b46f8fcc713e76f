"""adaLN ops on the triton backend, interpreted: forward and every gradient by the numerical contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import dispatch, norm
from ditkernels.ops.norm import triton as kernels
from tests import numerics
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import (
    BF16,
    F16,
    F32,
    F64,
    LARGE,
    OPS,
    TAKES,
    VECTORS,
    assert_parity,
    assert_parity_at_a_large_shift,
    make_inputs,
    run,
)

# Each pair of (batch, length, width, stream dtype, branch dtype, norm) values that matters occurs in some row: one token, a
# length that fills no block, several chunks; the paper's widths, an exact pair of pieces, a masked tail, tiny ones.
COVERING = [
    (1, 1, 384, F32, F32, "layernorm"),
    (2, 17, 96, F32, BF16, "rmsnorm"),
    (3, 5, 768, BF16, BF16, "layernorm"),
    (4, 1, 1152, BF16, F32, "rmsnorm"),
    (2, 18, 1024, F16, F16, "layernorm"),
    (2, 19, 1152, F32, BF16, "layernorm"),
    (4, 5, 100, F16, F32, "rmsnorm"),
    (1, 18, 96, BF16, BF16, "rmsnorm"),
    (2, 5, 768, F32, F32, "rmsnorm"),
    (3, 18, 100, F32, F16, "layernorm"),
    (4, 17, 384, BF16, BF16, "layernorm"),
    (1, 5, 1024, F32, BF16, "rmsnorm"),
    (3, 1, 768, F16, F16, "rmsnorm"),
    (2, 17, 7, F32, F32, "layernorm"),
    (2, 3, 1, BF16, BF16, "layernorm"),
    (1, 2, 2500, F32, F32, "layernorm"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, case: tuple) -> None:
    *shape, stream, branch, kind = case
    options = {} if op == "gated_residual" else {"norm": kind, "out_dtype": branch}
    assert_parity(op, make_inputs(op, *shape, stream, branch), **options)


@pytest.mark.parametrize("op", OPS)
def test_every_combination_of_optional_arguments(op: str) -> None:
    optional = [n for n in TAKES[op] if n in VECTORS]
    norms = itertools.cycle(reference.NORMS)
    for count in range(len(optional) + 1):
        for names in itertools.combinations(optional, count):
            inputs = make_inputs(op, 2, 3, 11, F32, F32, " ".join(names) or "none")
            assert_parity(op, inputs, **({} if op == "gated_residual" else {"norm": next(norms)}))


@pytest.mark.parametrize("kind", reference.NORMS)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_eps_beside_a_variance_of_its_size(kind: str, eps: float) -> None:
    inputs = make_inputs("modulate_norm", 2, 3, 12, F32, F32)
    inputs["x"] = inputs["x"] * eps**0.5
    assert_parity("modulate_norm", inputs, norm=kind, eps=eps)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("times", LARGE)
@pytest.mark.parametrize("op", ["modulate_norm", "gated_residual_norm"])
def test_parity_at_large_shifts(op: str, times: float, dtype: torch.dtype) -> None:
    assert_parity_at_a_large_shift(op, times, dtype, length=3)


@pytest.mark.parametrize("op", OPS)
def test_subsets_of_inputs_get_the_gradients_they_get_among_all(op: str) -> None:
    """What is not wanted is not computed, and the rest keeps its bits: for one input, two inputs, and all but one."""
    inputs = make_inputs(op, 1, 3, 11, BF16, F32)

    def gradients(needs: tuple[bool, ...]) -> dict[str, Tensor]:
        leaves = {n: v.detach().requires_grad_(need) for (n, v), need in zip(inputs.items(), needs)}
        outputs = getattr(norm, op)(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        needed = {n: v for n, v in leaves.items() if v.requires_grad}
        return dict(zip(needed, torch.autograd.grad(outputs, list(needed.values()), cotangents)))

    everything = gradients((True,) * len(inputs))
    for needs in itertools.product((False, True), repeat=len(inputs)):
        if sum(needs) in (1, 2, len(inputs) - 1):
            for name, got in gradients(needs).items():
                assert torch.equal(got, everything[name]), f"d{name} where {needs} need gradients"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (0, 0, 12)])
def test_nothing_in_gives_nothing_out_and_zero_gradients(op: str, shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(op, *shape, F32, F32)
    assert_parity(op, inputs)
    gradients = run(getattr(norm, op), inputs)[-len(inputs) :]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("op", OPS)
def test_cotangents_of_any_strides(op: str, layout: str) -> None:
    """Autograd hands on cotangents as they come: expanded by a sum, transposed by a permute, sliced by a split."""
    inputs = make_inputs(op, 2, 5, 12, F32, F32)

    def gradients(function: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {n: v.to(dtype).detach().requires_grad_() for n, v in inputs.items()}
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        made = {
            "expanded": torch.ones((), dtype=dtype).expand(2, 5, 12),
            "transposed": torch.arange(120, dtype=dtype).reshape(12, 5, 2).transpose(0, 2) / 120,
            "sliced": (torch.arange(240, dtype=dtype).reshape(2, 10, 12) / 240)[:, ::2],
        }
        return torch.autograd.grad(outputs, list(leaves.values()), [made[layout]] * len(outputs))

    plain = getattr(reference, op)
    results = gradients(getattr(norm, op), F32), gradients(plain, F32), gradients(plain, F64)
    for actual, low, exact, name in zip(*results, inputs):
        numerics.assert_contract(actual, low, exact, f"d{name} from a {layout} cotangent")


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which: int) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, F32)

    def gradients(function: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {n: v.to(dtype).detach().requires_grad_() for n, v in inputs.items()}
        loss = function(**leaves)[which].square().sum()
        return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)

    plain = reference.gated_residual_norm
    results = gradients(norm.gated_residual_norm, F32), gradients(plain, F32), gradients(plain, F64)
    for actual, low, exact, name in zip(*results, inputs):
        numerics.assert_contract(actual, low, exact, f"d{name} through output {which}")


def test_the_statistics_are_those_of_the_stream_as_stored() -> None:
    x, branch = torch.randn(2, 3, 96, dtype=BF16), torch.randn(2, 3, 96)
    x1, _, stats = kernels.gated_residual_norm(x, branch, *[None] * 6, "layernorm", 1e-6, F32, True)
    numerics.assert_contract(stats[..., 0], x1.float().mean(-1), x1.double().mean(-1), "mean of the stored stream")


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_writes_every_output(op: str) -> None:
    inputs = make_inputs(op, 2, 19, 100, BF16, BF16)
    first = run(getattr(norm, op), inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(getattr(norm, op), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("op", OPS)
def test_agrees_with_the_torch_backend_on_which_gradients_exist(op: str) -> None:
    inputs = make_inputs(op, 2, 3, 12, BF16, F32)
    fused = run(getattr(norm, op), inputs)
    with dispatch.use_backend("torch"):
        plain = run(getattr(norm, op), inputs)
    described = [[(t.shape, t.dtype, t.is_contiguous()) for t in results] for results in (fused, plain)]
    assert described[0] == described[1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: torch.zeros(1, 2, 8, dtype=F64), "torch.float64 is not among the kernels' dtypes"),
        (lambda: torch.zeros(1, 1, 16385), "a row of 16385 channels does not fit in registers"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_before_launch(make: object, words: str) -> None:
    with pytest.raises(dispatch.BackendError, match=words):
        norm.modulate_norm(make())
    with dispatch.use_backend("auto"):
        assert norm.MODULATE_NORM.choose(make(), *[None] * 4, "layernorm", 1e-6, F32, False) != "triton"
