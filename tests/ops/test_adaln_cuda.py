"""The CUDA kernels of the norm family, run on the host by tests/ops/emulation: parity, traffic, order, offsets, refusals."""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import pytest
import torch

from ditkernels.ops import _native, choice, dispatch, norm
from ditkernels.ops.spec import encoded
from tests import numerics
from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F16, F32, F64, OPS, assert_parity, make_inputs, run
from tests.ops.triton_proof.adaln_access import ALL, FAR_SHAPES, PASSES, spread
from tests.ops.triton_proof.adaln_parity import (  # noqa: F401 (they run here on the fixture below)
    test_agrees_with_the_torch_backend_on_which_gradients_exist,
    test_cotangents_of_any_strides,
    test_eps_beside_a_variance_of_its_size,
    test_every_combination_of_optional_arguments,
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_parity,
    test_repeats_bit_for_bit_and_writes_every_output,
)
from tools.kernel_proof import emulated_cuda

LARGE = {"x", "x1", "h", "branch", "dx1", "dh", "dx", "dbranch"}


def contiguous_inputs(
    op: str, batch: int, length: int, width: int, branch: torch.dtype = BF16, present: str = "all"
) -> dict[str, torch.Tensor]:
    made = make_inputs(op, batch, length, width, F32, branch, present)
    return {n: v.contiguous() for n, v in made.items()}


@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 40])
@pytest.mark.parametrize("op", OPS)
def test_parity_of_vectorised_accesses(op: str, width: int) -> None:
    options = {} if op == "gated_residual" else {"out_dtype": BF16}
    assert_parity(op, contiguous_inputs(op, 2, 19, width), **options)


@pytest.mark.parametrize("op", OPS)
def test_parity_of_more_samples_than_a_block_adds_at_a_time(op: str) -> None:
    assert_parity(op, make_inputs(op, 19, 2, 40, F32, F32))


@pytest.mark.parametrize(
    "op, present, forward, backward, width",
    [(*case, 100) for case in PASSES] + [(*case, 384) for case in PASSES if case[1] == ALL],
)
def test_every_tensor_is_touched_once_per_pass(op: str, present: str, forward: int, backward: int, width: int) -> None:
    inputs = contiguous_inputs(op, 3, 21, width, present=present)
    with emulated_cuda.running(tracing=True) as emulation:
        run(getattr(norm, op), inputs)
        counted = emulated_cuda.passes(emulation, LARGE, 3 * 21 * width)
    assert counted == {"forward_rows": forward, "backward_rows": backward}


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op", OPS)
def test_any_order_of_blocks_and_warps_gives_equal_bits(op: str, width: int) -> None:
    inputs = contiguous_inputs(op, 2, 35, width)
    straight = run(getattr(norm, op), inputs)
    for order in range(1, 4):
        with emulated_cuda.running(tracing=True, order=order):
            assert all(map(torch.equal, straight, run(getattr(norm, op), inputs)))


# ---- What is wanted and kept -----------------------------------------------------------------------------------------

INPUTS = ("x", "branch", "gate", "shift", "scale", "branch_bias", "weight", "bias")
# Which gradients of gated_residual_norm are wanted, and which (B, N, D) tensors its backward then reads and writes.
WANTED = [
    (("x",), {"dx1", "dh", "x1"}, {"dx"}),
    (("branch",), {"dx1", "dh", "x1"}, {"dbranch"}),
    (("gate",), {"dx1", "dh", "x1", "branch"}, set()),
    (("branch_bias",), {"dx1", "dh", "x1"}, set()),
    (("scale",), {"dh", "x1"}, set()),
    (("shift", "weight", "bias"), {"dh", "x1"}, set()),
    (("x", "gate"), {"dx1", "dh", "x1", "branch"}, {"dx"}),
    (INPUTS, {"dx1", "dh", "x1", "branch"}, {"dx", "dbranch"}),
]


