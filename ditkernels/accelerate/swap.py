"""Rewiring by class: a module gets a subclass of its own class, whose forward calls the fused ops. Parameters stay where they are.

A closure in the place of ``forward`` would keep the original's weights in every deep copy; a class belongs to each copy alike,
so copies, pickles, ``.to()``, DDP and ``torch.compile`` keep working. The subclass takes the original's name and module, because
libraries write these into checkpoints and sharding policies. Where the original's forward is compiled, so is the fused one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ditkernels.accelerate.watch import Watched, values_at
from ditkernels.models import watched

SETTINGS = "_ditkernels"
WATCHED, SIGNATURE = "watched", "signature"
"""Settings that every part has once it is proven."""
CALLED = "called"
"""A setting of parts whose names differ: further modules in it that the forward calls."""
READ = "read"
"""And further ones whose weights it reads."""
BEYOND = "beyond"
"""A setting in trials: a list that gets an entry when a call goes the original's way."""
_BESIDE = "beside"


class Fused(nn.Module):
    """What every rewired module is an instance of. A subclass gives the forward; ``fused_class`` joins it with the original.

    Attributes:
        called: the modules in it that the forward calls, by their paths, and need not watch.
        read: those whose weights it reads, and which it calls where somebody has changed them.
        mixin, original: the two halves of the class.
        rewired: the forward that the class was given, where nobody has compiled it.
    """

    called: ClassVar[tuple[str, ...]] = ()
    read: ClassVar[tuple[str, ...]] = ()
    mixin: ClassVar[type[Fused]]
    original: ClassVar[type[nn.Module]]
    rewired: ClassVar[Callable[..., Any]]
    _ditkernels: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Whoever calls type(model)(...) wants the model as it was written.
        self.__class__ = type(self).original  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def introduce(cls, original: type[nn.Module], fused: type[nn.Module]) -> None:
        """Is told of every class ``fused`` that is made of this one and an original, for libraries that keep lists of classes."""

    def unchanged(self) -> bool:
        """Whether all that the original's forward reads, or calls and this one does not, is as it was when the part was proven."""
        of_then: Watched | None = self._ditkernels.get(WATCHED)
        return (of_then is None or values_at(self, of_then.places) == of_then.values) and not self._changed_beside()

    def as_written(self, *args: Any, **options: Any) -> Any:
        """What the original's forward makes of a call outside of what was proven."""
        beyond = self._ditkernels.get(BEYOND)
        if beyond is not None:
            beyond.append(True)
        return type(self).original.forward(self, *args, **options)

    def proven_arguments(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """A call's arguments, in the order of the proof's; None where the call gives less than these, or more than defaults."""
        proven: Signature = self._ditkernels[SIGNATURE]
        if not options and len(args) == len(proven.names):
            return args
        for name in proven.names[len(args) :]:
            if name not in options:
                return None
            args = (*args, options[name])
        count = len(proven.names)
        if len(args) - count > len(proven.defaults):
            return None
        expected = dict(proven.defaults)
        further = dict(zip(expected, args[count:])) | {key: value for key, value in options.items() if key not in proven.names}
        if any(key not in expected or value is not expected[key] for key, value in further.items()):
            return None
        return args[:count]

    def _changed_beside(self) -> bool:
        """Whether somebody has changed a module that the fused forward does without, such as a dropout of probability zero."""
        for path, kind in self._ditkernels[_BESIDE]:
            inner = _inner(self, path)
            if inner is None or watched(inner, _forward_of(inner, kind)):
                return True
        return False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By its two halves, both of which can be imported; the joined class cannot."""
        reduced = super().__reduce_ex__(protocol)
        return rebuild, (type(self).mixin, type(self).original), *reduced[2:]

    def _get_name(self) -> str:
        return f"Fused{super()._get_name()}"


class Signature(NamedTuple):
    """The parameters of a forward: those that a proof gives, and the further ones with their defaults."""

    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module, count: int) -> Signature:
        """Of a module's forward, whose first ``count`` parameters are given."""
        parameters = list(inspect.signature(module.forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = [p.name for p in named[:count]]
        # Only what identity can tell apart.
        further = itertools.takewhile(lambda p: p.default is None or isinstance(p.default, bool), named[count:])
        return cls((*names, *[""] * (count - len(names))), tuple((p.name, p.default) for p in further))


def _forward_of(module: nn.Module, kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward that a module of class ``kind`` has while nobody but us has changed it."""
    rewired = isinstance(module, Fused) and type(module).original is kind
    return type(module).forward if rewired else kind.forward


def _inner(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def _beside(module: nn.Module, known: Sequence[str]) -> tuple[tuple[tuple[str, ...], type[nn.Module]], ...]:
    """The modules in ``module`` that the paths ``known`` do not hold, by path, with their classes; lists are never called."""
    return tuple(
        (tuple(path.split(".")), type(inner))
        for path, inner in module.named_modules()
        if path and not f"{path}.".startswith(tuple(f"{name}." for name in known)) and not isinstance(inner, nn.ModuleList)
    )


def _joined_forward(fused: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``fused`` under the name and the signature of ``original``; the forward of the class a module has now, once it was restored.

    A wrapper that was put around an accelerated module keeps its bound method (``accelerate.prepare``'s autocast, the hooks of
    its ``dispatch_model``, ``torch.compile(model.forward)``), and calls it after ``restore`` too.
    """

    # What a decorator keeps on a function, such as torch.compile's, is of that function alone.
    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Fused):
            return fused(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return forward


_joined: dict[tuple[type[Fused], type[nn.Module]], type[Fused]] = {}


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The subclass of ``original`` whose forward is ``mixin``'s; the same one for every module of that class."""
    if (mixin, original) not in _joined:
        names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        rewired = _joined_forward(mixin.forward, original.forward)
        compiler = _compiler_of(original.forward)
        forward = rewired if compiler is None else compiler(rewired)
        namespace = {**names, "mixin": mixin, "original": original, "rewired": rewired, "forward": forward}
        if hasattr(mixin, "streaming"):
            namespace["streaming"] = forward
        _joined[mixin, original] = type(original.__name__, (mixin, original), namespace)
        mixin.introduce(original, _joined[mixin, original])
    return _joined[mixin, original]


def _compiler_of(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """What makes a compiled function of another as ``@torch.compile`` made ``forward``, with the same settings; else None.

    torch keeps it in the closure of what it returns, and nowhere else.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or not inspect.isfunction(forward):
        return None
    context = inspect.getclosurevars(forward).nonlocals.get("self")
    return context if isinstance(context, dynamo.OptimizeContext) else None


def rebuild(mixin: type[Fused], original: type[nn.Module]) -> Fused:
    """An empty instance, for pickle and deepcopy to fill."""
    cls = fused_class(mixin, original)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Swap:
    """A module, by its path, that is to get the forward of ``mixin``, with what that forward needs to know."""

    path: str
    mixin: type[Fused]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def called(self) -> tuple[str, ...]:
        """The modules in it that the fused forward calls, by their paths."""
        return (*self.mixin.called, *self.settings.get(CALLED, ()))

    @property
    def read(self) -> tuple[str, ...]:
        """Those whose weights it reads."""
        return (*self.mixin.read, *self.settings.get(READ, ()))

    def under(self, prefix: str) -> Swap:
        """The same, seen from a module that holds this one at ``prefix``."""
        return Swap(".".join(filter(None, (prefix, self.path))), self.mixin, self.settings)


def rewire(root: nn.Module, swaps: Sequence[Swap]) -> None:
    """Carries out all swaps, or, if one fails, none."""
    with ExitStack() as undo:
        for swap in swaps:
            module = root.get_submodule(swap.path)
            if isinstance(module, Fused):  # it stands in several places of the model
                continue
            setattr(module, SETTINGS, {**swap.settings, _BESIDE: _beside(module, (*swap.called, *swap.read))})
            undo.callback(unwire, module)
            module.__class__ = fused_class(swap.mixin, type(module))
        undo.pop_all()


def changed_since(module: nn.Module) -> bool:
    """Whether somebody gave a rewired module a class of their own, derived from ours, which ``unwire`` would take away."""
    return isinstance(module, Fused) and "mixin" not in vars(type(module))


def unwire(module: nn.Module) -> None:
    """The module as it was written."""
    if isinstance(module, Fused):
        module.__class__ = type(module).original  # type: ignore[assignment]
    module.__dict__.pop(SETTINGS, None)
