"""The norm family with vectors of rows: token n of a sample takes row n of gate, shift and scale, or row index[b, n].

The formulas are those at the top of norm/__init__.py with the vectors of a token in the place of its sample's. A vector has K
rows a sample, (B, K, D). Without an index K = N, and the gradients of a token's own vectors need no sum:

    dshift = dh    dscale = dh · (x̂ · weight + bias)    dgate = dx · (branch + branch_bias)

With an index they are the sums of these over the tokens of a row, in the order of the tokens. ``order`` lists a sample's tokens in
the order of their rows, and ``starts`` says where each row's begin in it. The gradients of what all tokens share are

    dweight = Σ (1 + scale) · dh · x̂    dbias = Σ (1 + scale) · dh    dbranch_bias = Σ gate · dx

Passes of compiled kernels over (B, N, D): those of the ops per sample. Vectors per token add one for each of gate, shift and scale
in the forward, one for each of gate and scale in the backward, and one for each of their gradients but dshift, which is dh itself.
Vectors by index add none: their few rows stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.backward import Whole
from ditkernels.ops.dispatch import declare
from ditkernels.ops.norm.formulas import norm_formula, normed_rows, through_norm
from ditkernels.ops.spec import Example, Given, Gradient, Sizes, Wanted, accumulator, check_norm

# ---- Gradients: what the backward ops leave to plain PyTorch ---------------------------------------------------------

_INTEGERS = (None, None, None)


def _norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    (dh,) = grads
    x, scale, _, _, _, index, _, starts = read
    of_x, of_shift, of_scale, of_weight, of_bias, *_ = wanted
    if x is None:
        dshift, dbias = _offset_gradients(dh, scale, index, starts, of_shift, of_bias)
        return None, dshift, None, None, dbias, *_INTEGERS
    if index is not None or of_shift is None:
        return *call(grads, read, (of_x, of_shift, of_scale, of_weight, of_bias)), *_INTEGERS
    dx, _, *rest = call(grads, read, (of_x, None, of_scale, of_weight, of_bias))
    return dx, dh.to(of_shift), *rest, *_INTEGERS


def _residual_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """The gradient of x is the one of x1."""
    (dx1,) = grads
    of_x, *of_rest = wanted[:4]
    made = call(grads, read, tuple(of_rest)) if any(of_rest) else (None, None, None)
    return None if of_x is None else dx1, *made, *_INTEGERS


def _residual_norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    dx1, dh = grads
    x1, _, gate, scale, _, _, _, _, index, _, starts = read
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias, *_ = wanted
    if x1 is None:
        dshift, dbias = _offset_gradients(dh, scale, index, starts, of_shift, of_bias)
        return None, None, None, dshift, None, None, None, dbias, *_INTEGERS
    if dh is None:
        dh = torch.zeros_like(x1)
    asked_shift = None if index is None else of_shift
    # The gradient of a branch without a gate is that of x: the kernel writes it once.
    apart = of_branch is None or gate is not None
    asked = (of_x if apart else x1.dtype, of_branch if apart else None, of_gate)
    dx, dbranch, dgate, dshift, *rest = call((dx1, dh), read, (*asked, asked_shift, of_scale, of_branch_bias, of_weight, of_bias))
    if not apart:
        dx, dbranch = (None if of_x is None else dx), dx.to(of_branch)  # type: ignore[union-attr]
    if of_shift is not None and index is None:
        dshift = dh.to(of_shift)
    return dx, dbranch, dgate, dshift, *rest, *_INTEGERS


def _offset_gradients(
    dh: Tensor | None, scale: Tensor | None, index: Tensor | None, starts: Tensor | None,
    of_shift: torch.dtype | None, of_bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dshift and dbias where nothing else is wanted: they need no normed row."""
    if dh is None:
        return None, None
    wide = accumulator(dh)
    dshift = dbias = None
    if of_shift is not None:
        dshift = (dh if index is None else summed(dh.to(wide), index, starts)).to(of_shift)
    if of_bias is not None:
        modulated = dh.to(wide) if scale is None else (1 + of_rows(scale, dh, index, wide)) * dh
        dbias = modulated.sum((0, 1)).to(of_bias)
    return dshift, dbias


# ---- Declarations ----------------------------------------------------------------------------------------------------


def _sizes(given: Given, sizes: Sizes) -> Sizes:
    """K of a backward that reads no vector; the axis of ``stats``."""
    made = {} if "K" in sizes else {"K": sizes["L"] - 1 if "L" in sizes else sizes["N"]}
    return made | ({"S": 1 if given["norm"] == "rmsnorm" else 2} if "norm" in given else {})


