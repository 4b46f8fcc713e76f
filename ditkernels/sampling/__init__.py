"""Guided samples from a DiT. docs/sampling.md."""

from __future__ import annotations

from ditkernels.sampler.denoiser import MODULATION_BYTES
from ditkernels.sampler.drawing import SOLVERS, SampleConfig, sample, sample_progressive
from ditkernels.sampler.generate import Batches, Job, World, draw, generate
from ditkernels.sampler.labels import Labels
from ditkernels.sampler.loading import load_model

__all__ = [
    "MODULATION_BYTES",
    "SOLVERS",
    "Batches",
    "Job",
    "Labels",
    "SampleConfig",
    "World",
    "draw",
    "generate",
    "load_model",
    "sample",
    "sample_progressive",
]
