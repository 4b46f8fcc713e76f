"""The config: strict about types and values, the same from flags and from YAML."""

import argparse
import dataclasses
import re

import pytest

from ditkernels.cli import main
from ditkernels.options import EXECUTION, FREE, IDENTITY, RECIPE, add_flags, differences, from_flags, names_of
from ditkernels.training.config import TrainConfig
from tools.tree import ROOT


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    return from_flags(TrainConfig, parser.parse_args(list(flags)))


def test_the_defaults_are_the_papers():
    found = TrainConfig()
    assert (found.learning_rate, found.global_batch_size, found.ema_decay) == (1e-4, 256, 0.9999)
    assert (found.weight_decay, found.label_dropout, found.lr_schedule) == (0.0, 0.1, "constant")
    assert found.warmup_steps == 0
    assert found.grad_clip is None


def test_every_field_is_a_flag_and_says_what_it_is():
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    shown = " ".join(parser.format_help().split())
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in shown
        assert field.metadata["text"].split(";")[0].split()[0] in shown


def test_flags_have_the_types_of_their_fields():
    found = parsed("--steps", "7", "--learning-rate", "3e-4", "--compile", "--no-flip", "--grad-clip", "1")
    assert (found.steps, found.learning_rate, found.compile, found.flip) == (7, 3e-4, True, False)
    assert (found.grad_clip, type(found.grad_clip)) == (1.0, float)


def test_a_file_sets_what_flags_do_not(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-3\nsteps: 5\ncompile: true\ngrad_clip: null\nvae: mse\n", encoding="utf-8"
    )
    found = parsed("--config", str(tmp_path / "run.yaml"), "--steps", "9")
    assert (found.learning_rate, found.steps, found.compile, found.grad_clip, found.vae) == (
        1e-3,
        9,
        True,
        None,
        "mse",
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1\nstep: 2\n", r"unknown learning_rat, step; allowed are data_path, "),
        ("steps: '5'\n", "steps: got '5', allowed is a whole number"),
        ("steps: 5.0\n", "steps: got 5.0, allowed is a whole number"),
        ("steps: true\n", "steps: got True, allowed is a whole number"),
        ("learning_rate: fast\n", "learning_rate: got 'fast', allowed is a number"),
        ("compile: 1\n", "compile: got 1, allowed is true or false"),
        ("model: 3\n", "model: got 3, allowed is a string"),
        ("precision: fp8\n", "precision: got 'fp8', allowed are auto, bf16, fp16, tf32, fp32"),
        ("- a\n- b\n", "got list, allowed is a mapping"),
        ("a: [1\n", "is no YAML"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("epochs", 0),
        ("global_batch_size", 0),
        ("accumulation", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("grad_clip", 0.0),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("label_dropout", 1.0),
        ("label_dropout", -0.5),
        ("global_seed", -1),
        ("global_seed", 2**64),
        ("num_workers", -1),
        ("keep_last", 0),
        ("ckpt_every", 0),
        ("log_every", 0),
        ("warmup_steps", -1),
        ("num_classes", 0),
        ("max_skipped", -1),
        ("peak_tflops", -1.0),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        TrainConfig(**{name: value})


def test_what_excludes_each_other_is_refused():
    with pytest.raises(ValueError, match="accumulation: got 3, which does not divide global_batch_size 256"):
        TrainConfig(accumulation=3)
    with pytest.raises(ValueError, match="init_from: got one beside"):
        TrainConfig(resume="some/folder", init_from="some/weights.pt")
    with pytest.raises(ValueError, match=r"model: got 'DiT-M/2', allowed are DiT-XL/2"):
        TrainConfig(model="DiT-M/2")


def test_differences_are_told_by_what_they_mean_for_a_run_that_goes_on():
    there = dataclasses.asdict(TrainConfig(global_seed=1, learning_rate=1.0, accumulation=2, log_every=5))
    found = differences(there, TrainConfig(global_seed=2, learning_rate=2.0, accumulation=4, log_every=9))
    assert {role: [str(change) for change in changes] for role, changes in found.items()} == {
        IDENTITY: ["global_seed: 1 there, 2 here"],
        RECIPE: ["learning_rate: 1.0 there, 2.0 here"],
        EXECUTION: ["accumulation: 2 there, 4 here"],
        FREE: ["log_every: 5 there, 9 here"],
    }
    assert not any(differences(there, TrainConfig(**there)).values())


def test_a_record_from_before_a_field_was_there_had_what_was_done_then():
    older = dataclasses.asdict(TrainConfig(data_path="digits"))
    del older["optimizer"]
    assert not any(differences(older, TrainConfig(data_path="digits", optimizer="torch")).values())
    (change,) = differences(older, TrainConfig(data_path="digits", optimizer="fused"))[EXECUTION]
    assert str(change) == "optimizer: 'torch' there, 'fused' here"


def test_an_earlier_records_auto_is_no_difference():
    older = dataclasses.asdict(TrainConfig())
    assert older["precision"] == older["optimizer"] == "auto"
    assert not any(differences(older, TrainConfig(precision="bf16", optimizer="fused", device="cpu")).values())


def test_every_setting_is_in_one_class_and_the_page_lists_it_there():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    section = page.split("\n## Settings that may change\n")[1].split("\n## ")[0]
    rows = {match[1]: re.findall(r"`(\w+)`", match[2]) for match in re.finditer(r"^\| \*(\w+)\* \|(.*?)\|", section, re.MULTILINE)}
    assert {role: sorted(names) for role, names in rows.items()} == {
        role: sorted(names_of(TrainConfig, role)) for role in (IDENTITY, RECIPE, EXECUTION, FREE)
    }


def test_only_the_recipe_can_be_overridden():
    assert TrainConfig(override="learning_rate, steps").overridden == {"learning_rate", "steps"}
    with pytest.raises(ValueError, match=r"override: got model, precision, allowed are global_batch_size, "):
        TrainConfig(override="model,learning_rate,precision")


def test_the_example_is_a_config():
    found = parsed("--config", str(ROOT / "examples/digits.yaml"))
    assert found.data_path == "digits"
