"""The formulas at the top of norm/__init__.py, one by one: gradcheck runs on them, and no backend is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops.spec import Wanted, accumulator


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which costs the host microseconds even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def per_token(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A (B, D) vector as (B, 1, D), a (D,) vector as it is, in the accumulation dtype."""
    if vector is None:
        return None
    return vector.to(dtype).unsqueeze(1) if vector.dim() == 2 else vector.to(dtype)


def normed_rows(x: Tensor, stats: Tensor) -> Tensor:
    """x̂ from x and the saved statistics, a new tensor in the accumulation dtype."""
    if stats.shape[-1] == 2:
        return (x - stats[..., :1]).mul_(stats[..., 1:])
    return x * stats


def residual_formula(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """x1 = x + gate·(branch + branch_bias), rounded once to x's dtype."""
    wide = accumulator(x)
    u = branch.to(wide)
    if branch_bias is not None:
        u = u + branch_bias.to(wide)
    g = per_token(gate, wide)
    return (x.to(wide) + (u if g is None else g * u)).to(x.dtype).contiguous()


def norm_formula(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The modulated norm in ``out_dtype``, and mean and rstd of each row.

    The mean of the centred row is what rounding kept from the mean; with it taken off as well, a constant row is exactly zero.
    """
    wide = accumulator(x)
    values = x.to(wide)
    mean = values.mean(-1, keepdim=True)
    centred = values if norm == "rmsnorm" else values - mean
    if norm == "layernorm":
        rest = centred.mean(-1, keepdim=True)
        mean, centred = mean + rest, centred - rest
    square = centred.square().mean(-1, keepdim=True)
    rstd = (square + eps).rsqrt()
    if norm == "layernorm":
        rstd = rstd + 0 * square  # NaN where the square has overflowed: such a row is lost, and not a row of zeros
    h = centred * rstd
    if weight is not None:
        h = h * weight.to(wide)
    if bias is not None:
        h = h + bias.to(wide)
    if scale is not None:
        h = h * (1 + scale.to(wide).unsqueeze(1))
    if shift is not None:
        h = h + shift.to(wide).unsqueeze(1)
    stats = rstd if norm == "rmsnorm" else torch.cat([mean, rstd], -1)
    return h.to(out_dtype).contiguous(), stats if keep else None


def residual_norm_formula(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float,
    out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x1, the modulated norm of x1 as it is stored, and mean and rstd of its rows."""
    x1 = residual_formula(x, branch, gate, branch_bias)
    return (x1, *norm_formula(x1, shift, scale, weight, bias, norm, eps, out_dtype, keep))


def through_norm(dnormed: Tensor, normed: Tensor, stats: Tensor) -> Tensor:
    """The norm's dx in the accumulation dtype."""
    dx = dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)
    if stats.shape[-1] == 2:
        dx = dx - dnormed.mean(-1, keepdim=True)
    return dx * stats[..., -1:]


def vector_gradients(
    p: Tensor | None, q: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dshift, dscale, dweight, dbias, as far as they are wanted, from the sums P and Q; a sum that none needs may be None."""
    of_shift, of_scale, of_weight, of_bias = wanted
    dshift = dscale = dweight = dbias = None
    if of_shift and p is not None:
        dshift = in_dtype(p, of_shift)
    if of_scale and q is not None:
        through_weight = q if weight is None else weight * q
        dscale = in_dtype(through_weight if bias is None or p is None else through_weight + bias * p, of_scale)
    if of_weight and q is not None:
        dweight = in_dtype((q if scale is None else (1 + scale) * q).sum(0), of_weight)
    if of_bias and p is not None:
        dbias = in_dtype((p if scale is None else (1 + scale) * p).sum(0), of_bias)
    return dshift, dscale, dweight, dbias


def offset_gradients(
    dh: Tensor | None, scale: Tensor | None, of_shift: torch.dtype | None, of_bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """dshift and dbias where nothing else is wanted: they need no normed row."""
    if dh is None:
        return None, None
    p = dh.sum(1, dtype=accumulator(dh))
    dbias = p if scale is None else (1 + scale.to(p.dtype)) * p
    return (None if of_shift is None else p.to(of_shift)), (None if of_bias is None else dbias.sum(0).to(of_bias))


def residual_gradients_formula(
    dx1: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dbranch, dgate and dbranch_bias, as far as they are wanted."""
    of_branch, of_gate, of_bias = wanted
    wide = accumulator(dx1)
    dx = dx1.to(wide)
    g = per_token(gate, wide)
    dbranch = dgate = dbias = None
    if of_branch:
        dbranch = (dx.clone() if g is None else g * dx).to(of_branch).contiguous()
    if of_gate and branch is not None:
        u = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias.to(wide)
        dgate = (dx * u).sum(1).to(of_gate)
    if of_bias:
        sums = dx.sum(1)
        dbias = (sums if gate is None else gate.to(wide) * sums).sum(0).to(of_bias)
    return dbranch, dgate, dbias


def norm_gradients_formula(
    dh: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, shift, scale, weight and bias, as far as they are wanted."""
    of_x, *of_vectors = wanted
    dh, normed = dh.to(accumulator(x)), normed_rows(x, stats)
    scale, weight, bias = (None if t is None else t.to(dh.dtype) for t in (scale, weight, bias))
    dnormed = dh if scale is None else dh * (1 + scale.unsqueeze(1))
    dnormed = dnormed if weight is None else dnormed * weight
    dx = through_norm(dnormed, normed, stats).to(of_x).contiguous() if of_x else None
    return (dx, *vector_gradients(dh.sum(1), (dh * normed).sum(1), scale, weight, bias, tuple(of_vectors)))


def residual_norm_gradients_formula(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    stats: Tensor, norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of all inputs in their order, as far as they are wanted."""
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = wanted
    asked = (accumulator(x1), of_shift, of_scale, of_weight, of_bias)
    dx, dshift, dscale, dweight, dbias = norm_gradients_formula(dh, x1, scale, weight, bias, stats, norm, asked)
    dx = dx if dx1 is None else dx + dx1  # type: ignore[operator]
    of_residual = (of_branch, of_gate, of_branch_bias)
    dbranch, dgate, dbranch_bias = residual_gradients_formula(dx, branch, gate, branch_bias, of_residual)  # type: ignore[arg-type]
    dx = dx.to(of_x) if of_x else None  # type: ignore[union-attr]
    return dx, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias
