"""The graph of what a block's own forward does between the modules it calls, recorded in one call.

Everything runs once on real values, so that ranks and shapes are known. Sizes and dtypes stay symbolic in the graph: a forward that
decides by a size or by a value is refused. The modules in the block are leaves, so that whatever they do is theirs.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from ditkernels.accelerate.refusals import Refused
from ditkernels.accelerate.watch import names_in

VALUE = "ditkernels value"
"""Where a node keeps what it came to."""


class Known(fx.Proxy):
    """A value in the graph that knows what it came to. Its rank is no secret: a call of another rank takes the original's way."""

    def __getattr__(self, name: str) -> Any:
        return self.dim() if name == "ndim" else super().__getattr__(name)

    def dim(self) -> int:
        return int(value_of(self.node).dim())

    def __iter__(self) -> Iterator[Any]:
        value = value_of(self.node)
        if not isinstance(value, (tuple, list)):
            raise Refused(f"it walks through {type(value).__name__} values one by one")
        symbol: Any = self
        return iter([symbol[index] for index in range(len(value))])


class Recorder(GraphAppendingTracer):
    """Records one call.

    Attributes:
        by_dtype: whether the forward took its way by a dtype, so that the graph holds for no other.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(fx.Graph())
        self.by_dtype = False
        self._block = block
        self._paths = {id(module): path for path, module in block.named_modules()}
        self._tensors = {id(value): path for path, value in _tensors(block)}
        self._evaluating = False

    def record(self, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
        """Runs the block on the values ``given``, by name, and on ``fixed`` ones, which are no part of the graph."""
        symbols = {name: self._placeholder(name, value) for name, value in given.items()}
        with torch.no_grad(), self._listening():
            result = plain_forward(self._block)(self._block, **symbols, **fixed)
        self.graph.output(self.create_arg(result))

    def _placeholder(self, name: str, value: Any) -> Known:
        node = self.create_node("placeholder", name, (), {})
        node.meta[VALUE] = value
        return Known(node, self)

    # ---- What fx asks of a tracer

    def proxy(self, node: fx.Node) -> Known:
        return Known(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        proxy.node.meta[VALUE] = self._came_to(proxy.node)
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                raise Refused("it computes with a tensor that it makes itself")
            return self._attribute(self._tensors[id(a)], a).node
        return super().create_arg(a)

    def to_bool(self, obj: Any) -> bool:
        compared = obj.node.target in (operator.eq, operator.ne)
        if not compared or not any(_is_dtype(arg) for arg in obj.node.args):
            raise Refused("it takes one way or another by the sizes or the values of what it is given")
        self.by_dtype = True
        return bool(value_of(obj.node))

    # ---- Values

    def _attribute(self, path: str, value: Any) -> Known:
        node = self.create_node("get_attr", path, (), {})
        node.meta[VALUE] = value
        return Known(node, self)

    def _came_to(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        target: Any = node.target
        if node.op == "call_method":
            target, args = getattr(args[0], target), args[1:]
        self._evaluating = True
        try:
            called = self._block.get_submodule(target) if node.op == "call_module" else target
            return called(*args, **kwargs)
        finally:
            self._evaluating = False

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Calls of modules in the block, and reads of its parameters and buffers, become nodes."""
        call, read = nn.Module.__call__, nn.Module.__getattr__

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._evaluating or id(module) not in self._paths:
                return call(module, *args, **kwargs)
            return self.create_proxy("call_module", self._paths[id(module)], args, kwargs)

        def reading(module: nn.Module, name: str) -> Any:
            value = read(module, name)
            if self._evaluating or not isinstance(value, Tensor) or id(value) not in self._tensors:
                return value
            return self._attribute(self._tensors[id(value)], value)

        nn.Module.__call__, nn.Module.__getattr__ = called, reading  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = call, read  # type: ignore[method-assign]


def recorded(block: nn.Module, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> tuple[fx.Graph, bool]:
    """The graph of a call of ``block``, and whether it holds for these dtypes alone.

    Args:
        given: arguments that the graph has as placeholders, by name.
        fixed: the others, which a call has to repeat.

    Raises:
        Refused: the forward cannot be told from one call of it. Whatever it raises itself comes out as that.
    """
    if "autocast" in names_in(type(block)):
        raise Refused("it sets autocast around what it computes, which neither a graph nor a trial shows")
    recorder = Recorder(block)
    recorder.record(given, fixed)
    return recorder.graph, recorder.by_dtype


def plain_forward(block: nn.Module) -> Callable[..., Any]:
    """The forward of a block's class as it was written, where ``torch.compile`` decorates it."""
    forward: Any = type(block).forward
    return getattr(forward, "_torchdynamo_orig_callable", forward)  # type: ignore[no-any-return]


def value_of(node: Any) -> Any:
    """What a node came to, None for the output's; anything else as it is."""
    return node.meta.get(VALUE) if isinstance(node, fx.Node) else node


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensors kept as attributes, by path."""
    for path, module in block.named_modules():
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                yield ".".join(filter(None, (path, name))), value


def _is_dtype(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(value_of(arg), torch.dtype)
