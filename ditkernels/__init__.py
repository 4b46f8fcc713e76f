"""Fused kernels, a drop-in DiT, a trainer and a guided sampler for Diffusion Transformers."""

from ditkernels._version import __version__

__all__ = ["__version__"]
