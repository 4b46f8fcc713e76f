"""A model from a checkpoint: ours, of a run or alone, or of another program; its architecture is read from the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels.checkpoints.config import WEIGHTS
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, state_sha256
from ditkernels.checkpoints.layouts import TABLE, depth_of, grid_of, layout_of, sincos_grid, to_public
from ditkernels.checkpoints.run import read, resolve
from ditkernels.models import DiT
from ditkernels.reference import SIZES

OF_DIFFUSERS = "{} is of diffusers, which computes frequencies of timesteps and one norm differently; see ditkernels convert"

logger = logging.getLogger(__name__)


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

    @property
    def training(self) -> Mapping[str, Any]:
        """The settings of the run that trained it; empty where they are not known."""
        found = self.checkpoint.config.get("training")
        return found if isinstance(found, Mapping) else {}

    def to(self, device: torch.device | str) -> Loaded:
        """The same, with the model moved to a device."""
        self.model.to(device)
        return self


def load_model(
    path: str | Path,
    *,
    weights: str = "ema",
    num_heads: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    null_class: bool = True,
) -> Loaded:
    """The model of a checkpoint's folder, of a run's newest whole checkpoint, or of weights that another program wrote.

    What can be read, and how, is a table in docs/checkpoints.md. Nearly everything follows from the weights; the number of heads is
    taken from the config, else from the paper's model of that width. Positions of sines and cosines tell the grid.

    Args:
        path: a checkpoint's folder, the folder of a training run, or what :func:`read_foreign` takes.
        weights: "ema", the moving average, or "raw", the trained weights. A bare state dict is taken as what was asked for.
        num_heads: of attention.
        input_size: latent height and width, an int if square, where positions are learned or not stored.
        null_class: False: every row of the table of labels is a class, where the checkpoint does not tell.

    Raises:
        CheckpointError: as ``resolve`` and ``read``; there is no moving average, or nothing else; the weights are not a DiT's.
        ValueError: an unknown kind of weights; a width that needs ``num_heads``, positions that need ``input_size``; one of the
            arguments is not what the checkpoint records.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, allowed are {', '.join(WEIGHTS)}")
    path, size = Path(path), both_edges(input_size)
    checkpoint = read_public(resolve(path), size)
    bare = checkpoint.ema is None and "model" not in checkpoint.config
    if weights == "ema" and checkpoint.ema is None and not bare:
        raise CheckpointError(f"{path} holds no moving average; allowed are the raw weights")
    state = checkpoint.sampling_weights if weights == "ema" else checkpoint.model
    if not state:
        raise CheckpointError(f"{path} holds a moving average alone; allowed is ema")
    try:
        model = DiT(**architecture(state, checkpoint.config, num_heads, size, null_class=null_class))
        model.load_state_dict(dict(state))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:300]
        raise CheckpointError(f"{path} does not hold a DiT's weights: {reason}") from error
    tell_rows(path, len(state[TABLE]), checkpoint.config, null_class=null_class)
    return Loaded(model.eval().requires_grad_(False), checkpoint, state_sha256(state))


def read_public(path: Path, size: tuple[int, int] | None = None) -> Checkpoint:
    """What :func:`resolve` has found, in the public layout, which is ours; ``size`` of latents, where nothing there says it.

    Raises:
        CheckpointError: as of :func:`read`; the names are not a DiT's; weights of diffusers that cannot be renamed.
    """
    checkpoint = read(path)
    try:
        if layout_of(checkpoint.sampling_weights) == "public":
            return checkpoint
        grid = grid_of(checkpoint.sampling_weights, size or recorded_size(checkpoint.config))
        model, ema = (to_public(state, grid) if state else state for state in (checkpoint.model, checkpoint.ema))
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not hold a DiT's weights: {error}") from error
    assert model is not None
    logger.info("%s", OF_DIFFUSERS.format(path))
    return replace(checkpoint, model=model, ema=ema)


