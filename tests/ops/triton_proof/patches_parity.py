"""patch_embed, final_layer and unpatchify on the triton backend, interpreted: forward and gradients by the numerical contract."""

from __future__ import annotations

import itertools

import pytest
import torch

from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.ops.image import (
    FINAL_LAYER,
    PATCH_EMBED,
    PATCHIFY,
    UNPATCHIFY,
    final_layer,
    patch_embed,
    unpatchify,
)
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops import test_final_layer, test_patch_embed
from tests.ops.test_final_layer import BF16, F16, F32, F64, OPTIONAL

MODELS_OWN = ("branch", "gate", "shift", "scale", "bias")

# (batch, grid, width, patch, channels, dtypes ...): the paper's widths and patch sizes, one token, grids that fill no block,
# several blocks; values of a patch that fill no tile, one tile, several.
FINAL = [
    (1, (1, 1), 384, 2, 8, F32, F32, F32, "layernorm", MODELS_OWN),
    (2, (7, 5), 96, 2, 3, F32, BF16, F32, "rmsnorm", OPTIONAL),
    (3, (1, 3), 768, 2, 8, BF16, BF16, F32, "layernorm", MODELS_OWN),
    (2, (2, 1), 1152, 2, 8, BF16, F32, BF16, "rmsnorm", ("shift", "scale")),
    (2, (2, 1), 1024, 4, 8, F16, F16, F32, "layernorm", OPTIONAL),
    (1, (1, 17), 1152, 4, 8, F32, BF16, BF16, "layernorm", MODELS_OWN),
    (2, (2, 1), 384, 8, 8, BF16, BF16, BF16, "layernorm", OPTIONAL),
    (3, (2, 2), 100, 8, 3, F32, F16, F32, "rmsnorm", MODELS_OWN),
    (2, (3, 3), 7, 1, 4, F32, F32, F32, "layernorm", OPTIONAL),
    (2, (1, 2), 3, 3, 1, F32, F32, F32, "rmsnorm", OPTIONAL),
    (1, (1, 2), 2500, 2, 4, F32, F32, F32, "layernorm", ("branch", "branch_bias")),
    (1, (1, 2), 4100, 1, 5, F32, BF16, F32, "layernorm", OPTIONAL),
    (1, (1, 2), 4128, 1, 4, F32, F32, F32, "rmsnorm", ("shift", "scale")),
]
EMBED = [
    (1, (1, 1), 384, 2, F32, F32, F32, F32, 4),
    (3, (7, 5), 100, 2, F32, BF16, F32, F32, 4),
    (2, (3, 2), 768, 4, BF16, BF16, BF16, BF16, 4),
    (2, (1, 3), 1152, 2, BF16, F32, F32, BF16, 4),
    (1, (2, 2), 1024, 8, F16, F16, F32, F16, 4),
    (2, (1, 3), 96, 8, F32, BF16, BF16, F32, 5),
    (4, (11, 7), 24, 2, F16, F32, F32, BF16, 3),
    (2, (1, 5), 7, 3, F32, F32, F32, F32, 1),
    (2, (3, 1), 1, 1, F32, F32, F32, F32, 2),
]


def case_id(case: tuple) -> str:
    return "-".join(str(v).replace("torch.", "") for v in case[:9])


@pytest.mark.parametrize("case", FINAL, ids=case_id)
def test_parity_of_final_layer(case: tuple) -> None:
    batch, grid, width, patch, channels, stream, rest, out_dtype, norm, kept = case
    inputs = test_final_layer.make_inputs(batch, grid, width, patch, stream, rest, channels, kept)
    test_final_layer.assert_parity(inputs, grid=grid, patch_size=patch, norm=norm, out_dtype=out_dtype)