def _check(given: Given) -> None:
    """That there is a row for each token where no index chooses one."""
    if "norm" in given:
        check_norm(given)
    for name in ("gate", "shift", "scale"):
        vector = given.get(name)
        if vector is not None and given["index"] is None and vector.shape[1] != given["x"].shape[1]:
            raise ValueError(f"{name}: got {vector.shape[1]} rows for {given['x'].shape[1]} tokens, and no index")


def _without_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the reference as one of the declared arguments."""

    def meant(*, order: Tensor | None = None, starts: Tensor | None = None, **rest: Any) -> Any:
        return function(**rest)

    return meant


def _kept(x: Tensor, norm: str, eps: float, branch: Tensor | None = None, **rest: Any) -> tuple[Tensor, ...]:
    if branch is not None:
        x = reference.gated_residual(x, branch, rest["gate"], index=rest["index"], branch_bias=rest["branch_bias"])
    _, stats = norm_formula(x, None, None, None, None, norm, eps, x.dtype, True)
    assert stats is not None
    return (stats,)


_ODD = {"B": 3, "N": 7, "K": 7, "D": 45, "L": 8}
_XL = {"B": 3, "N": 5, "K": 5, "D": 1152, "L": 6}
_GROUPS = "index: BN? = int, order: BN? = int, starts: BL? = int"

MODULATE_NORM_BY_TOKEN = declare(
    "modulate_norm_by_token",
    inputs=f"x: BND, shift: BKD?, scale: BKD?, weight: D?, bias: D?, {_GROUPS}",
    options="norm: str, eps: float, out_dtype: ScalarType",
    outputs="h: BND = out_dtype, stats: BNS = wide if keep",
    sizes=_sizes,
    check=_check,
    row="D",
    shards="B",
    meaning=_without_groups(reference.modulate_norm),
    kept=_kept,
    called="modulate_norm",
    gradient=Gradient(
        reads="x scale weight bias stats index order starts",
        options="norm",
        needs={
            "x": "x scale weight stats index order starts",
            "shift": "index order starts",
            "scale": "x weight bias stats index order starts",
            "weight": "x scale stats index order starts",
            "bias": "scale index order starts",
        },
        formula=_norm_gradients,
    ),
    examples=(Example(_ODD, present="shift scale"), Example(_XL, {"norm": "rmsnorm"}, present="scale weight bias")),
)
GATED_RESIDUAL_BY_TOKEN = declare(
    "gated_residual_by_token",
    inputs=f"x: BND, branch: BND, gate: BKD?, branch_bias: D?, {_GROUPS}",
    outputs="x1: BND = x",
    sizes=_sizes,
    check=_check,
    row="D",
    shards="B",
    meaning=_without_groups(reference.gated_residual),
    called="gated_residual",
    gradient=Gradient(
        reads="branch gate branch_bias index order starts",
        needs={
            "branch branch_bias": "gate index order starts",
            "gate": "branch branch_bias index order starts",
        },
        gives="branch gate branch_bias",
        formula=_residual_gradients,
    ),
    examples=(Example(_ODD, present="gate branch_bias"), Example(_XL, present="gate")),
)
GATED_RESIDUAL_NORM_BY_TOKEN = declare(
    "gated_residual_norm_by_token",
    inputs=(f"x: BND, branch: BND, gate: BKD?, shift: BKD?, scale: BKD?, branch_bias: D?, weight: D?, bias: D?, {_GROUPS}"),
    options="norm: str, eps: float, out_dtype: ScalarType",
    outputs="x1: BND = x, h: BND = out_dtype, stats: BNS = wide if keep",
    sizes=_sizes,
    check=_check,
    row="D",
    shards="B",
    meaning=_without_groups(reference.gated_residual_norm),
    kept=_kept,
    called="gated_residual_norm",
    gradient=Gradient(
        reads="x1 branch gate scale branch_bias weight bias stats index order starts",
        options="norm",
        needs={
            "x": "x1 scale weight stats index order starts",
            "branch branch_bias": "x1 gate scale weight stats index order starts",
            "gate": "x1 branch branch_bias scale weight stats index order starts",
            "shift": "index order starts",
            "scale": "x1 weight bias stats index order starts",
            "weight": "x1 scale stats index order starts",
            "bias": "scale index order starts",
        },
        formula=_residual_norm_gradients,
    ),
    examples=(
        Example(_ODD, present="gate shift scale"),
        Example(_XL, {"norm": "rmsnorm"}, present="gate scale branch_bias weight bias"),
    ),
)


# ---- The torch backend: its backward is the formula. Eager calls that want gradients are plain PyTorch ----------------


def of_rows(vector: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each token's row of a vector, (B, N, D)."""
    return reference.of_tokens(vector, x.shape[1], index).to(dtype)


