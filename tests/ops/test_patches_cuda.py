"""The CUDA kernels of patch_embed, final_layer and unpatchify, in the emulation: parity, traffic, order, offsets, refusals."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from ditkernels.ops import _native, choice, dispatch
from ditkernels.ops.image import FINAL_LAYER, PATCH_EMBED, PATCHIFY, final_layer, patch_embed, unpatchify
from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops import test_final_layer, test_patch_embed
from tests.ops.test_final_layer import OPTIONAL
from tests.ops.test_patch_embed import BF16, F16, F32, F64, forward_and_gradients, make_inputs
from tests.ops.triton_proof.adaln_access import FAR, spread
from tests.ops.triton_proof.patches_parity import (  # noqa: F401 (they run here on the fixture below)
    FINAL,
    case_id,
    test_a_wider_image_is_not_rounded_to_the_weights_dtype,
    test_eps_beside_a_variance_of_its_size,
    test_final_layer_at_large_shifts_and_biases,
    test_final_layer_saves_and_computes_what_the_wanted_gradients_need,
    test_final_layer_with_every_combination_of_optional_arguments,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_parity_of_patch_embed,
    test_patch_embed_saves_and_computes_what_the_wanted_gradients_need,
    test_patch_embed_with_and_without_optional_arguments,
    test_repeats_bit_for_bit_and_writes_every_output,
    test_rows_are_rounded_to_the_weights_dtype_forward_and_backward,
    test_unpatchify_moves_every_value_and_its_gradient,
)
from tests.ops.triton_proof.patches_parity import test_parity_of_final_layer as parity_of_final_layer
from tools.kernel_proof import emulated_cuda


def final_inputs(
    batch: int,
    grid: tuple[int, int],
    width: int,
    patch: int,
    stream: torch.dtype = F32,
    rest: torch.dtype = BF16,
    channels: int = 8,
    kept: tuple[str, ...] = OPTIONAL,
) -> dict[str, Tensor]:
    """Inputs as a model makes them: all but the vectors of a sample contiguous."""
    made = test_final_layer.make_inputs(batch, grid, width, patch, stream, rest, channels, kept)
    return {n: v if n in ("gate", "shift", "scale") else v.contiguous() for n, v in made.items()}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width, patch", [(384, 8), (768, 4), (1024, 2), (1152, 2), (40, 2)])
def test_parity_of_vectorised_accesses_of_patch_embed(width: int, patch: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, (5, 7), width, patch, F32, dtype, F32)
    test_patch_embed.assert_parity(inputs, dtype)


@pytest.mark.parametrize("stream, rest", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16), (BF16, F16)])
@pytest.mark.parametrize("width, patch", [(384, 8), (768, 4), (1024, 2), (1152, 2), (40, 2)])
def test_parity_of_vectorised_accesses_of_final_layer(width: int, patch: int, stream: torch.dtype, rest: torch.dtype) -> None:
    grid = (2, 3) if patch == 8 else (5, 7)
    inputs = final_inputs(2, grid, width, patch, stream, rest)
    test_final_layer.assert_parity(inputs, grid=grid, patch_size=patch)


@pytest.mark.parametrize("case", [case for case in FINAL if case[2] <= _native.MAX_WIDTH], ids=case_id)
def test_parity_of_final_layer(case: tuple) -> None:
    parity_of_final_layer(case)


@pytest.mark.parametrize("width", [4090, _native.MAX_WIDTH])
def test_the_widest_rows_of_final_layer(width: int) -> None:
    """What shared memory does not hold of sixteen rows it holds of fewer."""
    inputs = test_final_layer.make_inputs(1, (1, 7), width, 1, kept=("shift", "scale"))
    test_final_layer.assert_parity(inputs, grid=(1, 7), patch_size=1)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_weight_that_begins_anywhere(dtype: torch.dtype) -> None:
    """The emulation faults on an access that is not aligned."""
    embedded, final = make_inputs(2, (3, 2), 16, 2, F32, dtype), final_inputs(2, (3, 2), 16, 2, F32, dtype)
    for inputs, function, options in (
        (embedded, patch_embed, {}),
        (final, final_layer, {"grid": (3, 2), "patch_size": 2}),
    ):
        weight = inputs["weight"]
        moved = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view_as(weight).copy_(weight)
        want, got = (function(**{**inputs, "weight": w}, **options) for w in (weight, moved))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("width", [40, 100, 192, 384])
@pytest.mark.parametrize("kept, reads", [(OPTIONAL, 2), (("shift", "scale", "bias"), 1)])
def test_final_layer_reads_every_tensor_once(width: int, kept: tuple[str, ...], reads: int) -> None:
    inputs = final_inputs(2, (17, 8), width, 2, kept=kept)
    with emulated_cuda.running(tracing=True) as emulation:
        final_layer(**inputs, grid=(17, 8), patch_size=2)
        counted = emulated_cuda.passes(emulation, {"x", "branch"}, 2 * 136 * width)
        image = emulated_cuda.passes(emulation, {"out"}, 2 * 136 * 4 * 8)
    assert (counted, image) == ({"final_rows": reads}, {"final_rows": 1})


def test_the_backward_of_final_layer_is_made_of_the_norms_kernels_a_gather_and_products() -> None:
    inputs = final_inputs(2, (17, 8), 40, 2)
    with emulated_cuda.running(tracing=True) as emulation:
        test_final_layer.forward_and_gradients(final_layer, inputs, grid=(17, 8), patch_size=2)
        ran = {kernel for kernel, _ in emulation.counts()}
    assert ran == {
        "final_rows",
        "forward_rows",
        "backward_rows",
        "add_chunks",
        "add_samples",
        "gather_values",
    }


@pytest.mark.parametrize("width", [100, 384])
def test_patch_embed_writes_every_token_once(width: int) -> None:
    inputs = make_inputs(2, (17, 8), width, 2, F32, BF16, F32)
    with emulated_cuda.running(tracing=True) as emulation:
        forward_and_gradients(patch_embed, inputs, out_dtype=BF16)
        counted = emulated_cuda.passes(emulation, {"y"}, 2 * 136 * width)
        ran = {kernel for kernel, _ in emulation.counts()}
    assert counted == {"embed": 1}
    # Backward gathers the patches for the weight's product, and puts their gradients back.
    assert ran == {"embed", "gather_values", "place_values"}


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_gather_touches_every_value_once_and_rounds(channels_first: bool) -> None:
    image = torch.randn(2, 3, 6, 8)
    with emulated_cuda.running(tracing=True) as emulation:
        tokens = PATCHIFY((image,), (2, channels_first, BF16))
        moved = torch.ops.ditkernels.unpatchify_cuda(tokens, 3, 4, 2, channels_first)
        counted = emulated_cuda.passes(emulation, {"image", "tokens"}, image.numel())
    assert counted == {"gather_values": 2, "place_values": 2}
    assert torch.equal(moved, image.to(BF16))


def run_patch_embed(width: int, dtype: torch.dtype) -> list[Tensor]:
    return forward_and_gradients(patch_embed, make_inputs(2, (1, 35), width, 2, F32, dtype, dtype))


def run_final_layer(width: int, dtype: torch.dtype, patch: int = 2) -> list[Tensor]:
    inputs = final_inputs(2, (1, 70), width, patch, F32, dtype)
    return test_final_layer.forward_and_gradients(final_layer, inputs, grid=(1, 70), patch_size=patch)


@pytest.mark.parametrize(
    "run",
    [
        lambda: run_patch_embed(100, F32),
        lambda: run_patch_embed(384, BF16),
        lambda: run_final_layer(100, F32),
        lambda: run_final_layer(384, BF16),
        lambda: run_final_layer(40, BF16, 8),
    ],
    ids=["embed any", "embed 384", "final any", "final 384", "final patch 8"],
)
def test_any_order_of_blocks_and_warps_gives_equal_bits(run: Callable[[], list[Tensor]]) -> None:
    straight = run()
    for order in range(1, 4):
        with emulated_cuda.running(tracing=True, order=order):
            assert all(map(torch.equal, straight, run()))


def everything(
    x: Tensor,
    branch: Tensor,
    image: Tensor,
    vectors: list[Tensor],
    weight: Tensor,
    tokens: Tensor,
    pos: Tensor,
    bias: Tensor,
    patch_weight: Tensor,
) -> list[Tensor]:
    ops = torch.ops.ditkernels
    tensors = (x, branch, vectors[0], None, *vectors[1:], None, None, weight, bias)
    moved = [
        made
        for channels_first in (False, True)
        for made in (
            ops.unpatchify_cuda(tokens, 1, 2, 2, channels_first),
            ops.patchify_cuda(image, 2, channels_first, F32),
        )
    ]
    return [
        ops.final_layer_cuda(*tensors, 1, 2, 2, "layernorm", 1e-6, F32),
        ops.patch_embed_cuda(image, patch_weight, None, pos, F32),
        *moved,
    ]


def test_strides_beyond_2_to_the_31_elements() -> None:
    """Tensors whose samples, rows or channels lie more than 2^31 elements apart give the bits of packed ones."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, branch, image = randn(2, 2, 3).to(BF16), randn(2, 2, 3).to(BF16), randn(2, 1, 2, 4).to(BF16)
    vectors = [randn(2, 3).to(BF16) for _ in range(3)]
    weight, tokens, pos = randn(4, 3).to(BF16), randn(2, 2, 4).to(BF16), randn(1, 2, 3).to(BF16)
    rest = (randn(4), randn(3, 1, 2, 2))
    expected = everything(x, branch, image, vectors, weight, tokens, pos, *rest)
    far, near = FAR + 8, FAR // 2 + 24  # the latter for three and more
    for tall, wide, of_weight, of_image in (
        ((far, 4, 1), (far, 1), (near, 1), (far, 8, 4, 1)),
        ((4, far, 1), (1, near), (1, near), (8, 8, far, 1)),
        ((3, 6, near), (far, 1), (1, near), (8, 8, 4, near)),
    ):
        got = everything(
            spread(x, tall),
            spread(branch, tall),
            spread(image, of_image),
            [spread(v, (far, 1)) for v in vectors],
            spread(weight, of_weight),
            spread(tokens, tall),
            spread(pos[0], wide)[None],
            *rest,
        )
        for i, (a, b) in enumerate(zip(got, expected)):
            assert torch.equal(a, b), f"output {i} at strides {tall}, {wide}, {of_image}"


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
    with pytest.raises(dispatch.BackendError, match="float64 is not among the kernels' dtypes"):
        patch_embed(torch.zeros(1, 1, 2, 2, dtype=F64), torch.zeros(4, 1, 2, 2))
    with pytest.raises(dispatch.BackendError, match="the weight is empty"):
        patch_embed(torch.zeros(1, 0, 2, 2), torch.zeros(4, 0, 2, 2))
    with pytest.raises(dispatch.BackendError, match="float64 is not among the kernels' dtypes"):
        unpatchify(torch.zeros(1, 1, 4, dtype=F64), grid=(1, 1), patch_size=2)
    x, weight = torch.zeros(1, 1, 4_097), torch.zeros(4, 4_097)
    with pytest.raises(dispatch.BackendError, match="a row of 4097 channels is wider than a block"):
        final_layer(x, None, None, weight, grid=(1, 1), patch_size=2)
    with pytest.raises(dispatch.BackendError, match="the weight is empty"):
        final_layer(torch.zeros(1, 1, 8), None, None, torch.zeros(0, 8), grid=(1, 1), patch_size=2)


def test_cuda_is_not_chosen_unasked() -> None:
    nothing = (None,) * 7
    final = (torch.zeros(1, 1, 8), *nothing, torch.zeros(4, 8), None, 1, 1, 2, "layernorm", 1e-6, F32)
    embed = (torch.zeros(1, 1, 2, 2), torch.zeros(4, 1, 2, 2), None, None, F32)
    for op, arguments in ((FINAL_LAYER, final), (PATCH_EMBED, embed)):
        assert op.reasons(*arguments)["cuda"] is None
        with mock.patch.object(choice, "AUTOMATIC", ["torch", "cuda"]):
            assert "not measured" in str(op.not_automatic("cuda", *arguments))
