"""What the parts of diffusers' models that are known by their class have in common: how they are called, proven and found again.

A part closes its residuals itself: it takes and returns tensors, as its original does. Every layer in it that is no norm is called
as the original calls it; attention processors, rotary positions, guidance and caching stay the library's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ditkernels import ops, reference
from ditkernels.accelerate import parts, proof
from ditkernels.accelerate.example import Calls, flat
from ditkernels.accelerate.parts import Kind, Stream
from ditkernels.accelerate.plans import Planned, joined, proven
from ditkernels.accelerate.refusals import Refused, refuse_intercepted, refuse_random
from ditkernels.accelerate.swap import CALLED, READ, Fused, Swap
from ditkernels.models import watched

TOKENS, CONTEXT = 7, 5
"""How many tokens a trial gives a part, and how many of text."""

NORMS, NAMES, DEFAULTS, REST = "norms", "names", "defaults", "rest"
"""Settings: the kinds of the norms by path; the parameters of the original's forward, in order; those that have a default, with it;
whether it takes further ones and ignores them."""

ANY_WIDTH = 8
"""What a norm is tried on that takes any width."""

Paths = tuple[str, ...]
"""Of modules in a part."""

Given = Mapping[str, Any]
"""The arguments of a call, by the names that the original's forward has for them."""


class ByClass(Fused):
    """A part that is known by its class.

    Attributes:
        norms: the norms whose weights it reads, by path; one that is missing or an Identity is none.
        probed: children that a trial replaces by a ``Probe``: what they compute is the library's own, and they are called.
        joint: those of them that return both of the streams they are given.
        fuses: the ops it runs.
    """

    norms: ClassVar[Paths] = ()
    probed: ClassVar[Paths] = ()
    joint: ClassVar[Paths] = ()
    fuses: ClassVar[Paths] = ("modulate_norm",)

    if TYPE_CHECKING:  # the layers and attributes of the original

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, *args: Any, **options: Any) -> Any:
        given = self._given(args, options)
        if given is None or not self.fits(given) or not self.unchanged():
            return self.as_written(*args, **options)
        return self.fused(given)

    @classmethod
    def norms_of(cls, part: Any) -> Paths:
        """``norms`` as ``part`` has them."""
        return cls.norms

    def fits(self, given: Given) -> bool:
        """Whether the ops take a call: tokens in rows of (B, N, D), and vectors of samples."""
        raise NotImplementedError

    def fused(self, given: Given) -> Any:
        """What the original's forward returns."""
        raise NotImplementedError

    @classmethod
    def applies(cls, part: Any) -> bool:
        """Whether a module of the class is of the kind that this stands for, where a class has several."""
        return True

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        """Random arguments of a call of ``part``."""
        raise NotImplementedError

    def _given(self, args: tuple[Any, ...], options: Given) -> dict[str, Any] | None:
        """The arguments by name; None where the original would not take them."""
        settings = self._ditkernels
        names, defaults = settings[NAMES], settings[DEFAULTS]
        given = {**defaults, **dict(zip(names, args)), **options}
        complete = len(given) == len(names) and len(args) + len(options) <= len(names)
        if not settings[REST]:
            return given if complete and all(name in given for name in names) else None
        return given if all(name in given for name in names) else None

    @classmethod
    def introduce(cls, original: type[nn.Module], fused: type[nn.Module]) -> None:
        register(original, fused)

    # ---- Norms and residuals

    def has(self, path: str) -> bool:
        """Whether there is a norm at ``path``."""
        return path in self._ditkernels[NORMS]

    def normed(self, stream: Stream, path: str, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Closes the open residual of ``stream``; returns the new x and its norm, modulated by (B, D) vectors."""
        return parts.normed(stream, self.get_submodule(path), self._ditkernels[NORMS][path], shift, scale)

    def closed(self, stream: Stream) -> Tensor:
        """The residual stream with nothing left to add."""
        return parts.plain(stream)


class Keeping(ByClass):
    """A part whose sums and norms are of x's dtype whatever the vectors' is: fp32 inside, and stored as x is."""

    def normed(self, stream: Stream, path: str, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, kind = self.get_submodule(path), self._ditkernels[NORMS][path]
        if watched(norm, kind.found_on.forward):
            x = self.closed(stream)
            return x, reference.modulate(norm(x.float()), shift, scale).to(x.dtype)
        x, branch, gate, _ = stream
        arguments = {**parts.norm_arguments(norm, kind), "out_dtype": x.dtype}
        if branch is None:
            return x, ops.modulate_norm(x, shift, scale, **arguments)
        return ops.gated_residual_norm(x, branch, gate, shift, scale, **arguments)

    def closed(self, stream: Stream) -> Tensor:
        x, branch, gate, _ = stream
        return x if branch is None else ops.gated_residual(x, branch, gate)


def rows_and_vectors(x: Any, *vectors: Any) -> bool:
    """Whether the ops take these: (B, N, D) and, each, (B, D)."""
    return isinstance(x, Tensor) and all(parts.fits(x, vector) for vector in vectors)


def in_range(x: Tensor) -> Tensor:
    """x; in fp16 with what has overflowed at the largest numbers there are."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# ---- Planning --------------------------------------------------------------------------------------------------------


def plan_part(part: Any, mixin: type[ByClass], calls: Calls) -> Planned:
    """The plan of one part of a class in the table."""
    refuse_intercepted(part)
    refuse_random(part)
    kinds = dict(_kinds(part, mixin))
    settings: dict[str, Any] = {
        NORMS: kinds,
        READ: tuple(kinds),
        CALLED: tuple(called_in(part, tuple(kinds))),
        **parameters_of(part),
    }
    names = settings[NAMES]

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), mixin.drawn(part, draw)

    stand_ins = {id(child): probe for child, probe in _probes(part, mixin)}
    swap = Swap("", mixin, settings)
    return mixin.fuses, proven(part, [swap], calls.inputs(part, guess, names), stand_ins, tokens=TOKENS)


