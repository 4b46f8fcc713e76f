"""Where modules of earlier versions have gone. An import of an old path still works, and warns once.

No code, page or example of this project uses an old path.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# An old module to those that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "beginning": ("training.start", "training.factory"),
    "check": ("diagnostics.check", "runtime"),
    "checkpoint": ("checkpoints.format", "checkpoints.public", "checkpoints.run", "checkpoints.writer", "checkpoints.sharded"),
    "config": ("training.config", "options"),
    "consolidate": ("checkpoints.consolidate",),
    "convert": ("checkpoints.convert", "checkpoints.config"),
    # Now a folder, whose __init__ serves the names that the file had.
    "data": ("data.order", "data.folder", "data.digits", "data.latents", "data.loader", "data.source"),
    "distributed": ("training.distributed", "runtime"),
    "encode": ("data.encode", "data.config"),
    "evaluate": ("evaluation.evaluate", "evaluation.features", "evaluation.metrics", "evaluation.config"),
    "evaluate.features": ("evaluation.features",),
    "evaluate.images": ("evaluation.images",),
    "evaluate.metrics": ("evaluation.metrics", "evaluation.config"),
    "evaluate.monitor": ("evaluation.monitor",),
    "flops": ("diagnostics.flops", "models"),
    "info": ("diagnostics.info",),
    "latents": ("data.latents",),
    "masters": ("training.master_weights",),
    "optimizer": ("training.optimizer", "training.ema"),
    "plot": ("training.plot",),
    "random": ("rng",),
    "runlog": ("training.log",),
    "sampler": (
        "sampling.drawing",
        "sampling.config",
        "sampling.generate",
        "sampling.labels",
        "sampling.denoiser",
        "checkpoints.model",
        "runtime",
    ),
    "sampler.denoiser": ("sampling.denoiser",),
    "sampler.drawing": ("sampling.drawing", "sampling.config"),
    "sampler.generate": ("sampling.generate", "sampling.config", "runtime"),
    "sampler.labels": ("sampling.labels", "sampling.config"),
    "sampler.loading": ("checkpoints.model", "checkpoints.config"),
    "sampler.outputs": ("sampling.outputs", "files"),
    "surroundings": ("runtime",),
    "torchrun": ("runtime",),
    "trainer": ("training.trainer",),
    "vae": ("data.vae", "training.factory"),
}
PACKAGES = ("evaluate", "sampler")
PREFIX = "ditkernels."


class _Moved(ModuleType):
    """An old path: its names are looked up where they are now."""

    def __getattr__(self, name: str) -> Any:
        return moved_name(self.__name__, name)


def moved_name(module: str, name: str) -> Any:
    """What ``module``, an old path, held under that name."""
    if not name.startswith("__"):
        for home in MOVED[module.removeprefix(PREFIX)]:
            found = getattr(importlib.import_module(PREFIX + home), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def warn_of(module: str) -> None:
    """Says where an old path's names are now, to whoever imports from it: the frame above the caller's."""
    homes = ", ".join(PREFIX + home for home in MOVED[module.removeprefix(PREFIX)])
    warnings.warn(f"{module} has moved to {homes}", DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = fullname.removeprefix(PREFIX)
        if old == fullname or old not in MOVED or old == "data":
            return None
        return ModuleSpec(fullname, self, is_package=old in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        warn_of(module.__name__)


def serve_old_paths() -> None:
    """Makes the old paths importable. They go first: a folder of an old name may hold nothing but its __pycache__."""
    sys.meta_path.insert(0, _Finder())
