"""A model as a folder: what goes in comes out, and what is no such folder is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ditkernels
from ditkernels import DiT
from ditkernels.pretrained import CONFIG, WEIGHTS, arguments_of

# Given by position, and none of them its default.
SIZES = ((8, 4), 2, 3, 48, 2, 3, 2.5, 0.0, 7, False)


def model_of(**options: Any) -> DiT:
    torch.manual_seed(0)
    model = DiT(*SIZES, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def outputs(model: DiT) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    return model.eval()(x, torch.tensor([3, 400]), torch.tensor([0, 6])).detach()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_a_model_comes_back_with_its_bits(conditioning: str, tmp_path: Path) -> None:
    model = model_of(conditioning=conditioning)
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    read = DiT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert arguments_of(read) == arguments_of(model)
    assert torch.equal(outputs(read), outputs(model))
    assert not read.training
    assert {n for n, p in read.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_dtypes_are_kept(tmp_path: Path) -> None:
    model = model_of().bfloat16()
    model.final_layer.float()
    model.save_pretrained(tmp_path)
    read = DiT.from_pretrained(tmp_path)
    assert {n: p.dtype for n, p in read.state_dict().items()} == {n: p.dtype for n, p in model.state_dict().items()}


def test_arguments_that_no_folder_holds_may_be_given(folder: Path) -> None:
    assert DiT.from_pretrained(folder, checkpointing="full").checkpointing == "full"
    with pytest.raises(ValueError, match=r"depth: got 3, but .*config.json says it"):
        DiT.from_pretrained(folder, depth=3)


def test_load_model_and_the_command_line_read_such_a_folder(folder: Path) -> None:
    loaded = ditkernels.load_model(folder)
    assert arguments_of(loaded.model) == arguments_of(model_of())
    assert torch.equal(outputs(loaded.model), outputs(model_of()))


def test_a_subclass_comes_back_as_one(folder: Path) -> None:
    class Mine(DiT):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine


def test_a_write_that_fails_leaves_no_folder_that_looks_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditkernels.files.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        model_of().save_pretrained(folder)
    assert not (folder / CONFIG).exists()


def test_what_is_no_plain_model_is_not_written(tmp_path: Path) -> None:
    model = model_of()
    model.blocks[0].attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks.0.attn.extra.bias is \(2,\), the model has not there"):
        model.save_pretrained(tmp_path / "none")
    with torch.device("meta"):
        empty = DiT(*SIZES)
    with pytest.raises(ValueError, match="is a tensor without data, allowed is an ordinary tensor"):
        empty.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= values
    (folder / CONFIG).write_text(json.dumps({n: v for n, v in config.items() if v is not ...}), encoding="utf-8")


def rewrite(folder: Path, **tensors: Any) -> None:
    state = load_file(folder / WEIGHTS) | tensors
    save_file({n: t for n, t in state.items() if t is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda f: change(f, _diffusers_version="0.42"),
            r"of diffusers: 'ditkernels convert .* OUT --to ditkernels'",
        ),
        (lambda f: change(f, _class_name="UNet"), r"_class_name: got 'UNet', allowed is 'DiT'"),
        (lambda f: change(f, width=3), r"got width, allowed are input_size, patch_size"),
        (lambda f: change(f, depth="two"), r"depth: got 'two', and \d+ tensors"),
        (lambda f: change(f, depth=10**9), r"depth: got 1000000000, and \d+ tensors"),
        (lambda f: change(f, num_heads=5), r"makes no model: hidden_size: got 48, which is no multiple of num_heads 5"),
        (lambda f: change(f, hidden_size=None), r"makes no model"),
        (lambda f: change(f, depth=1), r"blocks.1.adaLN_modulation.1.bias is \(288,\), the model has not there; .* more"),
        (lambda f: change(f, depth=...), r"blocks.10.adaLN_modulation.1.bias is not there, the model has \(288,\)"),
        (lambda f: rewrite(f, pos_embed=torch.zeros(1, 9, 48)), r"pos_embed is \(1, 9, 48\), the model has \(1, 8, 48\)"),
        (lambda f: rewrite(f, extra=torch.zeros(2)), r"extra is \(2,\), the model has not there"),
        (lambda f: rewrite(f, pos_embed=None), r"pos_embed is not there, the model has \(1, 8, 48\)"),
        (lambda f: (f / CONFIG).write_text("[]", encoding="utf-8"), r"config.json is damaged: it holds a list"),
        (lambda f: (f / CONFIG).write_text("{", encoding="utf-8"), r"config.json is damaged"),
        (lambda f: (f / CONFIG).unlink(), r"holds no config.json; load_model reads runs"),
        (lambda f: (f / WEIGHTS).unlink(), r"model.safetensors cannot be read"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), r"model.safetensors cannot be read"),
        (lambda f: shutil.rmtree(f), r"saved is no folder; nothing is downloaded: 'hf download"),
    ],
)
def test_what_is_no_such_folder_is_named(damage: Any, said: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=said):
        DiT.from_pretrained(folder)


def test_a_push_uploads_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            seen["made"] = (name, options)

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            seen["uploaded"] = sorted(path.name for path in Path(folder_path).iterdir())
            return f"hub/{repo_id}"

    hub = ModuleType("huggingface_hub")
    hub.HfApi = Api  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert model_of().push_to_hub("me/dit", private=True) == "hub/me/dit"
    assert seen == {"made": ("me/dit", {"private": True, "exist_ok": True}), "uploaded": [CONFIG, WEIGHTS]}
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace())
    with pytest.raises(ImportError, match="push_to_hub needs huggingface_hub"):
        model_of().push_to_hub("me/dit")
