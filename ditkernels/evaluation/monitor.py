"""Evaluation while training goes on: samples of the moving average, every so many steps, without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditkernels.checkpoints.format import state_sha256
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.evaluation.config import NEIGHBOURS, SPLIT_SIZE
from ditkernels.evaluation.evaluate import Evaluation, Reference, evaluate
from ditkernels.evaluation.features import Extractor, as_features, widths_of
from ditkernels.evaluation.plan import Plan, Side
from ditkernels.evaluation.record import describe_samples, record
from ditkernels.reference import DiT
from ditkernels.runtime import StopSignal, World, gather_unless_stopped
from ditkernels.sampling.drawing import SampleConfig
from ditkernels.sampling.generate import Batches, draw_batch
from ditkernels.sampling.labels import Labels
from ditkernels.sampling.outputs import to_pixels


@dataclass(frozen=True)
class Monitor:
    """Draws samples of a model and compares them with a reference; called with the moving average every K steps.

    The same images, from the same noise, are drawn every time, so that a curve shows the weights and not the draw. The caller's
    random state is not touched, and nothing is left on the device.

    Args:
        diffusion: respaced, ``create_diffusion("50")``.
        config: see SampleConfig.
        labels: of the images.
        batches: how many images, and how many at once.
        reference: what ``load_reference`` returned.
        extractor: images (B, 3, H, W) uint8 -> features, as in ``evaluate``.
        decode: latents (B, C, H, W) -> images (B, 3, H, W) in [-1, 1]; None where the model draws pixels.
        split_size: images in a split of the Inception Score.
        autocast: dtype of the model's products; None is the weights' own. Decoding and features stay outside.
        world: the processes of the run, all of which call it; they draw batches in turn, and each sees the images of all.
        stop: a signal that it has heard ends a call by Stopped, on all processes.

    Raises:
        ValueError: the extractor tells that its features have another width than the reference's.
    """

    diffusion: GaussianDiffusion
    config: SampleConfig
    labels: Labels
    batches: Batches
    reference: Reference
    extractor: Extractor
    decode: Callable[[Tensor], Tensor] | None = None
    split_size: int = SPLIT_SIZE
    autocast: torch.dtype | None = None
    world: World = field(default_factory=World)
    stop: StopSignal = field(default_factory=StopSignal)

    def __post_init__(self) -> None:
        self._check(getattr(self.extractor, "widths", None))

    def __call__(self, model: DiT, weights: str = "ema") -> Evaluation:
        """The metrics of a model in eval mode.

        Args:
            weights: what it has, for the record: "ema", the moving average, or "raw".

        Raises:
            ValueError: as ``sample`` and ``evaluate``.
        """
        return evaluate(
            self._pixels(model),
            self.reference,
            extractor=self.extractor,
            batch_size=self.batches.size,
            split_size=self.split_size,
            described=self._described(model, state_sha256(model.state_dict()), weights),
        )

    def measured_with(self, model: DiT, weights: str = "ema") -> dict[str, Any]:
        """The record of a call, but for the SHA-256 of the weights."""
        return record(
            reference_sha256=self.reference.sha256,
            extractor=self.extractor,
            count=self.batches.count,
            reference_count=self.reference.count,
            neighbours=NEIGHBOURS,
            split_size=self.split_size,
            samples=self._described(model, None, weights),
        )

    def _described(self, model: DiT, sha256: str | None, weights: str) -> dict[str, Any]:
        steps = self.diffusion.num_timesteps
        return describe_samples(
            self.config, self.labels, in_channels=model.in_channels, steps=steps, sha256=sha256, weights=weights
        )

    def _check(self, widths: Mapping[str, int] | None) -> None:
        Plan().check(Side(self.batches.count, widths), self.reference.side)

    def rehearse(self, model: DiT, steps: int) -> None:
        """Takes the features of this process's first batch, drawn in a few steps, and forgets them.

        Raises:
            ValueError: as of a call; the features have another width than the reference's.
        """
        few = replace(self, diffusion=create_diffusion(str(steps), learn_sigma=model.learn_sigma))
        images = few._draw(model, self.world.rank % len(self.batches))
        assert images is not None
        self._check(widths_of(as_features(self.extractor(images), len(images))))

    def _pixels(self, model: DiT) -> Iterator[Tensor]:
        """The images in order, (B, 3, H, W) uint8 on the CPU."""
        for start in range(0, len(self.batches), self.world.size):
            everyone = gather_unless_stopped(self.world, self.stop, partial(self._draw, model, start + self.world.rank))
            yield from (images for images in everyone if images is not None)

    def _draw(self, model: DiT, batch: int) -> Tensor | None:
        """The images of a batch; None past the last one."""
        if batch >= len(self.batches):
            return None
        device = next(model.parameters()).device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            drawn = draw_batch(model, self.diffusion, self.labels, self.config, self.batches, batch, self.stop)
        images = drawn if self.decode is None else self.decode(drawn)
        return torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2)
