"""What stands in the blocks of the docs runs: Python as it is, commands at toy size. A block ``sh parsed`` is only parsed.

``tests/test_docs.py`` parses every command, of either kind.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import ditkernels
from ditkernels import cli
from ditkernels.evaluation.features import Features
from tests.stand_ins import public
from tools import hub_kernel
from tools.tree import ROOT

PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/log.md"})]
KINDS = {"python", "sh", "sh parsed", "diff", "{toctree}", "{eval-rst}", ""}
RUN = """
data_path: digits
vae: none
image_size: 8
num_classes: 10
num_workers: 0
model: DiT-S/2
hidden_size: 16
depth: 1
num_heads: 2
steps: 2
global_batch_size: 4
device: cpu
sample_every: 0
"""
# The same lines at toy size: numbers that say how much, and what only a GPU or a file of somebody else has.
TOY = {
    r"--count \d+": "--count 4",
    r"--batch-size \d+": "--batch-size 2",
    r"--steps (250|50)\b": "--steps 2",
    r"--steps 2000\b": "--steps 3",
    r"(--data-path photos/.*)": r"\1 --steps 1 --global-batch-size 4 --num-workers 0 --hidden-size 16 --depth 1 --num-heads 2",
    r"steps=(400|50|20)\b": "steps=2",
    r'"hidden_size": 64': '"hidden_size": 16',
    r"input_size=32": "input_size=8",
    r"torch.randn\(2, 4, 32, 32\)": "torch.randn(2, 4, 8, 8)",
    r'"logsnr20"': '"logsnr2"',
    r"create_diffusion\(\"(250|50)\"\)": 'create_diffusion("2")',
    r"Inception\(weights\).cuda\(\)": "inception",
    r'\.to\("cuda"\)': "",
    r"\[207, 360\]": "[2, 7]",
    r"range\(1000\)": "range(10)",
    r"Batches\(5000, 64\)": "Batches(4, 2)",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(.*)\n((?:(?!```).*\n)*)```$", text, flags=re.MULTILINE)
    return [Block(match[1].strip(), match[2], text[: match.start()].count("\n") + 1) for match in found]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def toy(text: str) -> str:
    """The text at toy size."""
    for pattern, replacement in TOY.items():
        text = re.sub(pattern, replacement, text)
    return text


def colours(images: Tensor) -> Features:
    """Features of a few numbers, in the place of Inception's."""
    pool = images.float().flatten(1)[:, :2]
    return Features(pool=pool, spatial=pool, logits=pool)


class Decoder:
    """In the place of a VAE."""

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        return latents[:, :3]


def stand_ins(block: str) -> dict[str, Any]:
    """What the blocks of the docs take for granted."""
    torch.manual_seed(0)
    D = 32
    images = torch.randn(2, 4, 8, 8)
    tokens = torch.randn(2, 5, D)
    settings = {name: value for name, value in yaml.safe_load(RUN).items() if name != "data_path"}
    plain = public.DiT if "accelerate(" in block else ditkernels.DiT
    model = plain(input_size=8, hidden_size=D, depth=2, num_heads=2)
    return {
        "torch": torch,
        "ditkernels": ditkernels,
        "create_diffusion": ditkernels.create_diffusion,
        "model": model,
        "ema": ditkernels.DiT(input_size=8, patch_size=4, hidden_size=D, depth=1, num_heads=2, num_classes=10).eval(),
        "x": tokens if "branch" in block else images,
        "t": torch.tensor([10, 500]),
        "y": torch.tensor([3, 7]),
        "z": images,
        "labels": torch.tensor([3, 7]),
        "branch": torch.randn(2, 5, D),
        **{name: torch.randn(2, D) for name in ("gate", "shift", "scale")},
        "latents": images,
        "text": torch.tensor([3, 7]),
        "dataset": [(np.full((32, 32, 3), 20 * i, np.uint8), i % 2) for i in range(8)],
        "batches": [(torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([1, 2]))] * 2,
        "DiT_models": {
            name: lambda **size: public.DiT(hidden_size=D, depth=2, num_heads=2, **size) for name in ditkernels.DiT_models
        },
        "config": ditkernels.TrainConfig(**{**settings, "image_size": 32, "num_classes": 2, "results_dir": "own"}),
        "inception": colours,
        "vae": Decoder,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the docs take for granted on the disk: a run on digits, its samples, photos."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "examples").mkdir()
        (folder / "examples/digits.yaml").write_text(RUN, encoding="utf-8")
        for part, kind, number in ((p, k, n) for p in ("train", "val") for k in ("cat", "dog") for n in range(2)):
            file = folder / f"photos/{part}/{kind}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 50 + number).convert("RGB").save(file)
        for run in ("results/digits", "results/run"):
            assert cli.main(["train", "--config", "examples/digits.yaml", "--results-dir", run]) == 0
        hub_kernel.write(folder / "hub")
        (folder / "samples").mkdir()
        drawn = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        for file in (folder / "samples/samples.npz", folder / "reference.npz"):
            np.savez(file, drawn)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "python" for block in blocks_of(page))], ids=name_of)
def test_python_runs(page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a page writes is its own; what is taken for granted is there for all.
    for entry in place.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.kind == "python":
            names |= stand_ins(block.text)
            code = compile("\n" * block.line + toy(block.text), name_of(page), "exec")
            exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "sh" for block in blocks_of(page))], ids=name_of)
def test_commands_run(page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "photos"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    if "results/digits" in page.read_text(encoding="utf-8") and "digits.yaml" not in page.read_text(encoding="utf-8"):
        (tmp_path / "results").symlink_to(place / "results")
    for block in blocks_of(page):
        if block.kind == "sh":
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                program, *words = shlex.split(toy(line), comments=True)
                assert program == "ditkernels", f"{name_of(page)}: {line}"
                assert cli.main(words) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_kind(page: Path) -> None:
    assert {block.kind for block in blocks_of(page)} <= KINDS


def test_blocks_are_found() -> None:
    found = [block.kind for block in blocks_of(ROOT / "docs/how-to/resume.md")]
    assert found == ["sh", "sh parsed", "sh", "sh"]
    assert toy("ditkernels sample run --count 50000 --steps 250") == "ditkernels sample run --count 4 --steps 2"
