"""The optimizer's step: ``adamw_ema``, AdamW, the moving average and a low-precision copy of the weights, in one pass over memory.

For every weight w, with its moments m and v, its average a and its copy c, all updated in place, g = gradient / grad_scale, and t
the step counted from 1:

    w ← (1 − lr·weight_decay)·w            m ← β₁·m + (1 − β₁)·g            v ← β₂·v + (1 − β₂)·g²
    w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
    a ← a + (1 − decay)·(w − a)            c ← w, rounded

which is torch's fused AdamW followed by the average's own step. A step whose ``found_inf`` is not zero changes neither w, m, v
nor t, and the average takes its step towards the unchanged w; nothing waits for the host to know.

Bytes a parameter in fp32, the gradient included: 36 here, 40 for torch's two passes (28 and 12), since w is read once and not
twice. A bf16 copy adds the 2 bytes of its write; to cast the weight later would read 4 and write 2. With it comes a gradient in
bf16, of 2 bytes fewer (``train --master-weights``): 36 again, and no cast of weight or gradient anywhere else.

This op changes its arguments and has no derivative: gradients are not kept (torch's fused kernel leaves them divided, ours as they
were), so what they hold afterwards is not defined.

AdamW: Loshchilov & Hutter, arXiv 1711.05101; in this form ``torch.optim.AdamW(fused=True)``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _native
from ditkernels.ops.dispatch import Op, backend_setting, register, watched_by_torch
from ditkernels.ops.spec import Declaration, Given, Rule, check_tensor
from ditkernels.reference import is_dtensor

__all__ = ["adamw_ema"]

STATE_DTYPES = (torch.float32, torch.float64)

# ---- Public function -------------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_ema(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of every weight and of its moving average, in place, in one pass over memory.

    Args:
        weights: any shapes, fp32 (fp64 on the ``torch`` backend), all on one device.
        gradients: as the weights in shape, all fp32, all bf16 or all fp16; they may be overwritten.
        exp_avgs, exp_avg_sqs: the moments, as the weights.
        steps: one fp32 number (0-dim) a weight: the steps it has taken.
        averages: the moving averages, as the weights; empty for none.
        copies: of the weights in bf16 or fp16, rewritten after the step; empty for none.
        lr, betas, eps, weight_decay: AdamW's; weight_decay is decoupled.
        decay: of the moving averages.
        grad_scale: what the gradients are divided by, one fp32 number on the device.
        found_inf: not zero if the step is to be skipped, one fp32 number on the device. Averages take their step all the same.

    DTensors step in each process by themselves. All of a weight's tensors are placed as the weight is, which is no partial sum; a
    gradient that is not is moved there.

    Raises:
        ValueError, TypeError: a list, shape, dtype, device, placement or number that does not fit, named.
        BackendError: the forced backend cannot serve.
    """
    lists = (weights, gradients, exp_avgs, exp_avg_sqs, steps, averages, copies)
    numbers: tuple[Any, ...] = (grad_scale, found_inf, lr, *betas, eps, weight_decay, decay)
    if not weights:  # there is nothing to update, and no tensor to choose a backend by
        _check(*lists, *numbers)
        return
    if is_dtensor(weights[0]):
        adamw_ema(
            *_shards(lists),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
            grad_scale=_whole(grad_scale),
            found_inf=_whole(found_inf),
        )
        torch.autograd.graph.increment_version(itertools.chain(*lists))
        return
    plain = (Tensor, torch.nn.Parameter)
    if torch.compiler.is_compiling() or watched_by_torch() or not all(type(t) in plain for t in itertools.chain(*lists)):
        forced = None if torch.compiler._is_exporting_flag else backend_setting()
        ADAMW_EMA.call(*lists, *numbers, forced or "")
    else:
        _check(*lists, *numbers)
        chosen = ADAMW_EMA.choose(*lists, *numbers, forced=backend_setting())
        implementation = ADAMW_EMA.implementations[chosen]
        profiled = torch.autograd._profiler_enabled()
        (implementation.internal if profiled else implementation.kernel)(*lists, *numbers)
    if not torch.compiler.is_compiling():
        # Autograd does not see what a backend writes: a graph that saved a weight would go on with another one.
        torch.autograd.graph.increment_version(itertools.chain(*lists))


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _check_list(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """One tensor a weight, of its shape, on its device, all in one of ``dtypes``."""
    if len(tensors) != len(weights):
        raise ValueError(f"{name}: got {len(tensors)} tensors, expected one for each of {len(weights)} weights")
    for index, (tensor, weight) in enumerate(zip(tensors, weights)):
        if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
            allowed = ", ".join(map(str, dtypes))
            raise TypeError(f"{name}[{index}]: got dtype {tensor.dtype}, allowed is one of {allowed} for all of them")
        check_tensor(f"{name}[{index}]", tensor, tuple(weight.shape), weights[0])


def _check_number(name: str, value: Tensor, weights: Sequence[Tensor]) -> None:
    if value.numel() != 1 or value.dtype != torch.float32:
        raise ValueError(f"{name}: got shape {tuple(value.shape)} of {value.dtype}, expected one number of torch.float32")
    if weights and value.device != weights[0].device:
        raise ValueError(f"{name}: got device {value.device}, but the weights are on {weights[0].device}")


def _check(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], averages: Sequence[Tensor],
    copies: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, decay: float,
) -> None:  # fmt: skip
    _check_list("weights", weights, weights, STATE_DTYPES)
    own = [weights[0].dtype] if weights else STATE_DTYPES
    _check_list("gradients", gradients, weights, [*own, torch.bfloat16, torch.float16])
    _check_list("exp_avgs", exp_avgs, weights, own)
    _check_list("exp_avg_sqs", exp_avg_sqs, weights, own)
    if len(steps) != len(weights):
        raise ValueError(f"steps: got {len(steps)} tensors, expected one for each of {len(weights)} weights")
    for index, step in enumerate(steps):
        _check_number(f"steps[{index}]", step, weights)
    if averages:
        _check_list("averages", averages, weights, own)
    if copies:
        _check_list("copies", copies, weights, (torch.bfloat16, torch.float16))
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if number is not None:
            _check_number(name, number, weights)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}: got {value}, allowed is 0 or more")
    for name, value in (("betas[0]", beta1), ("betas[1]", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value}, allowed is 0 up to, not including, 1")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, allowed is 0..1")


