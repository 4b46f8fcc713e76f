"""The names of a DiT's tensors: in the public layout, which is ours too, and in diffusers' one.

diffusers splits qkv, and copies the embedders of timestep and label into every block. It computes positions and stores none.
There and back gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ditkernels.checkpoints.format import CheckpointError
from ditkernels.reference import sincos_positions

State = dict[str, Tensor]

TABLE = "y_embedder.embedding_table.weight"

UNKNOWN_SIZE = "input_size: diffusers stores no positions, and there is no config.json; give --input-size"

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
    TABLE: "norm1.emb.class_embedder.embedding_table.weight",
}
_KINDS = ("weight", "bias")


class Keys:
    """A state dict that must be used up: each key is taken once, and what is left at the end is an error."""

    def __init__(self, state: Mapping[str, Tensor], layout: str) -> None:
        self._left = dict(state)
        self._layout = layout
        self._missing: list[str] = []
        self._odd: list[str] = []

    def take(self, key: str) -> Tensor:
        if key not in self._left:
            self._missing.append(key)
            return torch.empty(0)
        tensor = self._left.pop(key)
        if tensor.dim() != _dimensions(key) or not tensor.numel():
            self._odd.append(f"{key} of shape {tuple(tensor.shape)}")
            return torch.empty(0)
        return tensor

    def finish(self) -> None:
        """Raises CheckpointError if a key was missing, is left over, or its tensor has too few or many dimensions."""
        problems = []
        if self._missing:
            problems.append(f"lacks {listed(self._missing)}")
        if self._odd:
            problems.append(f"has {listed(self._odd)}")
        if self._left:
            problems.append(f"has {listed(sorted(self._left))} besides")
        if problems:
            raise CheckpointError(f"a DiT in the {self._layout} layout was expected; it {' and '.join(problems)}")


def _dimensions(key: str) -> int:
    """Of the tensor of that name, in either layout."""
    if key == "pos_embed":
        return 3
    if key.endswith("_embedder.proj.weight") or key == "pos_embed.proj.weight":
        return 4
    return 2 if key.endswith("weight") else 1


def listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def layout_of(state: Mapping[str, Tensor]) -> str:
    """ "public" or "diffusers", by the names of the tensors. Raises CheckpointError on others."""
    if any(key.startswith("transformer_blocks.") for key in state):
        return "diffusers"
    if any(re.match(r"blocks\.\d+\.attn\.qkv\.", key) for key in state):
        return "public"
    known = "blocks.N.attn.qkv.* (the public layout and ours) nor transformer_blocks.N.* (diffusers)"
    raise CheckpointError(f"it has neither {known}, but {listed(sorted(state)) or 'nothing'}")


def depth_of(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks there are; one that is missing between them is missed by name."""
    return len({match[1] for key in state if (match := re.match(rf"{prefix}\.(\d+)\.", key))})


def to_diffusers(public: Mapping[str, Tensor]) -> State:
    """The public layout as diffusers' one.

    Raises:
        CheckpointError: a key is missing or unknown, or the positions are not those that diffusers would compute.
    """
    keys, out = Keys(public, "public"), {}
    positions, depth = keys.take("pos_embed"), depth_of(public, "blocks")
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


def to_public(diffusers: Mapping[str, Tensor], grid: tuple[int, int] | None) -> State:
    """diffusers' layout as the public one; ``grid`` is the token grid (h, w), for the positions; None leaves them out.

    Raises:
        CheckpointError: a key is missing or unknown, or the embedders of two blocks differ; they are named.
    """
    keys, out = Keys(diffusers, "diffusers"), {}
    depth = max(1, depth_of(diffusers, "transformer_blocks"))
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
    if grid is None:
        return {**copies[0], **out}
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
    grid = sincos_grid(positions)
    side = math.isqrt(positions.shape[-2]) if positions.dim() == 3 else 0
    if side * side != positions.shape[-2] or (grid is not None and grid != (side, side)):
        found = f"shape {tuple(positions.shape)}" if grid is None else f"the positions of a grid of {grid[0]} x {grid[1]} tokens"
        raise CheckpointError(f"pos_embed: got {found}; diffusers knows square images only")
    computed = sincos_positions(weight.shape[0], (side, side)).unsqueeze(0)
    # What was stored in half precision holds the same positions, rounded.
    roundings = (weight.dtype, torch.bfloat16, torch.float16)
    if positions.dtype != weight.dtype or not any(torch.equal(positions, computed.to(r).to(weight.dtype)) for r in roundings):
        raise CheckpointError(
            "pos_embed: these are not the fixed sine-cosine positions, and diffusers computes those instead of reading them"
        )


def sincos_grid(table: Tensor) -> tuple[int, int] | None:
    """The token grid (h, w) whose sine-cosine positions ``table`` (1, h·w, D) holds, in whatever precision; None if learned."""
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[2] % 4:
        return None
    for grid in _grids(table.shape[1]):
        computed = sincos_positions(table.shape[2], grid)
        # bf16 rounds numbers up to 1 by 2**-9 at most; another grid moves a token by a whole step.
        if (table[0].float() - computed).abs().max() < 2**-8:
            return grid
    return None


def _grids(tokens: int) -> Iterator[tuple[int, int]]:
    """All (h, w) with h·w = ``tokens``, the squarest first, the wide one of two before the tall one."""
    for height in range(math.isqrt(tokens), 0, -1):
        if tokens % height == 0:
            yield height, tokens // height
            if height * height != tokens:
                yield tokens // height, height


def check_complete(state: Mapping[str, Tensor], layout: str) -> None:
    """Raises CheckpointError on a state dict with a key too few or too many."""
    if layout == "public":
        _check_public(state)
    else:
        to_public(state, None)


def _check_public(state: Mapping[str, Tensor]) -> None:
    keys = Keys(state, "public")
    keys.take("pos_embed")
    outside = [f"{name}.{kind}" for name in _OUTSIDE for kind in _KINDS]
    inside = [f"{name}.{kind}" for name in (*_INSIDE, "attn.qkv") for kind in _KINDS]
    blocks = [f"blocks.{n}.{name}" for n in range(depth_of(state, "blocks")) for name in inside]
    for key in (*outside, *_EMBEDDERS, *blocks):
        keys.take(key)
    keys.finish()


def grid_of(diffusers: Mapping[str, Tensor], size: tuple[int, int] | None) -> tuple[int, int]:
    """The token grid of weights of diffusers for latents of ``size``. Raises CheckpointError where nothing says that."""
    weight = diffusers.get("pos_embed.proj.weight")
    if size is None:
        raise CheckpointError(UNKNOWN_SIZE)
    if weight is None or min(size) < 1 or any(edge % weight.shape[-1] for edge in size):
        got = f"{size[0]}" if size[0] == size[1] else f"{size[0]} x {size[1]}"
        raise CheckpointError(f"input_size: got {got}, which is no multiple of the patch size")
    return size[0] // weight.shape[-1], size[1] // weight.shape[-1]
