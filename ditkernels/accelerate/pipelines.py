"""A diffusion pipeline in the place of a model: its transformers, by their names in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def models_in(subject: Any) -> nn.Module:
    """``subject`` if it is a module; of a pipeline one that holds its transformers, and belongs to nobody.

    Raises:
        ValueError: the pipeline has no transformer.
        TypeError: it is neither.
    """
    if isinstance(subject, nn.Module):
        return subject
    components = getattr(subject, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"accelerate: {type(subject).__name__} is neither a module nor a pipeline of diffusers")
    models = {name: part for name, part in components.items() if name.startswith("transformer") and isinstance(part, nn.Module)}
    if not models:
        raise ValueError(f"accelerate: {type(subject).__name__} has no transformer; its parts are {', '.join(components)}")
    return nn.ModuleDict(models)
