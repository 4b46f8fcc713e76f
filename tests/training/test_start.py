"""What a run takes from its data, its record and its machine before it starts, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ditkernels.checkpoints.run import LOG
from ditkernels.cli import main
from ditkernels.data.folder import ImageFolder
from ditkernels.models import CHECKPOINTING, DiT
from ditkernels.runtime import World
from ditkernels.training import memory
from ditkernels.training.config import TrainConfig
from ditkernels.training.memory import expect, kept_for_backward, memory_of
from ditkernels.training.trainer import train
from tests.helpers.runs import newest_checkpoint
from tests.training.test_trainer import config, run, small_model, some_data

CPU = torch.device("cpu")
DIGITS = {"data_path": "digits", "vae": "none", "hidden_size": 16, "depth": 1, "num_heads": 2, "model": "DiT-S/2"}
QUICK = {"global_batch_size": 4, "num_workers": 0, "device": "cpu", "steps": 1}


# ---- From the data ---------------------------------------------------------------------------------------------------


def images(root, *classes):
    from PIL import Image

    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((9, 9, 3), 20 * number, np.uint8)).save(root / name / f"{number}.png")
    return root


def test_classes_and_size_are_the_datas_where_nothing_is_said(tmp_path):
    result = train(TrainConfig(**DIGITS, **QUICK, results_dir=str(tmp_path / "run")))
    assert (result.model.num_classes, result.model.input_size) == (10, (8, 8))
    recorded = newest_checkpoint(tmp_path / "run").checkpoint.config["training"]
    assert (recorded["num_classes"], recorded["image_size"]) == (10, 8)
    images(tmp_path / "data", "a", "b")
    mine = {**DIGITS, **QUICK, "data_path": str(tmp_path / "data"), "image_size": 8}
    assert train(TrainConfig(**mine, results_dir=str(tmp_path / "folder"))).model.num_classes == 2


def test_a_run_goes_on_with_the_number_of_classes_that_it_began_with(tmp_path):
    settings = {**DIGITS, **QUICK, "results_dir": str(tmp_path / "run")}
    train(TrainConfig(**settings, num_classes=12))
    assert train(TrainConfig(**{**settings, "steps": 2}, resume="auto")).model.num_classes == 12


def test_fewer_classes_than_the_data_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_classes: got 9, but digits has 10 classes"):
        train(TrainConfig(**DIGITS, **QUICK, num_classes=9, results_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("parts", [("train", "val"), ("train",), ("test", "train", "valid")])
def test_parts_of_a_data_set_are_no_classes(tmp_path, parts):
    for part in parts:
        images(tmp_path / part, "a", "b")
    with pytest.raises(ValueError, match=rf"holds {', '.join(parts)}, which are parts of a data set .* as {tmp_path / parts[0]}"):
        ImageFolder.scan(tmp_path)
    assert len(ImageFolder.scan(tmp_path / "train").class_to_idx) == 2
    assert len(ImageFolder.scan(tmp_path, unconditional=True)) == 4 * len(parts)


def test_classes_may_be_called_train_and_test(tmp_path):
    assert ImageFolder.scan(images(tmp_path, "train", "test")).class_to_idx == {"test": 0, "train": 1}
    images(tmp_path / "val", "a")
    images(tmp_path, "car")
    assert len(ImageFolder.scan(tmp_path).class_to_idx) == 4


@pytest.mark.parametrize("command", ["train", "encode"])
def test_where_the_data_lies_must_be_said(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(images(tmp_path, "a"))
    assert main([command, "--device", "cpu"]) == 2
    assert "data_path: got nothing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_setting_that_a_file_gives_twice_is_named(tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("steps: 4\nmodel: DiT-S/2\nsteps: 5\n", encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "twice.yaml")]) == 2
    assert "twice.yaml: steps is given twice" in capsys.readouterr().err


def test_a_run_that_is_complete_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "ditkernels")
    run(tmp_path)
    assert "complete" not in caplog.text
    run(tmp_path, resume="auto")
    assert "the run is complete: 4 of 4 steps are taken" in caplog.text


# ---- The machine -----------------------------------------------------------------------------------------------------


def test_the_start_tells_what_the_run_is(tmp_path, caplog):
    caplog.set_level("INFO", "ditkernels")
    train(TrainConfig(**DIGITS, **QUICK, results_dir=str(tmp_path / "run")))
    assert "DiT-S/2: 0.0 million parameters, 1 blocks of 16 channels; cpu, fp32, backends auto, 1 process" in caplog.text
    assert " images, 10 classes; 1 steps of 4 images" in caplog.text
    assert "expected memory: 0.0 GiB a process" in caplog.text
    assert "is expected to take" not in caplog.text


def of_size(monkeypatch, amount):
    monkeypatch.setattr(memory, "memory_of", lambda *_: amount)


def test_what_exceeds_the_machine_is_refused_and_what_may_is_told(tmp_path, monkeypatch, caplog):
    settings = config(tmp_path)
    expected = expect(settings, small_model(), some_data(settings), CPU, World())
    of_size(monkeypatch, expected.state - 1)
    with pytest.raises(
        ValueError, match=r"model: weights, gradients, moments and average of DiT-\S+, take 0.0 GiB, more than the 0.0"
    ):
        run(tmp_path)
    assert not (tmp_path / "run").exists()
    of_size(monkeypatch, expected.total - 1)
    assert run(tmp_path).step == 4
    assert "a step is expected to take" in caplog.text
    caplog.clear()
    of_size(monkeypatch, expected.total)
    run(tmp_path, resume="auto")
    assert "a step is expected to take" not in caplog.text


def test_a_batch_that_no_machine_holds_is_refused(tmp_path, capsys):
    flags = (
        "--global-batch-size",
        "100000000000000",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--results-dir",
        str(tmp_path / "run"),
    )
    sizes = (
        "--data-path",
        "digits",
        "--vae",
        "none",
        "--model",
        "DiT-S/2",
        "--hidden-size",
        "16",
        "--depth",
        "1",
        "--num-heads",
        "2",
    )
    assert main(["train", *sizes, *flags]) == 2
    assert "global_batch_size: the images of a step, of which there are 100000000000000, take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_what_a_forward_keeps_is_what_is_expected(checkpointing):
    """Against a forward that computes, of which every saved tensor is seen."""
    sizes = {"input_size": 8, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 4}
    model = DiT(**sizes, checkpointing=checkpointing).eval()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(8, 4, 8, 8, requires_grad=True), torch.zeros(8), torch.zeros(8, dtype=torch.int64))
    found = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
    assert 0.6 < 8 * kept_for_backward(model) / found < 1.7


def test_the_state_is_known_to_the_byte(tmp_path):
    model = small_model()
    settings = config(tmp_path)
    weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    fixed = sum(tensor.numel() for tensor in model.state_dict().values()) - weights
    data = some_data(settings)
    assert expect(settings, model, data, CPU, World()).state == 20 * weights + 8 * fixed
    two = World()
    two.size = 2
    pieces = dataclasses.replace(settings, parallel="fsdp")
    assert expect(pieces, model, data, CPU, two).state == (20 * weights + 8 * fixed) // 2
    assert expect(settings, model, data, CPU, World()).batch == 4 * settings.global_batch_size * 16


def test_a_container_has_what_its_group_lets_it(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory_of(CPU, World())
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (limit,))
    limit.write_text("max\n", encoding="utf-8")
    assert memory_of(CPU, World()) >= whole
    limit.write_text(f"{2**20}\n", encoding="utf-8")
    assert memory_of(CPU, World()) == 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_of(CPU, World()) == 2**18


def test_log_txt_has_it_too(tmp_path):
    """What is told before the folder is begun stands in no file; what is told after does."""
    train(TrainConfig(**DIGITS, **QUICK, results_dir=str(tmp_path / "run")))
    assert "step 1/1" in (tmp_path / "run" / LOG).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["process"]
