"""Every planted fault in the kernels of patch_embed, final_layer and unpatchify is found by the parity checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ditkernels import reference
from ditkernels.ops.image import final_layer, patch_embed, triton, unpatchify
from tests import numerics
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops import test_constant_rows, test_final_layer, test_patch_embed
from tests.ops.test_final_layer import F32
from tools.kernel_proof.interpreted import guarded

# What is replaced in the kernels' source, and by what.
SHARED = {
    "rows and columns of the grid swapped": ("(tokens // grid_w * P)", "(tokens % grid_w * P)"),
}
FINAL = SHARED | {
    "row of the patch ignored": ("= values // (P * O), values // O", "= values // (P * O) * 0, values // O"),
    "column of the patch ignored": ("values // O % P, values % O", "values // O % P * 0, values % O"),
    "output channel ignored": ("values // O % P, values % O\n", "values // O % P, values % O * 0\n"),
    "shift ignored": ("normed += channels_of(shift", "normed += 0.0 * channels_of(shift"),
    "scale without the one": ("normed *= 1.0 + channels_of(scale", "normed *= channels_of(scale"),
    "norm's weight ignored": ("normed *= channels_of(weight", "normed *= 1.0 + 0.0 * channels_of(weight"),
    "norm's bias ignored": ("normed += channels_of(bias", "normed += 0.0 * channels_of(bias"),
    "gate zeroed": ("through *= channels_of(gate", "through *= 0.0 * channels_of(gate"),
    "branch bias ignored": ("through += channels_of(branch_bias", "through += 0.0 * channels_of(branch_bias"),
    "batch index of the shift dropped": ("shift_b), sample)", "shift_b), 0)"),
    "batch index of the scale dropped": ("scale_b), sample)", "scale_b), 0)"),
    "batch index of the gate dropped": ("gate_b), sample)", "gate_b), 0)"),
    "batch index of x dropped": ("x_n, x_d), sample,", "x_n, x_d), 0,"),
    "batch index of the branch dropped": ("branch_n, branch_d), sample,", "branch_n, branch_d), 0,"),
    "batch index of the image dropped": ("out_h, out_w), sample,", "out_h, out_w), 0,"),
    "row mask dropped": ("live = tokens < N", "live = tokens >= 0"),
    "value mask dropped": ("live & (values < V))", "live & (values >= 0))"),
    "mean forgotten": ("apart = tl.div_rn(", "apart = 0.0 * tl.div_rn("),
    "mean as it was rounded": ("for _ in tl.static_range(2)", "for _ in tl.static_range(1)"),
    "a variance that overflows taken for infinite": ("scaling += 0.0 * square", "scaling += 0.0"),
    "eps dropped": ("D * 1.0) + eps)", "D * 1.0) + 0.0 * eps)"),
    "bias of the linear ignored": ("z += tl.load(bias", "z += 0.0 * tl.load(bias"),
    "the last values lost": (
        "for first in range(0, V, VALUES):",
        "for first in range(0, min(V, VALUES), VALUES):",
    ),
    "tokens of the wrong row": ("token = patch_row.to(tl.int64) * grid_w", "token = 0 * grid_w"),
    "channel and row of unpatchify swapped": (
        "channel, row = line // P, line % P",
        "row, channel = line // P, line % P",
    ),
    "value of the wrong channel": ("(row * P + column % P) * O + channel", "(row * P + column % P) * O"),
    "sample of the tokens dropped": ("at = tokens + sample * tokens_b", "at = tokens + 0 * tokens_b"),
    "sample of the gathered image dropped": (
        "places_of(image, sample, token, element",
        "places_of(image, 0, token, element",
    ),
}
WIDE = {
    "mean about zero": ("about = _x1(x,", "about = 0.0 * _x1(x,"),
    "mean of the first pieces alone": (
        "elif CENTRED:\n        for i in range(PIECES)",
        "elif CENTRED:\n        for i in range(PIECES - 1)",
    ),
    "variance of the first pieces alone": (
        "    else:\n        for i in range(PIECES):\n            piece",
        "    else:\n        for i in range(PIECES - 1):\n            piece",
    ),
    "product of the first pieces alone": (
        "        else:\n            for i in range(PIECES):",
        "        else:\n            for i in range(PIECES - 1):",
    ),
    "rows not modulated": (
        "h = modulated(normed, shift, scale, norm_weight, norm_bias, columns, ROUND, D)",
        "h = normed",
    ),
}
EMBED = SHARED | {
    "sample ignored": ("sample, token = sample + token // N", "sample, token = sample + 0 * (token // N)"),
    "channel ignored": ("values // (P * P), values // P", "values // (P * P) * 0, values // P"),
    "row and column of the patch swapped": ("values // P % P, values % P", "values % P, values // P % P"),
    "line mask dropped": ("live = line < lines", "live = line >= 0"),
    "bias ignored": ("product += tl.load(bias", "product += 0.0 * tl.load(bias"),
    "positions ignored": ("product += load_piece((pos", "product += 0.0 * load_piece((pos"),
    "positions of one token": ("(pos + token.to(tl.int64) * pos_n", "(pos + token.to(tl.int64) * 0"),
    "x not rounded to the weight's dtype": (".to(weight.dtype.element_ty).to(PRODUCT)", ".to(PRODUCT)"),
    "values beyond the first tile lost": (
        "for start in range(0, V, VALUES)",
        "for start in range(0, min(V, VALUES), VALUES)",
    ),
    "dx of the wrong order": ("value = line * P + column % P if", "value = line + column % P * 0 if"),
}


def check_final_layer() -> None:
    """Blocks and tiles that are not full, several of each, every argument, an eps that matters, two samples."""
    with guarded():
        inputs = test_final_layer.make_inputs(2, (5, 8), 70, 2, F32, F32)
        test_final_layer.assert_parity(inputs, grid=(5, 8), patch_size=2, eps=0.1)
        inputs = test_final_layer.make_inputs(2, (1, 3), 9, 8, F32, F32)
        test_final_layer.assert_parity(inputs, grid=(1, 3), patch_size=8)
        test_constant_rows.check("final_layer", 384, F32, test_constant_rows.constant, 0.0)
        test_constant_rows.check_overflow("final_layer", 48, F32, compiled=True)
        tokens = torch.arange(2 * 6 * 12.0).reshape(2, 6, 12).requires_grad_()
        image = unpatchify(tokens, grid=(3, 2), patch_size=2)
        want = reference.unpatchify(tokens, grid=(3, 2), patch_size=2)
        torch.testing.assert_close(image, want, rtol=0, atol=0)
        cotangent = image.detach().flip(0)
        for got, expected in zip(torch.autograd.grad(image, tokens, cotangent), torch.autograd.grad(want, tokens, cotangent)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def check_wide_rows() -> None:
    """Rows that no program holds."""
    with guarded(), torch.no_grad():
        inputs = test_final_layer.make_inputs(1, (1, 2), 4100, 1, F32, F32, channels=5)
        exact = {name: value.double() for name, value in inputs.items()}
        got, low, true = (
            function(**given, grid=(1, 2), patch_size=1)
            for function, given in (
                (final_layer, inputs),
                (reference.final_layer, inputs),
                (reference.final_layer, exact),
            )
        )
        numerics.assert_contract(got, low, true)
    test_constant_rows.check("final_layer", 4104, F32, test_constant_rows.constant, 0.0)


def check_patch_embed() -> None:
    with guarded():
        test_patch_embed.assert_parity(test_patch_embed.make_inputs(3, (7, 8), 140, 2, F32, F32, F32))
        test_patch_embed.assert_parity(test_patch_embed.make_inputs(2, (1, 3), 9, 8, F32, F32, F32))
        inputs = test_patch_embed.make_inputs(1, (1, 3), 9, 2, F32, torch.bfloat16, F32)
        inputs["x"] = inputs["x"].bfloat16().float()
        held = test_patch_embed.forward_and_gradients(patch_embed, inputs)
        inputs["x"] = inputs["x"] * (1 + 2**-12)  # less than any rounding to bf16 keeps
        rounded = test_patch_embed.forward_and_gradients(patch_embed, inputs)
        torch.testing.assert_close(rounded, held, rtol=0, atol=0)


def test_the_kernels_as_they_are_pass() -> None:
    check_final_layer()
    check_wide_rows()
    check_patch_embed()


def assert_killed(fault: tuple[str, str], check: Callable[[], None], folder: Path) -> None:
    assert_found(triton, fault, check, folder, "contract", "OutOfBounds", "not finite", "not close", "not equal")


@pytest.mark.parametrize("name", FINAL)
def test_killed_in_final_layer(name: str, tmp_path: Path) -> None:
    assert_killed(FINAL[name], check_final_layer, tmp_path)


@pytest.mark.parametrize("name", WIDE)
def test_killed_in_wide_rows(name: str, tmp_path: Path) -> None:
    assert_killed(WIDE[name], check_wide_rows, tmp_path)


@pytest.mark.parametrize("name", EMBED)
def test_killed_in_patch_embed(name: str, tmp_path: Path) -> None:
    assert_killed(EMBED[name], check_patch_embed, tmp_path)
