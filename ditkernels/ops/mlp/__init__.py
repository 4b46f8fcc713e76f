"""A transformer's MLP as one op: ``mlp``, two products with tanh-GELU between them, so that GELU can go along with the products.

With x (B, N, D), W₁ (F, D), b₁ (F,), W₂ (E, F), and GELU as in the family gelu:

    z = x·W₁ᵀ + b₁        h = GELU(z)        y = h·W₂ᵀ

The bias of the second linear is left to the kernel that adds y to the residual stream. Backward, from dy:

    dz = (dy·W₂) ⊙ GELU'(z)        db₁ = Σ_bn dz        dW₂ = dyᵀ·h        dW₁ = dzᵀ·x        dx = dz·W₁

Saved for backward: x, z and h, the weights, as far as the gradients that are wanted need them. z is kept in x's dtype; GELU' is
taken of what was kept. The products run in the saved dtypes, whatever autocast says around the backward.

Why one op: what GELU moves is (B, N, F), four times a branch's width. On its own it reads z and writes h, and backward reads dh and
z and writes dz: five passes. As an epilogue of the products beside it (``cuda``: cuBLASLt, csrc/cuda/mlp.cu) it writes z forward
and reads z backward: two, since h and dz are what the products write, and dh never exists. There h is the GELU of z before z is
rounded. The other backends take the product, then their kernel of ``bias_gelu``.

GELU: Hendrycks & Gimpel, arXiv 1606.08415; this is its tanh form, as in DiT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.dispatch import Op, Refusal, backend_setting, constant_when_traced, declare, define, fastest, without_autocast
from ditkernels.ops.gelu import BIAS_GELU
from ditkernels.ops.library import Kernel
from ditkernels.ops.spec import Example, Given, Gradient, Wanted

__all__ = ["mlp"]

# ---- Public function and declaration ---------------------------------------------------------------------------------


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> Tensor:
    """fc2(GELU(fc1(x))) without the bias of fc2.

    >>> branch = mlp(h, fc1.weight, fc1.bias, fc2.weight)
    >>> x = gated_residual(x, branch, gate, branch_bias=fc2.bias)

    Args:
        x: (B, N, D), any strides.
        fc1_weight: (F, D).
        fc1_bias: (F,), optional.
        fc2_weight: (E, F).

    Dtypes: all of one, fp32, bf16 or fp16 (fp64 on the ``torch`` backend); under autocast each is taken in autocast's dtype, as by
    the linears. Products add up in fp32.

    Returns:
        (B, N, E) in that dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or kind of tensor that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    dtype = MLP.autocast_dtype(x)
    if dtype is not None:
        x, fc1_weight, fc2_weight = x.to(dtype), fc1_weight.to(dtype), fc2_weight.to(dtype)
        fc1_bias = None if fc1_bias is None else fc1_bias.to(dtype)
    return MLP((x, fc1_weight, fc1_bias, fc2_weight))  # type: ignore[no-any-return]


def _check(given: Given) -> None:
    weights = ("fc1_weight", "fc2_weight")
    for name in weights:
        if given[name].shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(given[name].shape)}; the first axis must not be empty")
    x = given["x"]
    for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
        value = given[name]
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, expected x's, {x.dtype}")


def _flops(given: Given) -> int:
    batch, length, width = given["x"]
    out, hidden = given["fc2_weight"]
    return 2 * batch * length * hidden * (width + out)


def _backward_flops(given: Given) -> int:
    """Of dy·W₂, unless dW₂ alone is wanted, and of the products of the gradients that are."""
    batch, length, out = given["dy"]
    of_x, of_weight1, of_bias1, of_weight2 = (code >= 0 for code in given["wanted"])
    of_z = of_x or of_weight1 or of_bias1
    (*_, hidden), (*_, width) = given["z"] or given["h"], given["fc1_weight"] or given["x"] or (0,)
    return 2 * batch * length * hidden * (out * (of_z + of_weight2) + width * (of_x + of_weight1))