def check_what_is_wanted(
    wanted: tuple[str, ...],
    read: set[str],
    written: set[str],
    width: int,
    kind: str,
    module: ModuleType | None = None,
) -> None:
    """Each gradient alone has the bits that it has among all; a backward that wants few is given, and touches, what they need."""
    inputs = contiguous_inputs("gated_residual_norm", 3, 21, width)
    dx1, dh = torch.randn(3, 21, width), torch.randn(3, 21, width).to(BF16)
    declared, ops = norm.GATED_RESIDUAL_NORM.declaration, torch.ops.ditkernels

    def backward(names: tuple[str, ...], *reads: torch.Tensor | None) -> dict[str, torch.Tensor]:
        asked = encoded(tuple(inputs[name].dtype if name in names else None for name in INPUTS))
        made = ops.gated_residual_norm_backward_cuda(dx1, dh, *reads, kind, asked)
        return dict(zip(INPUTS, made))

    with emulated_cuda.running(module, tracing=True) as emulation:
        x1, _, stats = ops.gated_residual_norm_cuda(*inputs.values(), kind, 1e-6, BF16, True)
        given = {**inputs, "x1": x1, "stats": stats}
        saved = {"x1", "stats", *declared.saved([name in wanted for name in INPUTS])}
        emulation.reset(True, 0, False, None)
        got = backward(wanted, *[given[name] if name in saved else None for name in declared.reads])
        counts = {n: count for (kernel, n), count in emulation.counts().items() if kernel == "backward_rows"}
        everything = backward(INPUTS, *[given[name] for name in declared.reads])
        emulation.reset(True, 0, False, None)
        given_all = backward(wanted, *[given[name] for name in declared.reads])
        recounted = {n: c for (kernel, n), c in emulation.counts().items() if kernel == "backward_rows"}
    for counted in (counts, recounted):
        reads, writes = ({n for n in LARGE & counted.keys() if counted[n][i]} for i in range(2))
        assert (reads, writes) == (read, written), "touches what is not wanted"
    for name in INPUTS:
        for some in (got, given_all):
            if name in wanted:
                torch.testing.assert_close(some[name], everything[name], rtol=0, atol=0)
                assert some[name].dtype == inputs[name].dtype, "another dtype: not wanted"
            else:
                assert some[name].shape == (0,), "made, and not wanted"


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("width", [40, 384])
@pytest.mark.parametrize("wanted, read, written", WANTED, ids=lambda v: "-".join(sorted(v)))
def test_only_what_is_wanted_is_computed_and_only_what_that_needs_is_read(
    wanted: tuple[str, ...], read: set[str], written: set[str], width: int, kind: str
) -> None:
    check_what_is_wanted(wanted, read, written, width, kind)


def test_sums_that_are_not_wanted_are_not_made() -> None:
    dx1, gate = torch.randn(2, 5, 40), torch.randn(2, 40)
    with emulated_cuda.running(tracing=True) as emulation:
        dbranch, dgate, dbias = torch.ops.ditkernels.gated_residual_backward_cuda(
            dx1, None, gate, None, encoded((BF16, None, None))
        )
        assert {kernel for kernel, _ in emulation.counts()} == {"backward_rows"}
        assert not [name for _, name in emulation.counts() if name in ("partial", "branch")]
    numerics.assert_fp64_agreement(dbranch.double(), (dx1 * gate[:, None]).to(BF16).double(), "dbranch")
    assert (dgate.shape, dbias.shape) == ((0,), (0,))
    with pytest.raises(RuntimeError, match="dgate is wanted, and the branch is not given"):
        torch.ops.ditkernels.gated_residual_backward_cuda(dx1, None, gate, None, encoded((None, F32, None)))


@pytest.mark.parametrize("width", [40, 384])
@pytest.mark.parametrize("kind, size", [("layernorm", 2), ("rmsnorm", 1)])
def test_statistics_are_written_for_a_backward_only(kind: str, size: int, width: int) -> None:
    x = torch.randn(2, 5, width)
    made = []
    for keep in (True, False):
        with emulated_cuda.running(tracing=True) as emulation:
            made.append(torch.ops.ditkernels.modulate_norm_cuda(x, *[None] * 4, kind, 0.1, F32, keep))
            assert (("forward_rows", "stats") in emulation.counts()) == keep
    (h, stats), (bare, nothing) = made
    assert torch.equal(h, bare)
    assert (stats.shape, nothing.shape, nothing.dtype) == ((2, 5, size), (0,), F32)
    _, expected = norm.norm_forward(x.double(), None, None, None, None, kind, 0.1, F32, True)
    torch.testing.assert_close(stats, expected.float())


