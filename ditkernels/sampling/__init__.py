"""Guided samples from a DiT. docs/sampling.md."""
