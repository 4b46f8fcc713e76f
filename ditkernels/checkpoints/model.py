"""A model from a checkpoint: ours, of a run or alone, or a public ``.pt`` file; its architecture is read from the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels.checkpoints.config import WEIGHTS
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, state_sha256
from ditkernels.checkpoints.run import read, resolve
from ditkernels.models import DiT
from ditkernels.reference import SIZES


class Loaded(NamedTuple):
    """A model in eval mode on the CPU, and where it came from.

    Attributes:
        model: with the weights asked for.
        checkpoint: what was read.
        digest: SHA-256 over names, dtypes, shapes and bytes of those weights.
    """

    model: DiT
    checkpoint: Checkpoint
    digest: str

    def to(self, device: torch.device | str) -> Loaded:
        """The same, with the model moved to a device."""
        self.model.to(device)
        return self


def load_model(path: str | Path, *, weights: str = "ema", num_heads: int | None = None) -> Loaded:
    """The model of a checkpoint's folder, of a run's newest whole checkpoint, or of a public ``.pt`` file.

    Everything but the number of heads follows from the weights; that is taken from the checkpoint's config, else from the
    paper's model of that width, unless given.

    Args:
        path: a checkpoint's folder, the folder of a training run, or a file.
        weights: "ema", the moving average, or "raw", the trained weights. A bare state dict is taken as what was asked for.
        num_heads: of attention.

    Raises:
        CheckpointError: as ``resolve`` and ``read``; there is no moving average; the weights are not a DiT's.
        ValueError: an unknown kind of weights; a width that needs ``num_heads``.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, allowed are {', '.join(WEIGHTS)}")
    path = Path(path)
    checkpoint = read(resolve(path))
    bare = not checkpoint.config and checkpoint.ema is None
    if weights == "ema" and checkpoint.ema is None and not bare:
        raise CheckpointError(f"{path} holds no moving average; allowed are the raw weights")
    state = checkpoint.sampling_weights if weights == "ema" else checkpoint.model
    try:
        model = DiT(**architecture(state, checkpoint.config, num_heads))
        model.load_state_dict(dict(state))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not hold a DiT's weights: {reason}") from error
    return Loaded(model.eval().requires_grad_(False), checkpoint, state_sha256(state))


def architecture(state: Mapping[str, Tensor], config: Mapping[str, Any], num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of the DiT that has this state dict.

    Raises:
        KeyError: a tensor that every DiT has is missing.
        ValueError: the number of heads is neither given nor known.
    """
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    conditioning = _conditioning(state)
    outputs = state["final_layer.linear.weight"].shape[0] // patch_size**2
    num_classes = _num_classes(config, rows)
    return {
        "input_size": _input_size(config, state["pos_embed"].shape[1], patch_size),
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads or _num_heads(config, width),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
        "num_classes": num_classes,
        "learn_sigma": outputs == 2 * channels,
        "conditioning": conditioning,
    }


def _conditioning(state: Mapping[str, Tensor]) -> str:
    modulation = state.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is not None:
        return "adaln_zero" if modulation.shape[0] == 6 * modulation.shape[1] else "adaln"
    return "cross_attention" if "blocks.0.cross_attn.q.weight" in state else "in_context"


def _arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's own arguments, where a config keeps them apart."""
    model = config.get("model")
    return model if isinstance(model, Mapping) else config


def _num_classes(config: Mapping[str, Any], rows: int) -> int:
    # One row more than classes is the null class; without a word in the config it is taken to be there.
    known = _arguments(config).get("num_classes")
    return known if known in (rows, rows - 1) else max(1, rows - 1)


def _num_heads(config: Mapping[str, Any], width: int) -> int:
    known = _arguments(config).get("num_heads")
    if known is not None:
        return int(known)
    by_width = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    if width not in by_width:
        raise ValueError(f"num_heads: unknown for a model of width {width}; it must be given")
    return by_width[width]


def _input_size(config: Mapping[str, Any], tokens: int, patch_size: int) -> int | tuple[int, int]:
    known = _arguments(config).get("input_size")
    if known is not None:
        return known if isinstance(known, int) else (known[0], known[1])
    return math.isqrt(tokens) * patch_size
