"""Weights that other programs wrote: each row of docs/checkpoints.md, by every way in, and no end but a named error."""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import types
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ditkernels
from ditkernels import TrainConfig, load_model
from ditkernels.checkpoints.convert import convert
from ditkernels.checkpoints.foreign import read_foreign
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint, state_sha256
from ditkernels.checkpoints.layouts import sincos_grid, to_diffusers
from ditkernels.checkpoints.run import Run, checkpoint_directory, resolve
from ditkernels.cli import main
from ditkernels.reference import DiT, sincos_positions
from ditkernels.runtime import World
from ditkernels.training.finetune import fitted
from ditkernels.training.start import find_start
from tools.tree import ROOT

State = dict[str, Tensor]
SHAPE: dict[str, Any] = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def dit(seed: int = 0, **changed: Any) -> DiT:
    torch.manual_seed(seed)
    model = DiT(**SHAPE | changed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def weights(seed: int = 0, **changed: Any) -> State:
    return dit(seed, **changed).state_dict()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def halved(dtype: torch.dtype, state: State) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def saved(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def averaged_model() -> State:
    average = torch.optim.swa_utils.AveragedModel(dit(1))
    average.update_parameters(dit(1))
    return average.state_dict()


def in_pieces(folder: Path, suffix: str, state: State) -> Path:
    folder.mkdir()
    names = list(state)
    files = {name: f"model-{1 + index % 2:05d}-of-00002{suffix}" for index, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: state[name] for name in names if files[name] == file}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / f"model{suffix}.index.json").write_text(index, encoding="utf-8")
    return folder


def of_diffusers(folder: Path, *, config: bool = True) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in to_diffusers(weights(1)).items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    if config:
        content = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "sample_size": 4, "num_embeds_ada_norm": 3}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def pipeline(folder: Path, inside: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}', encoding="utf-8")
    of_diffusers(folder / inside)
    return folder


def ours(folder: Path) -> Path:
    save_checkpoint(folder, Checkpoint(weights(0), weights(1), 5, {"model": {"num_heads": 2, "num_classes": 3}}))
    return folder


def pretrained(folder: Path) -> Path:
    model = ditkernels.DiT(**SHAPE)
    model.load_state_dict(weights(1))
    model.save_pretrained(folder)
    return folder


def learned(**changed: Any) -> State:
    state = weights(1, **changed)
    return state | {"pos_embed": torch.randn(state["pos_embed"].shape)}


def wrapped_blocks(state: State) -> State:
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._orig_mod._checkpoint_wrapped_module.", name): v for name, v in state.items()}


ARGS = {
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "tags": {"b", "a"},
    "out": Path("runs/x"),
    "was": PureWindowsPath("c:/x"),
}
PLAIN_ARGS = {"device": "cpu", "dtype": "torch.bfloat16", "tags": ["a", "b"], "out": "runs/x", "was": "c:\\x"}

