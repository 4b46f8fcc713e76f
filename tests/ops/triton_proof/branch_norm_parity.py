"""The residual of a normed branch on the triton backend, interpreted: the contract, and what is refused."""

from __future__ import annotations

import itertools

import pytest

from ditkernels import reference
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F16, F32
from tests.ops.test_branch_norm import (  # noqa: F401 (they run here on the fixture above)
    OPS,
    TAKES,
    assert_parity,
    make_inputs,
    test_branch_eps_beside_a_mean_square_of_its_size,
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_some_gradients_alone,
)

# One token, a length that fills no block, several chunks; an exact pair of pieces, a masked tail, one piece; one warp and several.
COVERING = [
    (1, 1, 384, F32, F32, "layernorm"),
    (2, 17, 96, F32, BF16, "rmsnorm"),
    (3, 5, 768, BF16, BF16, "layernorm"),
    (2, 3, 1152, F32, BF16, "rmsnorm"),
    (4, 5, 100, F16, F32, "layernorm"),
    (2, 18, 7, BF16, F16, "rmsnorm"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, case: tuple) -> None:
    *shape, stream, branch, kind = case
    options = {} if op == "gated_residual" else {"norm": kind, "out_dtype": branch}
    assert_parity(op, make_inputs(op, *shape, stream, branch), **options)


@pytest.mark.parametrize("op", OPS)
def test_each_optional_argument_alone_and_all_but_one(op: str) -> None:
    norms = itertools.cycle(reference.NORMS)
    for count in (0, 1, len(TAKES[op]) - 1, len(TAKES[op])):
        for names in itertools.combinations(TAKES[op], count):
            inputs = make_inputs(op, 2, 3, 11, F32, F32, " ".join(names) or "none")
            assert_parity(op, inputs, **({} if op == "gated_residual" else {"norm": next(norms)}))
