"""patch_embed: parity, gradients and torch citizenship."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.ops.image import PATCH_EMBED, patch_embed
from tests import numerics
from tests.helpers.native_cpu import on_both_backends  # noqa: F401
from tests.ops.test_final_layer import Saved

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("x", "weight", "bias", "pos_embed")


def make_inputs(
    batch: int,
    grid: tuple[int, int],
    width: int,
    patch: int,
    x: torch.dtype = F32,
    weight: torch.dtype = F32,
    pos_embed: torch.dtype = F32,
    channels: int = 4,
) -> dict[str, Tensor]:
    """Random inputs, the latents strided in three ways at once: a slice of channels, of columns, and transposed."""
    generator = torch.Generator().manual_seed(batch * 1000 + grid[0] * 10 + width)
    height, columns = grid[0] * patch, grid[1] * patch
    latents = torch.randn(batch, channels + 1, 2 * columns, height, generator=generator).transpose(2, 3)
    made = {
        "x": latents[:, 1:, :, ::2],
        "weight": torch.randn(width, channels, patch, patch, generator=generator),
        "bias": torch.randn(width, generator=generator),
        "pos_embed": torch.randn(1, grid[0] * grid[1], width, generator=generator),
    }
    dtypes = {"x": x, "weight": weight, "bias": weight, "pos_embed": pos_embed}
    return {name: value.to(dtypes[name]) for name, value in made.items()}


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The reference, with the cast that its convolution needs where x and weight differ in dtype."""
    return reference.patch_embed(x.to(weight.dtype), weight, bias, pos_embed, out_dtype=out_dtype)


def forward_and_gradients(
    function: object, inputs: dict[str, Tensor], wanted: tuple[str, ...] = NAMES, **options: object
) -> list[Tensor]:
    """The tokens, then the gradient of every wanted input, for one random cotangent that every dtype holds exactly."""
    leaves = {n: v.detach().requires_grad_(n in wanted) for n, v in inputs.items()}
    out = function(**leaves, **options)
    cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
    asked = [v for v in leaves.values() if v.requires_grad]
    return [out, *torch.autograd.grad(out, asked, cotangent.to(out.dtype))]


def assert_parity(inputs: dict[str, Tensor], out_dtype: torch.dtype | None = None) -> None:
    """Holds op, under autocast or not, to the contract: tokens and every gradient."""
    actual = forward_and_gradients(patch_embed, inputs, out_dtype=out_dtype)
    low = forward_and_gradients(plain, inputs, out_dtype=out_dtype)
    with torch.autocast("cpu", enabled=False):
        exact = forward_and_gradients(plain, {n: v.double() for n, v in inputs.items()})
    for got, near, true, name in zip(actual, low, exact, ["out", *(f"d{n}" for n in inputs)]):
        numerics.assert_contract(got, near, true, f"patch_embed {name}")


# Every pair of values of (batch, grid, width, patch) occurs in some row, and every dtype in each role. Dtypes: x, weight,
# positions, out. The grids have 1, 17, 49 and 256 tokens.
COVERING = [
    (1, (1, 1), 384, 2, F32, F32, F32, F32),
    (1, (1, 17), 100, 4, BF16, BF16, BF16, BF16),
    (1, (7, 7), 96, 8, F32, BF16, F32, F32),
    (1, (8, 32), 1152, 4, F16, F16, F32, F16),
    (2, (17, 1), 96, 2, F32, BF16, F32, BF16),
    (2, (1, 1), 1152, 4, BF16, F32, BF16, F32),
    (2, (16, 16), 384, 8, F32, F32, F32, BF16),
    (2, (7, 7), 100, 2, F16, F16, F16, F16),
    (3, (7, 7), 1152, 2, BF16, BF16, F32, F32),
    (3, (1, 1), 96, 4, F16, F32, F32, BF16),
    (3, (32, 8), 100, 2, F32, F32, BF16, F32),
    (3, (1, 17), 384, 8, BF16, F16, F32, F32),
    (8, (16, 16), 96, 2, BF16, BF16, BF16, BF16),
    (8, (1, 1), 100, 8, F32, BF16, BF16, F32),
    (8, (17, 1), 1152, 8, F32, F32, F32, F32),
    (8, (7, 7), 384, 4, F32, F16, F32, F16),
]


def test_the_covering_set_covers() -> None:
    rows = [(b, grid[0] * grid[1], width, patch) for b, grid, width, patch, *_ in COVERING]
    for i, j in itertools.combinations(range(4), 2):
        wanted = set(itertools.product({r[i] for r in rows}, {r[j] for r in rows}))
        assert wanted == {(r[i], r[j]) for r in rows}


@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(case: tuple) -> None:
    *arguments, out_dtype = case
    assert_parity(make_inputs(*arguments), out_dtype)


@pytest.mark.parametrize("kept", [("bias",), ("pos_embed",), (), ("bias", "pos_embed")])
def test_optional_arguments(kept: tuple[str, ...]) -> None:
    inputs = make_inputs(2, (3, 2), 12, 2)
    assert_parity({n: v for n, v in inputs.items() if n in ("x", "weight", *kept)})


