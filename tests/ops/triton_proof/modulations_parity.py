"""Vectors shared, per segment, per token and by index on the triton backend, interpreted: the contract, and what is refused."""

from __future__ import annotations

import pytest

from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F16, F32, OPS
from tests.ops.test_modulations import (  # noqa: F401 (they run here on the fixture above)
    KINDS,
    assert_parity,
    make_inputs,
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
)

# Vectors of one token are read in pieces of the paper's widths, of an exact pair and of a masked tail; of one warp and of several.
COVERING = [
    (3, 6, 384, F32, BF16, "layernorm"),
    (2, 18, 100, BF16, BF16, "rmsnorm"),
    (1, 5, 1152, F32, F32, "layernorm"),
    (2, 1, 45, F32, F16, "rmsnorm"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["shared", "segments", "tokens", "mixed", "index", "index of a sample"])
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, kind: str, case: tuple) -> None:
    assert kind in KINDS
    *shape, stream, others, which = case
    options = {} if op == "gated_residual" else {"norm": which, "out_dtype": others}
    assert_parity(op, make_inputs(op, kind, *shape, stream, others), **options)


@pytest.mark.parametrize("kind", ["tokens", "index"])
@pytest.mark.parametrize("present", ["gate", "scale", "shift bias", "gate branch_bias", "scale weight", "gate scale weight bias"])
def test_some_optional_arguments(kind: str, present: str) -> None:
    assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", kind, 2, 6, 11, F32, F32, present))


# Which gradients are wanted alone: sums of some, and none of the rows.
NEEDS = ["x", "branch", "gate", "scale", "shift", "weight", "bias", "branch_bias", "x gate", "scale branch_bias"]


@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("needs", NEEDS)
def test_some_gradients_alone(kind: str, needs: str) -> None:
    assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", kind, 2, 6, 11, F32, F32), needs)