NAMES = ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "steps", "averages", "copies")


def not_contiguous(args: Sequence[Any]) -> str | None:
    """Which of the op's tensors a kernel that takes them for flat arrays cannot take, or None."""
    for name, tensors in zip(NAMES, args):
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                return f"{name}[{index}] is not contiguous"
    return None


# ---- DTensors --------------------------------------------------------------------------------------------------------


def _check_placements(lists: Sequence[Sequence[Any]]) -> None:
    """That what is written in a shard is all there is; gradients may come from elsewhere, and steps are one number each."""
    weights = lists[0]
    for name, tensors in zip(NAMES, lists):
        if name in ("gradients", "steps"):
            continue
        for index, (tensor, weight) in enumerate(zip(tensors, weights)):
            if tensor.placements != weight.placements:
                raise ValueError(f"{name}[{index}]: got placements {tensor.placements}, but its weight has {weight.placements}")
            if any(placement.is_partial() for placement in tensor.placements):
                raise ValueError(f"{name}[{index}]: got placements {tensor.placements}; partial sums cannot be updated")


def _shards(lists: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
    """What this process has of each tensor, in the same memory."""
    _check_placements(lists)
    weights, gradients, *others = lists
    moved = [g.redistribute(placements=w.placements) for g, w in zip(gradients, weights)]
    return [[t.to_local() if is_dtensor(t) else t for t in each] for each in (weights, moved, *others)]


def _whole(number: Any) -> Tensor | None:
    return number.full_tensor() if number is not None and is_dtensor(number) else number


# ---- Declaration, and the torch backend: torch's own two passes ------------------------------------------------------

_SCHEMA = (
    "(Tensor(a!)[] weights, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps,"
    " Tensor(f!)[] averages, Tensor(g!)[] copies, Tensor? grad_scale, Tensor? found_inf, float lr, float beta1, float beta2,"
    " float eps, float weight_decay, float decay) -> ()"
)


class _InPlace(Declaration):
    """An op on lists of tensors that it changes, which axes cannot describe."""

    schema = _SCHEMA
    arguments = tuple(re.findall(r"(\w+)[,)]", _SCHEMA))

    def checked(self, args: Sequence[Any]) -> dict[str, int]:
        _check(*args)
        return {}

    def fake(self, *args: Any) -> None:
        _check(*args)

    def rules(self, given: Given) -> list[Rule]:
        """One for each axis of the mesh: all as the weights are on it."""
        from torch.distributed.tensor import Replicate

        lists = [given[name] for name in NAMES]
        _check_placements(lists)
        numbers = [given[name] for name in ("grad_scale", "found_inf") if given[name] is not None]

        def along(axis: int) -> Rule:
            placed = [weight.placements[axis] for weight in lists[0]]
            spread = [[Replicate()] * len(each) if name == "steps" else placed[: len(each)] for name, each in zip(NAMES, lists)]
            return [], [*itertools.chain(*spread), *[Replicate()] * len(numbers)]

        return [along(axis) for axis in range(len(lists[0][0].placements))]


ADAMW_EMA = register(_InPlace("adamw_ema", (), (), ()))


@ADAMW_EMA.implement("torch")
def update(
    weights: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], averages: list[Tensor], copies: list[Tensor], grad_scale: Tensor | None,
    found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decay: float,
) -> None:  # fmt: skip
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        weights,
        [g.to(w.dtype) for g, w in zip(gradients, weights)],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    if copies:
        torch._foreach_copy_(copies, weights)


def _cuda_reason(op: Op, args: Sequence[Any]) -> str | None:
    return _native.refuse_cuda(op, args[0]) or not_contiguous(args)


def _cpu_reason(op: Op, args: Sequence[Any]) -> str | None:
    return _native.refuse_cpu(op, args[0]) or not_contiguous(args)


ADAMW_EMA.implement_elsewhere("cuda", refuse=_cuda_reason)
ADAMW_EMA.implement_elsewhere("cpu", refuse=_cpu_reason)
ADAMW_EMA.implement_later("triton", f"{__name__}.triton")
