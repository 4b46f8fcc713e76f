"""What models are trained on: images, latents, and the order they come in. docs/training.md."""

from __future__ import annotations

from typing import Any

from ditkernels import _moved


def __getattr__(name: str) -> Any:
    found = _moved.moved_name(__name__, name)
    _moved.warn_of(__name__)
    globals()[name] = found
    return found
