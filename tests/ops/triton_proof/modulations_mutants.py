"""Every fault planted in what the Triton kernels do for vectors per token and by index is found by the parity check."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditkernels.ops.norm import by_token_triton as kernels
from ditkernels.ops.norm import triton as beneath
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops.test_adaln import F32
from tests.ops.test_modulations import assert_parity, check_dshift_of_the_op, make_inputs
from tools.kernel_proof.interpreted import guarded

# What is replaced in the kernels' source, and by what.
MUTANTS = {
    "sample of a vector's row dropped": ("vector[0] + sample * vector[1]", "vector[0] + 0 * vector[1]"),
    "row of a vector dropped": ("+ rows * vector[2]", "+ 0 * vector[2]"),
    "index ignored": ("tl.load(index + sample * N + token) if index is not None", "token * 0 if index is not None"),
    "sample of the index dropped": ("tl.load(index + sample * N + token)", "tl.load(index + token)"),
    "scale read for shift": ("rows_of_vector((shift, shift_b, shift_k)", "rows_of_vector((scale, scale_b, scale_k)"),
    "dshift after the scale": ("_store(dshift, at, gradient, mask)", "_store(dshift, at, 2.0 * gradient, mask)"),
    "weight forgotten in dscale": ("unmodulated *= channels_of(weight", "unmodulated *= 1.0 + 0.0 * channels_of(weight"),
    "bias forgotten in dscale": ("unmodulated += channels_of(bias", "unmodulated += 0.0 * channels_of(bias"),
    "scale without the one": ("gradient *= 1.0 + channels_of(scale", "gradient *= channels_of(scale"),
    "dscale without x̂": ("_store(dscale, at, gradient * unmodulated", "_store(dscale, at, gradient + 0.0 * unmodulated"),
    "branch bias forgotten in dgate": (
        "value += channels_of(branch_bias, columns, END, D)\n    return",
        "value += 0.0\n    return",
    ),
    "gate forgotten in dbranch": ("d *= channels_of(own_gate, head", "d *= 1.0 + 0.0 * channels_of(own_gate, head"),
    "gate forgotten in the tail": ("tail_d *= channels_of(own_gate", "tail_d *= 1.0 + 0.0 * channels_of(own_gate"),
    "dgate after the gate": (
        "* _biased(u, branch_bias, head",
        "* channels_of(weight, head, HEAD, D) * _biased(u, branch_bias, head",
    ),
    "the norm's factor twice": ("_factor(None if OWN else scale, weight, head", "_factor(None, None, head"),
    "order ignored": ("rows = tl.load(order + rows, live, 0)", "rows = rows + 0"),
    "order of another sample": ("order + sample * N", "order"),
    "starts of another sample": ("sample * (K + 1) + group % K", "group % K"),
    "tokens of another row": ("starts += sample * (K + 1) + group % K", "starts += sample * (K + 1) + (group + 1) % K"),
    "one share's last token lost": ("last = tl.minimum(first + share, end)", "last = tl.minimum(first + share, end) - 1"),
    "shares that do not reach the end": ("(end - begin + chunks - 1) // chunks", "(end - begin) // chunks"),
    "vectors of another group": ("of_sample((gate, gate_b), group)", "of_sample((gate, gate_b), sample)"),
    "scale of another group": ("of_sample((scale, scale_b), group)", "of_sample((scale, scale_b), sample)"),
    "own rows not wanted for dgate alone": ('rows["OF_ROWS"] or of_gate is not None', 'rows["OF_ROWS"]'),
    "every chunk starts at the first": ("first = (program % chunks) * chunk_rows", "first = 0 * chunk_rows"),
}


def check() -> None:
    """Several chunks, a masked tail, every vector; rows of several tokens and of none; dgate alone; dshift of the op."""
    with guarded():
        for kind in ("tokens", "index of a sample"):
            assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", kind, 2, 5, 7, F32, F32), eps=0.1)
            assert_parity("gated_residual", make_inputs("gated_residual", kind, 1, 17 if kind == "tokens" else 150, 3, F32, F32))
        assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", "tokens", 2, 2, 7, F32, F32), "gate")
        check_dshift_of_the_op()


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path, "contract", "OutOfBounds", "not finite", "not equal", beneath=(beneath,))
