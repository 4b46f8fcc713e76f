"""mlp on the triton backend, interpreted: torch's products with the kernels of ``bias_gelu`` between them."""

from __future__ import annotations

import pytest

from ditkernels import ops
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_mlp import BF16, F32, UNEVEN, assert_parity, check_repeats, make_inputs, run
from tools.kernel_proof.interpreted import traced


@pytest.mark.parametrize("case", [*UNEVEN, ((2, 17, 96, 384, 96), BF16, True)], ids=str)
def test_parity(case: tuple) -> None:
    assert_parity(make_inputs(*case))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


def test_gelu_and_the_gradient_of_the_bias_are_our_kernels() -> None:
    with traced() as launches:
        run(ops.mlp, make_inputs((2, 5, 16, 32, 8), F32))
    assert [launch.kernel for launch in launches] == ["forward_tiles", "backward_tiles", "add_samples"]