# What is read: what makes it in a folder, whatever stands in it beside the second weights, and the flags that it needs.
READ: dict[str, Callable[[Path], Path]] = {
    "a run": lambda at: ours(checkpoint_directory(at / "run", 5)).parents[1],
    "a folder of `save_pretrained`": lambda at: pretrained(at / "saved"),
    "a checkpoint of ours": lambda at: ours(at / "ours"),
    "`.pt`: a state dict": lambda at: saved(at / "a.pt", weights(1)),
    "`.pt`: {model, ema, opt, args}": lambda at: saved(
        at / "a.pt",
        {"model": weights(0), "ema": weights(1), "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2", num_classes=3)},
    ),
    "`.pt`: {ema}": lambda at: saved(at / "a.pt", {"ema": weights(1)}),
    "`.pt`: {model, args}": lambda at: saved(at / "a.pt", {"model": weights(1), "args": {"epochs": 3}}),
    "`.ckpt`: {state_dict}": lambda at: saved(
        at / "a.ckpt", {"state_dict": prefixed("model.", weights(0)) | prefixed("ema_model.", weights(1)), "epoch": 1}
    ),
    "`.pt`: an AveragedModel": lambda at: saved(at / "a.pt", averaged_model()),
    "`.pt`: stacked prefixes": lambda at: saved(at / "a.pt", prefixed("module.model._orig_mod.", weights(1))),
    "`.pt`: a prefix in the EMA alone": lambda at: saved(
        at / "a.pt", {"model": weights(0), "ema": prefixed("ema_model.module.", weights(1))}
    ),
    "`.pt`: wrapped blocks": lambda at: saved(at / "a.pt", wrapped_blocks(weights(1))),
    "`.pt`: bf16": lambda at: saved(at / "a.pt", halved(torch.bfloat16, weights(1))),
    "`.pt`: args of other kinds": lambda at: saved(at / "a.pt", {"ema": weights(1), "args": argparse.Namespace(**ARGS)}),
    "`.safetensors`": lambda at: (save_file(weights(1), at / "a.safetensors"), at / "a.safetensors")[1],
    "pieces with a `.safetensors.index.json`": lambda at: in_pieces(at / "a", ".safetensors", weights(1)),
    "pieces with a `.bin.index.json`": lambda at: in_pieces(at / "a", ".bin", weights(1)) / "model.bin.index.json",
    "a folder with one `.bin`": lambda at: saved(at / "a" / "pytorch_model.bin", weights(1)).parent,
    "diffusers' transformer": lambda at: of_diffusers(at / "a"),
    "diffusers' pipeline": lambda at: pipeline(at / "a", "transformer"),
    "a grid of 4 x 16": lambda at: saved(at / "a.pt", halved(torch.float16, weights(1, input_size=(8, 32)))),
    "learned positions": lambda at: saved(at / "a.pt", learned(input_size=(8, 32))),
    "no null class, by args": lambda at: saved(
        at / "a.pt", {"ema": weights(1, class_dropout_prob=0.0), "args": {"class_dropout_prob": 0.0}}
    ),
    "no null class, by flag": lambda at: saved(at / "a.pt", weights(1, class_dropout_prob=0.0)),
}
CHANGED: dict[str, dict[str, Any]] = {
    "a grid of 4 x 16": {"input_size": (8, 32)},
    "learned positions": {"input_size": (8, 32)},
    "no null class, by args": {"class_dropout_prob": 0.0},
    "no null class, by flag": {"class_dropout_prob": 0.0},
}
TOLD: dict[str, dict[str, Any]] = {
    "learned positions": {"input_size": (8, 32)},
    "no null class, by flag": {"null_class": False},
}
ROUNDED = {"`.pt`: bf16": torch.bfloat16, "a grid of 4 x 16": torch.float16}


class Custom:
    pass


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an object that is no plain value": (
        lambda at: saved(at / "a.pt", {"model": weights(), "args": Custom()}),
        r"a\.pt was not loaded, because of an object of \S*Custom in it",
    ),
    "a tensor of int8": (
        lambda at: saved(at / "a.pt", weights() | {"pos_embed": torch.zeros(1, 4, 16, dtype=torch.int8)}),
        r"a\.pt holds pos_embed as torch\.int8",
    ),
    "a state dict of something else": (
        lambda at: saved(at / "a.pt", {"conv.weight": torch.ones(2)}),
        r"it has neither blocks\.N.* but conv\.weight",
    ),
    "several files of weights": (
        lambda at: saved(saved(at / "a" / "b.pt", weights()).with_name("c.pt"), weights()).parent,
        r"a holds several weights, of which one must be named: b\.pt, c\.pt",
    ),
    "a pipeline without a transformer": (
        lambda at: pipeline(at / "a", "dit"),
        r"it is a pipeline without a transformer; a folder in it with weights is dit",
    ),
    "an index whose piece lacks a tensor": (
        lambda at: saved(in_pieces(at / "a", ".bin", weights()) / "model-00001-of-00002.bin", {"x": torch.ones(1)}).parent,
        r"model-00001-of-00002\.bin lacks \S+, which model\.bin\.index\.json says is in it",
    ),
    "learned positions of no square": (
        lambda at: saved(at / "a.pt", learned(input_size=(4, 6))),
        r"input_size: unknown for learned positions of 6 tokens|does not fit the model: pos_embed \(1, 6, 16\)",
    ),
    "diffusers' weights without a config": (
        lambda at: of_diffusers(at / "a", config=False),
        "input_size: diffusers stores no positions, and there is no config.json; give --input-size",
    ),
    "a name that stands there twice": (
        lambda at: saved(at / "a.pt", {"ema": weights() | prefixed("module.", weights())}),
        r"a\.pt holds pos_embed twice, once as module\.pos_embed",
    ),
}


def expected(row: str) -> State:
    found = learned(**CHANGED[row]) if row == "learned positions" else weights(1, **CHANGED.get(row, {}))
    return halved(torch.float32, halved(ROUNDED[row], found)) if row in ROUNDED else found


def of_init(path: Path, folder: Path, *, null_class: bool = True, **changed: Any) -> State:
    config = TrainConfig(init_from=str(path), results_dir=str(folder / "results"), null_class=null_class)
    start = find_start(config, Run(config.results_dir), World())
    own = types.SimpleNamespace(model={"num_classes": 3, "num_heads": start.given.heads}, classes=3, names={}, latent_space=None)
    return fitted(start.given, weights(9, **changed), own, config).weights


