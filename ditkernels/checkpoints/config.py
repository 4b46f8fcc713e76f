"""The names that a checkpoint's weights and layouts are chosen by."""

from __future__ import annotations

LAYOUTS = ("public", "diffusers", "ditkernels")
WEIGHTS = ("ema", "raw")
