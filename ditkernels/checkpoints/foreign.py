"""Weights that other programs wrote, whatever they lie in: a file, pieces with an index, a folder, a pipeline's folder.

What comes out has plain names and fp32 values: what wraps a model leaves its name before those of the tensors, and half precision
widens without a change of value. Nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ditkernels.checkpoints.format import MANIFEST, Checkpoint, CheckpointError
from ditkernels.checkpoints.public import load_public_checkpoint
from ditkernels.files import read_object

INDEX = ".index.json"
CONFIG = "config.json"
PIPELINE = "model_index.json"
TRANSFORMER = "transformer"
USUAL = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# What stands before the names, by who put it there: DataParallel and DDP, torch.compile, Lightning modules and copies of averages.
PREFIXES = ("module", "_orig_mod", "model", "ema_model", "online_model")
AVERAGE = "ema_model"
# These also stand between names, where blocks were wrapped one by one.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What averages count beside the weights.
COUNTERS = ("n_averaged", "initted", "step")

WIDENED = (torch.bfloat16, torch.float16)
KEPT = (torch.float32, torch.float64)


def read_foreign(path: Path) -> Checkpoint:
    """The weights at ``path``, in the public layout's names or diffusers', in fp32, on the CPU.

    Args:
        path: a `.pt`, `.bin` or `.safetensors` file; the index of one that lies in pieces; a folder with one of these, whose
            config.json becomes the config; or a pipeline's folder of diffusers, which stands for its transformer.

    Returns:
        With an empty ``model`` where there is an average alone.

    Raises:
        CheckpointError: there is nothing to read, or not one thing; what is there is damaged, or as of
            :func:`load_public_checkpoint`; a tensor is not of floating point, or stands there twice. The file is named.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith(INDEX):
        return normalised(Checkpoint(_of_pieces(path)), path)
    if path.suffix == ".safetensors":
        return normalised(Checkpoint(_of_safetensors(path)), path)
    return normalised(load_public_checkpoint(path), path)


def _of_folder(folder: Path) -> Checkpoint:
    found = find_weights(folder)
    checkpoint = read_foreign(found)
    return Checkpoint(checkpoint.model, checkpoint.ema, config={**_config_of(found.parent), **checkpoint.config})


def find_weights(folder: Path) -> Path:
    """The file or index in a folder that :func:`read_foreign` reads. Raises CheckpointError where there is none, or not one."""
    inside = folder
    if (folder / PIPELINE).is_file():
        inside = folder / TRANSFORMER
        if not inside.is_dir():
            raise CheckpointError(f"{folder} holds no checkpoint: it is a pipeline without a {TRANSFORMER}{_folders_in(folder)}")
    found = _weights_in(inside)
    if not found:
        raise CheckpointError(f"{inside} holds no checkpoint: {MANIFEST} is not there, nor weights of others{_folders_in(inside)}")
    if len(found) > 1:
        raise CheckpointError(f"{inside} holds several weights, of which one must be named: {', '.join(p.name for p in found)}")
    return found[0]


def _weights_in(folder: Path) -> list[Path]:
    """What can be read in a folder, in the safest of the formats there; an index stands for its pieces, a usual name for all."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for suffix in SUFFIXES:
        whole = [path for path in files if path.suffix == suffix]
        found = [path for path in files if path.name.endswith(suffix + INDEX)] or whole
        usual = [path for path in found if path.name.removesuffix(INDEX).removesuffix(suffix) in USUAL]
        if found:
            return usual[:1] or found
    return []


def _folders_in(folder: Path) -> str:
    """The folders in it whose weights may be meant."""
    found = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _weights_in(path)]
    return f"; a folder in it with weights is {' or '.join(found)}" if found else ""


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


# ---- Formats ---------------------------------------------------------------------------------------------------------


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, which lies beside the index."""
    found = _json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} is damaged: it has no weight_map")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} is damaged: {name!r} is no file beside it")
    return found


def _of_pieces(index: Path) -> dict[str, Tensor]:
    if not index.is_file():
        raise CheckpointError(f"{index}: no such file")
    files = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        piece = index.parent / name
        tensors = _of_safetensors(piece) if piece.suffix == ".safetensors" else load_public_checkpoint(piece).model
        for key in (key for key, file in files.items() if file == name):
            if key not in tensors:
                raise CheckpointError(f"{piece} lacks {key}, which {index.name} says is in it")
            state[key] = tensors[key]
    return state


# ---- Names and dtypes ------------------------------------------------------------------------------------------------


def normalised(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """A foreign checkpoint with plain names and fp32 values; the average may lie in the model's state dict, as ``ema_model``.

    Raises:
        CheckpointError: as of :func:`read_foreign`.
    """
    model, average = _parted(checkpoint.model, path)
    if checkpoint.ema is not None:
        trained, copied = _parted(checkpoint.ema, path)
        average = copied or trained
    return Checkpoint(model, average or None, checkpoint.step, checkpoint.config)


def _parted(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained and what is an average in a state dict, under plain names."""
    trained: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    for key, tensor in state.items():
        before, name = _plain_name(key)
        if name in COUNTERS:
            continue
        part = average if AVERAGE in before else trained
        if name in part:
            raise CheckpointError(f"{path} holds {name} twice, once as {key}")
        part[name] = _widened(tensor, key, path)
    return trained, average


def _plain_name(key: str) -> tuple[list[str], str]:
    """What stands before a tensor's name, and that name."""
    parts = key.split(".")
    count = 0
    while count < len(parts) - 1 and parts[count] in (*PREFIXES, *WRAPPERS):
        count += 1
    return parts[:count], ".".join(part for part in parts[count:] if part not in WRAPPERS)


def _widened(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in (*KEPT, *WIDENED):
        kind = "a tensor without data" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise CheckpointError(f"{path} holds {name} as {kind}; allowed are dense fp32, fp64, bf16 and fp16")
    return tensor.float() if tensor.dtype in WIDENED else tensor
