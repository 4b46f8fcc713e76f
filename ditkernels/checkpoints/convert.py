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
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ditkernels.checkpoints.format import MANIFEST, Checkpoint, CheckpointError, open_checkpoint, save_checkpoint, save_tensors
from ditkernels.checkpoints.public import load_public_checkpoint
from ditkernels.checkpoints.run import is_run, resolve
from ditkernels.files import replacing, temporary_name
from ditkernels.reference import SIZES, sincos_positions

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_CONFIG = "config.json"

WARNING = """\
diffusers computes two things differently, so the same weights give other outputs there unless both are set:
  timestep frequencies, / 127 instead of / 128:
    for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0
  eps of norm3, 1e-5 by default instead of 1e-6:
    norm_eps=1e-6 in its constructor or config.json"""

State = dict[str, Tensor]

# A public name to diffusers' one, without .weight and .bias; N is the block's number.
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INSIDE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_QKV = tuple(f"attn1.to_{name}" for name in "qkv")
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
_KINDS = ("weight", "bias")


class Keys:
    """A state dict that must be used up: each key is taken once, and what is left at the end is an error."""

    def __init__(self, state: Mapping[str, Tensor], layout: str) -> None:
        self._left = dict(state)
        self._layout = layout
        self._missing: list[str] = []

    def take(self, key: str) -> Tensor:
        if key not in self._left:
            self._missing.append(key)
            return torch.empty(0)
        return self._left.pop(key)

    def finish(self) -> None:
        """Raises CheckpointError if a key was missing or is left over."""
        problems = []
        if self._missing:
            problems.append(f"lacks {_listed(self._missing)}")
        if self._left:
            problems.append(f"has {_listed(sorted(self._left))} besides")
        if problems:
            raise CheckpointError(f"a DiT in the {self._layout} layout was expected; it {' and '.join(problems)}")


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def layout_of(state: Mapping[str, Tensor]) -> str:
    """ "public" or "diffusers", by the names of the tensors. Raises CheckpointError on others."""
    if any(key.startswith("transformer_blocks.") for key in state):
        return "diffusers"
    if any(re.match(r"blocks\.\d+\.attn\.qkv\.", key) for key in state):
        return "public"
    known = "blocks.N.attn.qkv.* (the public layout and ours) nor transformer_blocks.N.* (diffusers)"
    raise CheckpointError(f"it has neither {known}, but {_listed(sorted(state))}")


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(match[1]) for key in state if (match := re.match(rf"{prefix}\.(\d+)\.", key))]
    return 1 + max(numbers, default=-1)


def to_diffusers(public: Mapping[str, Tensor]) -> State:
    """The public layout as diffusers' one.

    Raises:
        CheckpointError: a key is missing or unknown, or the positions are not those that diffusers would compute.
    """
    keys, out = Keys(public, "public"), {}
    positions, depth = keys.take("pos_embed"), _depth(public, "blocks")
    for theirs, ours in _OUTSIDE.items():
        for kind in _KINDS:
            out[f"{ours}.{kind}"] = keys.take(f"{theirs}.{kind}")
    embedders = {ours: keys.take(theirs) for theirs, ours in _EMBEDDERS.items()}
    for n in range(depth):
        block = f"transformer_blocks.{n}"
        # Clones, because safetensors does not store one tensor under two names.
        out |= {f"{block}.{name}": value.clone() for name, value in embedders.items()}
        for kind in _KINDS:
            for theirs, ours in _INSIDE.items():
                out[f"{block}.{ours}.{kind}"] = keys.take(f"blocks.{n}.{theirs}.{kind}")
            qkv = keys.take(f"blocks.{n}.attn.qkv.{kind}").chunk(3)
            out |= {f"{block}.{name}.{kind}": part.clone() for name, part in zip(_QKV, qkv)}
    keys.finish()
    _check_positions(positions, out["pos_embed.proj.weight"])
    return out