def of_sample(path: Path, folder: Path, told: dict[str, Any]) -> int:
    flags = ["--num-heads", "2", "--steps", "2", "--count", "1", "--batch-size", "1", "--formats", "latents", "--cfg-scale", "1"]
    if "input_size" in told:
        flags += ["--input-size", "8,32"]
    if "null_class" in told:
        flags += ["--no-null-class"]
    return main(["sample", str(path), "--out", str(folder / "samples"), "--device", "cpu", *flags])


def same(found: Any, state: State) -> bool:
    return found.keys() == state.keys() and all(
        found[name].dtype == v.dtype and torch.equal(found[name], v) for name, v in state.items()
    )


def rows_of(heading: str) -> set[str]:
    section = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")} - {"file or folder", "---"}


def test_each_row_of_the_page_is_tried() -> None:
    assert rows_of("What is read") == set(READ)
    assert rows_of("What is refused") == set(REFUSED)


@pytest.mark.parametrize("row", READ)
def test_every_way_in_reads_the_same_tensors(row: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path, told, state = READ[row](tmp_path), TOLD.get(row, {}), expected(row)
    loaded = load_model(path, num_heads=2, **told)
    assert same(loaded.model.state_dict(), state)
    assert loaded.model.input_size == CHANGED.get(row, {}).get("input_size", (4, 4))
    assert loaded.model.num_classes == 3
    positions = {} if row == "learned positions" else {"pos_embed": weights(9, **CHANGED.get(row, {}))["pos_embed"]}
    null_class = {name: value for name, value in told.items() if name == "null_class"}
    assert same(of_init(path, tmp_path, **null_class, **CHANGED.get(row, {})), state | positions)
    assert of_sample(path, tmp_path, told) == 0
    described = json.loads((tmp_path / "samples/metadata.json").read_text(encoding="utf-8"))
    assert described["checkpoint"]["sha256"] == state_sha256(state)
    convert(path, tmp_path / "converted", "ditkernels", num_heads=2, **told)
    assert same(load_checkpoint(tmp_path / "converted").sampling_weights, state)
    again = load_model(tmp_path / "converted")
    assert (again.digest, again.model.input_size, again.model.num_classes) == (
        loaded.digest,
        loaded.model.input_size,
        loaded.model.num_classes,
    )


@pytest.mark.parametrize("row", REFUSED)
def test_every_way_in_refuses_in_the_same_words(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[row]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(path, num_heads=2)
    with pytest.raises(ValueError, match=message):
        of_init(path, tmp_path)
    assert of_sample(path, tmp_path, {}) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "converted", "diffusers", num_heads=2)
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "converted").exists()


# ---- Beside the table ------------------------------------------------------------------------------------------------


def test_args_of_other_kinds_become_json_values(tmp_path: Path) -> None:
    path = READ["`.pt`: args of other kinds"](tmp_path)
    assert read_foreign(path).config == PLAIN_ARGS


def test_an_average_alone_has_no_raw_weights_and_a_run_without_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a moving average alone"):
        load_model(saved(tmp_path / "ema.pt", {"ema": weights()}), weights="raw", num_heads=2)
    trained = {"model": weights(), "args": argparse.Namespace(model="DiT-S/2")}
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_model(saved(tmp_path / "run.pt", trained), num_heads=2)


def test_an_average_is_checked_as_the_model_is(tmp_path: Path) -> None:
    broken = weights(1)
    del broken["blocks.1.mlp.fc1.bias"]
    path = saved(tmp_path / "a.pt", {"model": weights(0), "ema": broken})
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.mlp\.fc1\.bias"):
        convert(path, tmp_path / "out", "ditkernels")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        load_model(path, num_heads=2)


def test_a_checkpoint_of_ours_without_its_manifest_is_not_read_as_somebody_elses(tmp_path: Path) -> None:
    folder = ours(tmp_path / "ours")
    (folder / "manifest.json").unlink()
    for path in folder.glob("ema-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is not there"):
        resolve(folder)


def test_what_nothing_tells_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_model(saved(tmp_path / "a.pt", learned()), num_heads=2)
    assert "its 4 rows of labels are read as 3 classes and the null class; --no-null-class" in caplog.text
    assert "positions are learned: their 4 tokens are read as 2 x 2; --input-size" in caplog.text
    caplog.clear()
    load_model(READ["no null class, by args"](tmp_path), num_heads=2)
    load_model(ours(tmp_path / "ours"))
    assert not caplog.text


