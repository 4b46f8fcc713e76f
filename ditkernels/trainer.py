"""Training: one loop, read from top to bottom."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ditkernels.data import LabelledImages, ShuffledStream
from ditkernels.diffusion import GaussianDiffusion

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        batch_size: samples a step.
        learning_rate: constant, of AdamW with betas (0.9, 0.999), as in the DiT paper.
        weight_decay: of AdamW.
        ema_decay: the moving average is ema_decay·average + (1 − ema_decay)·weights, once a step.
        seed: fixes the order of the data, the timesteps, the noise and the dropped labels.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: got {self.learning_rate}, allowed is a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay: got {self.weight_decay}, allowed is 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, allowed is 0 up to, not including, 1")
        if not 0 <= self.seed < 2**32:
            # torch's CPU generator reads the low 32 bits only.
            raise ValueError(f"seed: got {self.seed}, allowed are 0..{2**32 - 1}")


@dataclass(frozen=True)
class TrainResult(Generic[Model]):
    """What training leaves beside the model: its moving average, in eval mode, and every step's loss."""

    ema: Model
    losses: list[float]


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; the message names the step."""


class EMA(Generic[Model]):
    """The exponential moving average of a model's weights, as a model in eval mode.

    Frozen parameters and buffers are copied once, at the start, and never touched again.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trainable = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = [average for average, _ in trainable]
        self._weights: list[Tensor] = [weight for _, weight in trainable]

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay·average + (1 − decay)·weight, over all trainable tensors in one foreach pass."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)


def train(
    model: Model,
    diffusion: GaussianDiffusion,
    data: LabelledImages,
    config: TrainConfig,
    *,
    progress: bool = True,
) -> TrainResult[Model]:
    """Train `model` in place on `data`, on the device that the model is on.

    The same seed gives the same weights, bit for bit, on the same device with the same number of threads. The
    caller's random state is left as it was.

    Args:
        model: called as model(x, t, y=labels); drops labels itself, in train mode. Left in train mode.
        diffusion: the process to learn; its training_losses is the loss.
        data: images in the model's shape.
        config: see TrainConfig.
        progress: show a bar with loss, images/s and time left on stderr.

    Raises:
        NonFiniteLossError: the loss of a step is NaN or infinite; the weights are those before that step.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = weights[0].device
    optimizer = make_optimizer(weights, config)
    ema = EMA(model, config.ema_decay)
    stream = ShuffledStream(len(data), config.batch_size, config.seed)
    data = data.to(device)
    losses: list[float] = []

    model.train()
    with _seeded(config.seed, device), _Bar(config, shown=progress) as bar:
        for step in range(config.steps):
            batch = stream.batch(step).to(device)
            loss = diffusion_loss(model, diffusion, data.images[batch], data.labels[batch])
            losses.append(_finite(loss, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            ema.update()
            bar.advance(losses)
    return TrainResult(ema.model, losses)


def make_optimizer(weights: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `weights`, fused on the devices that have it."""
    weights = list(weights)
    return torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=all(weight.device.type in ("cpu", "cuda") for weight in weights),
    )


def diffusion_loss(model: nn.Module, diffusion: GaussianDiffusion, images: Tensor, labels: Tensor) -> Tensor:
    """Mean training loss of a batch (B, C, H, W) with labels (B,), at uniformly drawn timesteps; a scalar."""
    t = torch.randint(diffusion.num_timesteps, labels.shape, device=images.device)
    return diffusion.training_losses(model, images, t, model_kwargs={"y": labels})["loss"].mean()


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss became {value} at step {step}; a lower learning rate is the usual cure"
        )
    return value


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _Bar:
    """The progress bar: step, smoothed loss, images/s, time left."""

    FORMAT = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}"
    SMOOTHING_STEPS = 50

    def __init__(self, config: TrainConfig, *, shown: bool) -> None:
        self.config = config
        self.tqdm = tqdm(
            total=config.steps * config.batch_size,
            unit=" images",
            unit_scale=True,
            desc=f"step 0/{config.steps}",
            bar_format=self.FORMAT,
            disable=not shown,
            # A log file gets a line now and then, a terminal a bar that moves.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.tqdm.close()

    def advance(self, losses: list[float]) -> None:
        recent = losses[-self.SMOOTHING_STEPS :]
        self.tqdm.set_description(f"step {len(losses)}/{self.config.steps}", refresh=False)
        self.tqdm.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        self.tqdm.update(self.config.batch_size)