def test_positions_with_and_without_a_leading_axis() -> None:
    inputs = make_inputs(2, (3, 2), 12, 2)
    flat = {**inputs, "pos_embed": inputs["pos_embed"][0]}
    assert_parity(flat)
    assert torch.equal(patch_embed(**flat), patch_embed(**inputs))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    width=st.integers(1, 40),
    patch=st.sampled_from([1, 2, 3, 4, 8]),
    channels=st.integers(1, 5),
)
def test_agreement_in_fp64_at_any_shape(batch: int, grid: tuple[int, int], width: int, patch: int, channels: int) -> None:
    """In fp64, because with a few values in a sum fp32 would test the luck of its rounding."""
    inputs = {n: v.double() for n, v in make_inputs(batch, grid, width, patch, channels=channels).items()}
    got, want = forward_and_gradients(patch_embed, inputs), forward_and_gradients(plain, inputs)
    for actual, expected, name in zip(got, want, ["out", *(f"d{n}" for n in inputs)]):
        numerics.assert_fp64_agreement(actual, expected, name)


def test_no_tokens() -> None:
    out, dx, dweight, *_ = forward_and_gradients(patch_embed, make_inputs(2, (0, 3), 12, 2))
    assert out.shape == (2, 0, 12)
    assert dx.shape == (2, 4, 0, 6)
    assert torch.equal(dweight, torch.zeros(12, 4, 2, 2))


def test_contiguous_and_strided_inputs_give_the_same() -> None:
    inputs = make_inputs(3, (4, 2), 12, 2)
    assert not inputs["x"].is_contiguous()
    packed = {n: v.contiguous() for n, v in inputs.items()}
    for a, b in zip(forward_and_gradients(patch_embed, inputs), forward_and_gradients(patch_embed, packed)):
        assert torch.equal(a, b)
        assert a.is_contiguous()