@pytest.mark.parametrize(
    "content, told, message",
    [
        (
            {"ema": weights(), "args": {"num_classes": 3}},
            {"null_class": False},
            "no_null_class: got it, but the checkpoint records 3",
        ),
        (weights(), {"input_size": (2, 8)}, "input_size: got 2 x 8, but the checkpoint holds positions of 4 x 4"),
        (learned(), {"input_size": 16}, "input_size: got 16 x 16, but the checkpoint holds 4 tokens"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(content: Any, told: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(saved(tmp_path / "a.pt", content), num_heads=2, **told)


def test_guidance_of_a_model_without_a_null_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = READ["no null class, by flag"](tmp_path)
    flags = ["--num-heads", "2", "--no-null-class", "--cfg-scale", "2", "--device", "cpu", "--formats", "latents"]
    assert main(["sample", str(path), "--out", str(tmp_path / "o"), *flags]) == 2
    assert "guidance_scale: got 2.0, allowed is 1: the model has no null class" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="has no null class, and diffusers' layout has a row for it"):
        convert(path, tmp_path / "hf", "diffusers", num_heads=2, null_class=False)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (4, 16), (16, 4), (8, 8), (1, 64), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_of_sines_and_cosines_tells_its_grid(grid: tuple[int, int], dtype: torch.dtype) -> None:
    table = sincos_positions(32, grid).unsqueeze(0).to(dtype)
    assert sincos_grid(table) == grid
    assert sincos_grid(table + 0.01) is None


def test_a_non_square_model_is_refused_by_name_where_diffusers_is_asked_for(tmp_path: Path) -> None:
    path = READ["a grid of 4 x 16"](tmp_path)
    with pytest.raises(CheckpointError, match="positions of a grid of 4 x 16 tokens; diffusers knows square images only"):
        convert(path, tmp_path / "hf", "diffusers", num_heads=2)


def test_a_model_of_the_meta_device_is_whole_once_it_is_initialised() -> None:
    for conditioning in ("adaln_zero", "cross_attention"):
        with torch.device("meta"):
            model = DiT(**SHAPE, conditioning=conditioning)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(3)
        model.initialize_weights()
        torch.manual_seed(3)
        twin = DiT(**SHAPE, conditioning=conditioning)
        twin_again = nn.Module.state_dict(twin)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        assert torch.equal(model.pos_embed, twin_again["pos_embed"])


# ---- Damage ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ours": lambda at: ours(at / "a"),
    "public": READ["`.pt`: {model, ema, opt, args}"],
    "legacy": lambda at: (torch.save(weights(1), at / "a.pt", _use_new_zipfile_serialization=False), at / "a.pt")[1],
    "safetensors": READ["`.safetensors`"],
    "safetensors in pieces": READ["pieces with a `.safetensors.index.json`"],
    "bin in pieces": lambda at: in_pieces(at / "a", ".bin", weights(1)),
    "diffusers": READ["diffusers' transformer"],
}


def corrupted(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes written over, a piece cut out or the end cut off; most of it where names and sizes stand."""
    changed = bytearray(content)
    within = len(changed) if chance.random() < 0.3 else min(len(changed), 4096)
    kind, at = chance.randrange(4), chance.randrange(within)
    if chance.random() < 0.3:
        at = len(changed) - 1 - at
    if kind == 0:
        for _ in range(chance.choice((1, 8))):
            changed[min(len(changed) - 1, at + chance.randrange(64))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        changed[at : at + 4] = chance.randbytes(4)
    elif kind == 2:
        del changed[at : at + chance.randrange(1, 64)]
    else:
        del changed[at:]
    return bytes(changed)


def break_and_read(layout: str, folder: Path, count: int) -> int:
    """How many of ``count`` corruptions were refused; whatever else is raised escapes."""
    path = LAYOUTS[layout](folder)
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    chance = random.Random(layout)
    refused = 0
    for _ in range(count):
        victim = chance.choice(files)
        whole = victim.read_bytes()
        victim.write_bytes(corrupted(whole, chance))
        try:
            load_model(path, num_heads=2)
        except ValueError:
            refused += 1
        victim.write_bytes(whole)
    load_model(path, num_heads=2)
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_checkpoint_ends_in_a_named_error(layout: str, tmp_path: Path) -> None:
    assert break_and_read(layout, tmp_path, 20) > 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_hundred_damages_end_in_named_errors(layout: str, tmp_path: Path) -> None:
    assert break_and_read(layout, tmp_path, 500) > 100
