"""`ditkernels demo`, end to end in small."""

import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from ditkernels import demo
from ditkernels.cli import main
from ditkernels.demo import pictures
from ditkernels.demo.pictures import Read
from ditkernels.reference import DiT
from ditkernels.training.trainer import train
from tests.helpers.runs import newest_checkpoint

SHORT = ("--device", "cpu", "--steps", "3", "--sampling-steps", "2")
PICTURES = ("samples.png", "loss.png")


@pytest.fixture(autouse=True)
def check(monkeypatch):
    """Stands in for the report of `ditkernels check`, which has its own tests and takes its time."""
    stand_in = types.SimpleNamespace(passes=True)

    def report(file):
        print("the report of the check", file=file)
        return stand_in.passes

    monkeypatch.setattr("ditkernels.diagnostics.check.report", report)
    # Three steps, three losses to draw.
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, log_every=1))
    return stand_in


def run(out, *flags):
    assert main(["demo", "--out", str(out), *SHORT, *flags]) == 0
    return out


def test_it_writes_pictures_metrics_and_a_checkpoint_and_says_so(tmp_path, capsys):
    out = run(tmp_path / "new" / "folder")
    shown = capsys.readouterr().out
    assert shown.startswith("the report of the check\n")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for name in ("guided_sample_accuracy", "real_accuracy"):
        assert 0 <= metrics[name] <= 1
        assert f"{name} {metrics[name]:.3f}" in shown
    assert metrics["real_accuracy"] > 0.97
    assert (metrics["training"]["steps"], metrics["sampling"]["steps"]) == (3, 2)
    for name in (*PICTURES, "metrics.json", "run"):
        assert f"wrote {out / name}" in shown
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_no_demo_has_made_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_text("precious", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path), *SHORT]) == 2
    assert f"{tmp_path / 'run'} was made by no demo and would be replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "weights"]


def test_a_demo_replaces_its_own_run(tmp_path):
    run(tmp_path)
    run(tmp_path, "--seed", "1")
    assert newest_checkpoint(tmp_path / "run").checkpoint.config["training"]["global_seed"] == 1


def test_the_checkpoint_makes_the_model_again(tmp_path):
    checkpoint = newest_checkpoint(run(tmp_path) / "run").checkpoint
    assert checkpoint.step == 3
    model = DiT(**checkpoint.config["model"])
    model.load_state_dict(checkpoint.model)
    model.load_state_dict(checkpoint.sampling_weights)
    assert not torch.equal(checkpoint.model["x_embedder.proj.weight"], checkpoint.ema["x_embedder.proj.weight"])


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path, monkeypatch):
    threads_in_training = []

    def spied_train(*args):
        threads_in_training.append(torch.get_num_threads())
        return train(*args)

    monkeypatch.setattr(demo, "train", spied_train)
    first = run(tmp_path / "a")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        second = run(tmp_path / "b")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert threads_in_training == [1, 1]
    other_seed = run(tmp_path / "c", "--seed", "1")
    metrics = json.loads((other_seed / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["training"]["global_seed"], metrics["sampling"]["seed"]) == (1, 1)
    for name in PICTURES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (other_seed / name).read_bytes()


def test_a_second_run_replaces_the_first(tmp_path):
    run(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    run(tmp_path, "--steps", "4")
    assert newest_checkpoint(tmp_path / "run").checkpoint.step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_nothing_is_trained_when_the_check_fails(tmp_path, capsys, check):
    check.passes = False
    assert main(["demo", "--out", str(tmp_path), *SHORT]) == 1
    assert "nothing is trained" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_missing_package_names_the_extra_before_anything_runs(tmp_path, monkeypatch, capsys, missing):
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else genuine(name, *rest))
    assert main(["demo", "--out", str(tmp_path / "out"), *SHORT]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"ditkernels: error: the demo needs {missing}: pip install ditkernels[demo]\n"
    assert shown.out == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--steps", "0"), "steps: got 0"),
        (("--seed", "-1"), "global_seed: got -1"),
        (("--guidance", "-2"), "guidance_scale: got -2"),
        (("--sampling-steps", "0"), "0"),
        (("--sampling-steps", "1001"), "1001"),
        (("--device", "toaster"), "--device: got 'toaster'"),
        (("--device", "meta"), "--device: got 'meta'"),
        (("--device", "cuda:99"), "--device: got 'cuda:99', but this machine has"),
    ],
)
def test_bad_flags_are_named_before_anything_runs(tmp_path, capsys, flags, message):
    assert main(["demo", "--out", str(tmp_path / "out"), *SHORT, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("ditkernels: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_file_in_the_way_of_out_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path / "out"), *SHORT]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_accuracy_counts_what_is_read_right_and_rows_follow_the_classes():
    labels = torch.tensor([1, 0, 1, 0] + list(range(2, 10)) * 2)
    images = torch.arange(len(labels)).float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    readings = labels.clone()
    readings[:5] = 9 - readings[:5]
    read = Read(images, labels, readings)
    assert read.accuracy == 0.75
    first = read.first_of_each_class(2)
    assert first.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert first.images[:4, 0, 0, 0].tolist() == [1, 3, 0, 2]
    assert first.readings[:4].tolist() == [9, 9, 8, 8]


def test_the_grid_lies_row_by_row():
    shades = torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])
    grid = pictures._grid(shades.reshape(6, 1, 1, 1).expand(6, 1, 8, 8), rows=2)
    cell = grid.shape[0] // 2
    assert grid.shape == (2 * cell, 3 * cell)
    centres = grid[cell // 2 :: cell, cell // 2 :: cell]
    assert torch.equal(torch.from_numpy(centres).flatten(), shades)


def test_importing_the_demo_is_light():
    code = (
        "import sys, ditkernels.demo, torch; "
        "assert not {'sklearn', 'matplotlib'} & set(sys.modules); assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_the_whole_demo_draws_digits_that_are_recognised(tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["guided_sample_accuracy"] >= 0.95
    assert metrics["real_accuracy"] >= 0.95
    assert metrics["training_seconds"] + metrics["sampling_seconds"] < 180