def test_final_layer_with_every_combination_of_optional_arguments() -> None:
    norms = itertools.cycle(reference.NORMS)
    for count in range(len(OPTIONAL) + 1):
        for kept in itertools.combinations(OPTIONAL, count):
            if count in (3, 4, 5) or ("branch" not in kept and {"gate", "branch_bias"} & set(kept)):
                continue
            inputs = test_final_layer.make_inputs(2, (3, 1), 11, 2, kept=kept)
            test_final_layer.assert_parity(inputs, grid=(3, 1), patch_size=2, norm=next(norms))


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_eps_beside_a_variance_of_its_size(norm: str, eps: float) -> None:
    inputs = test_final_layer.make_inputs(2, (3, 1), 12, 2, kept=("shift", "scale"))
    inputs["x"] = inputs["x"] * eps**0.5
    test_final_layer.assert_parity(inputs, grid=(3, 1), patch_size=2, norm=norm, eps=eps)


@pytest.mark.parametrize("case", EMBED, ids=case_id)
def test_parity_of_patch_embed(case: tuple) -> None:
    batch, grid, width, patch, x, weight, pos, out_dtype, channels = case
    inputs = test_patch_embed.make_inputs(batch, grid, width, patch, x, weight, pos, channels)
    test_patch_embed.assert_parity(inputs, out_dtype)


@pytest.mark.parametrize("kept", [("bias",), ("pos_embed",), ()])
def test_patch_embed_with_and_without_optional_arguments(kept: tuple[str, ...]) -> None:
    inputs = test_patch_embed.make_inputs(2, (3, 2), 12, 2)
    test_patch_embed.assert_parity({n: v for n, v in inputs.items() if n in ("x", "weight", *kept)})


@pytest.mark.parametrize("wanted", [("weight", "bias"), ("x",), ("pos_embed",), ("bias",)])
def test_patch_embed_saves_and_computes_what_the_wanted_gradients_need(wanted: tuple[str, ...]) -> None:
    test_patch_embed.test_only_what_the_wanted_gradients_need_is_saved(wanted)


@pytest.mark.parametrize("kept", [OPTIONAL, ("shift", "scale", "bias")])
def test_final_layer_saves_and_computes_what_the_wanted_gradients_need(kept: tuple[str, ...]) -> None:
    test_final_layer.test_only_what_the_wanted_gradients_need_is_saved(kept, "layernorm", "thin")


@pytest.mark.parametrize("large", ["shift", "norm_bias", "bias"])
def test_final_layer_at_large_shifts_and_biases(large: str) -> None:
    for dtype in (F32, BF16):
        inputs = test_final_layer.make_inputs(2, (3, 2), 96, 2, F32, dtype)
        inputs[large] = inputs[large] * 100
        test_final_layer.assert_parity(inputs, grid=(3, 2), patch_size=2)


@pytest.mark.parametrize("batch, grid", [(0, (3, 2)), (2, (0, 3)), (0, (0, 0))])
def test_nothing_in_gives_nothing_out_and_zero_gradients(batch: int, grid: tuple[int, int]) -> None:
    inputs = test_final_layer.make_inputs(batch, grid, 12, 2)
    out, *grads = test_final_layer.forward_and_gradients(final_layer, inputs, grid=grid, patch_size=2)
    embedded = test_patch_embed.make_inputs(batch, grid, 12, 2)
    tokens, *more = test_patch_embed.forward_and_gradients(patch_embed, embedded)
    assert out.numel() == tokens.numel() == 0
    assert all((g == 0).all() for g in (*grads, *more))
    for got, like in zip((*grads, *more), (*inputs.values(), *embedded.values())):
        assert got.shape == like.shape


