"""final_layer and unpatchify: parity, gradients and torch citizenship."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ditkernels
from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.ops.image import FINAL_LAYER, PATCHIFY, UNPATCHIFY, final_layer, unpatchify
from tests import numerics
from tests.helpers.native_cpu import on_both_backends  # noqa: F401

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# In the order of the op's schema.
NAMES = (
    "x",
    "branch",
    "gate",
    "branch_bias",
    "shift",
    "scale",
    "norm_weight",
    "norm_bias",
    "weight",
    "bias",
)
OPTIONAL = tuple(n for n in NAMES if n not in ("x", "weight"))
GRID = (3, 2)


def make_inputs(
    batch: int,
    grid: tuple[int, int],
    width: int,
    patch: int,
    stream: torch.dtype = F32,
    rest: torch.dtype = F32,
    channels: int = 3,
    kept: tuple[str, ...] = OPTIONAL,
) -> dict[str, Tensor]:
    """Random inputs: x the first tokens of a longer sequence, the vectors of a sample chunks of one tensor."""
    generator = torch.Generator().manual_seed(batch * 1000 + grid[0] * 10 + width)
    length, values = grid[0] * grid[1], patch * patch * channels

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gate, shift, scale = randn(batch, 6 * width).chunk(6, dim=1)[3:]
    made = {
        "x": randn(batch, length + 2, width)[:, :length],
        "branch": randn(length, batch, width).transpose(0, 1),
        "gate": gate,
        "branch_bias": randn(width),
        "shift": shift,
        "scale": scale,
        "norm_weight": randn(width),
        "norm_bias": randn(width),
        "weight": randn(width, values).t() / width**0.5,
        "bias": randn(values),
    }
    return {n: v.to(stream if n == "x" else rest) for n, v in made.items() if n not in OPTIONAL or n in kept}


def call(function: object, leaves: dict[str, Tensor], **options: object) -> Tensor:
    return function(**{"shift": None, "scale": None, **leaves}, **options)


def forward_and_gradients(function: object, inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    """The image, then the gradient of every input, for one random cotangent that every dtype holds exactly."""
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items()}
    out = call(function, leaves, **options)
    cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
    return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))]


def assert_parity(inputs: dict[str, Tensor], **options: object) -> None:
    """Holds op, under autocast or not, to the contract: image and every gradient."""
    actual = forward_and_gradients(final_layer, inputs, **options)
    low = forward_and_gradients(reference.final_layer, inputs, **options)
    with torch.autocast("cpu", enabled=False):
        wide = {n: v.double() for n, v in inputs.items()}
        exact = forward_and_gradients(reference.final_layer, wide, **{**options, "out_dtype": F64})
    for got, near, true, name in zip(actual, low, exact, ["out", *(f"d{n}" for n in inputs)]):
        numerics.assert_contract(got, near, true, f"final_layer {name}", terms=inputs["x"].shape[-1])


# Every pair of values of (batch, grid, width, patch) occurs in some row. Dtypes: the stream, all else, out. The grids have 1,
# 17, 49 and 256 tokens.
COVERING = [
    (1, (1, 1), 384, 2, F32, F32, F32, "layernorm"),
    (1, (1, 17), 100, 4, BF16, BF16, BF16, "layernorm"),
    (1, (7, 7), 96, 8, F32, BF16, F32, "rmsnorm"),
    (1, (8, 32), 1152, 4, F16, F16, F32, "layernorm"),
    (2, (17, 1), 96, 2, F32, BF16, BF16, "layernorm"),
    (2, (1, 1), 1152, 4, BF16, F32, F32, "rmsnorm"),
    (2, (16, 16), 384, 8, F32, F32, BF16, "rmsnorm"),
    (2, (7, 7), 100, 2, F16, F16, F16, "rmsnorm"),
    (3, (7, 7), 1152, 2, BF16, BF16, F32, "layernorm"),
    (3, (1, 1), 96, 4, F16, F32, F16, "rmsnorm"),
    (3, (32, 8), 100, 2, F32, F32, F32, "layernorm"),
    (3, (1, 17), 384, 8, BF16, F16, F32, "layernorm"),
    (8, (16, 16), 96, 2, BF16, BF16, BF16, "rmsnorm"),
    (8, (1, 1), 100, 8, F32, BF16, F32, "layernorm"),
    (8, (17, 1), 1152, 8, F32, F32, F32, "rmsnorm"),
    (8, (7, 7), 384, 4, F32, F16, F16, "rmsnorm"),
]


def test_the_covering_set_covers() -> None:
    rows = [(b, grid[0] * grid[1], width, patch) for b, grid, width, patch, *_ in COVERING]
    for i, j in itertools.combinations(range(4), 2):
        wanted = set(itertools.product({r[i] for r in rows}, {r[j] for r in rows}))
        assert wanted == {(r[i], r[j]) for r in rows}


@pytest.mark.parametrize("kept", [OPTIONAL, ("shift", "scale", "bias")], ids=["all", "the model's own"])
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(case: tuple, kept: tuple[str, ...]) -> None:
    batch, grid, width, patch, stream, rest, out_dtype, norm = case
    inputs = make_inputs(batch, grid, width, patch, stream, rest, kept=kept)
    assert_parity(inputs, grid=grid, patch_size=patch, norm=norm, out_dtype=out_dtype)


@pytest.mark.parametrize("norm", reference.NORMS)
def test_every_combination_of_optional_arguments(norm: str) -> None:
    for count in range(len(OPTIONAL) + 1):
        for kept in itertools.combinations(OPTIONAL, count):
            if "branch" in kept or not {"gate", "branch_bias"} & set(kept):
                inputs = make_inputs(2, GRID, 12, 2, kept=kept)
                assert_parity(inputs, grid=GRID, patch_size=2, norm=norm)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 4),
    grid=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    width=st.integers(1, 70),
    patch=st.sampled_from([1, 2, 3, 4, 8]),
    channels=st.integers(1, 5),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_agreement_in_fp64_at_any_shape(
    batch: int, grid: tuple[int, int], width: int, patch: int, channels: int, eps: float
) -> None:
    made = make_inputs(batch, grid, width, patch, channels=channels)
    inputs = {name: value.double() for name, value in made.items()}
    if inputs["x"].numel():
        options = {"grid": grid, "patch_size": patch, "eps": eps}
        got = forward_and_gradients(final_layer, inputs, **options)
        want = forward_and_gradients(reference.final_layer, inputs, **options)
        for actual, expected, name in zip(got, want, ["out", *(f"d{n}" for n in inputs)]):
            numerics.assert_fp64_agreement(actual, expected, name)
        return
    out, *grads = forward_and_gradients(final_layer, inputs, grid=grid, patch_size=patch, eps=eps)
    assert out.shape == (batch, channels, grid[0] * patch, grid[1] * patch)
    for (name, value), grad in zip(inputs.items(), grads):
        assert torch.equal(grad, torch.zeros_like(value)), name


def test_contiguous_and_strided_inputs_give_the_same() -> None:
    inputs = make_inputs(3, GRID, 12, 2)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("x", "branch", "gate", "shift", "scale", "weight"):
        assert not inputs[name].is_contiguous(), name
    packed = {n: v.contiguous() for n, v in inputs.items()}
    options = {"grid": GRID, "patch_size": 2}
    for a, b in zip(
        forward_and_gradients(final_layer, inputs, **options),
        forward_and_gradients(final_layer, packed, **options),
    ):
        assert torch.equal(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kept", [OPTIONAL, ("branch", "branch_bias"), ("shift", "norm_bias"), ("scale",)])
def test_hand_derived_backward_by_gradcheck(kept: tuple[str, ...], norm: str) -> None:
    made = make_inputs(2, GRID, 5, 2, F64, F64, channels=2, kept=kept)
    inputs = {n: v.detach().requires_grad_() for n, v in made.items()}

    def function(*values: Tensor) -> Tensor:
        return call(final_layer, dict(zip(inputs, values)), grid=GRID, patch_size=2, norm=norm)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def raw(inputs: dict[str, Tensor]) -> list[Tensor | None]:
    return [inputs.get(name) for name in NAMES]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("factor", [1, 10, 100])
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("large", ["shift", "norm_bias", "bias"])
def test_parity_at_large_shifts_and_biases(large: str, norm: str, factor: int, dtype: torch.dtype) -> None:
    """Where the offsets are many times the normed rows, which are of size 1."""
    inputs = make_inputs(2, (7, 5), 384, 2, F32, dtype)
    inputs[large] = inputs[large] * factor
    assert_parity(inputs, grid=(7, 5), patch_size=2, norm=norm)


# ---- What is saved and computed --------------------------------------------------------------------------------------

SUBSETS = [(n,) for n in NAMES] + [tuple(m for m in NAMES if m != n) for n in NAMES]
SUBSETS += [("weight", "bias"), ("shift", "scale"), ("weight", "shift"), ("branch", "norm_bias"), NAMES]


class Saved:
    """Hooks that see what a forward saves, and that let each saved tensor be unpacked once."""

    def __init__(self) -> None:
        self.packed: list[Tensor] = []
        self.taken: Counter[int] = Counter()

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> int:
        self.packed.append(tensor)
        return len(self.packed) - 1

    def unpack(self, place: int) -> Tensor:
        self.taken[place] += 1
        assert self.taken[place] == 1, "unpacked twice"
        return self.packed[place]

    def size(self) -> int:
        """Bytes of rows as wide as x, each storage once."""
        rows = (t.untyped_storage() for t in self.packed if t.numel() == 2 * 6 * 12)
        return sum({s.data_ptr(): s.nbytes() for s in rows}.values())

    def names(self, inputs: dict[str, Tensor]) -> list[str]:
        at = {value.data_ptr(): name for name, value in inputs.items()}
        return [at.get(tensor.data_ptr(), "another tensor") for tensor in self.packed]


def without_branch(names: Iterable[str], kept: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in names if n in kept or n in ("x", "weight"))


@pytest.mark.parametrize("way", ["thin", "whole"])
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kept", [OPTIONAL, ("shift", "scale", "norm_weight", "norm_bias", "bias"), ("branch",)])
def test_only_what_the_wanted_gradients_need_is_saved(kept: tuple[str, ...], norm: str, way: str) -> None:
    inputs = make_inputs(2, GRID, 12, 2, kept=kept)
    options = {"grid": GRID, "patch_size": 2, "norm": norm}
    everything = dict(zip(("out", *inputs), forward_and_gradients(final_layer, inputs, **options)))
    for subset in dict.fromkeys(without_branch(s, kept) for s in SUBSETS):
        if not subset:
            continue
        leaves = {n: v.detach().requires_grad_(n in subset) for n, v in inputs.items()}
        with Saved() as saved:
            if way == "thin":
                out = call(final_layer, leaves, **options)
            else:
                out = FINAL_LAYER.call(*raw(leaves), *GRID, 2, norm, 1e-6, F32)
        cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
        grads = torch.autograd.grad(out, [leaves[n] for n in subset], cotangent)
        for name, grad in zip(subset, grads):
            torch.testing.assert_close(grad, everything[name], rtol=1e-4, atol=1e-4)
        if way == "thin" and "weight" in subset and set(subset) <= {"weight", "bias"}:
            assert [t.shape for t in saved.packed] == [(2, 6, 12)], "the normed rows alone"
        elif way == "thin" and "x" not in subset and subset != ("bias",):
            with Saved() as plainly:
                reference.final_layer(**{"shift": None, "scale": None, **leaves}, **options)
            assert saved.size() <= plainly.size(), subset
        else:
            declared = FINAL_LAYER.declaration.saved([n in subset for n in NAMES])
            assert saved.names(inputs) == [n for n in declared if n in inputs], subset
        assert len(saved.taken) == len(saved.packed), subset


def small_model() -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = ditkernels.DiT(input_size=8, patch_size=2, hidden_size=24, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 7]))


def gradients_of(model: torch.nn.Module, out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])


def test_a_model_under_checkpointing_and_one_shot_offloading_trains_as_without() -> None:
    model, inputs = small_model()
    want = gradients_of(model, model(*inputs))
    recomputed = gradients_of(model, checkpoint(model, *inputs, use_reentrant=False))
    with Saved() as saved:
        out = model(*inputs)
    offloaded = gradients_of(model, out)
    assert len(saved.taken) > 10
    assert all(map(torch.equal, want, recomputed))
    assert all(map(torch.equal, want, offloaded))


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kept", [OPTIONAL, ("branch",), ()])
def test_opcheck(kept: tuple[str, ...], norm: str) -> None:
    made = make_inputs(2, GRID, 12, 2, BF16, BF16, kept=kept)
    made["x"] = made["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs = raw({n: v.detach().requires_grad_() for n, v in made.items()})
    torch.library.opcheck(FINAL_LAYER.call, (*inputs, *GRID, 2, norm, 1e-6, F32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(final_layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        inputs = make_inputs(batch, GRID, 12, 2, F32, BF16)
        got = forward_and_gradients(compiled, inputs, grid=GRID, patch_size=2)
        want = forward_and_gradients(final_layer, inputs, grid=GRID, patch_size=2)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    inputs = make_inputs(3, (1, 17), 100, 2, BF16, BF16)
    options = {"grid": (1, 17), "patch_size": 2}
    first = forward_and_gradients(final_layer, inputs, **options)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = forward_and_gradients(final_layer, inputs, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_are_rounded_to_the_weights_dtype_forward_and_backward() -> None:
    """Every backend multiplies the same rows: with an identity for weight the image shows them, and dW sums them."""
    inputs = make_inputs(1, (1, 2), 96, 1, F32, BF16, channels=96)
    inputs["weight"] = torch.eye(96, dtype=BF16).requires_grad_()
    del inputs["bias"]
    rows = final_layer(**inputs, grid=(1, 2), patch_size=1, out_dtype=F32)
    assert torch.equal(rows, rows.to(BF16).float())
    rows[0, 0].sum().backward()
    assert torch.equal(inputs["weight"].grad[0], rows[0].sum((1, 2)).to(BF16))


def test_a_wider_image_is_not_rounded_to_the_weights_dtype() -> None:
    image = final_layer(**make_inputs(2, GRID, 96, 2, BF16, BF16), grid=GRID, patch_size=2, out_dtype=F32)
    assert not torch.equal(image, image.to(BF16).float())


def test_autocast_gives_what_the_plain_model_gives() -> None:
    inputs = make_inputs(2, GRID, 12, 2)
    inputs = {n: v.to(BF16) if n in ("branch", "gate", "shift", "scale") else v for n, v in inputs.items()}
    with torch.autocast("cpu", dtype=BF16):
        assert_parity(inputs, grid=GRID, patch_size=2)
        assert final_layer(**inputs, grid=GRID, patch_size=2).dtype == BF16
        assert final_layer(**inputs, grid=GRID, patch_size=2, out_dtype=F32).dtype == F32
        assert unpatchify(torch.zeros(2, 6, 12), grid=GRID, patch_size=2).dtype == F32


def test_autocast_does_not_round_inside_the_op() -> None:
    """Nor does it in a backward that runs inside it."""
    inputs = make_inputs(2, GRID, 12, 2)
    want = forward_and_gradients(final_layer, inputs, grid=GRID, patch_size=2)
    for wanted in (NAMES, ("weight", "bias")):
        leaves = {n: v.detach().requires_grad_(n in wanted) for n, v in inputs.items()}
        out = final_layer(**leaves, grid=GRID, patch_size=2)
        cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
        with torch.autocast("cpu", dtype=BF16):
            out.backward(cotangent)
            raw_out = FINAL_LAYER.call(*raw(inputs), *GRID, 2, "layernorm", 1e-6, F32)
        assert torch.equal(raw_out, want[0])
        for name, expected in zip(NAMES, want[1:]):
            grad = leaves[name].grad
            assert (grad is None) == (name not in wanted)
            torch.testing.assert_close(expected if grad is None else grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, rest", [(F32, BF16), (BF16, F32), (F64, F64)])
def test_default_dtype_is_the_weights(dtype: torch.dtype, rest: torch.dtype) -> None:
    inputs = make_inputs(2, GRID, 12, 2, dtype, rest)
    assert final_layer(**inputs, grid=GRID, patch_size=2).dtype == rest


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name: str) -> None:
    inputs = make_inputs(2, GRID, 12, 2)
    function = lambda v: final_layer(**{**inputs, name: v}, grid=GRID, patch_size=2)  # noqa: E731
    with pytest.raises(NotImplementedError, match="final_layer: forward-mode"):
        torch.func.jvp(function, (inputs[name],), (inputs[name],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(torch.autograd.forward_ad.make_dual(inputs[name], inputs[name]))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name: str) -> None:
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(2, GRID, 12, 2).items()}
    out = final_layer(**inputs, grid=GRID, patch_size=2)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(NotImplementedError, match="final_layer_backward is not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(6, 12)}, ValueError, r"x: got shape \(6, 12\)"),
        ({"x": torch.zeros(2, 6, 12, dtype=torch.int32)}, TypeError, r"x: got dtype torch.int32"),
        ({"branch": torch.zeros(2, 5, 12)}, ValueError, r"branch: got shape .* expected \(2, 6, 12\)"),
        ({"gate": torch.zeros(12)}, ValueError, r"gate: got shape \(12\), expected \(2, 12\)"),
        ({"branch": None}, ValueError, r"gate: given without branch"),
        ({"branch": None, "gate": None}, ValueError, r"branch_bias: given without branch"),
        ({"shift": torch.zeros(1, 12)}, ValueError, r"shift: got shape \(1, 12\), expected \(2, 12\)"),
        ({"scale": torch.zeros(2, 11)}, ValueError, r"scale: got shape"),
        ({"branch_bias": torch.zeros(11)}, ValueError, r"branch_bias: got shape"),
        ({"norm_weight": torch.zeros(11)}, ValueError, r"norm_weight: got shape"),
        ({"norm_bias": torch.zeros(11)}, ValueError, r"norm_bias: got shape"),
        ({"weight": torch.zeros(12, 11)}, ValueError, r"weight: got shape \(12, 11\), expected \(any, 12\)"),
        ({"weight": torch.zeros(10, 12), "bias": None}, ValueError, r"weight: got shape .* multiple of .* 4"),
        ({"bias": torch.zeros(11)}, ValueError, r"bias: got shape"),
        ({"bias": torch.zeros(12, device="meta")}, ValueError, r"bias: got device meta"),
        ({"grid": (2, 2)}, ValueError, r"grid: got \(2, 2\), but x has 6 tokens"),
        ({"grid": (-3, -2)}, ValueError, r"grid: got \(-3, -2\)"),
        ({"patch_size": 0}, ValueError, r"patch_size: got 0"),
        ({"norm": "batchnorm"}, ValueError, r"norm: got 'batchnorm', allowed are layernorm, rmsnorm"),
        ({"eps": -1.0}, ValueError, r"eps: got -1.0"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype: got dtype torch.int8"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, words: str) -> None:
    arguments = {**make_inputs(2, GRID, 12, 2), "grid": GRID, "patch_size": 2, **change}
    good = {**make_inputs(2, GRID, 12, 2), "grid": GRID, "patch_size": 2}
    for wanted in ((), ("x",), ("weight",)):  # the ways a call may go
        for values in (good, arguments):
            for name in wanted:
                values[name] = values[name].detach().requires_grad_(values[name].is_floating_point())
        final_layer(**good)  # from here on the good call is remembered
        with pytest.raises(error, match=words.replace(r"(12\)", r"(12,?\)")):
            final_layer(**arguments)


def test_flops_are_those_of_the_linear() -> None:
    def count(function: object) -> int:
        with FlopCounterMode(display=False) as counter:
            forward_and_gradients(function, inputs, grid=GRID, patch_size=2)
        return counter.get_total_flops()

    inputs = make_inputs(2, GRID, 12, 2)
    assert count(final_layer) == count(reference.final_layer) > 0


def test_a_forced_backend_that_cannot_serve_says_why() -> None:
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(dispatch.BackendError, match=r"final_layer: backend 'cuda'.*torch: can serve"),
    ):
        final_layer(**make_inputs(2, GRID, 12, 2), grid=GRID, patch_size=2)


# ---- unpatchify ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.sampled_from([1, 2, 3, 4, 8]),
    channels=st.integers(1, 5),
    dtype=st.sampled_from([F32, BF16, F16, F64]),
)
def test_unpatchify_moves_every_value_and_its_gradient(
    batch: int, grid: tuple[int, int], patch: int, channels: int, dtype: torch.dtype
) -> None:
    length, values = grid[0] * grid[1], patch * patch * channels
    tokens = torch.randn(length, batch, values).transpose(0, 1).to(dtype).requires_grad_()
    got = unpatchify(tokens, grid=grid, patch_size=patch)
    assert got.shape == (batch, channels, grid[0] * patch, grid[1] * patch)
    assert got.is_contiguous()
    assert got.data_ptr() != tokens.data_ptr() or not got.numel()
    want = reference.unpatchify(tokens, grid=grid, patch_size=patch) if batch else got
    cotangent = torch.randn(got.shape).to(dtype)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got, tokens, cotangent)
    assert torch.equal(grad, torch.autograd.grad(want, tokens, cotangent)[0] if batch else tokens)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_opcheck_and_gradcheck_of_both_ways(patch: int, channels_first: bool) -> None:
    tokens = torch.randn(2, 6, 2 * patch * patch, dtype=F64, requires_grad=True)
    image = torch.randn(2, 2, 3 * patch, 2 * patch, dtype=F64).transpose(0, 1).requires_grad_()
    torch.library.opcheck(UNPATCHIFY.call, (tokens, *GRID, patch, channels_first))
    torch.library.opcheck(PATCHIFY.call, (image, patch, channels_first, F32))
    for op, tensor, options in ((UNPATCHIFY, tokens, (*GRID, patch)), (PATCHIFY, image, (patch,))):
        options = (*options, channels_first) if op is UNPATCHIFY else (*options, channels_first, F64)
        assert torch.autograd.gradcheck(lambda t, op=op, options=options: op((t,), options), (tensor,))


def test_unpatchify_compiles_as_one_graph() -> None:
    tokens = torch.randn(2, 6, 12, requires_grad=True)
    compiled = torch.compile(unpatchify, fullgraph=True, backend="aot_eager")
    for cotangent in (torch.randn(2, 3, 6, 4), torch.randn(3, 2, 6, 4).transpose(0, 1)):
        out, want = (f(tokens, grid=GRID, patch_size=2) for f in (compiled, unpatchify))
        assert torch.equal(out, want)
        (grad,) = torch.autograd.grad(out, tokens, cotangent)
        assert torch.equal(grad, torch.autograd.grad(want, tokens, cotangent)[0])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_patchify_gathers_rounds_and_undoes_unpatchify(dtype: torch.dtype) -> None:
    """In the order of a convolution's weight, or in that of unpatchify."""
    image = torch.randn(6, 3, 8, 2).transpose(0, 3).requires_grad_()
    by_convolution = torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2)
    in_order = by_convolution.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    for channels_first, want in ((True, by_convolution), (False, in_order)):
        tokens = PATCHIFY((image,), (2, channels_first, dtype))
        assert tokens.is_contiguous()
        assert tokens.dtype == dtype
        assert torch.equal(tokens, want.to(dtype))
        back = UNPATCHIFY((tokens.detach(),), (4, 3, 2, channels_first))
        assert torch.equal(back, image.to(dtype))
        (grad,) = torch.autograd.grad(tokens, image, tokens.detach())
        assert grad.dtype == F32
        assert torch.equal(grad, image.to(dtype).float())


