"""What the studies on the handwritten digits share: a small DiT trained on them, and a small network that looks at the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ditkernels.data.digits import LabelledImages, load_digits
from ditkernels.diffusion import create_diffusion
from ditkernels.evaluation.evaluate import Reference, load_reference
from ditkernels.evaluation.features import Features
from ditkernels.models import DiT
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.generate import Batches, draw
from ditkernels.sampling.labels import Labels
from ditkernels.sampling.outputs import to_pixels

CLASSES = 10
LEARNING_RATE, EMA_DECAY = 3e-3, 0.99


def train(model: DiT, digits: LabelledImages, *, steps: int, batch_size: int, seed: int) -> DiT:
    """The moving average of a model trained on the digits for so many steps, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    diffusion = create_diffusion("", learn_sigma=model.learn_sigma)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(digits), (batch_size,), generator=generator)
        t = torch.randint(diffusion.num_timesteps, (batch_size,), generator=generator)
        kwargs = {"y": digits.labels[chosen]}
        losses = diffusion.training_losses(model, digits.images[chosen], t, kwargs, generator=generator)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        average.update_parameters(model)
    trained: DiT = average.module
    return trained.eval().requires_grad_(False)


def new_model(hidden_size: int, depth: int, patch_size: int, seed: int) -> DiT:
    """A DiT for 8 x 8 grey digits, with heads of 16 channels."""
    torch.manual_seed(seed)
    return DiT(8, patch_size, 1, hidden_size, depth, max(1, hidden_size // 16), num_classes=CLASSES)


class Judge:
    """A network of one hidden layer, trained on real digits: its activations are the features, its classes the readings."""

    def __init__(self, digits: LabelledImages, seed: int = 0) -> None:
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier((64,), random_state=seed, max_iter=100, early_stopping=True)
        # It looks at what is written to files: pixels of eight bits.
        network.fit(self._rows(torch.from_numpy(pixels_of(digits.images))), digits.labels.numpy())
        self.weights = [torch.from_numpy(np.asarray(array)) for array in network.coefs_]
        self.biases = [torch.from_numpy(np.asarray(array)) for array in network.intercepts_]

    @staticmethod
    def _rows(pixels: Tensor) -> Any:
        return (pixels[:, 0].flatten(1).double() / 127.5 - 1).numpy()

    def __call__(self, images: Tensor) -> Features:
        """images: (B, 3, 8, 8) uint8 -> hidden activations (B, 64) and logits (B, 10)."""
        hidden = (torch.from_numpy(self._rows(images)) @ self.weights[0] + self.biases[0]).relu()
        return Features(hidden, None, hidden @ self.weights[1] + self.biases[1])


def pixels_of(images: Tensor) -> np.ndarray:
    """Images (N, 1, 8, 8) in [-1, 1] as (N, 3, 8, 8) uint8, as they would lie in a file."""
    return to_pixels(images).transpose(0, 3, 1, 2)


def real_digits() -> tuple[LabelledImages, Judge, Reference]:
    """The digits to train on, a judge that has seen them, and the judge's features of them."""
    digits, _ = load_digits()
    judge = Judge(digits)
    reference = load_reference(iter([torch.from_numpy(pixels_of(digits.images))]), extractor=judge)
    return digits, judge, reference


def drawn(model: DiT, respacing: str, config: SampleConfig, *, count: int) -> tuple[Tensor, Tensor]:
    """Samples as (N, 3, 8, 8) uint8 and their labels (N,), balanced and interleaved."""
    labels = Labels("balanced", tuple(range(CLASSES)))
    diffusion = create_diffusion(respacing, learn_sigma=model.learn_sigma)
    batches = draw(model, diffusion, labels, config, Batches(count, count))
    pixels = torch.cat([torch.from_numpy(pixels_of(batch)) for batch in batches])
    return pixels, labels.of(torch.arange(count))


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Writes the figure, without a date in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
