"""What the metrics look at: features of images, from torch-fidelity's Inception or from any module."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditkernels.files import first_line, sha256

SPATIAL_CHANNELS = 7
SPATIAL_LAYER = "Mixed_6d.branch1x1"


class Features(NamedTuple):
    """Features of B images; ``pool`` serves FID, precision and recall, ``spatial`` sFID, ``logits`` the Inception Score.

    Attributes:
        pool: (B, F) floating point.
        spatial: (B, S), or None.
        logits: (B, K), or None.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


Extractor = Callable[[Tensor], "Features | Mapping[str, Tensor] | Tensor"]
"""Images (B, 3, H, W) uint8 -> Features, a mapping with the same names, or (B, F) pool features alone.

What has an attribute ``widths``, as ``Inception.widths``, is held against stored features before the first image."""


def as_features(value: Any, count: int | None = None) -> Features:
    """What an extractor returned, checked.

    Raises:
        TypeError, ValueError: it is no Features, mapping or tensor; an array is not (count, width) floating point.
    """
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(Features._fields))
        if unknown or "pool" not in value:
            raise ValueError(f"features: got {', '.join(sorted(value))}, allowed are pool (needed), spatial and logits")
        value = Features(**value)
    elif isinstance(value, Tensor):
        value = Features(value)
    if not isinstance(value, Features):
        raise TypeError(f"features: got {type(value).__name__}, allowed are Features, a mapping or a tensor")
    expected = len(value.pool) if count is None else count
    for name, array in value._asdict().items():
        if array is None:
            continue
        if not isinstance(array, Tensor) or not array.is_floating_point():
            came = array.dtype if isinstance(array, Tensor) else type(array).__name__
            raise TypeError(f"features: {name}: got {came}, allowed is a floating-point tensor")
        if array.ndim != 2 or len(array) != expected:
            raise ValueError(f"features: {name}: got shape {tuple(array.shape)}, allowed is ({expected}, any width)")
    return value


def widths_of(features: Features) -> dict[str, int]:
    """How many values an image has, by name of the features that are there."""
    return {name: array.shape[1] for name, array in features._asdict().items() if array is not None}


class Inception(nn.Module):
    """torch-fidelity's InceptionV3, the TensorFlow network of 2015-12-05 that published numbers were made with.

    pool: pool_3, 2048 values. spatial: the first 7 channels of mixed_6/conv, 17 x 17 x 7 flattened in the order (row, column,
    channel), 2023 values. logits: without bias, 1008 values. Images of any size are resized as TensorFlow 1 did.

    Args:
        weights: path of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; nothing is downloaded.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: no such file, or not these weights.

    Attributes:
        widths: of the features, which are known before the first image.
        sha256: of the file of weights.
    """

    widths: Mapping[str, int] = {"pool": 2048, "spatial": 2023, "logits": 1008}

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ImportError("Inception features need torch-fidelity: pip install ditkernels[eval]")
        path = Path(weights)
        _check_weights_file(path)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold Inception's weights: {first_line(error)}") from error
        self.sha256 = sha256(path)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """images: (B, 3, H, W) uint8, on any device; the features lie on the network's."""
        images = images.to(self.network.fc.weight.device)
        spatial: list[Tensor] = []
        layer = self.network.get_submodule(SPATIAL_LAYER)
        hook = layer.register_forward_hook(lambda _module, _args, out: spatial.append(out))
        try:
            pool, logits = self.network(images)
        finally:
            hook.remove()
        # Channels last: in the order (channel, row, column) sFID comes out some fifty times too large.
        flat = spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, flat, logits)


def load_extractor(weights: str | Path | None, name: str | None, device: torch.device) -> Extractor | None:
    """Inception with ``weights``, or the function or module called ``name``, "MODULE:NAME"; None if neither is given.

    Args:
        device: where modules go.

    Raises:
        ValueError: both are given, or there is no such function; as :class:`Inception`.
        ImportError: no such module.
    """
    if weights is not None and name is not None:
        raise ValueError(f"features: got weights {weights} and extractor {name}, allowed is one of the two")
    if weights is not None:
        return Inception(weights).to(device)
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute, None) if module and attribute else None
    if not callable(found):
        raise ValueError(f"extractor: got {name!r}, allowed is MODULE:NAME of a function or module")
    return found.to(device) if isinstance(found, nn.Module) else found


def _check_weights_file(path: Path) -> None:
    # The library unpickles freely; so it gets only files that hold nothing but weights.
    if not path.is_file():
        raise ValueError(f"{path}: no such file; allowed is the path of Inception's weights")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} does not hold Inception's weights: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} does not hold Inception's weights, but a {type(content).__name__}")