def summed(values: Tensor, index: Tensor | None, starts: Tensor | None) -> Tensor:
    """The sums of a row's tokens, (B, K, D), from (B, N, D), in the order of the tokens; without an index the values themselves."""
    if index is None:
        return values
    if starts is None:
        raise RuntimeError("starts: the gradient of a vector by index needs it")
    batch, rows = values.shape[0], starts.shape[1] - 1
    places = index + (torch.arange(batch, device=index.device) * rows).unsqueeze(1)
    sums = torch.ops.aten.embedding_dense_backward(values.flatten(0, 1), places.flatten(), batch * rows, -1, False)
    return sums.view(batch, rows, values.shape[2])


@MODULATE_NORM_BY_TOKEN.implement("torch", plain=_without_groups(reference.modulate_norm))
def norm_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None,
    norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    h = reference.modulate_norm(x, shift, scale, index=index, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype)
    stats = norm_formula(x, None, None, None, None, norm, eps, x.dtype, True)[1] if keep else None
    return h.contiguous(), stats


@GATED_RESIDUAL_BY_TOKEN.implement("torch", plain=_without_groups(reference.gated_residual))
def residual_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None,
) -> Tensor:  # fmt: skip
    return reference.gated_residual(x, branch, gate, index=index, branch_bias=branch_bias).contiguous()


@GATED_RESIDUAL_NORM_BY_TOKEN.implement("torch", plain=_without_groups(reference.gated_residual_norm))
def residual_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None,
    norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    x1 = residual_forward(x, branch, gate, branch_bias, index, order, starts)
    return (x1, *norm_forward(x1, shift, scale, weight, bias, index, order, starts, norm, eps, out_dtype, keep))


@MODULATE_NORM_BY_TOKEN.gradients.implement("torch")
def norm_backward(
    dh: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None, norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, shift, scale, weight and bias, as far as they are wanted."""
    of_x, of_shift, of_scale, of_weight, of_bias = wanted
    wide = accumulator(x)
    dh, normed = dh.to(wide), normed_rows(x.to(wide), stats)
    affine = dh if scale is None else dh * (1 + of_rows(scale, dh, index, wide))
    dx = dshift = dscale = dweight = dbias = None
    if of_x:
        dx = through_norm(affine if weight is None else affine * weight, normed, stats).to(of_x).contiguous()
    if of_shift:
        dshift = summed(dh, index, starts).to(of_shift, copy=True).contiguous()
    if of_scale:
        unmodulated = normed if weight is None else normed * weight
        unmodulated = unmodulated if bias is None else unmodulated + bias
        dscale = summed(dh * unmodulated, index, starts).to(of_scale).contiguous()
    if of_weight:
        dweight = (affine * normed).sum((0, 1)).to(of_weight)
    if of_bias:
        dbias = affine.sum((0, 1)).to(of_bias)
    return dx, dshift, dscale, dweight, dbias


@GATED_RESIDUAL_BY_TOKEN.gradients.implement("torch")
def residual_backward(
    dx1: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dbranch, dgate and dbranch_bias, as far as they are wanted."""
    of_branch, of_gate, of_bias = wanted
    wide = accumulator(dx1)
    dx = dx1.to(wide)
    through_gate = dx if gate is None else dx * of_rows(gate, dx, index, wide)
    dbranch = dgate = dbias = None
    if of_branch:
        dbranch = through_gate.to(of_branch, copy=True).contiguous()
    if of_gate and branch is not None:
        u = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias
        dgate = summed(dx * u, index, starts).to(of_gate).contiguous()
    if of_bias:
        dbias = through_gate.sum((0, 1)).to(of_bias)
    return dbranch, dgate, dbias


@GATED_RESIDUAL_NORM_BY_TOKEN.gradients.implement("torch")
def residual_norm_backward(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    index: Tensor | None, order: Tensor | None, starts: Tensor | None, norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of all inputs in their order, as far as they are wanted."""
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = wanted
    groups = (index, order, starts)
    asked = (accumulator(x1), of_shift, of_scale, of_weight, of_bias)
    dx, dshift, dscale, dweight, dbias = norm_backward(dh, x1, scale, weight, bias, stats, *groups, norm, asked)
    assert dx is not None
    dx = dx if dx1 is None else dx + dx1
    of_residual = (of_branch, of_gate, of_branch_bias)
    dbranch, dgate, dbranch_bias = residual_backward(dx, branch, gate, branch_bias, *groups, of_residual)
    return dx.to(of_x) if of_x else None, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias


for _op in (MODULATE_NORM_BY_TOKEN, GATED_RESIDUAL_BY_TOKEN, GATED_RESIDUAL_NORM_BY_TOKEN):
    for _each in (_op, _op.gradients):
        _each.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
        _each.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
        _each.implement_later("triton", f"{__name__}_triton")
