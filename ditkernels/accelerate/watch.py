"""What was proven is what runs: attributes that a forward reads are watched, and a forward that writes any is found out.

Early exits, token dropping, an input scale and the like are plain values on modules. A part was proven with the values of that day.
Which of them its forward can read is known from two sources: the names in the bytecode of its methods, which also covers branches
that no trial took, and a trace of what the trial did read, which also covers functions and processors outside the class. Children
that the fused forward calls, as the original does, read their own attributes at every call, so that nothing of theirs is watched
but what the part itself reads of them. Globals of a module and attributes of a class are not seen.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MISSING = "ditkernels: no such attribute"

_NEVER_IN_A_FORWARD = ("__init__", "__repr__", "extra_repr", "reset_parameters")
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_ditkernels", "__dict__", "__class__"}

Places = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
"""Names of attributes, by the path of the module that has them."""


class Watched(NamedTuple):
    """Attributes of a part and of modules in it, and the values they had when the part was proven."""

    places: Places
    values: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted, as seen from the part."""
        return tuple(".".join((*path, name)) for path, names in self.places for name in names)


def values_at(module: nn.Module, places: Places) -> tuple[Any, ...]:
    """The values of the attributes now, for a comparison; quick, since every forward of a part begins with it."""
    values: list[Any] = []
    for path, names in places:
        owner: Any = module
        for child in path:
            owner = owner._modules.get(child) if owner is not None else None
        if owner is None:
            values.extend([MISSING] * len(names))
            continue
        held = owner.__dict__
        values.extend([held.get(name, MISSING) for name in names])
    return tuple(values)


def is_plain(value: Any) -> bool:
    """Whether a value can be compared: None, a bool, a number, a string, or a tuple of these."""
    if type(value) is tuple or isinstance(value, torch.Size):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, complex, str)


def watched(module: nn.Module, called: Collection[str], read: Collection[tuple[str, str]]) -> Watched:
    """What is to be watched of a part.

    Args:
        called: the modules in it that its fused forward calls, by their paths.
        read: what the part's own forward read in a trial, as pairs of a module's path in the part and a name.
    """
    found = {path: names for path, names in _named_in_code(module, called) if names}
    for path, name in read:
        found[path] = found.get(path, frozenset()) | {name}
    places = []
    for path, names in sorted(found.items()):
        owner = _at(module, path)
        if owner is not None and (kept := tuple(sorted(name for name in names if _counts(owner, path, name, read)))):
            places.append((tuple(path.split(".")) if path else (), kept))
    return Watched(tuple(places), values_at(module, tuple(places)))


def _at(module: nn.Module, path: str) -> nn.Module | None:
    return dict(module.named_modules(remove_duplicate=False)).get(path)


def _counts(owner: nn.Module, path: str, name: str, read: Collection[tuple[str, str]]) -> bool:
    if name in _OF_EVERY_MODULE:
        return False
    if name in vars(owner):
        return is_plain(vars(owner)[name])
    if any(name in held for held in (owner._modules, owner._parameters, owner._buffers)):
        return False
    # A flag of the class, or one with a default where it is read, can still be set on the instance.
    return (path, name) in read and is_plain(inspect.getattr_static(type(owner), name, None))


def _named_in_code(module: nn.Module, called: Collection[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Every module of a part by its path, with the names in the code that may read its attributes."""
    above = {"": names_in(type(module))}
    yield "", above[""]
    for path, inner in module.named_modules(remove_duplicate=False):
        if path:
            parent = above[path.rpartition(".")[0]]
            above[path] = parent if _under(path, called) else parent | names_in(type(inner))
            yield path, above[path]


def _under(path: str, called: Collection[str]) -> bool:
    return any(path == child or path.startswith(f"{child}.") for child in called)


_names: dict[type, frozenset[str]] = {}


def names_in(kind: type) -> frozenset[str]:
    """Names and strings in the bytecode of the methods of a class and of its bases below ``nn.Module``."""
    if kind not in _names:
        _names[kind] = _read_names(kind)
    return _names[kind]


def _read_names(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in vars(base).items():
            if name not in _NEVER_IN_A_FORWARD:
                for code in _codes(value):
                    _collect(code, found)
    return frozenset(found)


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of what stands in a class: a function, a decorated one, a property, a static or a class method."""
    if isinstance(value, property):
        accessors: tuple[Any, ...] = (value.fget, value.fset)
    else:
        accessors = (value, getattr(value, "__func__", None), getattr(value, "func", None))
    for accessor in accessors:
        code = getattr(inspect.unwrap(accessor) if callable(accessor) else accessor, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def _collect(code: CodeType, found: set[str]) -> None:
    found.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _collect(constant, found)
        elif isinstance(constant, (tuple, frozenset)):
            found.update(item for item in constant if isinstance(item, str))
        elif isinstance(constant, str):
            found.add(constant)


# ---- In a trial ------------------------------------------------------------------------------------------------------


class Trace:
    """What a part reads and writes of the attributes of its modules, outside of the children that are called.

    Attributes:
        read: pairs of a module's path in the part and a name.
        written: names of attributes, dotted, that were set, deleted or changed in place.
    """

    def __init__(self, module: nn.Module, called: Collection[str]) -> None:
        self.read: set[tuple[str, str]] = set()
        self.written: set[str] = set()
        self._paths = {id(inner): path for path, inner in module.named_modules()}
        self._own = [(path, inner) for path, inner in module.named_modules() if not _under(path, called)]
        self._called = [each for path, inner in module.named_modules() if path in called for each in _callable(inner)]
        self._inside = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Looks on for as long as the context is open.

        By ``nn.Module``'s own attribute access: a subclass that looks on would be another type, and forwards ask for types.
        """
        handles = [child.register_forward_pre_hook(self._enter) for child in self._called]
        handles += [child.register_forward_hook(self._leave, always_call=True) for child in self._called]
        before = self._contents()
        write, delete = nn.Module.__setattr__, nn.Module.__delattr__
        self._inside = 0

        def reading(module: nn.Module, name: str) -> Any:
            if not self._inside and id(module) in self._paths:
                self.read.add((self._paths[id(module)], name))
            return object.__getattribute__(module, name)

        def writing(module: nn.Module, name: str, value: Any) -> None:
            self._note(module, name)
            write(module, name, value)

        def deleting(module: nn.Module, name: str) -> None:
            self._note(module, name)
            delete(module, name)

        nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = writing  # type: ignore[method-assign, assignment]
        nn.Module.__delattr__ = deleting  # type: ignore[method-assign]
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module.__delattr__ = write, delete  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()
        after = self._contents()
        self.written |= {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    def _enter(self, *call: Any) -> None:
        self._inside += 1

    def _leave(self, *call: Any) -> None:
        self._inside -= 1

    def _note(self, module: nn.Module, name: str) -> None:
        if not self._inside and id(module) in self._paths:
            self.written.add(".".join(filter(None, (self._paths[id(module)], name))))

    def _contents(self) -> dict[str, Any]:
        """What a write that sets no attribute would change: containers and buffers."""
        found = {}
        for path, inner in self._own:
            for name, value in {**vars(inner), **inner._buffers}.items():
                if name not in _OF_EVERY_MODULE and isinstance(value, (list, dict, set, Tensor)):
                    found[".".join(filter(None, (path, name)))] = _content(value)
        return found


def _callable(module: nn.Module) -> list[nn.Module]:
    """The module, or those in the list that it is."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    return sorted(map(id, value)) if isinstance(value, set) else list(map(id, value))