def to_public(diffusers: Mapping[str, Tensor], grid: tuple[int, int]) -> State:
    """diffusers' layout as the public one; ``grid`` is the token grid (h, w), for the positions.

    Raises:
        CheckpointError: a key is missing or unknown, or the embedders of two blocks differ; they are named.
    """
    keys, out = Keys(diffusers, "diffusers"), {}
    depth = _depth(diffusers, "transformer_blocks")
    for theirs, ours in _OUTSIDE.items():
        for kind in _KINDS:
            out[f"{theirs}.{kind}"] = keys.take(f"{ours}.{kind}")
    copies = [{theirs: keys.take(f"transformer_blocks.{n}.{ours}") for theirs, ours in _EMBEDDERS.items()} for n in range(depth)]
    for n in range(depth):
        block = f"transformer_blocks.{n}"
        for kind in _KINDS:
            for theirs, ours in _INSIDE.items():
                out[f"blocks.{n}.{theirs}.{kind}"] = keys.take(f"{block}.{ours}.{kind}")
            parts = [keys.take(f"{block}.{name}.{kind}") for name in _QKV]
            out[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
    keys.finish()
    _check_embedders(copies)
    weight = out["x_embedder.proj.weight"]
    positions = sincos_positions(weight.shape[0], grid).unsqueeze(0).to(weight.dtype)
    return {"pos_embed": positions, **copies[0], **out}


def _check_embedders(copies: list[State]) -> None:
    for n, block in enumerate(copies):
        for theirs, ours in _EMBEDDERS.items():
            if not torch.equal(block[theirs], copies[0][theirs]):
                raise CheckpointError(
                    f"transformer_blocks.{n}.{ours} has drifted from block 0's: the public layout holds one {theirs} for all"
                    " blocks, so this model cannot be converted"
                )


def _check_positions(positions: Tensor, weight: Tensor) -> None:
    side = int(positions.shape[-2] ** 0.5)
    if positions.dim() != 3 or side * side != positions.shape[1]:
        raise CheckpointError(f"pos_embed: got shape {tuple(positions.shape)}; diffusers knows square images only")
    computed = sincos_positions(weight.shape[0], (side, side)).unsqueeze(0).to(weight.dtype)
    if positions.dtype != weight.dtype or not torch.equal(positions, computed):
        raise CheckpointError(
            "pos_embed: these are not the fixed sine-cosine positions, and diffusers computes those instead of reading them"
        )


# ---- Containers ------------------------------------------------------------------------------------------------------


def read(path: Path) -> Checkpoint:
    """A checkpoint from a `.pt` file, a safetensors file, a directory of diffusers' or one of ours. Nothing in it is executed.

    A run's folder stands for its newest whole checkpoint.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if (path / MANIFEST).is_file() or is_run(path):
        return open_checkpoint(resolve(path))
    if path.is_dir():
        return Checkpoint(_load_safetensors(path / DIFFUSERS_WEIGHTS), config=_diffusers_config(path))
    if path.suffix == ".safetensors":
        return Checkpoint(_load_safetensors(path))
    return load_public_checkpoint(path)


def _load_safetensors(path: Path) -> State:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _diffusers_config(directory: Path) -> dict[str, Any]:
    path = directory / DIFFUSERS_CONFIG
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write(path: Path, checkpoint: Checkpoint, layout: str, num_heads: int | None = None) -> None:
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
        config = diffusers_config(weights, num_heads, checkpoint.config)
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
    (folder / DIFFUSERS_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors(_contiguous(weights), folder / DIFFUSERS_WEIGHTS, {"format": "pt"})


def diffusers_config(weights: Mapping[str, Tensor], num_heads: int | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """What DiTTransformer2DModel has to be built with, read off the shapes; norm_eps is the public model's.

    Raises:
        CheckpointError: the number of heads is neither given nor that of one of the paper's widths.
    """
    width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
    by_width = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    heads = num_heads or known.get("num_attention_heads") or by_width.get(width)
    if heads is None or width % heads:
        raise CheckpointError(f"num_heads: got {heads} for {width} channels; give --num-heads")
    if "sample_size" not in known:
        raise CheckpointError("input_size: there is no config.json that says it; give --input-size")
    labels = weights[f"transformer_blocks.0.{_EMBEDDERS['y_embedder.embedding_table.weight']}"]
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": weights["proj_out_2.bias"].shape[0] // patch**2,
        "num_layers": _depth(weights, "transformer_blocks"),
        "sample_size": known["sample_size"],
        "patch_size": patch,
        "num_embeds_ada_norm": labels.shape[0] - 1,
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


def convert(source: Path, target: Path, layout: str, *, input_size: int | None = None, num_heads: int | None = None) -> str:
    """Converts a checkpoint and returns what there is to say about it.

    Args:
        source: as in ``read``.
        target: as in ``write``; it must not exist.
        layout: of the target, one of ``LAYOUTS``.
        input_size: latent height and width, where the source, diffusers' weights without a config.json, does not say.
        num_heads: for diffusers' config.json, where the width is none of the paper's.

    Raises:
        CheckpointError: the source cannot be read, or cannot be converted without loss; nothing was written.
    """
    checkpoint = read(source)
    came_as = layout_of(checkpoint.model)
    names = "diffusers" if layout == "diffusers" else "public"
    size = input_size or checkpoint.config.get("sample_size") or _size_of_images(checkpoint.model)
    said = [f"{source} ({came_as}) -> {target} ({layout}): {len(checkpoint.model)} tensors read"]
    if came_as == names:
        _check_complete(checkpoint.model, came_as)
    else:
        states = (checkpoint.model, checkpoint.ema)
        model, ema = (None if state is None else _renamed(state, names, size) for state in states)
        assert model is not None
        checkpoint = Checkpoint(model, ema, checkpoint.step, checkpoint.config)
        said.append(WARNING)
    if size is not None and names == "diffusers":
        checkpoint = replace(checkpoint, config={**checkpoint.config, "sample_size": size})
    write(target, checkpoint, layout, num_heads)
    return "\n".join(said + _left_behind(checkpoint, target))


def _renamed(state: Mapping[str, Tensor], names: str, size: int | None) -> State:
    return to_diffusers(state) if names == "diffusers" else to_public(state, _grid(state, size))


def _left_behind(checkpoint: Checkpoint, target: Path) -> list[str]:
    if checkpoint.ema is None or (target / MANIFEST).is_file():
        return []
    if target.suffix in (".pt", ".pth"):
        return ["the optimizer's state was left behind"]
    return ["written: the EMA's weights; the model's own and the optimizer's state were left behind"]


def _check_complete(state: Mapping[str, Tensor], layout: str) -> None:
    """Raises CheckpointError on a state dict with a key too few or too many."""
    if layout == "public":
        _check_public(state)
    else:
        to_public(state, (1, 1))


def _check_public(state: Mapping[str, Tensor]) -> None:
    keys = Keys(state, "public")
    keys.take("pos_embed")
    outside = [f"{name}.{kind}" for name in _OUTSIDE for kind in _KINDS]
    inside = [f"{name}.{kind}" for name in (*_INSIDE, "attn.qkv") for kind in _KINDS]
    blocks = [f"blocks.{n}.{name}" for n in range(_depth(state, "blocks")) for name in inside]
    for key in (*outside, *_EMBEDDERS, *blocks):
        keys.take(key)
    keys.finish()


def _size_of_images(state: Mapping[str, Tensor]) -> int | None:
    """Of a public state dict; diffusers' does not say."""
    if "pos_embed" not in state or "x_embedder.proj.weight" not in state:
        return None
    return int(state["pos_embed"].shape[-2] ** 0.5) * state["x_embedder.proj.weight"].shape[-1]


def _grid(diffusers: Mapping[str, Tensor], size: int | None) -> tuple[int, int]:
    weight = diffusers.get("pos_embed.proj.weight")
    if size is None:
        raise CheckpointError("input_size: diffusers stores no positions, and there is no config.json; give --input-size")
    if weight is None or size < 1 or size % weight.shape[-1]:
        raise CheckpointError(f"input_size: got {size}, which is no multiple of the patch size")
    return size // weight.shape[-1], size // weight.shape[-1]
