"""Constant and nearly constant rows on the triton backend, interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_constant_rows import BF16, CASES, F32, check, check_overflow, constant, every_kind

NORMS = ("modulate_norm", "gated_residual_norm")


@pytest.mark.parametrize("eps", [0.0, 1.0])
@pytest.mark.parametrize("op, case", [*itertools.product(NORMS, CASES), ("final_layer", (48, F32)), ("final_layer", (384, BF16))])
def test_contract(op: str, case: tuple[int, torch.dtype], eps: float) -> None:
    check(op, *case, every_kind, eps)


def test_rows_that_no_program_holds() -> None:
    check("final_layer", 4104, F32, constant, 0.0)


@pytest.mark.parametrize("op, width", [(NORMS[0], 48), (NORMS[1], 384), ("final_layer", 48), ("final_layer", 4104)])
def test_a_variance_that_overflows(op: str, width: int) -> None:
    check_overflow(op, width, F32, compiled=True)