def test_unpatchify_writes_every_output() -> None:
    tokens = torch.randn(2, 6, 12, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        out = unpatchify(tokens, grid=GRID, patch_size=2)
        (grad,) = torch.autograd.grad(out, tokens, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, reference.unpatchify(tokens, grid=GRID, patch_size=2))
    assert torch.equal(grad, torch.ones_like(tokens))


def test_unpatchify_refuses_forward_mode_and_second_derivatives() -> None:
    tokens = torch.randn(2, 6, 12, requires_grad=True)
    function = lambda t: unpatchify(t, grid=GRID, patch_size=2)  # noqa: E731
    with pytest.raises(NotImplementedError, match="unpatchify: forward-mode"):
        torch.func.jvp(function, (tokens.detach(),), (tokens.detach(),))
    (first,) = torch.autograd.grad(function(tokens).square().sum(), tokens, create_graph=True)
    with pytest.raises(NotImplementedError, match="unpatchify_backward is not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "shape, dtype, patch, error, words",
    [
        ((6, 12), F32, 2, ValueError, r"tokens: got shape \(6, 12\)"),
        ((2, 6, 12), torch.int64, 2, TypeError, r"tokens: got dtype torch.int64"),
        ((2, 5, 12), F32, 2, ValueError, r"grid: got \(3, 2\), but tokens has 5 tokens"),
        ((2, 6, 10), F32, 2, ValueError, r"tokens: got shape \(2, 6, 10\); axis 2 .* patch_size² = 4"),
        ((2, 6, 12), F32, -2, ValueError, r"patch_size: got -2"),
    ],
)
def test_unpatchify_errors_name_the_argument(
    shape: tuple[int, ...], dtype: torch.dtype, patch: int, error: type, words: str
) -> None:
    unpatchify(torch.zeros(2, 6, 12), grid=GRID, patch_size=2)  # from here on remembered
    with pytest.raises(error, match=words):
        unpatchify(torch.zeros(shape, dtype=dtype), grid=GRID, patch_size=patch)
