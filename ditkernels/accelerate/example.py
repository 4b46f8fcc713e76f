"""What the parts of a model are given in a call of it, for trials of the same kind where inputs cannot be guessed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.refusals import Refused, attempted

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Like:
    """A tensor of finite real numbers that is drawn anew: of this shape, and between ``bounds`` if none was negative."""

    shape: tuple[int, ...]
    bounds: tuple[float, float] | None

    def drawn(self, draw: proof.Draw) -> Tensor:
        if self.bounds is not None:
            return draw.between(*self.bounds, *self.shape)
        return draw.rows(*self.shape) if len(self.shape) == 3 else draw.normal(*self.shape)


class Calls:
    """The first call of each module, by the module's id."""

    def __init__(self) -> None:
        self._calls: dict[int, Arguments] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._calls

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what ``module`` was called with, as a forward pre-hook."""
        if module not in self:
            self._calls[id(module)] = (_described(args), _described(kwargs))

    def within(self, module: nn.Module) -> list[tuple[str, Arguments]]:
        """The calls of ``module`` and of the modules in it, by path."""
        return [(path, self._calls[id(inner)]) for path, inner in module.named_modules() if inner in self]

    def inputs(self, module: nn.Module, guess: proof.Inputs, takes: Collection[str]) -> proof.Inputs:
        """Inputs of the kind that ``module`` was called with; ``guess`` if it was not called.

        Raises Refused where an argument was set that is not among those its fused forward ``takes``: it would hand such a call to
        the original's, and prove nothing.
        """
        if module not in self:
            return guess
        args, kwargs = self._calls[id(module)]
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        defaults = {name: parameter.default for name, parameter in given.signature.parameters.items()}
        further = [(name, value) for name, value in flat(given) if name not in takes]
        more = [name for name, value in further if not any(value is unset for unset in (None, False, defaults.get(name)))]
        if more:
            raise Refused(f"the example gives it {', '.join(more)}, which its fused forward does not take")
        return lambda draw: (_drawn(args, draw), _drawn(kwargs, draw))


def captured(model: nn.Module, example: Arguments) -> Calls:
    """What each module of ``model`` is given while the model runs once on ``example``, (args, kwargs), in the mode it is in.

    Without gradients and without autocast. Buffers and the state of all generators are put back afterwards.

    Raises:
        ValueError: ``example`` is no such pair, or the model does not run on it.
    """
    if not (isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict)):
        raise ValueError(f"accelerate: example is {type(example).__name__}; it must be a pair (args, kwargs), a tuple and a dict")
    args, kwargs = example
    calls = Calls()
    try:
        with proof.isolated(model), torch.no_grad(), _buffers_kept(model), _listening(model, calls):
            attempted("the model does not run on the example", lambda: model(*args, **kwargs))
    except Refused as refused:
        raise ValueError(f"accelerate: {refused}") from refused
    return calls


@contextmanager
def _listening(model: nn.Module, calls: Calls) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(calls.record, with_kwargs=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def flat(given: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Names and values of arguments in the order of the signature, those of ``*args`` and ``**kwargs`` one by one."""
    for name, value in given.arguments.items():
        kind = given.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _described(value: Any) -> Any:
    """``value`` with every tensor of finite real numbers as ``Like``, and every other tensor copied."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel() or not value.isfinite().all():
            return value.detach().clone()
        low, high = value.min().item(), value.max().item()
        return Like(tuple(value.shape), (low, high) if low >= 0 else None)
    return _mapped(_described, value)


def _drawn(value: Any, draw: proof.Draw) -> Any:
    if isinstance(value, Like):
        return value.drawn(draw)
    if isinstance(value, nn.Module):
        return proof.moved(value, draw)
    if isinstance(value, Tensor):
        return value.to(draw.device, draw.dtype) if value.is_floating_point() else value.to(draw.device)
    return _mapped(lambda item: _drawn(item, draw), value)


def _mapped(change: Any, value: Any) -> Any:
    """A tuple, list or mapping of changed items; anything else as it is."""
    if isinstance(value, tuple):
        items = [change(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [change(item) for item in value]
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    return value
