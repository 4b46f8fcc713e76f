"""The CUDA kernels of adaln, run on the host by tests/emulation: parity, traffic, order, offsets, refusals."""

from __future__ import annotations

from unittest import mock

import emulated_cuda
import pytest
import torch
from adaln_access import ALL, FAR_SHAPES, PASSES, spread
from adaln_parity import (  # noqa: F401 (they run here on the fixture below)
    test_agrees_with_the_torch_backend_on_which_gradients_exist,
    test_cotangents_of_any_strides,
    test_eps_beside_a_variance_of_its_size,
    test_every_combination_of_optional_arguments,
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_parity,
    test_repeats_bit_for_bit_and_writes_every_output,
)
from test_adaln import BF16, F16, F32, F64, OPS, assert_parity, make_inputs, run

import ditkernels
from ditkernels.ops import _cuda, adaln
from ditkernels.ops import _registry as registry

LARGE = {"x", "x1", "h", "branch", "dx1", "dh", "dx", "dbranch"}


@pytest.fixture(autouse=True)
def _emulated():
    with emulated_cuda.running():
        yield


def contiguous_inputs(
    op: str, batch: int, length: int, width: int, branch: torch.dtype = BF16, present: str = "all"
) -> dict[str, torch.Tensor]:
    made = make_inputs(op, batch, length, width, F32, branch, present)
    return {n: v.contiguous() for n, v in made.items()}


@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 40])
@pytest.mark.parametrize("op", OPS)
def test_parity_of_the_wide_path(op: str, width: int) -> None:
    options = {} if op == "gated_residual" else {"out_dtype": BF16}
    assert_parity(op, contiguous_inputs(op, 2, 19, width), **options)


@pytest.mark.parametrize("op", OPS)
def test_parity_of_more_samples_than_a_block_adds_at_a_time(op: str) -> None:
    assert_parity(op, make_inputs(op, 19, 2, 40, F32, F32))


@pytest.mark.parametrize(
    "op, present, forward, backward, width",
    [(*case, 100) for case in PASSES] + [(*case, 384) for case in PASSES if case[1] == ALL],
)
def test_every_tensor_is_touched_once_per_pass(
    op: str, present: str, forward: int, backward: int, width: int
) -> None:
    inputs = contiguous_inputs(op, 3, 21, width, present=present)
    with emulated_cuda.running(tracing=True) as emulation:
        run(getattr(adaln, op), inputs)
        counted = emulated_cuda.passes(emulation, LARGE, 3 * 21 * width)
    assert counted == {"forward_rows": forward, "backward_rows": backward}


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op", OPS)
def test_any_order_of_blocks_and_warps_gives_equal_bits(op: str, width: int) -> None:
    inputs = contiguous_inputs(op, 2, 35, width)
    straight = run(getattr(adaln, op), inputs)
    for order in range(1, 4):
        with emulated_cuda.running(tracing=True, order=order):
            assert all(map(torch.equal, straight, run(getattr(adaln, op), inputs)))


FAR = 1 << 31


def there_and_back(tensors: list[torch.Tensor], vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """x1, h, dx, dbranch of gated_residual_norm."""
    x, branch, dx1, dh = tensors
    gate, shift, scale = vectors
    nothing = (None, None, None)
    ops = torch.ops.ditkernels
    x1, h, mean, rstd = ops.gated_residual_norm_cuda(
        x, branch, gate, shift, scale, *nothing, "layernorm", 1e-6, BF16
    )
    dx, dbranch, *_ = ops.gated_residual_norm_backward_cuda(
        dx1, dh, x1, branch, gate, scale, *nothing, mean, rstd, shift, "layernorm"
    )
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
        with pytest.raises(registry.BackendError, match=words):
            adaln.modulate_norm(x)


@pytest.mark.parametrize("width", [40, 384])
def test_dtypes_that_no_model_pairs(width: int) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, width, BF16, F16)
    assert_parity("gated_residual_norm", inputs, out_dtype=F32)


@pytest.mark.parametrize("op", OPS)
def test_the_widest_rows(op: str) -> None:
    assert_parity(
        op, make_inputs(op, 1, 2, 4090, F32, F16), **({} if op == "gated_residual" else {"out_dtype": F16})
    )


def test_cuda_is_not_chosen_unasked() -> None:
    x = torch.zeros(1, 2, 8)
    arguments = (x, None, None, None, None, "layernorm", 1e-6, F32)
    assert adaln.MODULATE_NORM.choose(*arguments) == "cuda"
    with ditkernels.use_backend("auto"):
        assert adaln.MODULATE_NORM.choose(*arguments) != "cuda"
        assert adaln.MODULATE_NORM.reasons(*arguments)["cuda"] is None
        assert "not measured" in str(adaln.MODULATE_NORM.not_automatic("cuda"))


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKERNELS_CUDA_LIBRARY", "/nowhere/_C.so")
    # Undone before the emulation's own change is, as monkeypatch, an older fixture, would not be.
    with mock.patch.object(_cuda, "_absence", None):
        _cuda.load_if_present()
        with pytest.raises(registry.BackendError, match=r"/nowhere/_C.so does not load"):
            adaln.modulate_norm(torch.zeros(1, 2, 8))