def test_an_expanded_cotangent() -> None:
    weight = torch.randn(12, 4, 2, 2, requires_grad=True)
    patch_embed(torch.randn(2, 4, 8, 6), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_hand_derived_backward_by_gradcheck() -> None:
    inputs = {n: v.double().requires_grad_() for n, v in make_inputs(2, (3, 2), 5, 2).items()}
    assert torch.autograd.gradcheck(patch_embed, tuple(inputs.values()))


SUBSETS = [names for count in range(1, 5) for names in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_only_what_the_wanted_gradients_need_is_saved(wanted: tuple[str, ...]) -> None:
    inputs = make_inputs(2, (3, 2), 12, 2)
    everything = dict(zip(("out", *NAMES), forward_and_gradients(patch_embed, inputs)))
    declared = PATCH_EMBED.declaration.saved([n in wanted for n in NAMES])
    assert declared == (("x", "weight") if {"x", "weight"} & set(wanted) else ())
    for function in (patch_embed, lambda **leaves: PATCH_EMBED.call(*leaves.values(), F32)):  # thin, whole
        with Saved() as saved:
            _, *some = forward_and_gradients(function, inputs, wanted)
        for name, grad in zip([n for n in NAMES if n in wanted], some):
            assert torch.equal(grad, everything[name])
        assert tuple(saved.names(inputs)) == declared
        assert list(saved.taken.values()) == [1] * len(declared)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("factor", [1, 10, 100])
@pytest.mark.parametrize("large", ["bias", "pos_embed", "x"])
def test_parity_at_large_biases(large: str, factor: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, (7, 5), 384, 2, F32, dtype, dtype)
    inputs[large] = inputs[large] + factor
    assert_parity(inputs, dtype)


def test_opcheck() -> None:
    inputs = [v.detach().requires_grad_() for v in make_inputs(2, (3, 2), 12, 2).values()]
    torch.library.opcheck(PATCH_EMBED.call, (*inputs, BF16))
    torch.library.opcheck(PATCH_EMBED.call, (*inputs[:2], None, None, F32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        inputs = make_inputs(batch, (3, 2), 12, 2, F32, BF16)
        for wanted in (NAMES, ("weight", "bias")):
            got = forward_and_gradients(compiled, inputs, wanted)
            for a, b in zip(got, forward_and_gradients(patch_embed, inputs, wanted)):
                assert torch.equal(a, b)


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    inputs = make_inputs(3, (1, 17), 100, 2, BF16, BF16)
    first = forward_and_gradients(patch_embed, inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = forward_and_gradients(patch_embed, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("pos_embed, expected", [(F32, F32), (BF16, BF16), (None, BF16)])
def test_autocast_gives_what_the_plain_model_gives(pos_embed: torch.dtype | None, expected: torch.dtype) -> None:
    inputs = make_inputs(2, (3, 2), 12, 2, pos_embed=pos_embed or F32)
    if pos_embed is None:
        del inputs["pos_embed"]
    with torch.autocast("cpu", dtype=BF16):
        assert_parity(inputs)
        assert patch_embed(**inputs).dtype == expected


def test_x_and_weight_are_rounded_for_the_product() -> None:
    """Every backend multiplies the same values: x in the weight's dtype, and under autocast both in autocast's."""
    inputs = make_inputs(2, (3, 2), 12, 2)
    rounded = {n: v.to(BF16) if n in ("x", "weight") else v for n, v in inputs.items()}
    want = forward_and_gradients(patch_embed, rounded, out_dtype=F32)
    half = forward_and_gradients(patch_embed, {**rounded, "x": inputs["x"]}, out_dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        lowered = forward_and_gradients(patch_embed, inputs, out_dtype=F32)
    assert torch.equal(half[0], want[0])
    assert torch.equal(lowered[0], want[0])
    assert torch.equal(half[2], want[2])
    assert torch.equal(lowered[2], want[2].float())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_does_not_round_inside_the_op(dtype: torch.dtype) -> None:
    """Nor does it in a backward that runs inside it."""
    inputs = make_inputs(2, (3, 2), 12, 2, F32, dtype)
    want = forward_and_gradients(patch_embed, inputs, out_dtype=F32)
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items()}
    out = patch_embed(**leaves, out_dtype=F32)
    cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
    with torch.autocast("cpu", dtype=BF16):
        out.backward(cotangent)
        raw = PATCH_EMBED.call(*inputs.values(), F32)
    assert all(torch.equal(a, b) for a, b in zip([raw, *(v.grad for v in leaves.values())], want))


@pytest.mark.parametrize("x, pos_embed, expected", [(BF16, F32, F32), (F16, F16, F16), (BF16, F16, F32)])
def test_default_dtype_of_the_tokens(x: torch.dtype, pos_embed: torch.dtype, expected: torch.dtype) -> None:
    inputs = make_inputs(2, (3, 2), 12, 2, x, x, pos_embed)
    assert patch_embed(**inputs).dtype == plain(**inputs).dtype == expected


def test_forward_mode_is_refused() -> None:
    inputs = make_inputs(2, (3, 2), 12, 2)
    call = lambda weight: patch_embed(**{**inputs, "weight": weight})  # noqa: E731
    with pytest.raises(NotImplementedError, match="patch_embed: forward-mode"):
        torch.func.jvp(call, (inputs["weight"],), (inputs["weight"],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(inputs["weight"], inputs["weight"]))


def test_second_derivatives_are_refused() -> None:
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(2, (3, 2), 12, 2).items()}
    (first,) = torch.autograd.grad(patch_embed(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="patch_embed_backward is not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(4, 6, 4)}, ValueError, r"x: got shape \(4, 6, 4\)"),
        ({"x": torch.zeros(2, 4, 7, 4)}, ValueError, r"x: got size 7 x 4, not divisible by the patch size 2"),
        ({"x": torch.zeros(2, 4, 6, 5)}, ValueError, r"x: got size 6 x 5, not divisible"),
        ({"x": torch.zeros(2, 4, 6, 4, dtype=torch.uint8)}, TypeError, r"x: got dtype torch.uint8"),
        ({"x": torch.zeros(2, 3, 6, 4)}, ValueError, r"weight: got shape .* expected \(any, 3, any, any\)"),
        ({"weight": torch.zeros(12, 4, 2, 1)}, ValueError, r"weight: got shape .* must be square"),
        ({"weight": torch.zeros(12, 4, 0, 0)}, ValueError, r"patch_size: got 0"),
        ({"bias": torch.zeros(11)}, ValueError, r"bias: got shape \(11,\), expected \(12\)"),
        ({"bias": torch.zeros(12, device="meta")}, ValueError, r"bias: got device meta"),
        (
            {"pos_embed": torch.zeros(5, 12)},
            ValueError,
            r"pos_embed: got shape \(1, 5, 12\), expected \(1, 6, 12\)",
        ),
        ({"pos_embed": torch.zeros(2, 6, 12)}, ValueError, r"pos_embed: got shape .* \(1, 6, 12\)"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype: got dtype torch.int8"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, words: str) -> None:
    good = make_inputs(2, (3, 2), 12, 2)
    patch_embed(**good)  # from here on remembered
    with pytest.raises(error, match=words):
        patch_embed(**{**good, **change})


def test_flops_are_those_of_the_convolution() -> None:
    def count(function: object, wanted: tuple[str, ...]) -> int:
        with FlopCounterMode(display=False) as counter:
            forward_and_gradients(function, inputs, wanted)
        return counter.get_total_flops()

    inputs = make_inputs(2, (3, 5), 12, 2)
    for wanted in (("weight",), ("x", "weight"), ("x",)):
        assert count(patch_embed, wanted) == count(reference.patch_embed, wanted) > 0


def test_a_forced_backend_that_cannot_serve_says_why() -> None:
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(dispatch.BackendError, match=r"patch_embed: backend 'cuda'.*torch: can serve"),
    ):
        patch_embed(**make_inputs(2, (3, 2), 12, 2))
