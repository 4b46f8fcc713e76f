"""What all ops ask of their arguments. Every message names the argument, what came and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.reference import NORMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype(name: str, value: torch.dtype) -> None:
    if value not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"{name}: got dtype {value}, allowed are {allowed}")


def tensor(name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Checks dtype, device and shape; None stands for any size."""
    dtype(name, value.dtype)
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, but the first argument is on {like.device}")
    same_rank = value.dim() == len(shape)
    if not same_rank or any(want is not None and got != want for got, want in zip(value.shape, shape)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({expected})")


def optional(name: str, value: Tensor | None, shape: tuple[int | None, ...], like: Tensor) -> None:
    if value is not None:
        tensor(name, value, shape, like)


def tokens(name: str, value: Tensor) -> tuple[int, int, int]:
    """Checks a (B, N, D) tensor and returns its sizes."""
    tensor(name, value, (None, None, None), value)
    batch, length, width = value.shape
    if width < 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; the last axis must not be empty")
    return batch, length, width


def norm(value: str, eps: float) -> None:
    if value not in NORMS:
        raise ValueError(f"norm: got {value!r}, allowed are {', '.join(NORMS)}")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, allowed is 0 or more")


def requires(name: str, value: Tensor | None, needed: str, other: Tensor | None) -> None:
    """Checks that ``value`` comes only together with ``other``."""
    if value is not None and other is None:
        raise ValueError(f"{name}: given without {needed}")
