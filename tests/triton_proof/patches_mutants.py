"""Every planted fault in the kernels of patch_embed, final_layer and unpatchify is found by the parity checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_final_layer
import test_patch_embed
import torch
from interpreted import guarded, mutant
from test_final_layer import F32
from triton.runtime.errors import InterpreterError

from ditkernels import reference
from ditkernels.ops import _registry as registry
from ditkernels.ops import final_layer_triton, patch_embed_triton
from ditkernels.ops.final_layer import unpatchify

IF_SHIFT, IF_SCALE = (f" if {name} is not None else None" for name in ("shift", "scale"))

# What is replaced in the kernels' source, and by what.
FINAL = {
    "rows and columns of the grid swapped": ("(tokens // grid_w * P)", "(tokens % grid_w * P)"),
    "row of the patch ignored": ("row, column = values // (P * O)", "row, column = values // (P * O) * 0"),
    "column of the patch ignored": ("values // O % P\n", "values // O % P * 0\n"),
    "output channel ignored": ("(values % O).to", "(values % O * 0).to"),
    "shift ignored": ("normed += channels_of(shift", "normed += 0.0 * channels_of(shift"),
    "scale without the one": ("normed *= 1.0 + channels_of(scale", "normed *= channels_of(scale"),
    "norm's weight ignored": ("normed *= channels_of(weight", "normed *= 1.0 + 0.0 * channels_of(weight"),
    "norm's bias ignored": ("normed += channels_of(bias", "normed += 0.0 * channels_of(bias"),
    "batch index of the shift dropped": (" shift = of_sample(shift, sample)", " shift = of_sample(shift, 0)"),
    "batch index of the backward's shift dropped": (
        "own_shift = of_sample(shift, sample)",
        "own_shift = of_sample(shift, 0)",
    ),
    "batch index of the scale dropped": (" scale = of_sample(scale, sample)", " scale = of_sample(scale, 0)"),
    "batch index of the backward's scale dropped": (
        "own_scale = of_sample(scale, sample)",
        "own_scale = of_sample(scale, 0)",
    ),
    "batch index of the gate dropped": (" gate = of_sample(gate, sample)", " gate = of_sample(gate, 0)"),
    "batch index of the backward's gate dropped": (
        "own_gate = of_sample(gate, sample)",
        "own_gate = of_sample(gate, 0)",
    ),
    "batch index of x dropped": (" x = rows_of(x, sample,", " x = rows_of(x, 0,"),
    "batch index of the backward's x dropped": ("x_rows = rows_of(x, sample,", "x_rows = rows_of(x, 0,"),
    "batch index of the branch dropped": (
        " branch = rows_of(branch, sample,",
        " branch = rows_of(branch, 0,",
    ),
    "batch index of the backward's branch dropped": (
        "branch_rows = rows_of(branch, sample,",
        "branch_rows = rows_of(branch, 0,",
    ),
    "batch index of the product's dout dropped": (
        "dz = values_of(dout, sample, tokens, places[",
        "dz = values_of(dout, 0, tokens, places[",
    ),
    "batch index of the means' dout dropped": (
        "dz = values_of(dout, sample, tokens, values,",
        "dz = values_of(dout, 0, tokens, values,",
    ),
    "batch index of z dropped": ("z = values_of(out, sample,", "z = values_of(out, 0,"),
    "batch index of the image dropped": ("places_of(out, sample,", "places_of(out, 0,"),
    "batch index of the means' shift dropped": (
        f"shift = of_sample(shift, sample){IF_SHIFT}\n    scale = of_sample(scale, sample){IF_SCALE}\n\n    slope",
        f"shift = of_sample(shift, 0){IF_SHIFT}\n    scale = of_sample(scale, sample){IF_SCALE}\n\n    slope",
    ),
    "batch index of the means' scale dropped": (
        f"scale = of_sample(scale, sample){IF_SCALE}\n\n    slope",
        f"scale = of_sample(scale, 0){IF_SCALE}\n\n    slope",
    ),
    "batch index of the slopes dropped": ("slopes + sample * V", "slopes + 0 * V"),
    "batch index of the offsets dropped": ("offsets + sample * V", "offsets + 0 * V"),
    "slope without the scale": ("slope += w * slope_of(scale,", "slope += w * slope_of(None,"),
    "slope without the norm's weight": (
        "slope += w * slope_of(scale, norm_weight",
        "slope += w * slope_of(scale, None",
    ),
    "offset without the shift": ("modulated(origin, shift, scale", "modulated(origin, None, scale"),
    "offset without the scale": ("modulated(origin, shift, scale", "modulated(origin, shift, None"),
    "offset without the norm's bias": ("None, norm_bias, columns", "None, None, columns"),
    "offset without the linear's bias": ("total += tl.load(bias", "total += 0.0 * tl.load(bias"),
    "dx̂·x̂ of dout alone": ("products += dz * (z - tl", "products += dz * (1.0 - tl"),
    "means of another row": ("z = values_of(out, sample, tokens,", "z = values_of(out, sample, tokens // 2,"),
    "means over the values and not the channels": (
        "tl.sum(products, 1, keep_dims=True), D * 1.0)",
        "tl.sum(products, 1, keep_dims=True), V * 1.0)",
    ),
    "row mask dropped": ("live = tokens < N", "live = tokens >= 0"),
    "row mask of a chunk dropped": ("live = tokens < last", "live = tokens >= 0"),
    "value mask dropped": ("live & (values < V), 0.0)", "live & (values >= 0), 0.0)"),
    "mean forgotten": ("mu = tl.div_rn(tl.sum(sums", "mu = 0.0 * tl.div_rn(tl.sum(sums"),
    "mean forgotten in the backward": ("value -= tl.load(mean", "value -= 0.0 * tl.load(mean"),
    "eps dropped": ("D * 1.0) + eps)", "D * 1.0) + 0.0 * eps)"),
    "bias of the linear ignored": ("z += tl.load(bias", "z += 0.0 * tl.load(bias"),
    "the last values lost": (
        "for first in range(0, V, VALUES):",
        "for first in range(0, min(V, VALUES), VALUES):",
    ),
    "mean of dx̂ lost": ("dnormeds += dz", "dnormeds += 0.0 * dz"),
    "mean of dx̂·x̂ lost": ("products += dz", "products += 0.0 * dz"),
    "means of one sample": ("mean_product + line, live", "mean_product + tokens, live"),
    "slope left out": ("dh * slope_of(own_scale", "dh + 0.0 * slope_of(own_scale"),
    "gate zeroed": ("through *= channels_of(gate", "through *= 0.0 * channels_of(gate"),
    "branch bias ignored": ("through += channels_of(branch_bias", "through += 0.0 * channels_of(branch_bias"),
    "dbranch without the gate": ("through_gate = d * channels_of(", "through_gate = d + 0.0 * channels_of("),
    "P of dx̂": ("p += over_rows(dh)", "p += over_rows(dh * normed)"),
    "Q without x̂": ("q += over_rows(dh * normed)", "q += over_rows(dh)"),
    "R of the scaled branch": ("r += over_rows(d * u.to", "r += over_rows(through_gate * u.to"),
    "S lost": ("s += over_rows(d)", "s += 0.0 * over_rows(d)"),
    "every chunk starts at the first": ("first = (chunk % chunks) * chunk_rows", "first = 0 * chunk_rows"),
    "one chunk lost": (
        "range(start, tl.minimum(start + group_chunks",
        "range(start + 1, tl.minimum(start + group_chunks",
    ),
    "one block lost": (
        "range(start, tl.minimum(start + group_blocks",
        "range(start + 1, tl.minimum(start + group_blocks",
    ),
    "dbias lost": ("db += tl.sum(dz", "db += 0.0 * tl.sum(dz"),
    "dW of x̂": (
        "h = modulated(normed, own_shift, own_scale, norm_weight, norm_bias, columns, ROUND, D)",
        "h = normed",
    ),
    "tokens of the wrong row": ("token = patch_row.to(tl.int64) * grid_w", "token = 0 * grid_w"),
    "channel and row of unpatchify swapped": (
        "channel, row = line // P, line % P",
        "row, channel = line // P, line % P",
    ),
    "value of the wrong channel": ("(row * P + column % P) * O + channel", "(row * P + column % P) * O"),
    "sample of the tokens dropped": ("tokens[0] + sample", "tokens[0] + 0"),
    "sample of the gathered image dropped": (
        "places_of(image, sample, token, element",
        "places_of(image, 0, token, element",
    ),
}
EMBED = {
    "sample ignored": ("return sample + token // N", "return sample + 0 * (token // N)"),
    "rows and columns of the grid swapped": ("(token // grid_w * P)", "(token % grid_w * P)"),
    "channel ignored": ("(values // (P * P))", "(values // (P * P) * 0)"),
    "row and column of the patch swapped": ("row = (values // P % P)", "row = (values % P)"),
    "line mask dropped": ("live = line < lines", "live = line >= 0"),
    "line mask of dx dropped": ("[:, None] < lines", "[:, None] >= 0"),
    "line mask of a group dropped": ("[:, None] < last", "[:, None] >= 0"),
    "bias ignored": ("product += tl.load(bias", "product += 0.0 * tl.load(bias"),
    "positions ignored": ("product += load_piece(rows_of(pos", "product += 0.0 * load_piece(rows_of(pos"),
    "positions of the line and not of the token": ("rows_of(pos, 0, token", "rows_of(pos, 0, 0 * token"),
    "x not rounded to the weight's dtype": (".to(weight.dtype.element_ty)", ""),
    "one group lost": ("(group < groups) & inside", "(group < groups - 1) & inside"),
    "one block of a group lost": (
        "for first in range(group * group_lines, last",
        "for first in range(group * group_lines + ROWS, last",
    ),
    "dbias lost": ("db += tl.sum(d.to", "db += 0.0 * tl.sum(d.to"),
    "batch index of dy dropped": ("load_piece(rows_of(dy, sample,", "load_piece(rows_of(dy, 0,"),
    "channels beyond the first tile lost": (
        "for start in range(0, D, COLUMNS)",
        "for start in range(0, min(D, COLUMNS), COLUMNS)",
    ),
    "one sample's positions lost": ("for sample in range(batch):", "for sample in range(1, batch):"),
    "values beyond the first tile lost": (
        "for start in range(0, K, VALUES)",
        "for start in range(0, min(K, VALUES), VALUES)",
    ),
}


def check_final_layer() -> None:
    """Blocks, chunks and tiles that are not full, several of each, every argument, an eps that matters, two samples."""
    with guarded():
        inputs = test_final_layer.make_inputs(2, (5, 8), 70, 2, F32, F32)
        test_final_layer.assert_parity(inputs, grid=(5, 8), patch_size=2, eps=0.1)
        inputs = test_final_layer.make_inputs(2, (1, 3), 9, 8, F32, F32)
        test_final_layer.assert_parity(inputs, grid=(1, 3), patch_size=8)
        tokens = torch.arange(2 * 6 * 12.0).reshape(2, 6, 12).requires_grad_()
        image = unpatchify(tokens, grid=(3, 2), patch_size=2)
        want = reference.unpatchify(tokens, grid=(3, 2), patch_size=2)
        torch.testing.assert_close(image, want, rtol=0, atol=0)
        cotangent = image.detach().flip(0)
        for got, expected in zip(
            torch.autograd.grad(image, tokens, cotangent), torch.autograd.grad(want, tokens, cotangent)
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def check_patch_embed() -> None:
    with guarded():
        test_patch_embed.assert_parity(test_patch_embed.make_inputs(3, (7, 8), 140, 2, F32, F32, F32))
        test_patch_embed.assert_parity(test_patch_embed.make_inputs(2, (1, 3), 9, 8, F32, F32, F32))
        inputs = test_patch_embed.make_inputs(1, (1, 3), 9, 2, F32, torch.bfloat16, F32)
        inputs["x"] = inputs["x"].bfloat16().float()
        held = test_patch_embed.forward_and_gradients(test_patch_embed.patch_embed, inputs)
        inputs["x"] = inputs["x"] * (1 + 2**-12)  # less than any rounding to bf16 keeps
        rounded = test_patch_embed.forward_and_gradients(test_patch_embed.patch_embed, inputs)
        torch.testing.assert_close(rounded, held, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _on_triton():
    with registry.use_backend("triton"):
        yield


def test_the_kernels_as_they_are_pass() -> None:
    check_final_layer()
    check_patch_embed()


def assert_killed(module: object, fault: tuple[str, str], check: object, folder: Path) -> None:
    with mutant(module, *fault, folder), pytest.raises((AssertionError, InterpreterError)) as caught:
        check()
    died_of = str(caught.value)
    assert any(
        word in died_of for word in ("contract", "OutOfBounds", "not finite", "not close", "not equal")
    ), died_of


@pytest.mark.parametrize("name", FINAL)
def test_killed_in_final_layer(name: str, tmp_path: Path) -> None:
    assert_killed(final_layer_triton, FINAL[name], check_final_layer, tmp_path)


@pytest.mark.parametrize("name", EMBED)
def test_killed_in_patch_embed(name: str, tmp_path: Path) -> None:
    assert_killed(patch_embed_triton, EMBED[name], check_patch_embed, tmp_path)
