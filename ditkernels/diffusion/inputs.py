"""Checks of arguments. Each error names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}")


def check_count(name: str, value: int, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, allowed is an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, allowed is an int of at least {least}")


def check_like(name: str, value: Tensor, x: Tensor) -> None:
    """``value`` must be a tensor of x's shape on x's device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a tensor")
    if value.shape != x.shape or value.device != x.device:
        raise ValueError(f"{name}: got shape {tuple(value.shape)} on {value.device}, allowed is {tuple(x.shape)} on {x.device}")


def widened(x: Tensor, name: str = "x") -> Tensor:
    """x (B, C, …) in the dtype of the computation: float64 stays, narrower floats become float32."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: got {came}, allowed is a floating-point tensor")
    if x.ndim < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is (B, C, …)")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_timesteps(t: Tensor, x: Tensor, steps: int) -> None:
    """t must hold one step of 0 … steps − 1 for each sample of x, and lie on x's device."""
    if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
        came = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: got {came}, allowed is a tensor of int64 or int32")
    if t.shape != x.shape[:1] or t.device != x.device:
        raise ValueError(f"t: got shape {tuple(t.shape)} on {t.device}, allowed is {tuple(x.shape[:1])} on {x.device}")
    inside = ((t >= 0) & (t < steps)).all()
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading the answer would stall the host at every step. The assertion lets the device itself complain.
        torch._assert_async(inside, f"t: got a step out of range, allowed are 0 to {steps - 1}")
    elif not inside:
        raise ValueError(f"t: got steps from {int(t.min())} to {int(t.max())}, allowed are 0 to {steps - 1}")


def noise_for(x: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """``noise``, which must fit x, in x's dtype; where it is None, standard normals from ``generator``."""
    if noise is None:
        return torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    if generator is not None:
        raise ValueError("generator: got one beside noise, allowed is only one of the two")
    check_like("noise", noise, x)
    return noise.to(x.dtype)
