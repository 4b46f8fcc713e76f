"""What happens between a gradient and the weights: norm, clipping, loss scale, AdamW, moving average. Nothing waits for the host.

A gradient that is not finite must not reach the weights, and whether it is finite is known on the device only. AdamW's fused
kernel takes that answer as a tensor (`found_inf`) and then leaves weights and moments as they are, and a divisor of the gradients
beside it (`grad_scale`), which serves for clipping and for fp16's loss scale at once. On a skipped step therefore

- weights, moments and AdamW's own step count stay as they are;
- the moving average takes its usual step towards the unchanged weights;
- the run's step count, and with it the learning rate, the data and all keyed random numbers, go on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ditkernels.ops import adamw_ema, dispatch
from ditkernels.training.config import TrainConfig
from ditkernels.training.ema import EMA
from ditkernels.training.master_weights import Copies

# The parts of a model whose matrices decay.
DECAYED = ("blocks", "final_layer")


class NonFiniteGradientError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite; the last good checkpoint is kept."""


def resolved(optimizer: Literal["auto", "torch", "fused"], weight: Tensor) -> Literal["torch", "fused"]:
    """The optimizer that a name stands for: "auto" is fused where that was measured to be faster, on a CPU with its library."""
    if optimizer != "auto":
        return optimizer
    one = torch.zeros(1, dtype=weight.dtype, device=weight.device)
    lists: tuple[list[Tensor], ...] = ([one], [one], [one], [one], [one.float()], [], [])
    numbers = (None, None, 1e-4, 0.9, 0.999, 1e-8, 0.0, 0.0)
    chosen = dispatch.OPS["adamw_ema"].choose(*lists, *numbers, forced=dispatch.backend_setting())
    return "fused" if chosen == "cpu" else "torch"


