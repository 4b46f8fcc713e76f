"""The `.pt` files of the public DiT code, read without executing anything in them."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.checkpoints.format import Checkpoint, CheckpointError
from ditkernels.files import first_line


def load_public_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.pt` file of the public DiT code onto the CPU: a bare state dict, or {model, ema, opt, args}.

    Nothing in the file is executed: only tensors, plain containers and the argparse.Namespace that the public
    trainer stores as `args` are let in. `args` becomes the config; the optimizer's state is not returned.

    Raises:
        CheckpointError: the file is missing or damaged, holds other objects, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not a torch file of plain weights and was not loaded: {first_line(error)}") from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {first_line(error)}") from error
    if _is_state_dict(content):
        return Checkpoint(model=content)
    if isinstance(content, dict) and _is_state_dict(content.get("model")):
        return _from_public_trainer(path, content)
    raise CheckpointError(f"{path} holds neither a state dict nor {{model, ema, opt, args}}: {_describe(content)}")


def _from_public_trainer(path: Path, content: dict[str, Any]) -> Checkpoint:
    ema = content.get("ema")
    if ema is not None and not _is_state_dict(ema):
        raise CheckpointError(f"{path}: 'ema' is no state dict but {_describe(ema)}")
    args = content.get("args")
    config = vars(args) if isinstance(args, argparse.Namespace) else {}
    return Checkpoint(model=content["model"], ema=ema, config=config)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict) and len(value) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {sorted(map(str, value))[:8]}"
    return f"a {type(value).__name__}"
