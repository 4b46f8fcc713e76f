"""One line to speed up a DiT that somebody else wrote: ``accelerate(model)``, and ``restore(model)`` to undo it.

public.py      facebookresearch/DiT, SiT, LightningDiT, and copies of them
diffusers/     DiTTransformer2DModel of diffusers by its structure, its other transformers by their classes
recorded/      other blocks, by what they compute in a call of them
parts.py       the fused forwards that families share
pipelines.py   a diffusion pipeline in place of a model
proof.py       each part is run beside its own original forward before it is kept
refusals.py    what keeps a part as it was
plans.py       what planning a part comes to
example.py     what each part is given in a call of the model
watch.py       attributes that a forward reads, and whether they are what they were
same.py        which modules are equal, so that one proof holds for all
swap.py        rewiring by class, and back
report.py      what was fused, what was left and why
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, TextIO

from torch import nn

from ditkernels.accelerate import public
from ditkernels.accelerate.diffusers import dit
from ditkernels.accelerate.diffusers.block import plan_part
from ditkernels.accelerate.diffusers.table import known
from ditkernels.accelerate.example import Arguments, Calls, captured
from ditkernels.accelerate.pipelines import models_in
from ditkernels.accelerate.plans import Found, Once, Planned, found
from ditkernels.accelerate.recorded.exact import plan_exact
from ditkernels.accelerate.recorded.part import WITHOUT_SITES, is_candidate, plan_recorded
from ditkernels.accelerate.refusals import Refused, attempted, refuse_wrapped
from ditkernels.accelerate.report import EXACTLY, Part, Report
from ditkernels.accelerate.swap import Fused, Swap, changed_since, rewire, unwire
from ditkernels.models import DiT

__all__ = ["Part", "Report", "accelerate", "restore"]

_FAMILIES: tuple[ModuleType, ...] = (public, dit)


def accelerate(model: Any, *, example: Arguments | None = None, exact: bool = False, file: TextIO | None = None) -> Report:
    """Rewires a live DiT, or those of a diffusion pipeline, in place, so that it runs the fused ops.

    Parameters, state dict and signatures stay; outputs and gradients agree to rounding. A part is recognised by its structure, then
    run beside its own forward on random weights and inputs, outputs and gradients, and kept only if they agree; where it would not
    (dropout, hooks, quantised weights, masks, another order of shift and scale), it stays as it was and the report says why. The
    model's weights, mode and the state of all generators are left alone. Whatever a trial raises, KeyboardInterrupt apart, is the
    reason of a refusal; nothing is rewired before all of the report stands, and nothing by a call that raises.

    Args:
        model: a DiT of facebookresearch/DiT, SiT, LightningDiT or diffusers, or a copy or fork of one, on its device and in its
            dtype; or a module that holds one, such as DDP's or a trainer's. Before FSDP and checkpoint wrappers. Or a pipeline of
            diffusers, all of whose transformers are rewired.
        example: (args, kwargs) of a call of the model, for one whose inputs cannot be guessed: text in the place of labels, real
            timesteps, images of a size that it does not tell. The model runs on it once, without gradients, and trials are drawn
            like what each part was given: real numbers anew, in their shapes; integers, booleans and everything else as they were.
        exact: whether outputs keep their bits. Then only the modulation behind the model's own norms and the gates with their
            residuals are fused, where a trial on this device gives the bits of the original, and only without gradients; under
            gradients, autocast and ``torch.compile`` the original runs. Needs an ``example``.
        file: where the report is printed; by default on stdout.

    Returns:
        What was fused, and what was left and why.

    Raises:
        ValueError: no DiT was found; the model is already wrapped in FSDP or checkpoint wrappers; it does not run on ``example``,
            or that was given for a pipeline; ``exact`` came without one.
        TypeError: ``model`` is neither a module nor a pipeline.
    """
    root = models_in(model)
    if example is not None and root is not model:
        raise ValueError("accelerate: an example is a call of one model; give that model in place of its pipeline")
    if exact and example is None:
        raise ValueError("accelerate: exact=True came without an example; example=(args, kwargs) of a call shows what is computed")
    refuse_wrapped(root)
    calls = Calls() if example is None else captured(root, example)
    report, swaps = (_plan_exact if exact else _plan)(root, type(model).__name__, calls)
    print(report, file=file or sys.stdout)
    rewire(root, swaps)
    return report


def restore(model: Any) -> None:
    """Puts everything back: each module computes, bit for bit, what it did before ``accelerate``.

    Also inside wrappers that were put around the model or its parts since: DDP, ``torch.compile``, ``accelerate.prepare``,
    checkpoint wrappers. These stay, and run the restored forward.

    Raises:
        ValueError: a module got another class since, as FSDP2 and parametrizations give it; nothing is changed.
    """
    modules = list(models_in(model).named_modules())
    for name, module in modules:
        if changed_since(module):
            raise ValueError(
                f"restore: {name or 'the model'} was made a {type(module).__name__} since it was accelerated, as FSDP2 and "
                "parametrizations do, and would lose that; undo it first, or restore before it"
            )
    for _, module in modules:
        unwire(module)


def _plan(model: nn.Module, name: str, calls: Calls) -> tuple[Report, list[Swap]]:
    parts: list[Part] = []
    swaps: list[Swap] = []
    claimed: set[int] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, DiT):
            parts.append(Part(path, reason="it is ditkernels' own DiT, which runs the fused ops as it is"))
            continue
        for family, lists in _families_of(module):
            claimed.update(map(id, module.modules()))
            if any(isinstance(inner, Fused) for inner in module.modules()):
                parts.append(Part(path, reason="it is accelerated already"))
                continue
            for part, of_part in _planned(family, module, lists, calls):
                parts.append(replace(part, name=".".join(filter(None, (path, part.name)))))
                swaps.extend(swap.under(path) for swap in of_part)
    for part, found_swaps in _by_class(model, claimed, calls):
        parts.append(part)
        swaps.extend(found_swaps)
    parts, more = _by_what_they_compute(model, parts, {swap.path for swap in swaps}, calls, plan_recorded)
    swaps.extend(more)
    if not parts:
        raise ValueError(_nothing_found(model, name))
    return Report(name, tuple(parts)), swaps


def _plan_exact(model: nn.Module, name: str, calls: Calls) -> tuple[Report, list[Swap]]:
    parts, swaps = _by_what_they_compute(model, [], (), calls, plan_exact)
    if not parts:
        raise ValueError(f"accelerate: nothing that exact=True fuses was found in {name}: no modulation, no gate with a residual")
    return Report(name, tuple(parts), EXACTLY), swaps


def _by_class(model: nn.Module, claimed: Collection[int], calls: Calls) -> Iterator[Found]:
    """The parts that are known by their class, but for those in a model of which a family has taken care."""
    once = Once(calls)
    for path, module in list(model.named_modules()):
        mixin = None if id(module) in claimed else known(module)
        if mixin is None:
            continue
        if isinstance(module, Fused):
            yield Part(path, reason="it is accelerated already"), []
            continue
        attempt = partial(plan_part, module, mixin, calls)
        yield from once.planned(path, module, lambda name, attempt=attempt: [found(name, attempt)])  # type: ignore[misc]


def _by_what_they_compute(
    model: nn.Module, parts: list[Part], fused: Collection[str], calls: Calls, plan: Callable[[Any, Calls], Planned]
) -> tuple[list[Part], list[Swap]]:
    """``parts`` with those that are left in them fused, and further ones, as far as a call of them shows what they compute."""
    named = {part.name: part for part in parts}
    swaps: list[Swap] = []
    once = Once(calls)
    for path, module in list(model.named_modules()):
        if path in fused or not is_candidate(module, calls):
            continue
        attempt = partial(plan, module, calls)
        for part, found_swaps in once.planned(path, module, lambda name, attempt=attempt: [found(name, attempt)]):  # type: ignore[misc]
            if part.fused or (path and part.reason != WITHOUT_SITES and not _known(path, named)):
                named[path] = part
            swaps.extend(found_swaps)
    return list(named.values()), swaps


def _known(path: str, named: Collection[str]) -> bool:
    """Whether the report has a module, or one that holds it."""
    return any(name and f"{path}.".startswith(f"{name}.") for name in named)


def _planned(family: ModuleType, module: nn.Module, lists: list[str], calls: Calls) -> list[Found]:
    """The parts of ``module``, up to one that cannot be looked at."""
    entries: list[Found] = []
    try:
        attempted("the rest cannot be read", lambda: entries.extend(family.plan(module, lists, calls)))
    except Refused as refused:
        entries.append((Part("", reason=str(refused)), []))
    return entries


def _families_of(module: nn.Module) -> list[tuple[ModuleType, list[str]]]:
    """The families whose blocks the module holds in lists of its own, with the names of these lists."""
    lists = [(name, child) for name, child in module.named_children() if isinstance(child, nn.ModuleList)]
    of_family = [(family, [name for name, child in lists if any(map(family.is_block, child))]) for family in _FAMILIES]
    return [(family, names) for family, names in of_family if names]


def _nothing_found(model: nn.Module, name: str) -> str:
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    sought = ", or ".join(family.SOUGHT for family in _FAMILIES)
    sought += ", or blocks and norms of diffusers' transformers"
    hint = "example=(args, kwargs) of a call shows what other blocks compute"
    return f"accelerate: no DiT found in {name}: looked for {sought}; found {children or 'no submodules'}; {hint}"