def make_optimizer(
    weights: Mapping[str, nn.Parameter],
    config: TrainConfig,
    average: EMA[Any] | None = None,
    copies: Copies | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW with betas (0.9, 0.999), as in the DiT paper.

    With ``optimizer: fused`` an :class:`AdamWEMA` of ``average`` and ``copies``, which must be None without. The trainer resolves
    ``auto`` before; here it is torch's.

    Args:
        weights: what is trained, by name, in the model's order.
    """
    numbers: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    groups = _groups(weights, config)
    if config.optimizer == "fused":
        return AdamWEMA(groups, average, copies, **numbers)
    return torch.optim.AdamW(groups, **numbers, fused=True)


def _groups(weights: Mapping[str, nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """What decays, and what does not: vectors, embedders and positions say where zero is, and have no other use of being small."""
    if config.weight_decay == 0 or config.weight_decay_on == "all":
        return [{"params": list(weights.values())}]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in weights.items():
        (matrices if weight.ndim > 1 and name.split(".")[0] in DECAYED else others).append(weight)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of ``step``, counted from 0, in a run of ``total``: linear warm-up, then constant or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class AdamWEMA(torch.optim.AdamW):
    """Fused AdamW whose step also moves the average of the weights: one pass over memory in place of two, ``ops.adamw_ema``.

    State and state dict are those of AdamW, so that either can go on with the other's. Sharded weights are updated shard by shard.

    Args:
        weights: parameters, or groups of them.
        average: what is moved; None for nothing. Its own ``update`` is not to be called then.
        copies: low-precision copies of some of the weights, rewritten at every step; None for none. Those weights' gradients may be
            in any dtype that ``ops.adamw_ema`` reads.
        lr, weight_decay: AdamW's.
    """

    def __init__(
        self,
        weights: Iterable[Any],
        average: EMA[Any] | None,
        copies: Copies | None = None,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(list(weights), lr=lr, weight_decay=weight_decay, fused=True)
        self._average = average
        self._copies = copies or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there; takes no closure. ``grad_scale`` and ``found_inf`` are read as AdamW's are."""
        average = self._average
        untouched = {} if average is None else dict(average.pairs())
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            weights, gradients, exp_avgs, exp_avg_sqs, _, steps = lists
            averages = [] if average is None else [untouched.pop(weight) for weight in weights]
            copies = [self._copies.get(weight) for weight in weights]
            for indices in _kinds(gradients, copies):
                adamw_ema(
                    *(
                        _chosen(tensors, indices)
                        for tensors in (weights, gradients, exp_avgs, exp_avg_sqs, steps, averages, copies)
                    ),
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decay=0.0 if average is None else average.decay,
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                )
        if average is not None and untouched:
            # A weight without a gradient stays as it is, but its average does not.
            torch._foreach_lerp_(list(untouched.values()), list(untouched), 1 - average.decay)


def _kinds(gradients: Sequence[Tensor], copies: Sequence[Tensor | None]) -> Iterable[list[int]]:
    """Which weights go into one call of ``ops.adamw_ema``: all gradients in one dtype, and all with a copy or none."""
    kinds: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
    for index, (gradient, made) in enumerate(zip(gradients, copies)):
        kinds[gradient.dtype, made is None].append(index)
    return kinds.values()


def _chosen(tensors: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
    """What this process holds of those that are there."""
    some = [tensors[index] for index in indices] if tensors else []
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in some if tensor is not None]


class LossScale:
    """fp16's loss scale, on the device: halved after an overflow, doubled after 2,000 steps without one.

    Small gradients underflow in fp16; they are computed of a loss this many times larger (Micikevicius et al.,
    arXiv 1710.03740).
    """

    INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(self.INITIAL, device=device)
        self._good_steps = torch.tensor(0, dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """``overflow``: 1.0 if the step was skipped, else 0.0."""
        torch._amp_update_scale_(self.value, self._good_steps, overflow, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def state(self) -> dict[str, float]:
        """As JSON values; read from the device."""
        return {"value": self.value.item(), "good_steps": int(self._good_steps.item())}

    def load(self, state: Mapping[str, float]) -> None:
        """Takes over a :meth:`state`."""
        self.value.fill_(state["value"])
        self._good_steps.fill_(int(state["good_steps"]))


class Update(NamedTuple):
    """What an update did: 0-dim fp32 tensors on the device.

    Attributes:
        norm: of the whole gradient, before clipping.
        skipped: 1.0 if loss or gradient was not finite and nothing was changed, else 0.0.
    """

    norm: Tensor
    skipped: Tensor


def gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    """Those that are there, in the weights' order, which is that of the sum of their norm."""
    return [weight.grad for weight in weights if weight.grad is not None]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together, 0-dim, in fp32 where they are narrower."""
    norms: dict[int, Tensor] = {}
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = {index: gradient for index, gradient in enumerate(gradients) if gradient.dtype == dtype}
        wide = torch.promote_types(dtype, torch.float32)
        norms |= zip(alike, torch._foreach_norm(list(alike.values()), 2, dtype=wide))
    # In the gradients' own order, so that their dtypes do not change the order of the sum.
    return torch.linalg.vector_norm(torch.stack([norms[index] for index in range(len(gradients))]))


def update(optimizer: torch.optim.AdamW, loss: Tensor, norm: Tensor, scale: LossScale | None, clip: float | None) -> Update:
    """One step of the optimizer on the gradients that are there, skipped on the device if they or the loss are not finite.

    Args:
        loss: the step's, unscaled; 0-dim.
        norm: of the whole gradient as it is, multiplied by ``scale``.
        scale: what the gradients' loss was multiplied by.
        clip: a larger norm is scaled down to this one.
    """
    divisor = None
    if scale is not None:
        divisor = scale.value.clone()
        norm = norm / divisor
    if clip is not None:
        excess = (norm / clip).clamp(min=1)
        divisor = excess if divisor is None else divisor * excess
    skipped = (~torch.isfinite(norm + loss)).float()
    optimizer.grad_scale, optimizer.found_inf = divisor, skipped  # type: ignore[attr-defined]
    optimizer.step()
    if scale is not None:
        scale.update(skipped)
    return Update(norm, skipped)


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """Moments and step counts by name of parameter and of tensor, "blocks.0.attn.qkv.weight.exp_avg"."""
    return {
        f"{name}.{kind}": tensor
        for name, weight in model.named_parameters()
        for kind, tensor in optimizer.state.get(weight, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    shard_like: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Takes over :func:`optimizer_tensors` of what is trained; ``shard_like(tensor, weight)`` copies one to where its weight is."""
    weights = dict(model.named_parameters())
    for key in tensors:
        name, _, kind = key.rpartition(".")
        weight = weights[name]
        if not weight.requires_grad:
            continue
        optimizer.state[weight][kind] = shard_like(tensors[key], weight)
