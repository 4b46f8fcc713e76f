"""The three walks of docs/architecture.md, walked at toy size: calls go where the page says, and down."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ditkernels import TrainConfig, train
from ditkernels.cli import main
from tests.helpers.architecture import PACKAGE, PAGE, TIERS, module_of, room_of
from tests.helpers.native_cpu import needs_library
from tools.tree import ROOT

# What a lower room calls in a higher one, because it was handed it: the room that calls, and why it may.
CALLBACKS = {
    "models.py: DiT.__init__": ("reference", "a constructor of a size by its name makes the class it was made for"),
    "models.py: DiT.forward": ("reference", "guidance is written once, around the forward of whatever subclass"),
    "models.py: PatchEmbed.forward": ("reference", "the embedding runs the parts that a subclass names"),
    "training/start.py: find_start": ("runtime", "World.on_first calls the function it is given"),
    "training/trainer.py: train": ("runtime", "World.on_first calls the function it is given"),
    "sampling/denoiser.py: Denoiser.__call__": ("diffusion", "a step calls the model it is given"),
    "sampling/denoiser.py: _Unread.forward": ("reference", "the denoiser has put it in the place of an embedder"),
    "sampling/denoiser.py: _Rows.forward": ("models", "the denoiser has put it in the place of a linear of adaLN"),
}

# ---- The page --------------------------------------------------------------------------------------------------------

FUNCTION = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
HOP = re.compile(r"^(\d+)\. (Again )?`([\w/]+\.py: [\w.]+)`", flags=re.MULTILINE)


class Hop(NamedTuple):
    """A function that a walk calls; ``again``: it was called before, too."""

    name: str
    again: bool


def hops_of(heading: str) -> list[Hop]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    hops = HOP.findall(section)
    assert [int(number) for number, _, _ in hops] == list(range(1, len(hops) + 1)), f"{heading}: an item is missing"
    return [Hop(name, bool(again)) for _, again, name in hops]


def code_of(name: str) -> CodeType:
    """The code of a function "file: name", which that file defines."""
    file, _, path = name.partition(": ")
    found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module_of(file)))
    found = found.fget if isinstance(found, property) else found
    code: CodeType = inspect.unwrap(found).__code__
    assert code.co_filename == str(PACKAGE / file), f"{name} is defined in {code.co_filename}"
    return code


# ---- The walks -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of a function of the package; ``caller``: the nearest function of the package up the stack, if there is one."""

    caller: CodeType | None
    callee: CodeType


def recorded(walk: Callable[[], object]) -> list[Call]:
    """The calls of a walk in order, of its threads too."""
    prefix = f"{PACKAGE}/"
    # What an import calls, such as what serves names and old paths, is called by no function of the package.
    callers = (prefix, "<frozen importlib")
    calls: list[Call] = []

    def record(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        # The body of a module or of a class is no function.
        if event == "call" and code.co_filename.startswith(prefix) and code.co_flags & inspect.CO_OPTIMIZED:
            above = frame.f_back
            while above is not None and not above.f_code.co_filename.startswith(callers):
                above = above.f_back
            of_package = above is not None and above.f_code.co_filename.startswith(prefix)
            calls.append(Call(above.f_code if of_package else None, code))

    before, in_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(record)
    sys.setprofile(record)
    try:
        walk()
    finally:
        sys.setprofile(before)
        threading.setprofile(in_threads)  # type: ignore[arg-type]
    return calls


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A run on a folder of one image, made here if need be."""
    images = folder / "images/class"
    if not images.exists():
        images.mkdir(parents=True)
        Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)).save(images / "0.png")
    settings = {
        "data_path": str(images.parent),
        "image_size": 8,
        "num_classes": 2,
        "vae": "none",
        "results_dir": str(folder / "run"),
    }
    settings |= {"model": "DiT-S/4", "hidden_size": 32, "depth": 1, "num_heads": 2, "global_batch_size": 1, "num_workers": 0}
    return TrainConfig(**{**settings, "steps": 1, "optimizer": "torch", "device": "cpu", **changes})


def a_batch(folder: Path) -> None:
    train(config(folder))


def a_sample(folder: Path) -> None:
    # Of one class, since fewer images than classes would be noted by the command line's handler.
    flags = ["--out", str(folder), "--formats", "png", "--count", "1", "--batch-size", "1", "--steps", "2", "--device", "cpu"]
    flags += ["--classes", "0"]
    assert main(["sample", str(ROOT / "tests/earlier/run"), *flags]) == 0


def a_checkpoint(folder: Path) -> None:
    train(config(folder))
    train(config(folder, steps=2, resume="auto"))


WALKS = {
    "A training batch, from disk to the weights": a_batch,
    "A sample, from seed to PNG": a_sample,
    "A checkpoint, to disk and back": a_checkpoint,
}


@functools.cache
def calls_of(heading: str) -> list[Call]:
    with tempfile.TemporaryDirectory() as folder:
        return recorded(lambda: WALKS[heading](Path(folder)))


def file_of(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def with_inner(code: CodeType) -> set[CodeType]:
    """A function's code, and that of the functions inside it."""
    return {code}.union(*(with_inner(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def test_calls_go_down_but_for_what_a_lower_room_was_handed() -> None:
    names = {code: name for name in CALLBACKS for code in with_inner(code_of(name))}
    found: dict[str, set[str]] = {}
    for heading in WALKS:
        for caller, callee in calls_of(heading):
            if caller is not None and TIERS[room_of(file_of(callee))] > TIERS[room_of(file_of(caller))]:
                name = names.get(callee, f"{file_of(callee)}: {callee.co_name}")
                found.setdefault(name, set()).add(room_of(file_of(caller)))
    assert found == {name: {room} for name, (room, _) in CALLBACKS.items()}
    assert len(CALLBACKS) <= 8


@pytest.mark.parametrize(
    "heading", [pytest.param(heading, marks=needs_library) if walk is a_batch else heading for heading, walk in WALKS.items()]
)
def test_a_walk_calls_what_the_page_names_in_the_pages_order(heading: str) -> None:
    hops = hops_of(heading)
    assert len(hops) > 20
    calls = calls_of(heading)
    callees = [callee for _, callee in calls]
    start = at = callees.index(code_of(hops[0].name))
    passed: set[str] = set()
    for hop in hops:
        code = code_of(hop.name)
        assert code in callees[at:], f"{hop.name} is not called after the hops before it"
        first = callees.index(code, start)
        at = callees.index(code, at)
        assert hop.again == (first < at), f"{hop.name} is called {'for the first time' if first == at else 'earlier, too'}"
        caller = calls[at].caller
        passed.add(file_of(code))
        assert caller is None or at == start or file_of(caller) in passed, f"{hop.name}: the page leaves out {file_of(caller)}"


def test_every_function_that_the_page_names_exists() -> None:
    named = [": ".join(found) for found in FUNCTION.findall(PAGE)]
    assert len(named) > 90
    for name in named:
        code_of(name)
