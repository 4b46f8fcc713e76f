"""A model as a folder: the arguments that make it in config.json, its weights in model.safetensors.

The folder is what the Hugging Face hub holds of a model. Nothing here asks the network, but for ``push_to_hub``.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ditkernels import files
from ditkernels._version import __version__
from ditkernels.reference import DiT

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Beside the arguments, what made the file: written for readers, and passed over when it is read.
CLASS, VERSION = "_class_name", "_ditkernels_version"
OF_DIFFUSERS = "_diffusers_version"

Model = TypeVar("Model", bound="Pretrained")


def arguments_of(model: DiT) -> dict[str, Any]:
    """The arguments that make a DiT of the same shapes, as JSON values."""
    rows = model.y_embedder.rows
    hidden_size = model.x_embedder.proj.weight.shape[0]
    return {
        "input_size": list(model.input_size),
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "hidden_size": hidden_size,
        "depth": len(model.blocks),
        "num_heads": model.num_heads,
        "mlp_ratio": model.state_dict()["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "class_dropout_prob": model.y_embedder.dropout_prob if rows > model.num_classes else 0.0,
        "num_classes": model.num_classes,
        "learn_sigma": model.learn_sigma,
        "conditioning": model.conditioning,
    }


class Pretrained(DiT):
    """A DiT that is written to a folder and made from one."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors to ``folder``, which is made if it is not there.

        The weights keep their dtypes. The config comes last, so that a folder with a config is whole.

        Raises:
            ValueError: a weight has no data, or the state dict is not the plain model's, as with adapters or quantised weights.
            OSError: the folder cannot be written.
        """
        arguments = arguments_of(self)
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in _ordinary(self.state_dict()).items()}
        _refuse_differences("save_pretrained", state, _shapes(type(self), arguments))
        folder = Path(folder)
        files.make_directory(folder)
        (folder / CONFIG).unlink(missing_ok=True)
        files.write_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
        files.write_json(folder / CONFIG, {CLASS: "DiT", VERSION: __version__, **arguments})

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path, **arguments: Any) -> Model:
        """The model of a folder that :meth:`save_pretrained` wrote, on the CPU, in eval mode, with the dtypes that were saved.

        Args:
            folder: a local one; nothing is downloaded.
            arguments: more of the constructor, as ``attention_backend`` and ``checkpointing``, which no folder holds.

        Raises:
            ValueError: there is no such folder, or it holds another program's model or another class; a weight is missing, left
                over or of another shape; what is there is damaged; an argument that the folder holds is given.
        """
        folder = Path(folder)
        recorded = _recorded(folder)
        twice = sorted(recorded.keys() & arguments.keys())
        if twice:
            raise ValueError(f"{twice[0]}: got {arguments[twice[0]]!r}, but {folder / CONFIG} says it")
        try:
            state = load_file(folder / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error
        _refuse_differences(str(folder), state, _recorded_shapes(cls, recorded, folder / CONFIG, len(state)))
        with torch.random.fork_rng(devices=[]):
            model = cls(**_as_arguments(recorded), **arguments)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads what :meth:`save_pretrained` writes to a model repository of the hub, which is made if it is not there.

        Args:
            repository: owner/name.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError(f"push_to_hub needs huggingface_hub ({error}): pip install huggingface_hub") from error
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))


def _ordinary(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            kind = "a tensor without data" if getattr(tensor, "is_meta", False) else f"a {type(tensor).__name__}"
            raise ValueError(f"save_pretrained: {name} is {kind}, allowed is an ordinary tensor")
    return dict(state)


def _shapes(model: type[DiT], arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shape of every weight of the model that these arguments make."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model(**_as_arguments(arguments)).state_dict().items()}


def _refuse_differences(where: str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = [
        f"{name} is {_described(found, name)}, the model has {_described(shapes, name)}"
        for name in sorted(found.keys() | shapes.keys())
        if found.get(name) != shapes.get(name)
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong[:4])}{f' and {len(wrong) - 4} more' * (len(wrong) > 4)}")


def _described(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "not there"


def _recorded(folder: Path) -> dict[str, Any]:
    """The arguments in a folder's config."""
    path = folder / CONFIG
    if not folder.is_dir():
        how = f"'hf download {folder} --local-dir DIR' fetches it"
        raise ValueError(f"from_pretrained: {folder} is no folder; nothing is downloaded: {how}")
    if not path.is_file():
        others = "load_model reads runs, checkpoints and weights of other programs"
        raise ValueError(f"from_pretrained: {folder} holds no {CONFIG}; {others}")
    content = files.read_object(path)
    if OF_DIFFUSERS in content:
        raise ValueError(
            f"{folder} holds a model of diffusers: 'ditkernels convert {folder} OUT --to ditkernels' makes it one of ours"
        )
    if content.get(CLASS) != "DiT":
        raise ValueError(f"{path}: {CLASS}: got {content.get(CLASS)!r}, allowed is 'DiT'")
    return {name: value for name, value in content.items() if name not in (CLASS, VERSION)}


def _recorded_shapes(model: type[DiT], recorded: Mapping[str, Any], path: Path, tensors: int) -> dict[str, torch.Size]:
    """As :func:`_shapes`; ValueError, naming the file, for arguments that make no model, or too deep a one."""
    allowed = [name for name in inspect.signature(DiT.__init__).parameters if name != "self"]
    unknown = sorted(recorded.keys() - {*allowed})
    if unknown:
        raise ValueError(f"{path}: got {', '.join(unknown)}, allowed are {', '.join(allowed)}")
    depth = recorded.get("depth", 0)
    if type(depth) is not int or depth > tensors:
        raise ValueError(f"{path}: depth: got {depth!r}, and {tensors} tensors of weights")
    try:
        return _shapes(model, recorded)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} makes no model: {error}") from error


def _as_arguments(recorded: Mapping[str, Any]) -> dict[str, Any]:
    size = recorded.get("input_size")
    return {**recorded, **({"input_size": tuple(size)} if isinstance(size, list) else {})}