def _kinds(part: nn.Module, mixin: type[ByClass]) -> Iterator[tuple[str, Kind]]:
    for path in mixin.norms_of(part):
        norm = at(part, path)
        if norm is not None and not isinstance(norm, nn.Identity):
            yield path, parts.kind_of_norm(path, norm, width_of(path, norm) or ANY_WIDTH)


def at(part: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, if there is one."""
    found: Any = part
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def width_of(path: str, norm: Any) -> int:
    """How many channels a norm takes; 0 where it takes any."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None) or getattr(norm, "weight", torch.empty(0)).shape
    if len(shape) != 1:
        raise Refused(f"{path} is {type(norm).__name__}, which does not say how many channels it takes")
    return int(shape[0])


def called_in(part: nn.Module, read: tuple[str, ...], prefix: str = "") -> Iterator[str]:
    """The modules that are called: all but the norms, and what holds these."""
    for name, child in part.named_children():
        path = joined(prefix, name)
        if any(norm.startswith(f"{path}.") for norm in read):
            yield from called_in(child, read, path)
        elif path not in read:
            yield path


def parameters_of(part: nn.Module) -> dict[str, Any]:
    """What the original's forward takes."""
    parameters = inspect.signature(part.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    return {NAMES: tuple(p.name for p in named), DEFAULTS: defaults, REST: len(named) < len(parameters)}


def _probes(part: nn.Module, mixin: type[ByClass]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for path in mixin.probed:
        child = at(part, path)
        if child is not None:
            yield child, Probe(child, path in mixin.joint)


class Probe(nn.Module):
    """Stands in for a layer that is called while a part is proven: cheap, and telling every argument from every other.

    Each token's result depends on its place, and on all tensors that are given, each by its name. So it shows whether the layer was
    given what the original gives it, in the same order of tokens, and whether its results went where they go there.
    """

    def __init__(self, child: nn.Module, joint: bool) -> None:
        super().__init__()
        self.signature = inspect.signature(child.forward)
        self.joint = joint

    def forward(self, *args: Any, **options: Any) -> Any:
        given = dict(sorted(flat(self.signature.bind(*args, **options))))
        first = next(iter(self.signature.parameters))
        x = given.pop(first)
        seen = [x, *proof.tensors_in(list(given.values()))]
        mixed = sum(self._summary(value, x, place) for place, value in enumerate(seen))
        others = [value for name, value in given.items() if "encoder_hidden_states" in name and value is not None]
        if self.joint and others:
            return self._result(x, mixed), self._result(others[0], mixed + 1)
        return self._result(x, mixed)

    def _summary(self, value: Tensor, x: Tensor, place: int) -> Any:
        value = value.to(x.dtype) if not value.is_complex() else value.real.to(x.dtype)
        of_samples = value.dim() > 1 and value.shape[0] == x.shape[0]
        mean = torch.cos(value + place).flatten(1).mean(1) if of_samples else torch.cos(value + place).mean()
        return mean.reshape(-1, *[1] * (x.dim() - 1))

    def _result(self, x: Tensor, mixed: Any) -> Tensor:
        places = torch.linspace(1, 2, x.shape[1], device=x.device, dtype=x.dtype)
        return torch.tanh(x * places.reshape(-1, *[1] * (x.dim() - 2)) + mixed)


# ---- Where diffusers looks for the class of a block ------------------------------------------------------------------


def register(original: type[nn.Module], fused: type[nn.Module]) -> None:
    """Has diffusers' caches and layer skip find a rewired block, which they look up by its exact class."""
    if not original.__module__.startswith("diffusers."):
        return
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        metadata = TransformerBlockRegistry.get(original)
    except (ImportError, ValueError):  # a release without such caches, or a block that none knows
        return
    TransformerBlockRegistry.register(fused, dataclasses.replace(metadata))