@pytest.mark.parametrize(
    "batch, grid, patch, channels, dtype",
    [
        (2, (3, 2), 2, 3, BF16),
        (1, (1, 17), 4, 8, F32),
        (3, (5, 1), 8, 1, F16),
        (1, (2, 40), 2, 8, BF16),
        (2, (3, 2), 1, 3, F32),
        (0, (3, 2), 2, 3, F32),
    ],
)
def test_unpatchify_moves_every_value_and_its_gradient(
    batch: int, grid: tuple[int, int], patch: int, channels: int, dtype: torch.dtype
) -> None:
    tokens = torch.randn(grid[0] * grid[1], batch, patch * patch * channels).transpose(0, 1).to(dtype)
    image = torch.randn(batch, channels, grid[1] * patch, grid[0] * patch).to(dtype).transpose(2, 3)
    for channels_first in (False, True):
        got = move_there_and_back(tokens, image, grid, patch, channels_first)
        with dispatch.use_backend("torch"):
            want = move_there_and_back(tokens, image, grid, patch, channels_first)
        assert all(map(torch.equal, got, want))
        assert all(moved.is_contiguous() for moved in got)


def move_there_and_back(
    tokens: torch.Tensor, image: torch.Tensor, grid: tuple[int, int], patch: int, channels_first: bool
) -> list[torch.Tensor]:
    """What unpatchify and patchify give, then their gradients, each for the other's input."""
    tokens, image = tokens.detach().requires_grad_(), image.detach().requires_grad_()
    placed = UNPATCHIFY((tokens,), (*grid, patch, channels_first))
    gathered = PATCHIFY((image,), (patch, channels_first, image.dtype))
    return [placed, gathered, *torch.autograd.grad([placed, gathered], [tokens, image], [image, tokens])]


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    final = test_final_layer.make_inputs(2, (1, 19), 100, 2, BF16, BF16)
    embedded = test_patch_embed.make_inputs(2, (1, 19), 100, 2, BF16, BF16)

    def run() -> list[torch.Tensor]:
        return [
            *test_final_layer.forward_and_gradients(final_layer, final, grid=(1, 19), patch_size=2),
            *test_patch_embed.forward_and_gradients(patch_embed, embedded),
        ]

    first = run()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_are_rounded_to_the_weights_dtype_forward_and_backward() -> None:
    """With an identity for weight the image shows the rows, and dW of one token's cotangent shows them again, to the bit."""
    inputs = test_final_layer.make_inputs(1, (1, 2), 96, 1, F32, BF16, channels=96)
    inputs["weight"] = torch.eye(96, dtype=BF16).requires_grad_()
    del inputs["bias"]
    rows = final_layer(**inputs, grid=(1, 2), patch_size=1, out_dtype=F32)
    assert torch.equal(rows, rows.to(BF16).float())
    rows[0, 0, 0, 1].backward()
    assert torch.equal(inputs["weight"].grad[0], rows[0, :, 0, 1].to(BF16))


def test_a_wider_image_is_not_rounded_to_the_weights_dtype() -> None:
    test_final_layer.test_a_wider_image_is_not_rounded_to_the_weights_dtype()


def test_what_the_kernels_cannot_take_is_refused_before_launch() -> None:
    x, weight = torch.zeros(1, 1, 5), torch.zeros(0, 5)
    with pytest.raises(dispatch.BackendError, match="the weight is empty"):
        final_layer(x, None, None, weight, grid=(1, 1), patch_size=2)
    with pytest.raises(dispatch.BackendError, match="float64 is not among the kernels' dtypes"):
        patch_embed(torch.zeros(1, 1, 2, 2, dtype=F64), torch.zeros(4, 1, 2, 2))
    with pytest.raises(dispatch.BackendError, match="float64 is not among the kernels' dtypes"):
        unpatchify(torch.zeros(1, 1, 4, dtype=F64), grid=(1, 1), patch_size=2)
    with dispatch.use_backend("auto"):
        nothing = (None,) * 7
        assert FINAL_LAYER.choose(x, *nothing, weight, None, 1, 1, 2, "layernorm", 1e-6, F32) != "triton"
        assert PATCH_EMBED.choose(torch.zeros(1, 0, 2, 2), torch.zeros(4, 0, 2, 2), None, None, F32) == "torch"
