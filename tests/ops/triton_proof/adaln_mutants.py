"""Every planted fault in the adaLN kernels is found by the parity check: a suite that misses one proves too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditkernels.ops import dispatch
from ditkernels.ops.norm import triton as kernels
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops import test_constant_rows
from tests.ops.test_adaln import BF16, F32, assert_parity, make_inputs
from tools.kernel_proof.interpreted import guarded

# Of a weight the gradient of x needs, but not the weight's own; of sums and terms some, and in other places than among all.
NEEDS = ("x bias", "scale", "gate", "weight branch_bias")

# What is replaced in the kernels' source, and by what.
MUTANTS = {
    "shift and scale swapped": (" modulated(value * r, shift, scale,", " modulated(value * r, scale, shift,"),
    "shift and scale swapped in the tail": ("tail_value * r, shift, scale,", "tail_value * r, scale, shift,"),
    "scale without the one": ("normed *= 1.0 + channels_of(scale", "normed *= channels_of(scale"),
    "bias after the modulation": ("normed += channels_of(bias", "normed += 0.0 * channels_of(bias"),
    "weight ignored": ("normed *= channels_of(weight", "normed *= 1.0 + 0.0 * channels_of(weight"),
    "gate zeroed": ("through *= channels_of(gate", "through *= 0.0 * channels_of(gate"),
    "branch bias ignored": ("through += channels_of(branch_bias", "through += 0.0 * channels_of(branch_bias"),
    "batch index of the gate dropped": (
        "gate = of_sample((gate, gate_b), sample)",
        "gate = of_sample((gate, gate_b), 0)",
    ),
    "batch index of the shift dropped": (
        "shift = of_sample((shift, shift_b), sample)",
        "shift = of_sample((shift, shift_b), 0)",
    ),
    "batch index of the scale dropped": (
        "scale = of_sample((scale, scale_b), sample)",
        "scale = of_sample((scale, scale_b), 0)",
    ),
    "batch index of the backward's branch dropped": (
        "branch_rows = rows_of(tokens[3], sample, rows)",
        "branch_rows = rows_of(tokens[3], 0, rows)",
    ),
    "batch index of x1 dropped": (
        "x1_rows = rows_of(tokens[2], sample,",
        "x1_rows = rows_of(tokens[2], 0,",
    ),
    "batch index of x dropped": (
        "x = rows_of(tokens[0], sample,",
        "x = rows_of(tokens[0], 0,",
    ),
    "batch index of the branch dropped": (
        "branch = rows_of(tokens[1], sample,",
        "branch = rows_of(tokens[1], 0,",
    ),
    "batch index of dh dropped": (
        "dh_rows = rows_of(tokens[1], sample,",
        "dh_rows = rows_of(tokens[1], 0,",
    ),
    "batch index of dx1 dropped": (
        "stream_rows = rows_of(tokens[0], sample,",
        "stream_rows = rows_of(tokens[0], 0,",
    ),
    "batch index of the sums' scale dropped": (
        "of_sample((scale, scale_b), sample), columns",
        "of_sample((scale, scale_b), 0), columns",
    ),
    "batch index of the sums' gate dropped": (
        "of_sample((gate, gate_b), sample), columns",
        "of_sample((gate, gate_b), 0), columns",
    ),
    "row mask dropped": ("live = rows < N", "live = rows >= 0"),
    "row mask of a chunk dropped": ("live = rows < last", "live = rows >= 0"),
    "column mask dropped": ("mask = live & (columns < D)", "mask = live & (columns >= 0)"),
    "column mask of the squares dropped": (
        "tl.where(columns < D, result, 0.0)",
        "tl.where(columns >= 0, result, 0.0)",
    ),
    "the last chunk runs on": ("last = tl.minimum(first + chunk_rows, N)", "last = first + chunk_rows"),
    "every chunk starts at the first": ("first = (program % chunks) * chunk_rows", "first = 0 * chunk_rows"),
    "eps outside the root": (
        "tl.rsqrt(tl.div_rn(squares, D * 1.0) + eps)",
        "1.0 / (tl.sqrt(tl.div_rn(squares, D * 1.0)) + eps)",
    ),
    "eps divided by D": (
        "tl.div_rn(squares, D * 1.0) + eps",
        "tl.div_rn(squares + eps, D * 1.0)",
    ),
    "eps dropped": ("tl.div_rn(squares, D * 1.0) + eps", "tl.div_rn(squares, D * 1.0) + 0.0 * eps"),
    "variance over the piece and not the row": (
        "tl.div_rn(squares, D * 1.0)",
        "tl.div_rn(squares, HEAD * 1.0)",
    ),
    "tail left out of the mean": ("apart += tl.sum(tail_value, 1", "apart += 0.0 * tl.sum(tail_value, 1"),
    "mean as it was rounded": ("for _ in tl.static_range(2)", "for _ in tl.static_range(1)"),
    "a variance that overflows taken for infinite": ("r += 0.0 * squares", "r += 0.0"),
    "tail left out of the squares": ("squares += tl.sum(tail", "squares += 0.0 * tl.sum(tail"),
    "mean of dx̂ not subtracted": ("dx -= along_mean", "dx -= 0.0 * along_mean"),
    "tail left out of the mean of dx̂": ("along_mean += _along(tail", "along_mean += 0.0 * _along(tail"),
    "x̂'s share not subtracted": ("dnormed - normed * along_normed", "dnormed - 0.0 * normed * along_normed"),
    "tail left out of x̂'s share": ("along_normed += _along(tail", "along_normed += 0.0 * _along(tail"),
    "rstd forgotten in dx": ("return dx * r", "return dx"),
    "mean forgotten in x̂": ("value -= mu", "value -= 0.0 * mu"),
    "weight forgotten in dx̂": ("factor *= channels_of(weight", "factor *= 1.0 + 0.0 * channels_of(weight"),
    "stream's gradient lost": ("d = d + stream.to", "d = d + 0.0 * stream.to"),
    "stream's gradient lost in the tail": (
        "tail_d = tail_d + tail_stream.to",
        "tail_d = tail_d + 0.0 * tail_stream.to",
    ),
    "dbranch without the gate": ("head, g * d if", "head, d if"),
    "dbranch without the gate in the tail": ("tail, tail_g * tail_d if", "tail, tail_d if"),
    "P lost in the tail": ("tail_p += _folded(", "tail_p += 0.0 * _folded("),
    "Q lost in the tail": ("tail_q += _folded(", "tail_q += 0.0 * _folded("),
    "R lost in the tail": ("tail_r += _folded(", "tail_r += 0.0 * _folded("),
    "S lost in the tail": ("tail_s += _folded(", "tail_s += 0.0 * _folded("),
    "Q stored for P in the tail": ("SUM_P, p, tail_p,", "SUM_P, p, tail_q,"),
    "P summed after the slope": ("p += over_rows(dnormed)", "p += over_rows(dnormed * factor)"),
    "R of the new gradient only": ("r += over_rows(d *", "r += over_rows((d - stream.to(tl.float32)) *"),
    "S of one row in two": ("s += over_rows(d)", "s += 0.5 * over_rows(d)"),
    "one chunk's sums lost": ("for chunk in range(chunks):", "for chunk in range(1, chunks):"),
    "P and Q swapped": ("p += tl.load(at + SUM_P * D", "p += tl.load(at + SUM_Q * D"),
    "one sample's terms lost": ("(samples < batch) & inside", "(samples < batch - 1) & inside"),
    "bias forgotten in dscale": (
        "through_weight += channels_of(bias",
        "through_weight += 0.0 * channels_of(bias",
    ),
    "weight forgotten in dscale": (
        "through_weight *= channels_of(weight",
        "through_weight *= 1.0 + 0.0 * channels_of(weight",
    ),
    "branch bias forgotten in dgate": ("through_gate += channels_of(", "through_gate += 0.0 * channels_of("),
    "scale forgotten in dweight": ("q *= factor", "q *= 1.0"),
    "scale without the one in the sums": (
        "factor = 1.0 + channels_of(of_sample",
        "factor = channels_of(of_sample",
    ),
    "gate forgotten in dbranch_bias": (
        "s *= channels_of(of_sample",
        "s *= 1.0 + 0.0 * channels_of(of_sample",
    ),
    "dshift and dscale swapped": ("dshift, out, p,", "dshift, out, q,"),
    "gradients of weight and bias swapped": ("tl.store(terms, q, inside)", "tl.store(terms, p, inside)"),
    "vectors' gradients in one place": ("if kind == 1:", "if kind == 3:"),
    "P not added up for dscale": ("of_shift or of_bias or (of_scale and has_bias)", "of_shift or of_bias"),
    "Q not added up for dweight": ('"SUM_Q": of_scale or of_weight', '"SUM_Q": of_scale'),
    "S not added up for dgate": ("of_branch_bias or (of_gate and has_branch_bias)", "of_branch_bias"),
    "sums that are not needed take a place": ("names.index(name)", "list(needed).index(name)"),
    "terms that are not wanted take a place": ("(OF_WEIGHT + OF_BIAS + OF_BRANCH_BIAS) * D", "3 * D"),
    "terms of a weight whose gradient is not wanted": ("if OF_WEIGHT:", "if weight is not None:"),
    "scale left out of the rows' gradient where no other vector's is wanted": (
        "if dh is not None and OF_ROWS and not AT_USE:\n        factor = _factor(scale,",
        "if dh is not None and OF_ROWS and not AT_USE:\n        factor = _factor(scale if SUMS > 1 else None,",
    ),
    "statistics of the stream before rounding": (
        "value = (value + through).to(x[0].dtype.element_ty).to(tl.float32)",
        "value = value + through",
    ),
}


def check() -> None:
    """A masked and an exact tail, several chunks and rows that fill no block, every vector, an eps that matters, two samples.

    And gradients of which each is wanted without those it shares sums with.
    """
    with guarded():
        masked = make_inputs("gated_residual_norm", 2, 21, 23, F32, F32)
        assert_parity("gated_residual_norm", masked, eps=0.1)
        assert_parity("modulate_norm", make_inputs("modulate_norm", 2, 3, 384, F32, F32), eps=0.1)
        for needs in NEEDS:
            assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", 2, 3, 11, F32, F32), needs)
        rounded_statistics()
        test_constant_rows.check("modulate_norm", 384, F32, test_constant_rows.constant, 0.0)
        test_constant_rows.check_overflow("modulate_norm", 48, F32, compiled=True)


def rounded_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(1, 3, 96, generator=generator) for _ in range(2))
    kernel = dispatch.OPS["gated_residual_norm"].implementations["triton"].kernel
    x1, _, stats = kernel(x.to(BF16), branch, *[None] * 6, "layernorm", 1e-6, F32, True)
    torch.testing.assert_close(stats[..., 0], x1.float().mean(-1))


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path, "contract", "OutOfBounds", "not finite", "not close")
