"""Checkpoints between the public DiT layout, diffusers' and ours, every key accounted for.

The public layout is that of facebookresearch/DiT, whose names our models keep; what differs is the container: a `.pt` of tensors
(bare, or {model, ema, opt, args}), one safetensors file, or a checkpoint directory of ours, which holds weights and EMA both.
diffusers splits qkv, and copies the embedders of timestep and label into every block. It computes positions and stores none.

What converts at all converts without loss: there and back gives the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.checkpoints.foreign import CONFIG
from ditkernels.checkpoints.format import MANIFEST, Checkpoint, CheckpointError, save_checkpoint, save_tensors
from ditkernels.checkpoints.layouts import (
    TABLE,
    UNKNOWN_SIZE,
    State,
    check_complete,
    depth_of,
    grid_of,
    layout_of,
    to_diffusers,
    to_public,
)
from ditkernels.checkpoints.model import both_edges, classes_of, paper_heads, recorded_heads, recorded_size, size_of, tell_rows
from ditkernels.checkpoints.run import read, resolve
from ditkernels.files import replacing, temporary_name

LABELS = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

WARNING = """\
diffusers computes two things differently, so the same weights give other outputs there unless both are set:
  timestep frequencies, / 127 instead of / 128:
    for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0
  eps of norm3, 1e-5 by default instead of 1e-6:
    norm_eps=1e-6 in its constructor or config.json"""


def write(path: Path, checkpoint: Checkpoint, layout: str, size: tuple[int, int] | None = None) -> None:
    """Writes a checkpoint whose tensors are in ``layout`` already; at any instant ``path`` is there whole or not at all.

    A directory of ours and a `.pt` hold weights and EMA; a safetensors file and diffusers hold the EMA where there is one.

    Raises:
        CheckpointError: ``path`` exists, or its name does not say what to write.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already; nothing was written")
    if layout == "ditkernels":
        _write_directory(path, lambda folder: save_checkpoint(folder, checkpoint))
    elif path.suffix == ".safetensors":
        _write_file(path, lambda file: save_tensors(_contiguous(checkpoint.sampling_weights), file))
    elif path.suffix in (".pt", ".pth"):
        _write_file(path, lambda file: torch.save(_public_content(checkpoint), file))
    elif layout == "diffusers" and not path.suffix:
        weights = checkpoint.sampling_weights
        config = diffusers_config(weights, checkpoint.config, size)
        _write_directory(path, lambda folder: _save_diffusers(folder, weights, config))
    else:
        raise CheckpointError(f"{path}: allowed are .pt, .pth and .safetensors, and for diffusers a directory")


