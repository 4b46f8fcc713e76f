"""Divergence and likelihood of Gaussians, in nats per element, and their mean in bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Pixels lie in [-1, 1] in steps of 2/255. The floor keeps the logarithm finite far from the mean.
_HALF_BIN = 1.0 / 255.0
_PROBABILITY_FLOOR = 1e-12


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise over broadcast shapes."""
    # expm1(d) − d keeps small differences of variance, which −1 − d + exp(d) would round away. It is 0 where d is 0.
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(difference) - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log of the mass that N(mean, exp(log_std)²) gives to the bin of width 2/255 around x, elementwise, in nats.

    This is equation 13 of Ho et al. 2020: x lies in [-1, 1], and the bins of the two ends reach to infinity. As in the
    public DDPM, ADM and DiT losses, the normal distribution function is its tanh approximation,
    ½(1 + tanh(√(2/π)(z + 0.044715 z³))), and the mass is at least 1e-12. This makes losses comparable with published ones.
    """
    inverse_std = torch.exp(-log_std)
    offset = x - mean
    # Symmetry puts every difference into the lower tail, where the distribution function is small and keeps its digits.
    inner = _normal_cdf((_HALF_BIN - offset.abs()) * inverse_std) - _normal_cdf((-_HALF_BIN - offset.abs()) * inverse_std)
    outer = _normal_cdf((_HALF_BIN - offset * x.sign()) * inverse_std)
    mass = torch.where(x.abs() > 0.999, outer, inner)
    return mass.clamp(min=_PROBABILITY_FLOOR).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # ½(1 + tanh u) is sigmoid(2u), which has none of the cancellation of 1 + tanh in the lower tail.
    return torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all axes but the first: (B, …) -> (B,)."""
    return x.flatten(1).mean(1)


def bits_per_dim(nats: Tensor) -> Tensor:
    """Mean over all axes but the first, in bits: (B, …) in nats -> (B,)."""
    return mean_flat(nats) / math.log(2.0)
