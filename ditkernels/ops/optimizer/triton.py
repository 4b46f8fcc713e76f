"""The Triton kernels of ``adamw_ema``. Names and formulas are those at the top of __init__.py.

One launch of each kernel serves all weights: a table on the device holds the addresses of the tensors, one row for each weight, and
each program looks up the weight whose chunk of ``CHUNK`` elements it owns.

    advance_steps    A program owns ``ROWS`` weights. It writes t + 1, unless the step is skipped, and to ``factors`` (weights, 2),
                     fp32, lr / (1 − β₁ᵗ) and √(1 − β₂ᵗ). It computes both in fp64, because 1 − βᵗ cancels in fp32.

    update_chunks    A program owns one chunk of one weight. It reads w, gradient, m, v and the average once, and writes w, m, v,
                     the average and the copy once: 36 bytes a parameter in fp32, and also with gradient and copy both in bf16.

Arithmetic is fp32, with quotients and roots rounded to nearest. The same inputs give the same bits: no two programs touch one
element. Offsets and addresses are 64-bit. 128-bit accesses move the weights whose tensors all begin at multiples of 16 bytes and
hold a multiple of 8 elements. A second launch of each kernel takes the other weights.

The host builds the table at every step and copies it without waiting, so a CUDA graph cannot capture the step.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._triton import Tile, ceil_div, jit, tl
from ditkernels.ops.dispatch import Op
from ditkernels.ops.optimizer import ADAMW_EMA, not_contiguous

CHUNK = 8192
BLOCK = 1024
TILE = Tile(1, 4)
STEP_ROWS = 128
VECTOR_BYTES, VECTOR_ELEMENTS = 16, 8

# Columns of the table: seven addresses, the number of elements, the index of the first chunk.
COLUMNS = 9
STEP_COLUMN = 4

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def advance_steps(  # type: ignore[no-untyped-def]
    table, factors, found_inf, lr, weights,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, COLUMNS: tl.constexpr, STEP_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < weights
    steps = tl.load(table + rows * COLUMNS + STEP_COLUMN, live, 0).to(tl.pointer_type(tl.float32))
    before = tl.load(steps, live, 0.0)
    t = (before + 1.0).to(tl.float64)
    step_size = lr / (1.0 - tl.exp(t * LOG_BETA1))
    root = tl.sqrt(1.0 - tl.exp(t * LOG_BETA2))
    tl.store(factors + rows * 2, step_size.to(tl.float32), live)
    tl.store(factors + rows * 2 + 1, root.to(tl.float32), live)
    taken = 1.0
    if found_inf is not None:
        taken = 1.0 - (tl.load(found_inf) != 0).to(tl.float32)
    tl.store(steps, before + taken, live)


@jit
def _address(row, column: tl.constexpr, dtype: tl.constexpr, VECTORISED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tensor whose address this column of a weight's row holds."""
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if VECTORISED:
        address = tl.multiple_of(address, 16)
    return address


