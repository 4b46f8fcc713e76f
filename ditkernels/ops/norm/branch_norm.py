"""The residual of a branch that is RMS-normed first: ``gated_residual`` and ``gated_residual_norm`` with a ``branch_norm``.

Lumina 2, Z-Image and Mochi norm what attention and the MLP give before they gate it. Forward, for token n of sample b, the rest as
at the top of norm/__init__.py:

    r = (mean_d(branch²) + branch_eps)^-1/2        b̂ = branch · r        x1 = x + gate_b · branch_weight · b̂

Backward, from dx, the gradient that reaches x1 from later layers and through the next norm, with c = gate_b · branch_weight:

    dbranch = r · (c · dx - b̂ · mean_d(c · dx · b̂))

and from one sum over the tokens of a sample,

    T = Σ_n dx · b̂ :        dgate = branch_weight · T        dbranch_weight = Σ_b gate_b · T

T stands where R or S of a plain branch do: dgate = R + branch_bias · S and dbranch_bias = Σ_b gate_b · S are these formulas, with
the weight in the bias's place, S = T and R = 0, or, without a weight, R = T. So kernels add up T as one of the two, and what
makes gradients of the sums stays as it is.

Saved for backward besides: ``branch_stats``, r of each row. Passes of compiled kernels over (B, N, D): those of the ops without
this norm, 3 and 3, or 4 and 6 with the next norm. Vectors per token and by index have no kernels here: the branch is normed by
an op of its own, 2 passes more in the forward and 3 in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.backward import Whole
from ditkernels.ops.choice import OPS
from ditkernels.ops.dispatch import declare
from ditkernels.ops.norm.formulas import (
    norm_formula,
    norm_gradients_formula,
    normed_rows,
    offset_gradients,
    per_token,
    through_norm,
)
from ditkernels.ops.norm.vectors import Tensors, wider
from ditkernels.ops.spec import Example, Given, Gradient, Sizes, Wanted, accumulator, check_eps, check_norm

BRANCH_NORMS = ("rmsnorm",)


def check_branch_norm(branch_norm: str | None, branch_weight: Tensor | None, branch_bias: Tensor | None) -> None:
    """Raises on arguments of a public function that do not go together."""
    if branch_norm is None:
        raise ValueError("branch_weight: given without branch_norm")
    if branch_norm not in BRANCH_NORMS:
        raise ValueError(f"branch_norm: got {branch_norm!r}, allowed are {', '.join(BRANCH_NORMS)}")
    if branch_bias is not None:
        raise ValueError("branch_bias: given together with branch_norm, allowed is one of them")


# ---- Calls with vectors of rows --------------------------------------------------------------------------------------


def normed_apart(branch: Tensor, weight: Tensor | None, eps: float, asked: str | None = None) -> Tensor:
    """The normed branch, by an op of its own."""
    return OPS["modulate_norm"]((branch, None, None, weight, None), ("rmsnorm", eps, branch.dtype), asked)  # type: ignore[operator, no-any-return]


def _residual_by_token(tensors: Tensors, options: tuple[Any, ...], asked: str) -> Any:
    x, branch, gate, branch_weight = tensors
    u = normed_apart(branch, branch_weight, options[0], asked)  # type: ignore[arg-type]
    return OPS["gated_residual_by_token"]((x, u, gate, None, None, None, None), (), asked)  # type: ignore[operator]


def _residual_norm_by_token(tensors: Tensors, options: tuple[Any, ...], asked: str) -> Any:
    x, branch, gate, shift, scale, branch_weight, weight, bias = tensors
    u = normed_apart(branch, branch_weight, options[0], asked)  # type: ignore[arg-type]
    given = (x, u, gate, shift, scale, None, weight, bias, None, None, None)
    return OPS["gated_residual_norm_by_token"](given, options[1:], asked)  # type: ignore[operator]


# ---- Gradients: what the backward ops leave to plain PyTorch ---------------------------------------------------------


def _residual_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """The gradient of x is the one of x1."""
    (dx1,) = grads
    of_x, *of_rest = wanted
    made = call(grads, read, tuple(of_rest)) if any(of_rest) else (None, None, None)
    return None if of_x is None else dx1, *made


def _residual_norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    dx1, dh = grads
    x1, _, _, scale, *_ = read
    if x1 is None:
        dshift, dbias = offset_gradients(dh, scale, wanted[3], wanted[7])
        return None, None, None, dshift, None, None, None, dbias
    return call((dx1, torch.zeros_like(x1) if dh is None else dh), read, wanted)  # type: ignore[no-any-return]


# ---- Declarations ----------------------------------------------------------------------------------------------------


def _sizes(given: Given, sizes: Sizes) -> Sizes:
    """The axes of the statistics: r alone of the branch; mean and rstd, or rstd alone, of x1."""
    return {"R": 1} | ({"S": 1 if given["norm"] == "rmsnorm" else 2} if "norm" in given else {})


def _check(given: Given) -> None:
    check_eps("branch_eps", given.get("branch_eps", 0.0))
    if "norm" in given:
        check_norm(given)


def _with_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the reference as one of the declared arguments."""

    def meant(**given: Any) -> Any:
        return function(branch_norm="rmsnorm", **given)

    return meant


