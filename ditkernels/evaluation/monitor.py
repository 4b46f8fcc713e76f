"""Evaluation while training goes on: samples of the moving average, every so many steps, without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ditkernels.config import TrainConfig
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.distributed import Ranks
from ditkernels.evaluate import Evaluation, Extractor, Reference, evaluate, load_reference
from ditkernels.evaluate.features import load_extractor
from ditkernels.evaluate.metrics import SPLIT_SIZE
from ditkernels.reference import DiT
from ditkernels.sampler import Batches, Labels, SampleConfig
from ditkernels.sampler.generate import draw_batch
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
        autocast: dtype of the model's products; None is the weights' own. Decoding and features stay outside.
        ranks: of the run, all of which call it; they draw batches in turn, and each sees the images of all.
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
    ranks: Ranks = field(default_factory=Ranks)

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
        """The images in order, (B, 3, H, W) uint8 on the CPU."""
        for start in range(0, len(self.batches), self.ranks.size):
            mine = start + self.ranks.rank
            drawn = self._draw(model, mine) if mine < len(self.batches) else None
            yield from (images for images in self.ranks.gather(drawn) if images is not None)

    def _draw(self, model: DiT, batch: int) -> Tensor:
        device = next(model.parameters()).device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            drawn = draw_batch(model, self.diffusion, self.labels, self.config, self.batches, batch)
        images = drawn if self.decode is None else self.decode(drawn)
        return torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2)


def monitor_of_training(
    config: TrainConfig,
    *,
    num_classes: int,
    learn_sigma: bool,
    device: torch.device,
    decode: Callable[[Tensor], Tensor] | None,
    autocast: torch.dtype | None,
    ranks: Ranks,
) -> Monitor:
    """The monitor that the ``eval_`` fields of a config describe; its reference is read here, once.

    Args:
        config: ``sample_steps`` DDPM steps, classes in turn.
        num_classes, learn_sigma: the model's.
        device: of the features.
        decode, autocast, ranks: as of :class:`Monitor`.

    Raises:
        ValueError, ImportError: no reference or no features named, or as ``load_reference`` and ``load_extractor``.
    """
    if config.eval_reference is None:
        raise ValueError("eval_every: got no eval_reference, which samples are compared with")
    extractor = load_extractor(config.eval_weights, config.eval_extractor, device)
    if extractor is None:
        raise ValueError("eval_every: got no features, allowed are eval_weights or eval_extractor")
    settings = SampleConfig(
        guidance_scale=config.eval_guidance,
        guided_channels=None if decode is None else 3,
        clip_denoised=decode is None,
    )
    return Monitor(
        create_diffusion(str(config.sample_steps), learn_sigma=learn_sigma),
        settings,
        Labels("balanced", tuple(range(num_classes))),
        Batches(config.eval_images, config.eval_batch_size),
        load_reference(Path(config.eval_reference), extractor=extractor, batch_size=config.eval_batch_size),
        extractor,
        decode=decode,
        autocast=autocast,
        ranks=ranks,
    )
