"""Rows that are constant, nearly constant, or hold one huge value, through every op that ends in a layer norm.

They are judged by the numerical contract against statistics in whole numbers: fp64 rounds the mean of such rows as well. Triton's
kernels run these tests in tests/ops/triton_proof/constant_rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import dispatch, image, norm
from ditkernels.ops.norm import formulas
from tests import numerics
from tests.helpers.native_cpu import needs_library, run_formulas
from tools.kernel_proof import emulated_cuda

F32, BF16 = torch.float32, torch.bfloat16
VALUES, HUGE = (0.1, 3.3, 1000.3), 2.0**27
WIDTHS = (48, 384, 1152)
OPS = ("modulate_norm", "gated_residual_norm", "final_layer")


@pytest.fixture(params=["torch", "formulas", pytest.param("cpu", marks=needs_library), "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda":
        with emulated_cuda.running():
            yield "cuda"
        return
    if request.param == "formulas":
        run_formulas(monkeypatch, "modulate_norm", formulas.norm_formula, formulas.norm_gradients_formula)
        run_formulas(monkeypatch, "gated_residual_norm", formulas.residual_norm_formula, formulas.residual_norm_gradients_formula)
    for op in OPS:  # which would run where gradients are wanted
        monkeypatch.setattr(dispatch.OPS[op].implementations["torch"], "plain", None)
    dispatch.forget()
    with dispatch.use_backend("cpu" if request.param == "cpu" else "torch"):
        yield request.param
    dispatch.forget()


# ---- Rows: (N, D), a few for each value ------------------------------------------------------------------------------


def constant(width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(VALUES)[:, None].expand(-1, width).to(dtype)


def changed(rows: Tensor, units: Tensor) -> Tensor:
    """Each value moved by so many units in its last place."""
    bits = torch.int32 if rows.dtype == F32 else torch.int16
    return (rows.contiguous().view(bits) + units.to(bits)).view(rows.dtype)


def by_a_unit_anywhere(width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return changed(constant(width, dtype), torch.randint(-1, 2, (len(VALUES), width), generator=generator))


def by_a_unit_at_one_place(width: int, dtype: torch.dtype) -> Tensor:
    """At the first channel, at the last, and in the middle."""
    places = torch.tensor([0, width - 1, width // 2])[:, None]
    return changed(constant(width, dtype), torch.arange(width) == places)


def one_huge(width: int, dtype: torch.dtype, value: float = HUGE) -> Tensor:
    """Such a value at the first channel, at the last, and in the middle, where ``final_layer`` picks none, of random ones."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(len(VALUES), width, generator=generator) + torch.tensor(VALUES)[:, None]
    rows[0, 0], rows[1, -1], rows[2, width // 2 + 1] = value, -value, value
    return rows.to(dtype)


def overflowing(width: int, dtype: torch.dtype) -> Tensor:
    """The square of the huge value overflows in fp32, and its sum over a row does not."""
    return one_huge(width, dtype, 1e30)


KINDS = (constant, by_a_unit_anywhere, by_a_unit_at_one_place, one_huge)


def every_kind(width: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([rows_like(width, dtype) for rows_like in KINDS])


# ---- What is expected ------------------------------------------------------------------------------------------------


def exact_row(row: Tensor, eps: float) -> tuple[list[float], float]:
    """x̂ and rstd of a row, each rounded to fp64 a few times: the sums are of whole numbers."""
    ratios = [value.as_integer_ratio() for value in row.tolist()]
    unit = max(denominator for _, denominator in ratios)
    whole = [numerator * (unit // denominator) for numerator, denominator in ratios]
    width, total = len(whole), sum(whole)
    apart = [width * value - total for value in whole]
    variance = Fraction(sum(value * value for value in apart), width**3 * unit**2)
    root = math.sqrt(variance + Fraction(eps))
    rstd = 1 / root if root else math.inf
    return [value / (width * unit) * rstd for value in apart], rstd


@cache
def exact_norm(rows_like: Callable[..., Tensor], width: int, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ and rstd of (N, D) rows, in fp64."""
    made = [exact_row(row, eps) for row in rows_like(width, dtype)]
    return torch.tensor([n for n, _ in made], dtype=torch.float64), torch.tensor([[r] for _, r in made], dtype=torch.float64)


def exact_results(inputs: dict[str, Tensor], normed: Tensor, rstd: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The last output and the gradient of every input of an op whose x1 has these rows in each sample, in fp64."""
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    factor = 1 + wide["scale"].unsqueeze(1)
    out = h = (normed * factor + wide["shift"].unsqueeze(1)).requires_grad_()
    dh = cotangent.double()
    if "weight" in inputs:
        out = reference.unpatchify(h @ wide["weight"].t(), grid=(1, len(normed)), patch_size=2)
        (dh,) = torch.autograd.grad(out, h, dh)
    dnormed = dh * factor
    mean, along_normed = dnormed.mean(-1, keepdim=True), (dnormed * normed).mean(-1, keepdim=True)
    dx = rstd * (dnormed - mean - normed * along_normed)
    gradients = {"x": dx, "shift": dh.sum(1), "scale": (dh * normed).sum(1)}
    if "branch" in inputs:
        gradients |= {"branch": wide["gate"].unsqueeze(1) * dx, "gate": (dx * wide["branch"]).sum(1)}
    return [out.detach(), *(gradients[name] for name in inputs if name != "weight")]


def make_inputs(op: str, rows: Tensor) -> dict[str, Tensor]:
    """Such that x1 is exactly ``rows``: half comes through the branch, but for huge values, and gates are powers of two.

    The linear of ``final_layer`` picks four channels.
    """
    width = rows.shape[-1]
    generator = torch.Generator().manual_seed(width)
    shift, scale = torch.randn(2, 2, width, generator=generator)
    if op == "modulate_norm":
        return {"x": rows.expand(2, -1, -1), "shift": shift, "scale": scale}
    gate = torch.tensor([0.5, 0.25])
    half = torch.where(rows.abs() < HUGE, rows / 2, 0)
    branch = half / gate[:, None, None].to(rows.dtype)
    inputs = {"x": (rows - half).expand(2, -1, -1), "branch": branch, "gate": gate[:, None].expand(-1, width).contiguous()}
    inputs |= {"shift": shift, "scale": scale}
    if op == "final_layer":
        inputs["weight"] = torch.eye(width)[[0, 1, width // 2, width - 1]]
    return inputs


def run(op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], cotangent: Tensor, eps: float) -> list[Tensor]:
    """The last output, and the gradient of every input but the linear's weight."""
    leaves = {name: tensor.detach().requires_grad_(name != "weight") for name, tensor in inputs.items()}
    options = {"grid": (1, inputs["x"].shape[1]), "patch_size": 2} if "weight" in inputs else {"out_dtype": F32}
    made = op(**leaves, eps=eps, **options)
    out = made[-1] if isinstance(made, tuple) else made
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves.values() if leaf.requires_grad], cotangent)]


def assert_lost(actual: Tensor, low: Tensor, name: str) -> None:
    assert not torch.isfinite(actual[~torch.isfinite(low)]).any(), f"{name}: a number where plain PyTorch is not finite"


def by_token(tensor: Tensor, count: int) -> list[Tensor]:
    """Parts of a result for each token, if it has tokens: (B, N, D), or an image of one row of patches of size 2."""
    if tensor.dim() == 2:
        return [tensor]
    return list(tensor.unbind(1)) if tensor.dim() == 3 else list(tensor.unflatten(3, (count, 2)).unbind(3))


def make_cotangent(op: str, rows: Tensor) -> Tensor:
    shape = (2, 1, 2, 2 * len(rows)) if op == "final_layer" else (2, *rows.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def fused(op: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    return getattr(image if op == "final_layer" else norm, op)  # type: ignore[no-any-return]


def check(op: str, width: int, dtype: torch.dtype, rows_like: Callable[..., Tensor], eps: float) -> None:
    """The contract, token by token, where plain PyTorch is finite, and nothing finite where it is not."""
    rows = rows_like(width, dtype)
    inputs, cotangent = make_inputs(op, rows), make_cotangent(op, rows)
    actual, low = (run(function, inputs, cotangent, eps) for function in (fused(op), getattr(reference, op)))
    exact = exact_results(inputs, *exact_norm(rows_like, width, dtype, eps), cotangent)
    for name, *results in zip(["output", *(f"d{n}" for n in inputs)], actual, low, exact):
        assert_lost(*results[:2], name)
        for token, parts in enumerate(zip(*(by_token(result, len(rows)) for result in results))):
            there = torch.isfinite(parts[1])
            numerics.assert_contract(*(part[there] for part in parts), f"{name} of token {token}")


def check_overflow(op: str, width: int, dtype: torch.dtype, compiled: bool) -> None:
    """Plain PyTorch makes NaN of such a row or zeros, as the place of the huge value decides; ``compiled`` kernels make NaN."""
    rows = overflowing(width, dtype)
    inputs, cotangent = make_inputs(op, rows), make_cotangent(op, rows)
    actual, low = (run(function, inputs, cotangent, 1e-6) for function in (fused(op), getattr(reference, op)))
    for name, *results in zip(["output", *(f"d{n}" for n in inputs)], actual, low):
        assert_lost(*results, name)
    if compiled:
        assert not torch.isfinite(actual[0]).any(), "output: a number that is not finite in fp32"


# ---- Tests -----------------------------------------------------------------------------------------------------------

CASES = [*((width, F32) for width in WIDTHS), (384, BF16)]


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("rows_like", KINDS)
@pytest.mark.parametrize("width, dtype", CASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_contract(op: str, width: int, dtype: torch.dtype, rows_like: Callable[..., Tensor], eps: float) -> None:
    check(op, width, dtype, rows_like, eps)


@pytest.mark.parametrize("width, dtype", CASES)
@pytest.mark.parametrize("op", OPS)
def test_a_variance_that_overflows(op: str, width: int, dtype: torch.dtype, backend: str) -> None:
    check_overflow(op, width, dtype, compiled=backend in ("cpu", "cuda"))