def _kept(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(x, fc1_weight, fc1_bias)
    return z, F.gelu(z, approximate="tanh")


MLP = declare(
    "mlp",
    inputs="x: BND, fc1_weight: FD, fc1_bias: F?, fc2_weight: EF",
    outputs="y: BNE = x, z: BNF = x if keep, h: BNF = x if keep",
    check=_check,
    shards="BNF",
    flops=_flops,
    meaning=reference.mlp,
    kept=_kept,
    gradient=Gradient(
        reads="x fc1_weight fc2_weight z h",
        needs={"x": "fc1_weight fc2_weight z", "fc1_weight": "x fc2_weight z", "fc1_bias": "fc2_weight z", "fc2_weight": "h"},
        flops=_backward_flops,
    ),
    examples=(Example({"B": 3, "N": 7, "D": 45, "F": 31, "E": 13}), Example({"B": 3, "N": 37, "D": 96, "F": 384, "E": 96})),
)


# ---- The op from what a backend makes of its two halves --------------------------------------------------------------

# (x (B, N, D), fc1_weight, fc1_bias, keep) -> z and h (B, N, F); z may be None unless keep is set.
Hidden = Callable[[Tensor, Tensor, "Tensor | None", bool], "tuple[Tensor | None, Tensor]"]
# (dy (B·N, E), fc2_weight, z (B, N, F), dtypes of dz and db₁ or None) -> dz (..., F), db₁; each may be None if it is not wanted.
HiddenBackward = Callable[[Tensor, Tensor, Tensor, Wanted], "tuple[Any, Tensor | None]"]


def _rows(tensor: Tensor) -> Tensor:
    """(B, N, D) as (B·N, D), packed."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _implement(backend: str, hidden: Hidden, hidden_backward: HiddenBackward, refuse: Refusal, refuse_backward: Refusal) -> None:
    """Gives the op to a backend that has its two halves; the products beside them are torch's."""

    @MLP.implement(backend, refuse=refuse)
    def forward(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with without_autocast(x):
            z, h = hidden(x, fc1_weight, fc1_bias, keep)
            y = F.linear(h, fc2_weight)
        return (y, z, h) if keep else (y, None, None)

    @MLP.gradients.implement(backend, refuse=refuse_backward)
    def backward(
        dy: Tensor, x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, z: Tensor, h: Tensor,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Each of x ... h is None where no wanted gradient needs it."""
        of_x, of_weight1, of_bias1, of_weight2 = wanted
        dx = dweight1 = dbias1 = dweight2 = None
        with without_autocast(dy):
            flat = _rows(dy)
            of_z = of_x or of_weight1
            if of_z or of_bias1:
                dz, dbias1 = hidden_backward(flat, fc2_weight, z, (of_z, of_bias1))
            if of_x:
                dx = (_rows(dz) @ fc1_weight).unflatten(0, dy.shape[:2])
            if of_weight1:
                dweight1 = _rows(dz).t() @ _rows(x)
            if of_weight2:
                dweight2 = flat.t() @ _rows(h)
        return dx, dweight1, dbias1, dweight2


def through_bias_gelu(backend: str, gelu: Kernel, gelu_backward: Kernel, refuse: Refusal) -> None:
    """Gives the op to a backend by its kernels of ``bias_gelu`` and its backward; the product before them adds the bias."""

    def hidden(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        z = F.linear(x, weight, bias)
        return z, gelu(z, None)

    def hidden_backward(dy: Tensor, weight: Tensor, z: Tensor, wanted: Wanted) -> Any:
        return gelu_backward((dy @ weight).view(z.shape), z, None, wanted)

    _implement(backend, hidden, hidden_backward, refuse, refuse)


_gelu, _gelu_backward = BIAS_GELU.implementation, BIAS_GELU.gradients.implementation
through_bias_gelu("torch", _gelu("torch").kernel, _gelu_backward("torch").kernel, lambda op, args: None)
through_bias_gelu("cpu", _gelu("cpu").kernel, _gelu_backward("cpu").kernel, _native.refuse_cpu)
for _op in (MLP, MLP.gradients):
    _op.implement_later("triton", f"{__name__}.triton")


# ---- The CUDA C++ backend: GELU as an epilogue of cuBLASLt's products ------------------------------------------------

# Of the compiled library, on packed matrices; z and dbias are empty unless ``keep`` or ``biased`` is set.
define("linear_gelu_cuda(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor h, Tensor z)")
define("gelu_linear_backward_cuda(Tensor dy, Tensor weight, Tensor z, bool biased) -> (Tensor dz, Tensor dbias)")
# Why cuBLASLt cannot be used, and why its epilogues cannot serve these sizes on the current device; "" if they can.
define("cuda_blas() -> str")
define("mlp_algorithms_cuda(ScalarType dtype, int rows, int width, int hidden, int out) -> str")

DTYPES = (torch.bfloat16, torch.float16)
ALIGNED = 8


def _cuda_hidden(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor | None, Tensor]:
    packed = None if bias is None else bias.contiguous()
    h, z = torch.ops.ditkernels.linear_gelu_cuda(_rows(x), weight.contiguous(), packed, keep)
    return z.unflatten(0, x.shape[:2]) if keep else None, h.unflatten(0, x.shape[:2])


def _cuda_hidden_backward(dy: Tensor, weight: Tensor, z: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
    biased = wanted[1] is not None
    dz, dbias = torch.ops.ditkernels.gelu_linear_backward_cuda(dy, weight.contiguous(), _rows(z), biased)
    return dz, dbias if biased else None


def reason(device: torch.device, dtype: torch.dtype, width: int, hidden: int, out: int, rows: int | None = None) -> str | None:
    """Why the epilogues cannot serve on a device, for x (B, N, width) and weights (hidden, width) and (out, hidden), or None.

    With ``rows``, B·N, cuBLASLt is asked whether it has algorithms for these products.
    """
    missing = _native.cuda_reason("linear_gelu_cuda", device)
    if missing is not None:
        return missing
    if dtype not in DTYPES:
        return f"{dtype} is not among the products' dtypes ({', '.join(map(str, DTYPES))})"
    for name, size in (("D", width), ("F", hidden), ("E", out)):
        if size % ALIGNED:
            return f"{name} is {size}; the products need a multiple of {ALIGNED}"
    no_library = torch.ops.ditkernels.cuda_blas()
    if no_library or not rows or type(rows) is not int:  # a compiler's symbolic number of rows cannot be asked about
        return no_library or None
    return _no_algorithms(device, dtype, rows, int(width), int(hidden), int(out))


@functools.lru_cache(maxsize=1024)
def _no_algorithms(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int, out: int) -> str | None:
    op = "mlp_algorithms_cuda"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ditkernels::{op}", "CompositeExplicitAutograd"):
        return None
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: as it is
        return torch.ops.ditkernels.mlp_algorithms_cuda(dtype, rows, width, hidden, out) or None


def _refuse(op: Op, args: Sequence[Any]) -> str | None:
    x, _, _, fc2_weight, *_ = args
    batch, length, width = x.shape
    out, hidden = fc2_weight.shape
    return reason(x.device, x.dtype, width, hidden, out, batch * length)


def _refuse_backward(op: Op, args: Sequence[Any]) -> str | None:
    dy, x, fc1_weight, _, z, h, _ = args
    batch, length, out = dy.shape
    hidden = (h if z is None else z).shape[-1]
    # The epilogues of the backward know nothing of D.
    width = next((t.shape[-1] for t in (x, fc1_weight) if t is not None), ALIGNED)
    return reason(dy.device, dy.dtype, width, hidden, out, batch * length)


def asked_for(device: torch.device) -> bool:
    """Whether the epilogues are asked for, or were measured to be the fastest."""
    return (backend_setting() or fastest("mlp", device)) == "cuda"


@constant_when_traced
def _without_reason(device: torch.device, dtype: torch.dtype, width: int, hidden: int, out: int) -> bool:
    return reason(device, dtype, width, hidden, out) is None


def serves(device: torch.device, dtype: torch.dtype, width: int, hidden: int, out: int) -> bool:
    """Whether a call of ``mlp`` with such tensors would run on the epilogues: they can, and are asked for or were measured fastest.

    Otherwise its parts one by one do the same, and leave a compiler more to choose.
    """
    return asked_for(device) and _without_reason(device, dtype, width, hidden, out)


_implement("cuda", _cuda_hidden, _cuda_hidden_backward, _refuse, _refuse_backward)
