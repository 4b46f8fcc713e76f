"""A graph as source again, with calls of the fused part's own methods in the place of sites.

The source is plain Python that compilers and debuggers read. Modules are called where they are, so that hooks, other weights and
other layers count. A value is dropped after its last use, as the original's own forward drops it.
"""

from __future__ import annotations

import linecache
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from ditkernels.accelerate.refusals import Refused

_PLAIN = (type(None), bool, int, str)


class Site(NamedTuple):
    """A call of a method of the part in the place of several nodes.

    Attributes:
        method: its name.
        arguments: nodes and plain values.
        results: the nodes that it computes, in the order it returns them; None for one that nobody needs.
        inner: nodes that only the site needed.
    """

    method: str
    arguments: tuple[Any, ...]
    results: tuple[fx.Node | None, ...]
    inner: tuple[fx.Node, ...]


class Program:
    """A function of a part and of the values of its graph's placeholders. Copies and pickles by its source.

    Attributes:
        source: of the function.
        objects: what the source calls or holds that has no plain spelling, by the names it has there.
        run: the function.
    """

    def __init__(self, source: str, objects: tuple[tuple[str, Any], ...]) -> None:
        self.source, self.objects = source, objects
        name = f"<ditkernels.accelerate {abs(hash(source)):x}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        space = dict(objects)
        exec(compile(source, name, "exec"), space)
        self.run: Callable[..., Any] = space["run"]

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self.source, self.objects)


def program_of(graph: fx.Graph, sites: Sequence[Site]) -> Program:
    """The program of a graph with ``sites`` in the place of their nodes.

    Raises:
        Refused: the graph holds something that cannot be pickled.
    """
    writer = _Writer(graph, sites)
    program = Program(writer.source(), tuple(writer.objects.items()))
    try:
        pickle.dumps(program)
    except (pickle.PicklingError, TypeError, AttributeError) as fault:
        raise Refused(f"its forward holds something that cannot be pickled ({fault})") from fault
    return program


class _Writer:
    def __init__(self, graph: fx.Graph, sites: Sequence[Site]) -> None:
        self.objects: dict[str, Any] = {}
        self._nodes = list(graph.nodes)
        results = [node for site in sites for node in site.results if node is not None]
        self._dropped = {node for site in sites for node in site.inner} | set(results)
        self._at = self._places(sites)
        self._drop_unneeded(sites)

    def _places(self, sites: Sequence[Site]) -> Mapping[fx.Node, list[Site]]:
        """The sites by the node in whose place they run: the first of their results."""
        order = {node: place for place, node in enumerate(self._nodes)}
        found: dict[fx.Node, list[Site]] = {}
        for site in sites:
            found.setdefault(min((n for n in site.results if n is not None), key=order.__getitem__), []).append(site)
        return found

    def _drop_unneeded(self, sites: Sequence[Site]) -> None:
        """What only led to dropped nodes is dropped, but for calls of modules: they may do more than return."""
        needed = {node for site in sites for node in _nodes_in(site.arguments)}
        for node in reversed(self._nodes):
            led_on = bool(node.users) and node.op in ("call_function", "call_method", "get_attr")
            if led_on and node not in needed and all(user in self._dropped for user in node.users):
                self._dropped.add(node)

    def source(self) -> str:
        names = [node.name for node in self._nodes if node.op == "placeholder"]
        lines = [line for line, _ in self._lines()]
        return "\n    ".join([f"def run({', '.join(('self', *names))}):", *lines]) + "\n"

    def _lines(self) -> Iterator[tuple[str, tuple[fx.Node, ...]]]:
        steps = list(self._steps())
        last = {node: place for place, (_, read, _) in enumerate(steps) for node in read}
        for place, (line, read, made) in enumerate(steps):
            yield line, read
            over = [n.name for n in dict.fromkeys((*read, *made)) if last.get(n, place) == place]
            if over and not line.startswith("return"):
                yield f"{' = '.join(over)} = None", ()

    def _steps(self) -> Iterator[tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]]:
        """Lines, with the nodes that they read and make."""
        for node in self._nodes:
            for site in self._at.get(node, ()):
                made = tuple(n for n in site.results if n is not None)
                targets = ", ".join("_" if n is None else n.name for n in site.results)
                yield f"{targets} = self.{site.method}({self._spelled_all(site.arguments)})", _nodes_in(site.arguments), made
            if node in self._dropped or node.op == "placeholder":
                continue
            read = tuple(node.all_input_nodes)
            if node.op == "output":
                yield f"return {self._spelled(node.args[0])}", read, ()
            else:
                yield f"{node.name} = {self._call(node)}", read, (node,)

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        if node.op == "get_attr":
            return _reached(target)
        options = [f"{name}={self._spelled(value)}" for name, value in node.kwargs.items()]
        args = list(node.args)
        if node.op == "call_module":
            called = _reached(target)
        elif node.op == "call_method":
            called = f"{self._spelled(args.pop(0))}.{target}"
        else:
            called = self._named(target)
        return f"{called}({', '.join([*map(self._spelled, args), *options])})"

    def _spelled_all(self, values: Sequence[Any]) -> str:
        return ", ".join(map(self._spelled, values))

    def _spelled(self, value: Any) -> str:
        match value:
            case fx.Node():
                return value.name
            case slice():
                return f"slice({self._spelled_all((value.start, value.stop, value.step))})"
            case dict():
                return f"{{{', '.join(f'{key!r}: {self._spelled(item)}' for key, item in value.items())}}}"
            case list():
                return f"[{self._spelled_all(value)}]"
            case tuple() if type(value) is tuple:
                return f"({''.join(f'{self._spelled(item)}, ' for item in value)})"
        return repr(value) if type(value) in _PLAIN else self._named(value)

    def _named(self, value: Any) -> str:
        known = next((name for name, held in self.objects.items() if held is value), None)
        if known is None:
            known = f"_{getattr(value, '__name__', 'held')}_{len(self.objects)}"
            self.objects[known] = value
        return known


def _reached(path: str) -> str:
    """The module or tensor at a path, as an expression."""
    return "self" + "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in path.split("."))


def _nodes_in(arguments: Sequence[Any]) -> tuple[fx.Node, ...]:
    return tuple(argument for argument in arguments if isinstance(argument, fx.Node))
