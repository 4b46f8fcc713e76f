"""One line to speed up a DiT that somebody else wrote: ``accelerate(model)``, and ``restore(model)`` to undo it.

public.py      facebookresearch/DiT, SiT, LightningDiT, and copies of them
diffusers.py   DiTTransformer2DModel of diffusers
parts.py       the fused forwards both share
proof.py       each part is run beside its own original forward before it is kept
refusals.py    what keeps a part as it was
plans.py       what planning a part comes to
watch.py       attributes that a forward reads, and whether they are what they were
same.py        which modules are equal, so that one proof holds for all
swap.py        rewiring by class, and back
report.py      what was fused, what was left and why
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import TextIO

from torch import nn

from ditkernels.accelerate import diffusers, public
from ditkernels.accelerate.refusals import refuse_wrapped
from ditkernels.accelerate.report import Part, Report
from ditkernels.accelerate.swap import Fused, Swap, rewire, unwire
from ditkernels.models import DiT

__all__ = ["Part", "Report", "accelerate", "restore"]

_FAMILIES: tuple[ModuleType, ...] = (public, diffusers)


def accelerate(model: nn.Module, *, file: TextIO | None = None) -> Report:
    """Rewires a live DiT in place, so that it runs the fused ops.

    Parameters, state dict and signatures stay; outputs and gradients agree to rounding. A part is recognised by its structure, then
    run beside its own forward on random weights and inputs, outputs and gradients, and kept only if they agree; where it would not
    (dropout, hooks, quantised weights, masks, another order of shift and scale), it stays as it was and the report says why. The
    model's weights, mode and the state of all generators are left alone; an error leaves the model as it was.

    Args:
        model: a DiT of facebookresearch/DiT, SiT, LightningDiT or diffusers, or a copy or fork of one, on its device and in its
            dtype; or a module that holds one, such as DDP's or a trainer's. Before FSDP and checkpoint wrappers.
        file: where the report is printed; by default on stdout.

    Returns:
        What was fused, and what was left and why.

    Raises:
        ValueError: no DiT was found, or the model is already wrapped in FSDP or checkpoint wrappers.
    """
    refuse_wrapped(model)
    report, swaps = _plan(model)
    rewire(model, swaps)
    print(report, file=file or sys.stdout)
    return report


def restore(model: nn.Module) -> None:
    """Puts everything back: each module computes, bit for bit, what it did before ``accelerate``.

    Raises:
        ValueError: the model was wrapped in FSDP or checkpoint wrappers since; nothing is changed.
    """
    refuse_wrapped(model)
    for module in list(model.modules()):
        unwire(module)


def _plan(model: nn.Module) -> tuple[Report, list[Swap]]:
    parts: list[Part] = []
    swaps: list[Swap] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, DiT):
            parts.append(Part(path, reason="it is ditkernels' own DiT, which runs the fused ops as it is"))
        for family, blocks in _families_of(module):
            if any(isinstance(inner, Fused) for inner in module.modules()):
                parts.append(Part(path, reason="it is accelerated already"))
                continue
            for part, found in family.plan(module, blocks):
                parts.append(replace(part, name=".".join(filter(None, (path, part.name)))))
                swaps.extend(swap.under(path) for swap in found)
    if not parts:
        raise ValueError(_nothing_found(model))
    return Report(type(model).__name__, tuple(parts)), swaps


def _families_of(module: nn.Module) -> list[tuple[ModuleType, str]]:
    """The families whose blocks the module holds in a list of its own, with the name of that list."""
    return [
        (family, name)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        for family in _FAMILIES
        if any(family.is_block(block) for block in child)
    ]


def _nothing_found(model: nn.Module) -> str:
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    sought = ", or ".join(family.SOUGHT for family in _FAMILIES)
    return f"accelerate: no DiT found in {type(model).__name__}: looked for {sought}; found {children or 'no submodules'}"
