"""Evaluation while training goes on: samples of the moving average, every so many steps, without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkernels.diffusion import GaussianDiffusion
from ditkernels.evaluate import Evaluation, Extractor, Reference, evaluate
from ditkernels.evaluate.metrics import SPLIT_SIZE
from ditkernels.reference import DiT
from ditkernels.sampler import Batches, Labels, SampleConfig, draw
from ditkernels.sampler.outputs import to_pixels


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
    """

    diffusion: GaussianDiffusion
    config: SampleConfig
    labels: Labels
    batches: Batches
    reference: Reference
    extractor: Extractor
    decode: Callable[[Tensor], Tensor] | None = None
    split_size: int = SPLIT_SIZE

    def __call__(self, model: DiT) -> Evaluation:
        """The metrics of a model in eval mode.

        Raises:
            ValueError: as ``sample`` and ``evaluate``.
        """
        return evaluate(
            self._pixels(model),
            self.reference,
            extractor=self.extractor,
            batch_size=self.batches.size,
            split_size=self.split_size,
        )

    def _pixels(self, model: DiT) -> Iterator[Tensor]:
        for drawn in draw(model, self.diffusion, self.labels, self.config, self.batches):
            images = drawn if self.decode is None else self.decode(drawn)
            yield torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2)