def architecture(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    num_heads: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    null_class: bool = True,
) -> dict[str, Any]:
    """Arguments of the DiT that has this state dict; the last three as of :func:`load_model`.

    Raises:
        KeyError: a tensor that every DiT has is missing, or is of another shape than any DiT's.
        ValueError: as of :func:`load_model`.
    """
    width, channels, patch_size, _ = _shape(state, "x_embedder.proj.weight", 4)
    _shape(state, "pos_embed", 3)
    rows, _ = _shape(state, TABLE, 2)
    outputs = _shape(state, "final_layer.linear.weight", 2)[0] // patch_size**2
    heads = num_heads or recorded_heads(config) or paper_heads(width)
    if heads is None:
        raise ValueError(f"num_heads: unknown for a model of width {width}; it must be given")
    num_classes = classes_of(config, rows, null_class=null_class)
    return {
        "input_size": size_of(state["pos_embed"], config, size, patch_size),
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth_of(state, "blocks"),
        "num_heads": heads,
        "mlp_ratio": _shape(state, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
        "num_classes": num_classes,
        "learn_sigma": outputs == 2 * channels,
        "conditioning": _conditioning(state),
    }


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in state:
        raise KeyError(f"{name} is missing")
    shape = state[name].shape
    if len(shape) != dimensions or not all(shape):
        raise KeyError(f"{name} has shape {tuple(shape)}, allowed are {dimensions} dimensions")
    return shape


def _conditioning(state: Mapping[str, Tensor]) -> str:
    if "blocks.0.adaLN_modulation.1.weight" in state:
        outputs, inputs = _shape(state, "blocks.0.adaLN_modulation.1.weight", 2)
        return "adaln_zero" if outputs == 6 * inputs else "adaln"
    return "cross_attention" if "blocks.0.cross_attn.q.weight" in state else "in_context"


# ---- What a config says ----------------------------------------------------------------------------------------------


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    """The first whole number of one of these names among the model's own arguments, where a config keeps them apart."""
    model = config.get("model")
    arguments = model if isinstance(model, Mapping) else config
    found = (arguments.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)


def recorded_heads(config: Mapping[str, Any]) -> int | None:
    """The heads of attention, by our name or diffusers' one."""
    return _whole(config, "num_heads", "num_attention_heads")


def recorded_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the latents, by our name or diffusers' one."""
    model = config.get("model")
    known = (model if isinstance(model, Mapping) else config).get("input_size")
    if isinstance(known, (list, tuple)) and len(known) == 2 and all(type(edge) is int and edge > 0 for edge in known):
        return known[0], known[1]
    edge = _whole(config, "input_size", "sample_size")
    return None if edge is None else (edge, edge)


def classes_of(config: Mapping[str, Any], rows: int, *, null_class: bool = True) -> int:
    """How many of the rows of a table of labels are classes: all, or all but the last, the null class.

    Raises:
        ValueError: ``null_class`` is False, but the config says that there is one.
    """
    told = told_classes(config, rows, null_class=null_class)
    return rows - 1 if told is None else told


def told_classes(config: Mapping[str, Any], rows: int, *, null_class: bool) -> int | None:
    """The same, where the config, the number of rows or the caller tells, else None."""
    told = _recorded_classes(config, rows)
    if null_class:
        return told
    if told is not None and told != rows:
        raise ValueError(
            f"no_null_class: got it, but the checkpoint records {told} classes and a null class in {rows} rows of labels"
        )
    return rows


def _recorded_classes(config: Mapping[str, Any], rows: int) -> int | None:
    known = _whole(config, "num_classes", "num_embeds_ada_norm")
    if known in (rows, rows - 1):
        return known
    model = config.get("model")
    dropout = (model if isinstance(model, Mapping) else config).get("class_dropout_prob")
    # The public model gives the null class a row only where labels are dropped.
    if rows == 1 or (isinstance(dropout, (int, float)) and dropout == 0):
        return rows
    return rows - 1 if isinstance(dropout, float) and 0 < dropout <= 1 else None


def tell_rows(path: Path, rows: int, config: Mapping[str, Any], *, null_class: bool) -> None:
    """Says how rows are read where neither the checkpoint nor the caller told."""
    if told_classes(config, rows, null_class=null_class) is None:
        text = "%s: its %d rows of labels are read as %d classes and the null class; --no-null-class takes all for classes"
        logger.info(text, path, rows, rows - 1)


def paper_heads(width: int) -> int | None:
    """The heads of the paper's model of that width; None if there is none."""
    return {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}.get(width)


# ---- The grid --------------------------------------------------------------------------------------------------------


def both_edges(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_of(positions: Tensor, config: Mapping[str, Any], size: tuple[int, int] | None, patch_size: int) -> tuple[int, int]:
    """Height and width of the latents of a table of positions (1, N, D): as given, as the table tells, as recorded, else square.

    Raises:
        ValueError: ``size`` is not what the table tells or does not have its number of tokens; nothing tells it.
    """
    tokens = positions.shape[1]
    grid = sincos_grid(positions)
    told = None if grid is None else (grid[0] * patch_size, grid[1] * patch_size)
    if size is not None:
        if told not in (None, size) or (size[0] // patch_size) * (size[1] // patch_size) != tokens:
            there = f"{tokens} tokens" if told is None else f"positions of {told[0]} x {told[1]}"
            raise ValueError(f"input_size: got {size[0]} x {size[1]}, but the checkpoint holds {there}")
        return size
    recorded = recorded_size(config)
    if recorded is not None and (recorded[0] // patch_size) * (recorded[1] // patch_size) != tokens:
        recorded = None
    side = math.isqrt(tokens)
    found = told or recorded
    if found is not None:
        return found
    if side * side != tokens:
        raise ValueError(f"input_size: unknown for learned positions of {tokens} tokens, which are no square; it must be given")
    logger.info("positions are learned: their %d tokens are read as %d x %d; --input-size says otherwise", tokens, side, side)
    return side * patch_size, side * patch_size
