"""What keeps a part from being rewired: things that a fused forward would pass over, or would compute differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ditkernels.files import first_line

T = TypeVar("T")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule", "CheckpointWrapper", "OffloadWrapper")
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


class Refused(Exception):
    """A part stays as it was; the message says why."""


class Faulted(Refused):
    """Somebody else's code raised."""


def attempted(failing: str, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns. What it raises, KeyboardInterrupt apart, comes out as Faulted: ``failing``, then the exception."""
    try:
        return attempt()
    except (KeyboardInterrupt, Refused):
        raise
    # A model's own code runs in here, on inputs that its author never thought of: a check in it may call sys.exit, and a name in it
    # may not exist. Neither may end the process, nor keep the other parts of the model from being fused.
    except BaseException as fault:
        raise Faulted(f"{failing} ({type(fault).__name__}: {first_line(fault)})") from fault


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ValueError on a model that FSDP or a checkpoint wrapper holds.

    By name, since importing torch.distributed's wrappers only to ask costs a second.
    """
    for name, module in model.named_modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise ValueError(f"{name or 'the model'} is already wrapped in {wrapper}; accelerate the model first, then wrap it")


def compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped a module in this one. By name, since importing Dynamo only to ask costs a second."""
    return type(module).__name__ == "OptimizedModule"


def refuse_intercepted(module: nn.Module, called: str = "", *, below: bool = True) -> None:
    """Raises Refused where somebody listens in, by the name the module is ``called``: hooks, or a forward put on the instance."""
    for name, inner in module.named_modules() if below else [("", module)]:
        where = ".".join(filter(None, (called, name))) or "it"
        for kind in _HOOKS:
            if getattr(inner, kind, None):
                raise Refused(f"{where} has {kind.strip('_').replace('_', ' ')}")
        if "forward" in vars(inner) and not compiled(inner):
            raise Refused(f"the forward of {where} was replaced on the instance")


def refuse_random(module: nn.Module) -> None:
    """Raises Refused on dropout or drop-path above zero, wherever in the module."""
    for name, inner in module.named_modules():
        probability = next(
            (p for p in (getattr(inner, key, 0) for key in ("p", "drop_prob")) if isinstance(p, float) and p > 0),
            0,
        )
        if probability and "drop" in type(inner).__name__.lower():
            raise Refused(f"{name or 'it'} is {type(inner).__name__} with probability {probability}")


def require_plain(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises Refused unless ``module`` is torch's own layer with ordinary weights, which a kernel may read."""
    if type(module) is not kind:
        raise Refused(f"{name} is {type(module).__module__}.{type(module).__qualname__}, not torch's {kind.__name__}")
    for key, parameter in module.named_parameters(recurse=False):
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
            raise Refused(f"{name}.{key} is {type(parameter.data).__name__} of {parameter.dtype}, not ordinary weights")


def require_children(module: nn.Module, *names: str) -> None:
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise Refused(f"{type(module).__name__} has no {', '.join(missing)}")


def keeps_eps(norm: nn.Module) -> bool:
    """Whether a norm has its eps as an attribute."""
    return any(hasattr(norm, key) for key in _EPS_NAMES)


def eps_of(name: str, norm: nn.Module) -> float:
    """The eps of a norm; raises Refused where it has none, or one that depends on the dtype."""
    for key in _EPS_NAMES:
        if hasattr(norm, key):
            eps = getattr(norm, key)
            if not isinstance(eps, float) or eps < 0:
                raise Refused(f"{name}.{key} is {eps!r}; the ops need a number")
            return eps
    raise Refused(f"{name} is {type(norm).__name__} without an eps")
