"""`ditkernels flops` against the numbers of the paper, a closed form, and itself on other models."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from ditkernels import reference
from ditkernels.commands import flops as command
from ditkernels.diagnostics import flops
from ditkernels.models import count

# Parameters with the frozen position embedding.
EXACT_PARAMS = {
    "DiT-S/2": 32_963_360,
    "DiT-B/2": 130_512_416,
    "DiT-L/2": 458_102_816,
    "DiT-XL/2": 675_129_632,
}
TINY = {"input_size": (8, 4), "patch_size": 2, "hidden_size": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return flops.rows()


def closed_form(name: str, image_size: int) -> int:
    """Multiply-adds of an adaLN-Zero DiT: blocks, patch embedding, final layer, timestep MLP."""
    size, patch = name.removeprefix("DiT-").split("/")
    d, depth, p = reference.SIZES[size]["hidden_size"], reference.SIZES[size]["depth"], int(patch)
    tokens = (image_size // flops.LATENT_FACTOR // p) ** 2
    blocks = depth * (tokens * 12 * d * d + 2 * tokens**2 * d + 6 * d * d)
    embedding = tokens * p * p * 4 * d
    final = tokens * d * p * p * 2 * 4 + 2 * d * d
    timestep = 256 * d + d * d
    return blocks + embedding + final + timestep


def test_every_row_of_the_paper_is_there(rows):
    counted = {(row["model"], row["image_size"], row["conditioning"]) for row in rows}
    assert len(rows) == len(counted)
    assert {(name, 256, "adaln_zero") for name in reference.DiT_models} < counted
    assert {("DiT-XL/2", 256, conditioning) for conditioning in reference.CONDITIONINGS} < counted
    assert ("DiT-XL/2", 512, "adaln_zero") in counted


def test_gmacs_are_the_papers_gflops(rows):
    # Within 0.5%, or half of the last digit that is printed there.
    for row in rows:
        assert abs(row["gmacs"] - row["paper_gmacs"]) <= max(0.005 * row["paper_gmacs"], 0.005), row
        assert row["gflops"] == 2 * row["gmacs"]


def test_gmacs_are_the_closed_form(rows):
    checked = [row for row in rows if row["conditioning"] == "adaln_zero"]
    assert len(checked) == 13
    for row in checked:
        assert round(row["gmacs"] * 1e9) == closed_form(row["model"], row["image_size"])


def test_parameters(rows):
    small = {row["model"]: row["params"] for row in rows if (row["image_size"], row["conditioning"]) == (256, "adaln_zero")}
    assert {name: small[name] for name in EXACT_PARAMS} == EXACT_PARAMS
    for row in rows:
        if row["paper_params_millions"] is not None:
            assert abs(row["params"] / 1e6 - row["paper_params_millions"]) < 1, row


@pytest.mark.parametrize("conditioning", reference.CONDITIONINGS)
def test_a_model_that_exists_is_counted_where_it_lives(conditioning):
    model = reference.DiT(**TINY, conditioning=conditioning)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    counted = count(model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert counted == count(reference.DiT(**TINY, conditioning=conditioning))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("conditioning", reference.CONDITIONINGS)
@pytest.mark.parametrize("options", [{}, {"class_dropout_prob": 0.0}, {"learn_sigma": False, "in_channels": 3}])
def test_the_fused_model_counts_the_same(conditioning, options):
    models = pytest.importorskip("ditkernels.models")
    settings = {**TINY, **options, "conditioning": conditioning}
    assert count(models.DiT(**settings)) == count(reference.DiT(**settings))


def test_the_fused_xl_counts_the_same(rows):
    models = pytest.importorskip("ditkernels.models")
    published = next(p for p in flops.PAPER if p.model == "DiT-XL/2")
    expected = next(row for row in rows if row["model"] == "DiT-XL/2")
    assert flops._row(published, models.DiT_models["DiT-XL/2"]) == expected


def test_the_command_prints_json_and_a_table(rows, monkeypatch, capsys):
    monkeypatch.setattr(flops, "rows", lambda: rows)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--json"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == rows
    assert {"model", "image_size", "conditioning", "gmacs", "gflops", "params"} < set(printed[0])
    assert command.run(parser.parse_args([])) == 0
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("DiT-XL/2") and " 256 adaln_zero" in line)
    assert line.split()[3:] == ["675,129,632", "675M", "237.24", "118.62", "118.64"]