@jit
def update_chunks(  # type: ignore[no-untyped-def]
    table, owners, factors, grad_scale, found_inf, shrink, complement1, beta2, complement2, eps, towards,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, AVERAGE: tl.constexpr, VECTORISED: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * COLUMNS
    weight = _address(row, 0, tl.float32, VECTORISED)
    gradient = _address(row, 1, GRADIENT, VECTORISED)
    exp_avg = _address(row, 2, tl.float32, VECTORISED)
    exp_avg_sq = _address(row, 3, tl.float32, VECTORISED)
    average = _address(row, 5, tl.float32, VECTORISED)
    if COPY is not None:
        copy = _address(row, 6, COPY, VECTORISED)
    size = tl.load(row + 7)
    if VECTORISED:
        size = tl.multiple_of(size, 8)
    first = (program - tl.load(row + 8)) * CHUNK
    step_size = tl.load(factors + owner * 2)
    root = tl.load(factors + owner * 2 + 1)
    scale = tl.load(grad_scale) if grad_scale is not None else None
    skipped = tl.load(found_inf) != 0 if found_inf is not None else None

    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = at < size
        w = tl.load(weight + at, inside, 0.0)
        g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
        m = tl.load(exp_avg + at, inside, 0.0)
        v = tl.load(exp_avg_sq + at, inside, 0.0)
        if AVERAGE:
            a = tl.load(average + at, inside, 0.0)
        if scale is not None:
            g = tl.div_rn(g, scale)
        new_m = m + complement1 * (g - m)
        new_v = beta2 * v + complement2 * (g * g)
        denominator = tl.div_rn(tl.sqrt_rn(new_v), root) + eps
        new_w = shrink * w - step_size * tl.div_rn(new_m, denominator)
        if skipped is not None:
            new_w = tl.where(skipped, w, new_w)
            new_m = tl.where(skipped, m, new_m)
            new_v = tl.where(skipped, v, new_v)
        tl.store(weight + at, new_w, inside)
        tl.store(exp_avg + at, new_m, inside)
        tl.store(exp_avg_sq + at, new_v, inside)
        if AVERAGE:
            tl.store(average + at, a + towards * (new_w - a), inside)
        if COPY is not None:
            tl.store(copy + at, new_w.to(COPY), inside)


# ---- Launch ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _owners(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """The index of each chunk's weight, int32 on the device, and the index of each weight's first chunk."""
    chunks = torch.tensor([ceil_div(size, CHUNK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), chunks)
    return owners.to(device), tuple((chunks.cumsum(0) - chunks).tolist())


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """``rows`` as int64 on the device. The copy does not block: torch does not reuse pinned memory until the copy is done."""
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# A weight's tensors in the order of the table's columns: weight, gradient, both moments, step, average, copy. None: absent.
Row = tuple[Any, ...]


def _is_vectorised(row: Row) -> bool:
    """Whether 128-bit accesses can move the weight and every other tensor of its size."""
    tensors = [t for index, t in enumerate(row) if t is not None and index != STEP_COLUMN]
    return row[0].numel() % VECTOR_ELEMENTS == 0 and all(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)


def _update(
    rows: list[Row], vectorised: bool, grad_scale: Tensor | None, found_inf: Tensor | None, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, decay: float,
) -> None:  # fmt: skip
    weight, gradient, *_, average, copy = rows[0]
    device = weight.device
    sizes = tuple(row[0].numel() for row in rows)
    owners, firsts = _owners(sizes, device)
    addresses = [tuple(0 if t is None else t.data_ptr() for t in row) for row in rows]
    table = _table([(*a, size, first) for a, size, first in zip(addresses, sizes, firsts)], device)
    factors = torch.empty(len(rows), 2, dtype=torch.float32, device=device)
    _triton.launch(
        advance_steps,
        ceil_div(len(rows), STEP_ROWS),
        Tile(1, 4),
        device,
        *(table, factors, found_inf, lr, len(rows)),
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        COLUMNS=COLUMNS,
        STEP_COLUMN=STEP_COLUMN,
        ROWS=STEP_ROWS,
    )
    _triton.launch(
        update_chunks,
        len(owners),
        TILE,
        device,
        *(table, owners, factors, grad_scale, found_inf),
        *(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, 1 - decay),
        GRADIENT=_dtype(gradient),
        COPY=None if copy is None else _dtype(copy),
        AVERAGE=average is not None,
        VECTORISED=vectorised,
        COLUMNS=COLUMNS,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
    )


def _dtype(tensor: Tensor) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[tensor.dtype]


def _log(beta: float) -> float:
    """ln β. 0 is replaced by the smallest normal number, whose powers also vanish beside 1."""
    return math.log(max(beta, sys.float_info.min))


def _refuse(op: Op, args: Sequence[Any]) -> str | None:
    weights = args[0]
    reason = _triton.refuse(op, weights)
    if reason is not None:
        return reason
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the table of addresses is built on the host at every step"
    return not_contiguous(args)


@ADAMW_EMA.implement("triton", refuse=_refuse)
def update(weights: list[Tensor], *rest: Any) -> None:
    lists, numbers = (weights, *rest[:6]), rest[6:]
    rows = list(zip(*(tensors or [None] * len(weights) for tensors in lists)))
    for vectorised in (True, False):
        chosen = [row for row in rows if _is_vectorised(row) is vectorised]
        if chosen:
            _update(chosen, vectorised, *numbers)
