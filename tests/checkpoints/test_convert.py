"""Checkpoints between the public layout, diffusers' and ours: lossless where accepted, refused by name where not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditkernels import reference
from ditkernels.checkpoints.convert import WARNING, convert, to_diffusers, to_public
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ditkernels.cli import main
from tests import numerics

State = dict[str, Tensor]
CONFIG = {"input_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 10}


def model(seed: int = 0) -> reference.DiT:
    torch.manual_seed(seed)
    dit = reference.DiT(**CONFIG).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return dit


def weights(seed: int = 0) -> State:
    return model(seed).state_dict()


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture
def public_pt(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "public.pt")
    return tmp_path / "public.pt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_gives_the_same_bits(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in weights().items()}
    assert equal(to_public(to_diffusers(state), (4, 4)), state)


def test_every_container_there_and_back(tmp_path: Path, public_pt: Path) -> None:
    steps = [
        ("public", "a.safetensors"),
        ("ditkernels", "b"),
        ("diffusers", "c"),
        ("public", "d.pt"),
        ("diffusers", "e.safetensors"),
        ("diffusers", "f"),
        ("ditkernels", "g"),
        ("public", "h.pth"),
    ]
    source = public_pt
    for layout, name in steps:
        convert(source, tmp_path / name, layout, num_heads=4, input_size=8)
        source = tmp_path / name
    assert equal(torch.load(source, weights_only=True), weights())
    assert equal(load_file(tmp_path / "a.safetensors"), weights())
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_weights_and_ema_travel_together(tmp_path: Path) -> None:
    args = argparse.Namespace(model="DiT-S/8", epochs=3)
    trained = {"model": weights(1), "ema": weights(2), "opt": {"state": {}}, "args": args}
    torch.save(trained, tmp_path / "trained.pt")
    convert(tmp_path / "trained.pt", tmp_path / "ours", "ditkernels")
    checkpoint = load_checkpoint(tmp_path / "ours")
    assert equal(dict(checkpoint.model), weights(1))
    assert equal(dict(checkpoint.ema or {}), weights(2))
    assert checkpoint.config == {"model": "DiT-S/8", "epochs": 3}
    said = convert(tmp_path / "ours", tmp_path / "again.pt", "public")
    with torch.serialization.safe_globals([argparse.Namespace]):
        again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert equal(again["model"], weights(1))
    assert equal(again["ema"], weights(2))
    assert again["args"] == args
    assert "optimizer" in said
    said = convert(tmp_path / "ours", tmp_path / "ema.safetensors", "public")
    assert equal(load_file(tmp_path / "ema.safetensors"), weights(2))
    assert "written: the EMA's weights" in said


def test_diffusers_reads_what_is_written_and_computes_the_same(tmp_path: Path, public_pt: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    said = convert(public_pt, tmp_path / "hf", "diffusers", num_heads=4)
    assert WARNING in said
    assert "downscale_freq_shift = 0" in said
    assert "norm_eps=1e-6" in said
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "hf").eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 10])
    ours = model()
    exact = ours.double()(x.double(), t, y)
    low = ours.float()(x, t, y)
    numerics.assert_model_contract(theirs(x, t, y).sample, low, exact)


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=5
    )
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(first)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "public.safetensors", "public")
    convert(tmp_path / "public.safetensors", tmp_path / "back.safetensors", "diffusers")
    assert equal(load_file(tmp_path / "back.safetensors"), dict(theirs.state_dict()))


def test_embedders_that_drifted_apart_are_refused_by_name() -> None:
    state = to_diffusers(weights())
    state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"][3] += 1e-7
    with pytest.raises(
        CheckpointError,
        match=r"transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias has drifted from block 0's",
    ):
        to_public(state, (4, 4))


def test_every_key_is_accounted_for() -> None:
    state = weights()
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.1.attn.q_norm.weight"] = torch.ones(12)
    with pytest.raises(
        CheckpointError,
        match=r"lacks blocks.1.mlp.fc1.bias and has blocks.1.attn.q_norm.weight besides",
    ):
        to_diffusers(state)
    theirs = to_diffusers(weights())
    del theirs["transformer_blocks.0.attn1.to_q.bias"]
    with pytest.raises(CheckpointError, match=r"lacks transformer_blocks.0.attn1.to_q.bias"):
        to_public(theirs, (4, 4))


@pytest.mark.parametrize("layout", ["public", "ditkernels"])
def test_a_copy_in_the_same_layout_is_checked_too(tmp_path: Path, layout: str) -> None:
    state = weights()
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="has extra besides"):
        convert(tmp_path / "odd.pt", tmp_path / ("out.pt" if layout == "public" else "out"), layout)
    assert [p.name for p in tmp_path.iterdir()] == ["odd.pt"]


def test_learned_positions_are_refused() -> None:
    state = weights()
    state["pos_embed"] = state["pos_embed"] + 1e-6
    with pytest.raises(CheckpointError, match="not the fixed sine-cosine positions"):
        to_diffusers(state)
    state["pos_embed"] = torch.zeros(1, 12, 48)
    with pytest.raises(CheckpointError, match="square images only"):
        to_diffusers(state)


def test_nothing_is_executed(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="was not loaded"):
        convert(tmp_path / "evil.pt", tmp_path / "out", "ditkernels")


def test_what_is_no_dit_is_named(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"neither blocks.N.attn.qkv.*but conv.weight"):
        convert(tmp_path / "unet.safetensors", tmp_path / "out", "ditkernels")
    (tmp_path / "cut.safetensors").write_bytes(b"123456789")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        convert(tmp_path / "cut.safetensors", tmp_path / "out", "ditkernels")


def test_an_existing_target_stays(tmp_path: Path, public_pt: Path) -> None:
    target = tmp_path / "there.safetensors"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists already; nothing was written"):
        convert(public_pt, target, "public")
    assert target.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name, layout", [("out.safetensors", "public"), ("out.pt", "public"), ("out", "diffusers")])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, public_pt: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    from ditkernels.checkpoints import convert as module

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_tensors", full)
    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        convert(public_pt, tmp_path / name, layout, num_heads=4)
    assert [p.name for p in tmp_path.iterdir()] == ["public.pt"]


def test_sizes_that_no_file_says(tmp_path: Path, public_pt: Path) -> None:
    with pytest.raises(CheckpointError, match=r"num_heads: got None for 48 channels; give --num-heads"):
        convert(public_pt, tmp_path / "hf", "diffusers")
    convert(public_pt, tmp_path / "hf.safetensors", "diffusers")
    with pytest.raises(CheckpointError, match="give --input-size"):
        convert(tmp_path / "hf.safetensors", tmp_path / "back.pt", "public")
    with pytest.raises(CheckpointError, match="input_size: got 7, which is no multiple of the patch size"):
        convert(tmp_path / "hf.safetensors", tmp_path / "back.pt", "public", input_size=7)
    with pytest.raises(CheckpointError, match=r"out.bin: allowed are .pt, .pth and .safetensors"):
        convert(public_pt, tmp_path / "out.bin", "public")


def test_the_command(tmp_path: Path, public_pt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "hf"
    assert main(["convert", str(public_pt), str(target), "--to", "diffusers", "--num-heads", "4"]) == 0
    assert "norm3, 1e-5 by default" in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["norm_eps"] == 1e-6
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "x"), "--to", "ditkernels"]) == 2
    assert capsys.readouterr().err.startswith("ditkernels: error: ")


def test_our_own_steps_survive(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours", Checkpoint(weights(), step=7, config={"a": 1}))
    convert(tmp_path / "ours", tmp_path / "copy", "ditkernels")
    assert load_checkpoint(tmp_path / "copy").step == 7