residual, residual_norm = _with_norm(reference.gated_residual), _with_norm(reference.gated_residual_norm)


def _rstd_of_branch(x: Tensor, branch: Tensor, branch_eps: float, **rest: Any) -> Tensor:
    """r of each row of the branch, (B, N, 1), in the dtype of x's arithmetic."""
    rstd = norm_formula(branch, None, None, None, None, "rmsnorm", branch_eps, branch.dtype, True)[1]
    assert rstd is not None
    return rstd.to(accumulator(x))


def _kept(**given: Any) -> tuple[Tensor, ...]:
    return (_rstd_of_branch(**given),)


def _kept_of_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    branch_eps: float,
    norm: str,
    eps: float,
    **rest: Any,
) -> tuple[Tensor, ...]:
    x1 = residual(x=x, branch=branch, gate=gate, branch_weight=branch_weight, branch_eps=branch_eps)
    stats = norm_formula(x1, None, None, None, None, norm, eps, x.dtype, True)[1]
    assert stats is not None
    return stats, _rstd_of_branch(x, branch, branch_eps)


_ODD = {"B": 3, "N": 7, "D": 45}
_XL = {"B": 3, "N": 5, "D": 1152}
_NORMED = {"branch_norm": "rmsnorm"}

GATED_RESIDUAL_BRANCH_NORM = declare(
    "gated_residual_branch_norm",
    inputs="x: BND, branch: BND, gate: BD?, branch_weight: D?",
    options="branch_eps: float",
    outputs="x1: BND = x, branch_stats: BNR = wide if keep",
    sizes=_sizes,
    check=_check,
    row="D",
    shards="BN",
    meaning=residual,
    wider=wider("gated_residual_branch_norm", _residual_by_token),
    kept=_kept,
    called="gated_residual",
    gradient=Gradient(
        reads="branch gate branch_weight branch_stats",
        needs={
            "branch": "branch gate branch_weight branch_stats",
            "gate": "branch branch_weight branch_stats",
            "branch_weight": "branch gate branch_stats",
        },
        gives="branch gate branch_weight",
        formula=_residual_gradients,
    ),
    examples=(Example(_ODD, _NORMED), Example(_XL, _NORMED, present="gate")),
)
GATED_RESIDUAL_NORM_BRANCH_NORM = declare(
    "gated_residual_norm_branch_norm",
    inputs="x: BND, branch: BND, gate: BD?, shift: BD?, scale: BD?, branch_weight: D?, weight: D?, bias: D?",
    options="branch_eps: float, norm: str, eps: float, out_dtype: ScalarType",
    outputs="x1: BND = x, h: BND = out_dtype, stats: BNS = wide if keep, branch_stats: BNR = wide if keep",
    sizes=_sizes,
    check=_check,
    row="D",
    shards="BN",
    meaning=residual_norm,
    wider=wider("gated_residual_norm_branch_norm", _residual_norm_by_token),
    kept=_kept_of_norm,
    called="gated_residual_norm",
    gradient=Gradient(
        reads="x1 branch gate scale branch_weight weight bias stats branch_stats",
        options="norm",
        needs={
            "x": "x1 scale weight stats",
            "branch": "x1 branch gate scale branch_weight weight stats branch_stats",
            "gate": "x1 branch scale branch_weight weight stats branch_stats",
            "branch_weight": "x1 branch gate scale weight stats branch_stats",
            "scale": "x1 weight bias stats",
            "weight": "x1 scale stats",
            "bias": "scale",
        },
        formula=_residual_norm_gradients,
    ),
    examples=(
        Example(_ODD, {**_NORMED, "norm": "rmsnorm"}, present="gate scale branch_weight weight"),
        Example(_XL, _NORMED, present="gate shift scale"),
        Example(_ODD, _NORMED, present="branch_weight weight bias"),
    ),
)


