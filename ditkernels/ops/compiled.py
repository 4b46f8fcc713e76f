"""Under torch.compile: what a graph says of the choice of a backend, and which kernels a compiler sees from inside."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ditkernels._version import __version__
from ditkernels.ops import _native, choice
from ditkernels.ops.choice import OPS, Op
from ditkernels.ops.context import constant_when_traced, exporting
from ditkernels.ops.library import boxed

_TRACED = (Tensor, FunctionalTensor)
_DIRECT = ("cpu",)
"""Backends whose internal op stands in the graph, so that no Python of ours runs per call. Others stay the op that chooses."""


def asked(backend: str | None) -> str:
    """What a call says of its backend: its name or "auto", under torch.compile ``name:fingerprint``, and nothing in an export.

    So the setting, and which kernels it stands for, are in a graph before any compiler's cache looks at it.
    """
    if not torch.compiler.is_compiling():
        return backend or "auto"
    return "" if exporting() else f"{backend or 'auto'}:{fingerprint()}"


def said(text: str) -> str | None:
    """The forced backend in what ``asked`` has said, None for none."""
    name = text.partition(":")[0]
    return None if name in ("", "auto") else name


@constant_when_traced
def fingerprint() -> str:
    """Stands for what decides which code an op runs: version and files of the ops, libraries, Triton, what was measured."""
    return _fingerprint(choice.forgotten())


@lru_cache(maxsize=1)
def _fingerprint(forgotten: int) -> str:
    # A graph may launch Triton kernels, so that their files count from the first call on.
    from ditkernels.ops import _triton

    for op in OPS.values():
        op.import_all()
    digest = hashlib.sha256()
    for content in _files_of_ops():
        digest.update(content)
    libraries = (_native.cuda_library(), _native.cpu_library())
    facts = (__version__, sorted(choice.PREFERRED.items()), *libraries, _triton.MISSING, _triton.INTERPRETED)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _files_of_ops() -> Iterator[bytes]:
    """The files that the modules of the ops were loaded from, in a folder or an archive: ``.py``, or ``.pyc`` without it."""
    package = __name__.rpartition(".")[0]
    for module in (sys.modules[name] for name in sorted(sys.modules) if name.startswith(package)):
        with suppress(AttributeError, OSError):  # a loader of another kind, which gives no files; the version is left
            yield module.__loader__.get_data(module.__file__)  # type: ignore[union-attr]


def opening(op: Op) -> Callable[..., Any]:
    """What AOTAutograd runs in the place of the op while it traces a graph for torch.compile: the kernel that was chosen.

    A compiler sees from inside what launches Triton kernels, and plain PyTorch, which it fuses.
    An op that was called without ``setting:fingerprint``, by torch.export or through torch.ops, stays one op of the graph.
    """

    def rule(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(t not in _TRACED and not issubclass(t, FakeTensor) for t in types):
            return NotImplemented
        *given, text = op.with_backend(args, kwargs)
        if ":" in text:
            backend = op.choose(*given, forced=said(text))
            implementation = op.implementation(backend)
            if backend == "torch":
                with mode:
                    return boxed(op.declaration, implementation.kernel)(*given)
            if backend == "triton":
                from ditkernels.ops import _triton

                if not _triton.INTERPRETED:
                    with mode, _triton.traced():
                        return boxed(op.declaration, implementation.kernel)(*given)
            if backend in _DIRECT and not implementation.internal._schema.is_mutable:
                return mode.__torch_dispatch__(implementation.internal, types, tuple(given), {})
        return mode.__torch_dispatch__(func, types, args, kwargs)

    return rule
