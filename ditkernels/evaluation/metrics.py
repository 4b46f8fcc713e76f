"""FID, sFID and Inception Score, on features, by the conventions of the ADM evaluation suite; precision and recall: manifold.py.

FID (Heusel et al. 2017, arXiv 1706.08500) and sFID (Nash et al. 2021, arXiv 2103.03841) are the Fréchet distance of two
Gaussians, with covariances over n − 1. The Inception Score (Salimans et al. 2016, arXiv 1606.03498) is a mean over
consecutive splits. All is summed as it comes, in float64, so that memory does not grow with the number of images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditkernels.evaluation.config import SPLIT_SIZE

FloatArray = npt.NDArray[np.float64]

ORDER_DEVIATIONS = 6.0
ROUNDING = 1e-6
"""How far below zero a distance of equal Gaussians may come out, beside the two traces."""


class Gaussian(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64."""

    mu: FloatArray
    sigma: FloatArray


class GaussianSum:
    """Mean and covariance of features that come in batches, in float64; holds one (F, F) matrix.

    ``name`` is that of the metric, for the errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """features: (B, F), any floating dtype. Raises ValueError for values that are not finite."""
        features = features.double()
        if not torch.isfinite(features).all():
            raise ValueError(f"{self.name}: got features that are not finite")
        if self._mean is None or self._scatter is None:
            width = features.shape[1]
            self._mean = features.new_zeros(width)
            self._scatter = features.new_zeros(width, width)
        # Chan, Golub & LeVeque's pairwise update: sums of squares about zero would cancel.
        mean = features.mean(0)
        centred = features - mean
        apart = mean - self._mean
        total = self.count + len(features)
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(apart, apart, alpha=self.count * len(features) / total)
        self._mean = self._mean + apart * (len(features) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The mean, and the covariance over n − 1. Raises ValueError for fewer than 2 samples."""
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ValueError(f"{self.name}: got {self.count} samples, needs at least 2 for a covariance")
        return Gaussian(self._mean.cpu().numpy(), (self._scatter / (self.count - 1)).cpu().numpy())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½).

    The trace of the root is Σ √eig(Σ₁^½ Σ₂ Σ₁^½): symmetric, so it stays real where a covariance is singular, and no
    offset has to be added to the diagonal.

    Raises:
        ValueError: the two have features of different width; the distance is further below zero than rounding leads.
    """
    if first.mu.shape != second.mu.shape:
        raise ValueError(f"features: got {first.mu.shape[0]} per image, but the reference has {second.mu.shape[0]}")
    values, vectors = np.linalg.eigh(first.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.sigma @ root)
    apart = first.mu - second.mu
    traces = np.trace(first.sigma) + np.trace(second.sigma)
    distance = float(apart @ apart + traces - 2 * np.sqrt(product.clip(0)).sum())
    if distance < -ROUNDING * traces:
        raise ValueError(f"the Fréchet distance came out as {distance:.6g}, below zero: one of the two covariances is none")
    return max(distance, 0.0)


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))), mean and standard deviation over consecutive splits; the last may be shorter.

    Since the splits are consecutive, the score depends on the order of the images: class by class, every split sees few classes
    and the score falls. ``ordered_by_class`` says whether that is so.
    """

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        if split_size < 1:
            raise ValueError(f"split_size: got {split_size}, allowed is 1 or more")
        self.split_size = split_size
        self.count = 0
        self._probabilities: list[Tensor] = []
        self._negative_entropies: list[float] = []
        self._predicted: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """logits: (B, K), any floating dtype, without bias. Raises ValueError for values that are not finite."""
        if not torch.isfinite(logits).all():
            raise ValueError("inception_score: got logits that are not finite")
        logits = logits.detach().cpu().double()
        while len(logits):
            room = self.split_size - self.count % self.split_size
            self._add_to_split(logits[:room])
            logits = logits[room:]

    def _add_to_split(self, logits: Tensor) -> None:
        if self.count % self.split_size == 0:
            self._probabilities.append(logits.new_zeros(logits.shape[1]))
            self._negative_entropies.append(0.0)
            self._predicted.append(logits.new_zeros(logits.shape[1]))
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        self._probabilities[-1] += p.sum(0)
        self._negative_entropies[-1] += (p * log_p).sum().item()
        self._predicted[-1] += torch.bincount(p.argmax(1), minlength=p.shape[1])
        self.count += len(logits)

    def score(self) -> tuple[float, float | None]:
        """Mean and standard deviation (over n) of the splits' scores; of one split None. Raises ValueError for nothing added."""
        if self.count == 0:
            raise ValueError("inception_score: got 0 samples, needs at least 1")
        scores = []
        for index, total in enumerate(self._probabilities):
            size = min(self.split_size, self.count - index * self.split_size)
            marginal = total / size
            # Σ p(x)·log p(y) over the split is size times the marginal's, so the divergence is a difference of two sums.
            entropy = torch.special.entr(marginal).sum().item()
            scores.append(np.exp(self._negative_entropies[index] / size + entropy))
        return float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None

    def ordered_by_class(self) -> bool:
        """Whether the classes predicted in the splits differ by more than chance: Pearson's χ² of (split, class),
        more than ``ORDER_DEVIATIONS`` standard deviations above its mean. One split has no order."""
        if len(self._predicted) < 2:
            return False
        counts = torch.stack(self._predicted)
        counts = counts[:, counts.sum(0) > 0]
        freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
        if freedom == 0:
            return False
        expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
        chi_squared = ((counts - expected).square() / expected).sum().item()
        return (chi_squared - freedom) / (2 * freedom) ** 0.5 > ORDER_DEVIATIONS
