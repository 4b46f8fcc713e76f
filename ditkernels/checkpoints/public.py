"""The `.pt` files of the public DiT code and of those who changed it, read without executing anything in them."""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.checkpoints.format import Checkpoint, CheckpointError
from ditkernels.files import first_line

# Where trainers keep a state dict, by what it is of. The first that holds one counts.
MODEL_KEYS = ("model", "state_dict", "model_state_dict")
EMA_KEYS = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema")

# What may stand in `args` besides plain values. A path becomes one that touches no disk, whatever system it was of.
_LET_IN: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"{home}.{kind}PosixPath") for home in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
    *((pathlib.PureWindowsPath, f"{home}.{kind}WindowsPath") for home in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
]

# What torch's unpickler raises on bytes that somebody changed, besides its own error: it takes them as they come.
_BROKEN = (
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)

# Deeper than any config; a damaged file may hold a list that holds itself.
_DEEPEST = 8


def load_public_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.pt` file of the public DiT code onto the CPU: a bare state dict, or {model, ema, opt, args}.

    Nothing in the file is executed: only tensors, plain containers and values, dtypes, devices, sets, paths and the
    argparse.Namespace that the public trainer stores as `args` are let in. `args`, a Namespace or a dict, becomes the config in
    JSON values; the optimizer's state is not returned. State dicts are found under ``MODEL_KEYS`` and ``EMA_KEYS``, their names and
    dtypes left as they are. Where there is only an average, ``model`` is empty.

    Raises:
        CheckpointError: the file is missing or damaged, holds other objects, of which one is named, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _found_in(path, _loaded(path))


def _loaded(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_LET_IN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_why_not(error)}") from error
    except _BROKEN as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {first_line(error)}") from error
    except OSError as error:
        # What torch asks of a file where the end of an archive names a wrong place; anything else is the disk's.
        if error.errno != errno.EINVAL:
            raise
        raise CheckpointError(f"{path} is truncated or not a torch file: {first_line(error)}") from error


def _why_not(error: pickle.UnpicklingError) -> str:
    """What is wrong with a file that torch does not load without executing it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return f"is not a torch file of plain weights and was not loaded: {first_line(error)}"
    return (
        f"was not loaded, because of an object of {found[1]} in it: only tensors and plain values are read, since anything else "
        "could run code; save it again without that object"
    )


def _found_in(path: Path, content: object) -> Checkpoint:
    if is_state_dict(content):
        return Checkpoint(model=content)  # type: ignore[arg-type]
    if isinstance(content, dict):
        model, ema = _part(path, content, MODEL_KEYS), _part(path, content, EMA_KEYS)
        if model is not None or ema is not None:
            args = content.get("args")
            config = vars(args) if isinstance(args, argparse.Namespace) else args
            return Checkpoint(model=model or {}, ema=ema, config=_plain(config) if isinstance(config, dict) else {})
    raise CheckpointError(f"{path} holds neither a state dict nor {{model, ema, opt, args}}: {_describe(content)}")


def _part(path: Path, content: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The state dict under the first of ``keys`` that holds one; None where they hold nothing."""
    there = [key for key in keys if content.get(key) is not None]
    for key in there:
        if is_state_dict(content[key]):
            return content[key]
    if there:
        raise CheckpointError(f"{path}: {there[0]!r} is no state dict but {_describe(content[there[0]])}")
    return None


def is_state_dict(value: object) -> bool:
    """Whether it is a dict of tensors by name, with at least one."""
    return (
        isinstance(value, dict) and len(value) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _plain(value: object, depth: int = 0) -> Any:
    """The same as JSON values: what JSON does not know by its text, sets in order."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == _DEEPEST or isinstance(value, Tensor):
        return type(value).__name__
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, depth + 1) for item in value), key=str)
    return str(value)


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {sorted(map(str, value))[:8]}"
    return f"a {type(value).__name__}"
