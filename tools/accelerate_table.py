"""Writes the table of diffusers' transformers into docs/accelerate.md, from trials: ``python -m tools.accelerate_table``.

Each class is built tiny with random weights, run, accelerated, run and restored.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels import accelerate, restore
from tools.accelerate_sites import Sites, fused
from tools.diffusers_models import MODELS, Inputs, Tiny
from tools.tree import ROOT

PAGE = ROOT / "docs/accelerate.md"
BEGIN, END = "<!-- table: python -m tools.accelerate_table -->\n", "<!-- end of table -->"
HEAD = "| class | sites fused of sites | error | what is left, and why |\n|---|---|---|---|\n"

_LAST = "the last norm, which the model modulates itself"
LEFT = {
    **dict.fromkeys(("PixArt", "Latte", "Allegro", "Wan", "SkyReelsV2", "ChronoEdit", "LTXVideo", "AceStep"), _LAST),
    **dict.fromkeys(("CogVideoX", "ConsisID", "EasyAnimate"), "a norm in front of the last one, without modulation"),
    "JoyImageEdit": "the last norm, without modulation",
    "MotifVideo": "the sum of two branches in the parallel blocks",
    "WanVACE": f"{_LAST}; the sum of the first control block with the stream",
}
"""By the beginning of a class's name, the longest that fits."""


ELSEWHERE = {"DiTTransformer2DModel": "known by its structure"}
"""Classes that are fused otherwise, and tested by themselves."""


def table() -> str:
    """The whole table, a row for each class that diffusers exports and for each variant tried."""
    from diffusers.models import transformers

    rows = {name: [] for name in sorted(dir(transformers)) if name[0].isupper()}
    for title, tiny in MODELS.items():
        rows[tiny.name].append(_row(title, tiny))
    return HEAD + "".join(
        row for name, tried in rows.items() for row in tried or [f"| {name} | {ELSEWHERE.get(name, 'not tried')} | | |\n"]
    )


def _row(title: str, tiny: Tiny) -> str:
    model, arguments = tiny.make(), tiny.call(Inputs(2))
    with torch.no_grad():
        want = _first(model(**arguments))
        with Sites(model) as sites:
            model(**arguments)
        report = accelerate(model, file=io.StringIO())
        with fused() as ran:
            got = _first(model(**arguments))
        restore(model)
        if not torch.equal(_first(model(**arguments)), want):
            raise AssertionError(f"{title}: restore() did not bring the bits back")
    error = (got - want).abs().max() / want.abs().max()
    left = [f"{part.name}: {part.reason}" for part in report.left]
    reason = "; ".join(left or [why_left(tiny.name)] if ran["sites"] < sites.count else [])
    return f"| {title} | {ran['sites']} of {sites.count} | {error:.0e} | {reason} |\n"


def why_left(name: str) -> str:
    fitting = [prefix for prefix in LEFT if name.startswith(prefix)]
    return LEFT[max(fitting, key=len)]


def _first(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = next(iter(result.values() if isinstance(result, dict) else result))
    return result


def write(page: Path = PAGE) -> None:
    """Puts the table in the place of the one that stands on the page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    page.write_text(pattern.sub(lambda _: BEGIN + table() + END, text), encoding="utf-8")


if __name__ == "__main__":
    write()