def _public_content(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.ema is None:
        return _contiguous(checkpoint.model)
    args = argparse.Namespace(**checkpoint.config)
    return {"model": _contiguous(checkpoint.model), "ema": _contiguous(checkpoint.ema), "args": args}


def _contiguous(state: Mapping[str, Tensor]) -> State:
    return {key: value.contiguous() for key, value in state.items()}


def _save_diffusers(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors(_contiguous(weights), folder / DIFFUSERS_WEIGHTS, {"format": "pt"})


def diffusers_config(weights: Mapping[str, Tensor], known: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    """What DiTTransformer2DModel has to be built with, read off the shapes; norm_eps is the public model's.

    Args:
        weights: in diffusers' layout.
        known: config of where they came from.
        size: of the latents.

    Raises:
        CheckpointError: the number of heads is neither known nor that of one of the paper's widths; the latents are not square.
    """
    width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
    heads = recorded_heads(known) or paper_heads(width)
    if heads is None or width % heads:
        raise CheckpointError(f"num_heads: got {heads} for {width} channels; give --num-heads")
    if size is None:
        raise CheckpointError(UNKNOWN_SIZE)
    if size[0] != size[1]:
        raise CheckpointError(f"input_size: got {size[0]} x {size[1]}; diffusers knows square images only")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": weights["proj_out_2.bias"].shape[0] // patch**2,
        "num_layers": depth_of(weights, "transformer_blocks"),
        "sample_size": size[0],
        "patch_size": patch,
        "num_embeds_ada_norm": len(weights[LABELS]) - 1,
        "norm_eps": known.get("norm_eps", 1e-6),
    }


def _write_file(path: Path, save: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save(unfinished)


def _write_directory(path: Path, save: Callable[[Path], object]) -> None:
    unfinished = temporary_name(path)
    unfinished.mkdir(parents=True)
    try:
        save(unfinished)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---- The command -----------------------------------------------------------------------------------------------------


def convert(
    source: Path,
    target: Path,
    layout: str,
    *,
    input_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    null_class: bool = True,
) -> str:
    """Converts a checkpoint and returns what there is to say about it.

    Args:
        source: a checkpoint's folder, a run's, or what :func:`read_foreign` takes.
        target: as in ``write``; it must not exist.
        layout: of the target, one of ``LAYOUTS``.
        input_size, num_heads, null_class: as of :func:`load_model`; a target of ours records those that are given.

    Raises:
        CheckpointError: the source cannot be read, or cannot be converted without loss; nothing was written.
        ValueError: as of :func:`load_model`.
    """
    checkpoint = read(resolve(source))
    came_as = layout_of(checkpoint.sampling_weights)
    said = [f"{source} ({came_as}) -> {target} ({layout}): {len(checkpoint.sampling_weights)} tensors read"]
    if not checkpoint.model:
        checkpoint = replace(checkpoint, model=checkpoint.sampling_weights)
        said.append("it holds a moving average alone, which is written as the trained weights too")
    size = both_edges(input_size)
    if layout == "diffusers":
        _check_null_class(source, checkpoint, null_class=null_class)
    if came_as == "diffusers":
        size = size or recorded_size(checkpoint.config)
    elif size is not None or layout == "diffusers":
        size = _size_of_positions(checkpoint, size)
    names = "diffusers" if layout == "diffusers" else "public"
    if came_as == names:
        for state in (checkpoint.model, checkpoint.ema):
            check_complete(state or checkpoint.model, came_as)
    else:
        states = (checkpoint.model, checkpoint.ema)
        model, ema = (None if state is None else _renamed(state, names, size) for state in states)
        assert model is not None
        checkpoint = Checkpoint(model, ema, checkpoint.step, checkpoint.config)
        said.append(WARNING)
    given = {"input_size": input_size and size, "num_heads": num_heads, "class_dropout_prob": None if null_class else 0.0}
    config = {**checkpoint.config, **{name: value for name, value in given.items() if value is not None}}
    write(target, replace(checkpoint, config=config), layout, size)
    return "\n".join(said + _left_behind(checkpoint, target))


def _renamed(state: Mapping[str, Tensor], names: str, size: tuple[int, int] | None) -> State:
    return to_diffusers(state) if names == "diffusers" else to_public(state, grid_of(state, size))


def _check_null_class(source: Path, checkpoint: Checkpoint, *, null_class: bool) -> None:
    """Raises CheckpointError where there is no row for the null class, and says so where nothing tells."""
    state, config = checkpoint.sampling_weights, checkpoint.config
    table = state.get(TABLE, state.get(LABELS))
    if table is None:
        return
    if classes_of(config, len(table), null_class=null_class) == len(table):
        raise CheckpointError(f"{source} has no null class, and diffusers' layout has a row for it: it cannot be converted")
    tell_rows(source, len(table), config, null_class=null_class)


def _size_of_positions(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, int] | None:
    state = checkpoint.sampling_weights
    if "pos_embed" not in state or "x_embedder.proj.weight" not in state:
        return None
    return size_of(state["pos_embed"], checkpoint.config, size, state["x_embedder.proj.weight"].shape[-1])


def _left_behind(checkpoint: Checkpoint, target: Path) -> list[str]:
    if checkpoint.ema is None or (target / MANIFEST).is_file():
        return []
    if target.suffix in (".pt", ".pth"):
        return ["the optimizer's state was left behind"]
    return ["written: the EMA's weights; the model's own and the optimizer's state were left behind"]