# ---- The torch backend: its backward is the formula. Eager calls that want gradients are plain PyTorch ----------------


@GATED_RESIDUAL_BRANCH_NORM.implement("torch", plain=residual)
def residual_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_weight: Tensor | None, branch_eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    x1 = residual(x=x, branch=branch, gate=gate, branch_weight=branch_weight, branch_eps=branch_eps)
    return x1.contiguous(), _rstd_of_branch(x, branch, branch_eps) if keep else None


@GATED_RESIDUAL_NORM_BRANCH_NORM.implement("torch", plain=residual_norm)
def residual_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    branch_weight: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    branch_eps: float, norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    x1, branch_stats = residual_forward(x, branch, gate, branch_weight, branch_eps, keep)
    h = reference.modulate_norm(x1, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype)
    stats = norm_formula(x1, None, None, None, None, norm, eps, x1.dtype, True)[1] if keep else None
    return x1, h.contiguous(), stats, branch_stats


@GATED_RESIDUAL_BRANCH_NORM.gradients.implement("torch")
def residual_backward(
    dx1: Tensor, branch: Tensor, gate: Tensor | None, branch_weight: Tensor | None, branch_stats: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dbranch, dgate and dbranch_weight, as far as they are wanted."""
    of_branch, of_gate, of_weight = wanted
    wide = accumulator(dx1)
    dx, normed = dx1.to(wide), normed_rows(branch.to(wide), branch_stats)
    g = per_token(gate, wide)
    through_gate = dx if g is None else dx * g
    dbranch = dgate = dweight = None
    if of_branch:
        dnormed = through_gate if branch_weight is None else through_gate * branch_weight
        dbranch = through_norm(dnormed, normed, branch_stats).to(of_branch).contiguous()
    if of_gate:
        dgate = (dx * (normed if branch_weight is None else normed * branch_weight)).sum(1).to(of_gate)
    if of_weight:
        dweight = (through_gate * normed).sum((0, 1)).to(of_weight)
    return dbranch, dgate, dweight


@GATED_RESIDUAL_NORM_BRANCH_NORM.gradients.implement("torch")
def residual_norm_backward(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    branch_weight: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor, branch_stats: Tensor | None,
    norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of all inputs in their order, as far as they are wanted."""
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_weight, of_weight, of_bias = wanted
    asked = (accumulator(x1), of_shift, of_scale, of_weight, of_bias)
    dx, dshift, dscale, dweight, dbias = norm_gradients_formula(dh, x1, scale, weight, bias, stats, norm, asked)
    assert dx is not None
    dx = dx if dx1 is None else dx + dx1
    dbranch = dgate = dbranch_weight = None
    if branch is not None and branch_stats is not None:
        of_residual = (of_branch, of_gate, of_branch_weight)
        dbranch, dgate, dbranch_weight = residual_backward(dx, branch, gate, branch_weight, branch_stats, of_residual)
    return dx.to(of_x) if of_x else None, dbranch, dgate, dshift, dscale, dbranch_weight, dweight, dbias


for _op in (GATED_RESIDUAL_BRANCH_NORM, GATED_RESIDUAL_NORM_BRANCH_NORM):
    for _each in (_op, _op.gradients):
        _each.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
        _each.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
        _each.implement_later("triton", f"{__name__}_triton")
