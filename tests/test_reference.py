"""The specification itself: sizes, keys, initialisation, guidance and its errors, against facts stated elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from ditkernels import models, reference
from ditkernels.reference import DiT

SMALL = {"input_size": (4, 6), "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


def inputs(size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(size, 4, 4, 6), torch.arange(size), torch.arange(size)


def randomised(**config: object) -> DiT:
    model = DiT(**{**SMALL, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def test_the_public_state_dict() -> None:
    block = [f"attn.{n}.{k}" for n in ("qkv", "proj") for k in ("weight", "bias")]
    block += [f"mlp.{n}.{k}" for n in ("fc1", "fc2") for k in ("weight", "bias")]
    block += ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    expected = {
        "pos_embed",
        "y_embedder.embedding_table.weight",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
    }
    expected |= {f"t_embedder.mlp.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    expected |= {f"blocks.{i}.{n}" for i in range(2) for n in block}
    expected |= {f"final_layer.{n}.{k}" for n in ("linear", "adaLN_modulation.1") for k in ("weight", "bias")}
    state = DiT(**SMALL).state_dict()
    assert set(state) == expected
    assert state["y_embedder.embedding_table.weight"].shape == (6, 48)
    assert DiT(**SMALL, class_dropout_prob=0).y_embedder.embedding_table.weight.shape == (5, 48)


def test_a_fresh_model_returns_exactly_zero_and_is_xavier_inside() -> None:
    torch.manual_seed(0)
    model = DiT(**SMALL)
    assert not model(*inputs()).any()
    limit = math.sqrt(6 / (48 + 3 * 48))
    qkv = model.blocks[0].attn.qkv.weight
    assert limit * 0.95 < qkv.abs().max() <= limit
    patch = model.x_embedder.proj.weight
    assert math.sqrt(6 / (16 + 48)) * 0.9 < patch.abs().max() <= math.sqrt(6 / (16 + 48))
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.pos_embed.requires_grad


def test_positions_encode_the_column_first() -> None:
    positions = reference.sincos_positions(8, (2, 3))
    assert positions.shape == (6, 8)
    row, column = 1, 2
    got = positions[row * 3 + column]
    omega = [1.0, 0.01]
    encode = lambda n: [f(n * w) for f in (math.sin, math.cos) for w in omega]  # noqa: E731
    assert torch.allclose(got, torch.tensor([*encode(column), *encode(row)]), rtol=0, atol=torch.finfo(torch.float32).eps)


def test_timestep_frequencies_are_cosines_first_over_half() -> None:
    got = reference.timestep_frequencies(torch.tensor([3]), 4)[0]
    want = [math.cos(3), math.cos(3 / 100), math.sin(3), math.sin(3 / 100)]
    assert torch.allclose(got, torch.tensor(want), rtol=0, atol=2 * torch.finfo(torch.float32).eps)


def test_unpatchify_orders_row_column_channel() -> None:
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = torch.empty(2, 6, 12)
    for h in range(2):
        for w in range(3):
            for p in range(2):
                for q in range(2):
                    for o in range(3):
                        tokens[:, h * 3 + w, (p * 2 + q) * 3 + o] = image[:, o, 2 * h + p, 2 * w + q]
    assert torch.equal(reference.unpatchify(tokens, grid=(2, 3), patch_size=2), image)


@pytest.mark.parametrize("conditioning", reference.CONDITIONINGS)
def test_every_input_reaches_the_output(conditioning: str) -> None:
    model = randomised(conditioning=conditioning)
    x, t, y = inputs()
    base = model(x, t, y)
    assert base.shape == (4, 8, 4, 6)
    for changed in ((x + 1, t, y), (x, t + 300, y), (x, t, (y + 1) % 6)):
        difference = (model(*changed) - base).abs().flatten(1).amax(1)
        assert (difference > 1e-4).all()


def test_samples_do_not_mix() -> None:
    model = randomised()
    x, t, y = inputs()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model(x[order], t[order], y[order]), model(x, t, y)[order], atol=1e-5)


def test_label_dropout_only_in_training() -> None:
    embedder = reference.LabelEmbedder(5, 8, 0.25)
    labels = torch.zeros(20000, dtype=torch.int64)
    torch.manual_seed(0)
    null = embedder.embedding_table.weight[5]
    dropped = (embedder(labels) == null).all(1).float().mean().item()
    three_sigma = 3 * math.sqrt(0.25 * 0.75 / 20000)
    assert abs(dropped - 0.25) < three_sigma
    assert not (embedder.eval()(labels) == null).all(1).any()


def test_guidance_identities() -> None:
    model = randomised()
    x, t, _ = inputs()
    x, t = torch.cat([x[:2], x[:2]]), torch.cat([t[:2], t[:2]])
    y = torch.tensor([1, 2, 5, 5])
    plain = model(x, t, y)
    cond, uncond = plain.chunk(2)
    for scale, expected in ((1.0, cond), (0.0, uncond)):
        guided = model.forward_with_cfg(x, t, y, scale)
        for half in guided.chunk(2):
            assert torch.allclose(half[:, :3], expected[:, :3], atol=1e-5)
        assert torch.equal(guided[:, 3:], plain[:, 3:])
    everything = model.forward_with_cfg(x, t, y, 2.0, guided_channels=None)
    assert torch.allclose(everything[:2, :4], 2 * cond[:, :4] - uncond[:, :4], atol=1e-4)
    assert torch.equal(everything[:, 4:], plain[:, 4:])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"input_size": 5}, "input_size: got 5 x 5, which is not a positive multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size: got 48, which is no multiple of num_heads 5"),
        (
            {"hidden_size": 6, "num_heads": 1},
            "hidden_size: got 6; sine-cosine positions need a multiple of 4",
        ),
        (
            {"conditioning": "film"},
            "conditioning: got 'film', allowed are adaln_zero, adaln, cross_attention, in_context",
        ),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: got 1.5"),
        ({"num_classes": 0}, "num_classes: got 0"),
    ],
)
def test_bad_configurations(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiT(**{**SMALL, **change})


def test_bad_inputs() -> None:
    model = DiT(**SMALL)
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"x: got shape \(4, 4, 6, 4\), expected \(B, 4, 4, 6\)"):
        model(x.transpose(2, 3), t, y)
    with pytest.raises(ValueError, match=r"t: got shape \(3,\), expected \(4,\)"):
        model(x, t[:3], y)
    with pytest.raises(ValueError, match=r"y: got label 6, allowed are 0\.\.5"):
        model(x, t, y + 3)
    with pytest.raises(ValueError, match=r"y: got label -1, allowed are 0\.\.5"):
        model(x, t, y - 1)
    with pytest.raises(TypeError, match=r"y: got dtype torch\.float32"):
        model(x, t, y.float())
    with pytest.raises(ValueError, match="x: got a batch of 3"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 2.0)
    with pytest.raises(ValueError, match="guided_channels: got 0"):
        model.forward_with_cfg(x, t, y, 2.0, guided_channels=0)


@pytest.mark.parametrize("model_class", [DiT, models.DiT])
def test_timesteps_that_round_are_refused_by_their_dtype(model_class):
    model = model_class(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3).eval()
    x, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 2])
    t = torch.tensor([3, 999])
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        model(x, t.to(dtype), y)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"t: got dtype {dtype}, which rounds timesteps; allowed are integers"):
            model(x, t.to(dtype), y)
        with pytest.raises(TypeError, match="which rounds timesteps"):
            torch.export.export(model, (x, t.to(dtype), y))
