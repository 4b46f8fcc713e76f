"""Guided samples from a DiT. docs/sampling.md."""

from __future__ import annotations

from ditkernels.sampler.denoiser import MODULATION_BYTES
from ditkernels.sampler.drawing import SOLVERS, SampleConfig, sample, sample_progressive

__all__ = ["MODULATION_BYTES", "SOLVERS", "SampleConfig", "sample", "sample_progressive"]
