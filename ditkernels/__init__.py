"""Fused kernels, a drop-in DiT, a trainer and a guided sampler for Diffusion Transformers.

>>> model = ditkernels.DiT_models["DiT-XL/2"](input_size=32)        # same constructor and state dict as the public DiT
>>> with ditkernels.use_backend("torch"): model(x, t, y)            # force a backend; by default each op chooses
>>> h = ditkernels.ops.modulate_norm(x, shift, scale)               # or call one op
>>> ditkernels.accelerate(model)                                    # or speed up the DiT you have, in place

Names are imported when they are asked for. ``torch.ops.ditkernels`` is there after ``import ditkernels.ops``.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ditkernels import _moved
from ditkernels._version import __version__

if TYPE_CHECKING:
    from ditkernels import diffusion, models, ops, reference
    from ditkernels.accelerate import accelerate, restore
    from ditkernels.checkpoints.model import load_model
    from ditkernels.diffusion import create_diffusion
    from ditkernels.evaluation.evaluate import evaluate
    from ditkernels.models import (
        DiT,
        DiT_B_2,
        DiT_B_4,
        DiT_B_8,
        DiT_L_2,
        DiT_L_4,
        DiT_L_8,
        DiT_models,
        DiT_S_2,
        DiT_S_4,
        DiT_S_8,
        DiT_XL_2,
        DiT_XL_4,
        DiT_XL_8,
    )
    from ditkernels.ops.dispatch import BackendError, set_backend, use_backend
    from ditkernels.sampling.config import SampleConfig
    from ditkernels.sampling.simple import sample
    from ditkernels.training.config import TrainConfig
    from ditkernels.training.trainer import train

__all__ = [
    "BackendError",
    "DiT",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "DiT_models",
    "SampleConfig",
    "TrainConfig",
    "__version__",
    "accelerate",
    "create_diffusion",
    "diffusion",
    "evaluate",
    "load_model",
    "models",
    "ops",
    "reference",
    "restore",
    "sample",
    "set_backend",
    "train",
    "use_backend",
]

_HOMES = {
    "accelerate": "accelerate",
    "restore": "accelerate",
    "load_model": "checkpoints.model",
    "create_diffusion": "diffusion",
    "evaluate": "evaluation.evaluate",
    "BackendError": "ops.dispatch",
    "set_backend": "ops.dispatch",
    "use_backend": "ops.dispatch",
    "SampleConfig": "sampling.config",
    "sample": "sampling.simple",
    "TrainConfig": "training.config",
    "train": "training.trainer",
    **dict.fromkeys((name for name in __all__ if name.startswith("DiT")), "models"),
}
_ROOMS = ("diffusion", "models", "ops", "reference")


def _refuse_scripts() -> None:
    """Ends a process that runs a file or a module of the package as a program, but for ``python -m ditkernels``."""
    main = sys.modules.get("__main__")
    package = os.path.dirname(os.path.realpath(__file__))
    module = _module_run()
    if getattr(main, "__spec__", None) is None and getattr(main, "__file__", None) is not None:  # python -m has a spec
        file = os.path.realpath(str(main.__file__))  # type: ignore[union-attr]
        inside = file.startswith(os.path.join(package, ""))
        name = os.path.basename(file)
    else:
        inside = module.startswith("ditkernels.") and module != "ditkernels.__main__"
        name = module
    if inside:
        print(f"ditkernels: error: {_how_to_run(name, os.path.join(package, 'commands'))}", file=sys.stderr)
        sys.exit(2)


def _module_run() -> str:
    """What follows the interpreter's own ``-m``, if it got one."""
    options = iter(sys.orig_argv[1:])
    for option in options:
        if option == "-m":
            return next(options, "")
        if not option.startswith("-"):
            break
    return ""


def _how_to_run(name: str, commands: str) -> str:
    command = name.removesuffix(".py").rpartition(".")[2]
    if not os.path.isfile(os.path.join(commands, f"{command}.py")) or command.startswith("_"):
        return f"{name} is a part of a package; `python -m ditkernels --help` shows what can be run"
    also = f" or `torchrun -m ditkernels {command} ...`" if command in ("train", "sample", "encode") else ""
    return f"run `python -m ditkernels {command} ...`{also}"


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"ditkernels.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ditkernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ditkernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps its functions from being hidden: an import binds a room's module to the room's name, which may be a function's too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


_refuse_scripts()
sys.modules[__name__].__class__ = _Package
_moved.serve_old_paths()