# ---- Offsets ---------------------------------------------------------------------------------------------------------

FAR = 1 << 31


def there_and_back(tensors: list[torch.Tensor], vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """x1, h, dx, dbranch of gated_residual_norm."""
    x, branch, dx1, dh = tensors
    gate, shift, scale = vectors
    nothing = (None, None, None)
    ops = torch.ops.ditkernels
    x1, h, stats = ops.gated_residual_norm_cuda(x, branch, gate, shift, scale, *nothing, "layernorm", 1e-6, BF16, True)
    wanted = encoded((BF16, BF16, BF16, BF16, BF16, None, None, None))
    dx, dbranch, *_ = ops.gated_residual_norm_backward_cuda(dx1, dh, x1, branch, gate, scale, *nothing, stats, "layernorm", wanted)
    return [x1, h, dx, dbranch]


def randoms(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]


def test_strides_beyond_2_to_the_31_elements() -> None:
    *near, gate, shift, scale = randoms(*[(2, 2, 3)] * 4, *[(2, 3)] * 3)
    expected = there_and_back(near, [gate, shift, scale])
    far = [spread(v, (FAR + 8, 1)) for v in (gate, shift, scale)]
    for strides in ((FAR + 8, 3, 1), (3, FAR + 8, 1), (3, 6, FAR // 2 + 24)):
        got = there_and_back([spread(t, strides) for t in near], far)
        assert all(map(torch.equal, got, expected)), strides


def test_rows_beyond_2_to_the_31_elements() -> None:
    """The last row of tensors of more than 2^31 elements gives the bits that the same row gives in small tensors."""
    batch, length, width = FAR_SHAPES["far sample"]
    near = randoms(*[(1, 1, width)] * 4)
    vectors = randoms(*[(1, width)] * 3)
    expected = there_and_back(near, vectors)
    tensors = [torch.empty(batch, length, width, dtype=BF16) for _ in near]
    assert tensors[0].numel() > FAR + width
    for tensor, row in zip(tensors, near):
        tensor[-1, -1] = row[0, 0]
    with emulated_cuda.running(last_block_only=True):
        got = there_and_back(tensors, [v.expand(batch, width) for v in vectors])
    assert all(torch.equal(a[-1, -1], b[0, 0]) for a, b in zip(got, expected))


def test_refusals_name_what_came() -> None:
    for x, words in (
        (torch.zeros(1, 2, 8, dtype=F64), "torch.float64 is not among the kernels' dtypes"),
        (torch.zeros(1, 1, 4100), "a row of 4100 channels is wider than a block"),
    ):
        with pytest.raises(dispatch.BackendError, match=words):
            norm.modulate_norm(x)


@pytest.mark.parametrize("width", [40, 384])
def test_dtypes_that_no_model_pairs(width: int) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, width, BF16, F16)
    assert_parity("gated_residual_norm", inputs, out_dtype=F32)


@pytest.mark.parametrize("op", OPS)
def test_the_widest_rows(op: str) -> None:
    assert_parity(op, make_inputs(op, 1, 2, 4090, F32, F16), **({} if op == "gated_residual" else {"out_dtype": F16}))


def test_cuda_is_not_chosen_unasked() -> None:
    x = torch.zeros(1, 2, 8)
    arguments = (x, None, None, None, None, "layernorm", 1e-6, F32, False)
    assert norm.MODULATE_NORM.reasons(*arguments)["cuda"] is None
    with mock.patch.object(choice, "AUTOMATIC", ["torch", "cuda"]):
        assert norm.MODULATE_NORM.choose(*arguments) == "torch"
        assert "not measured" in str(norm.MODULATE_NORM.not_automatic("cuda", *arguments))


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKERNELS_CUDA_LIBRARY", "/nowhere/_C.so")
    # Undone before the emulation's own change is, as monkeypatch, an older fixture, would not be.
    with mock.patch.object(_native.CUDA, "absence", None):
        _native.CUDA.load_if_present()
        with pytest.raises(dispatch.BackendError, match=r"/nowhere/_C\.so is not loaded: .*No such file"):
            norm.modulate_norm(torch.zeros(1, 2, 8))
