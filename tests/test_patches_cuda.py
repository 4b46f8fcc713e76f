"""The CUDA kernels of patch_embed, run on the host by tests/emulation: parity, traffic, order, offsets, refusals."""

from __future__ import annotations

import emulated_cuda
import pytest
import test_patch_embed
import torch
from adaln_access import FAR, spread
from patches_parity import (  # noqa: F401 (they run here on the fixture below)
    test_parity_of_patch_embed,
    test_patch_embed_computes_only_the_gradients_asked_for,
    test_patch_embed_with_and_without_optional_arguments,
)
from test_patch_embed import BF16, F16, F32, F64, forward_and_gradients, make_inputs
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops.patch_embed import patch_embed


@pytest.fixture(autouse=True)
def _emulated():
    with emulated_cuda.running():
        yield


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width, patch", [(384, 8), (768, 4), (1024, 2), (1152, 2), (40, 2)])
def test_parity_of_the_wide_path(width: int, patch: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, (5, 7), width, patch, F32, dtype, F32)
    test_patch_embed.assert_parity(inputs, dtype)


@pytest.mark.parametrize("width", [100, 384])
def test_patch_embed_touches_every_tensor_once_a_pass(width: int) -> None:
    inputs = make_inputs(2, (17, 8), width, 2, F32, BF16, F32)
    with emulated_cuda.running(tracing=True) as emulation:
        forward_and_gradients(patch_embed, inputs, out_dtype=BF16)
        counted = emulated_cuda.passes(emulation, {"y", "dy"}, 2 * 136 * width)
    # The gradients of x and of the positions read dy once more each, and only where they are asked for.
    assert counted == {"embed": 1, "weight_products": 1, "image_gradients": 1, "add_positions": 1}


@pytest.mark.parametrize("wanted", [("weight", "bias"), ("bias",), ("pos_embed",), ("x",)])
def test_a_gradient_that_is_not_asked_for_costs_no_pass(wanted: tuple[str, ...]) -> None:
    with emulated_cuda.running(tracing=True) as emulation:
        forward_and_gradients(patch_embed, make_inputs(2, (3, 2), 16, 2), wanted)
        assert emulated_cuda.passes(emulation, {"dy"}, 2 * 6 * 16).total() == 1


@pytest.mark.parametrize("patch, dtype, visits", [(8, BF16, 1), (8, F32, 2), (4, F32, 1)])
def test_dy_is_read_once_for_as_many_values_as_a_block_holds(
    patch: int, dtype: torch.dtype, visits: int
) -> None:
    with emulated_cuda.running(tracing=True) as emulation:
        inputs = make_inputs(2, (2, 2), 16, patch, F32, dtype, dtype)
        forward_and_gradients(patch_embed, inputs, ("weight",), out_dtype=dtype)
        read, *_ = emulation.counts()["weight_products", "dy"]
    assert read == visits * 2 * 4 * 16


def test_any_order_of_blocks_and_warps_gives_equal_bits() -> None:
    for width, dtype in ((100, F32), (384, BF16)):
        inputs = make_inputs(2, (1, 35), width, 2, F32, dtype, dtype)
        straight = forward_and_gradients(patch_embed, inputs)
        for order in range(1, 4):
            with emulated_cuda.running(tracing=True, order=order):
                assert all(map(torch.equal, straight, forward_and_gradients(patch_embed, inputs)))


def everything(x: Tensor, image: Tensor, pos: Tensor, weight: Tensor) -> list[Tensor]:
    ops = torch.ops.ditkernels
    y = ops.patch_embed_cuda(image, weight, None, pos, F32)
    return [y, *ops.patch_embed_backward_cuda(x, image, weight, None, pos, [True, True, False, True])]


def test_strides_beyond_2_to_the_31_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    x, image, pos = (torch.randn(s, generator=generator).to(BF16) for s in ((2, 2, 3), (2, 1, 2, 4), (2, 3)))
    weight = torch.randn(3, 1, 2, 2, generator=generator)
    expected = everything(x, image, pos, weight)
    far, near = FAR + 8, FAR // 2 + 24  # the latter for three and more
    for tall, wide, of_image in (
        ((far, 4, 1), (far, 1), (far, 8, 4, 1)),
        ((4, far, 1), (1, near), (8, 8, far, 1)),
        ((3, 6, near), (far, 1), (8, 8, 4, near)),
    ):
        got = everything(spread(x, tall), spread(image, of_image), spread(pos, wide), weight)
        assert all(map(torch.equal, got, expected)), tall


def test_lines_beyond_2_to_the_31_elements() -> None:
    """The last lines of tokens of more than 2^31 elements give what the same lines give alone."""
    batch, width = 1 << 22, 520
    weight = torch.randn(width, 1, 1, 1)
    image = torch.empty(batch, 1, 1, 1)
    image[-64:] = torch.randn(64, 1, 1, 1)
    expected = patch_embed(image[-64:].clone(), weight, out_dtype=BF16)
    with emulated_cuda.running(last_block_only=True):
        got = patch_embed(image, weight, out_dtype=BF16)
    assert got.numel() > FAR
    assert torch.equal(got[-32:, :, 512:], expected[-32:, :, 512:])


def test_refusals_name_what_came() -> None:
    with pytest.raises(registry.BackendError, match="float64 is not among the kernels' dtypes"):
        patch_embed(torch.zeros(1, 1, 2, 2, dtype=F64), torch.zeros(4, 1, 2, 2))
    with pytest.raises(registry.BackendError, match="the weight is empty"):
        patch_embed(torch.zeros(1, 0, 2, 2), torch.zeros(4, 0, 2, 2))
