"""What people look at: lines, metrics.jsonl, TensorBoard and wandb."""

import json
import sys
import types

import pytest
import torch

from ditkernels.training import log as runlog
from ditkernels.training.config import TrainConfig
from ditkernels.training.log import METRICS, OneStepLate, RunLog, StepMetrics, cut_back, line, read_metrics

ROW = {
    "step": 20,
    "loss": 0.12345,
    "grad_norm": 1.5,
    "learning_rate": 1e-4,
    "images_per_second": 1234.5,
    "gflops_per_second": 878_000.0,
    "mfu": 0.4321,
    "memory_gib": 71.25,
    "skipped": 0,
}


def log_of(tmp_path, *, pending=None, start=0, **changes):
    config = TrainConfig(results_dir=str(tmp_path), log_every=2, global_batch_size=4, **changes)
    return RunLog(config, total=6, start=start, flops_per_image=1e9, device=torch.device("cpu"), pending=pending)


def test_a_line_tells_step_loss_norm_speed_share_memory_and_time_left():
    text = line(ROW, 400_000, 3600 * 30)
    assert text == (
        "step     20/400000 | loss 0.1235 | grad norm 1.5 | 1,234.5 images/s | 878,000 GFLOP/s | MFU 43.2% | 71.2 GiB | 1d 06h left"
    )
    assert "MFU" not in line({**ROW, "mfu": None}, 20, 5)
    assert "3 skipped | 0m 05s left" in line({**ROW, "skipped": 3}, 20, 5)
    assert "loss nan" in line({**ROW, "loss": None}, 20, 5)


def test_means_are_over_the_interval_and_leave_out_skipped_steps(tmp_path, caplog):
    caplog.set_level("INFO", "ditkernels")
    log = log_of(tmp_path, pending={"loss": 1.0, "grad_norm": 2.0, "steps": 1}, start=1)
    log.step(StepMetrics(2, 0.1, 3.0, 4.0, False), 0)
    log.step(StepMetrics(3, 0.1, 5.0, 6.0, False), 0)
    assert log.pending() == {"loss": 5.0, "grad_norm": 6.0, "steps": 1}
    log.step(StepMetrics(4, 0.1, float("nan"), float("inf"), True), 1)
    log.step(StepMetrics(5, 0.1, float("nan"), float("inf"), True), 2)
    log.step(StepMetrics(6, 0.1, float("nan"), float("inf"), True), 3)
    log.close()
    found = read_metrics(tmp_path / METRICS)
    assert [(row["step"], row["loss"], row["grad_norm"], row["skipped"]) for row in found] == [
        (2, 2.0, 3.0, 0),
        (4, 5.0, 6.0, 1),
        (6, None, None, 3),
    ]
    assert caplog.text.count("left\n") == 3


def test_speed_is_images_over_time_and_mfu_a_share_of_the_peak(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    log = log_of(tmp_path, peak_tflops=0.016)
    late = OneStepLate()

    def step(number):
        now[0] += 1.0
        arrived = late.push(number, 0.1, [torch.tensor(1.0)] * 3, log.seconds())
        if arrived is not None:
            log.step(arrived, 0)

    step(1)
    with log.apart("evaluation"):
        now[0] += 100.0
    step(2)
    step(3)
    with log.apart("saving"):
        now[0] += 50.0
    for number in (4, 5, 6):
        step(number)
    log.step(late.pop(), 0)
    rows = read_metrics(tmp_path / METRICS)
    # Two steps of four images in two seconds, 1 GFLOP each, on a device of 16 GFLOP/s; the last of them like the others.
    assert [(row["images_per_second"], row["gflops_per_second"], row["mfu"]) for row in rows] == [(4.0, 4.0, 0.25)] * 3
    assert [row["seconds"] for row in rows] == [2.0, 4.0, 6.0]
    assert [(row["seconds_evaluation"], row["seconds_saving"]) for row in rows] == [(100.0, 0.0), (100.0, 50.0), (100.0, 50.0)]
    assert rows[0]["memory_gib"] > 0


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
    ],
)
def test_the_peak_of_a_known_gpu_is_known(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert runlog._peak_flops(TrainConfig(), torch.device("cuda")) == peak * 1e12


def test_metrics_are_cut_back_to_a_step(tmp_path, caplog):
    path = tmp_path / METRICS
    lines = [json.dumps({"step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo', encoding="utf-8")
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6]
    cut_back(path, 4)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:2]) + "\n"
    path.write_bytes(b'{"step": 2}\n\xff\xfe\n[1]\n{"step": 4}\n{"step": 6}\n{"ste')
    caplog.clear()
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6]
    assert [record.args[1] for record in caplog.records] == [2, 3]
    cut_back(path, 4)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:2]) + "\n"
    cut_back(tmp_path / "absent", 4)
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flushed")

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    log = log_of(tmp_path, tensorboard=True, start=4)
    log.write({"step": 5, "loss": 0.5, "mfu": None})
    log.flush()
    log.close()
    assert written == [(tmp_path / "tensorboard", 5), ("loss", 0.5, 5), "flushed", "closed"]


class WandBError(Exception):
    """As theirs."""


def stand_in_for_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=WandBError)
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_every_number_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((values, step))

        def finish(self):
            logged.append("finished")

    def init(**arguments):
        logged.append(arguments)
        return Run()

    stand_in_for_wandb(monkeypatch, init)
    log = log_of(tmp_path, wandb=True, wandb_entity="team")
    log.write({"step": 5, "loss": 0.5, "mfu": None})
    log.close()
    assert logged[1:] == [({"loss": 0.5}, 5), "finished"]
    told = {name: logged[0][name] for name in ("project", "entity", "name", "resume")}
    assert told == {"project": "ditkernels", "entity": "team", "name": tmp_path.name, "resume": "allow"}
    assert logged[0]["config"]["log_every"] == 2
    log_of(tmp_path, wandb=True, wandb_project="mine", wandb_name="first").close()
    assert (logged[3]["project"], logged[3]["name"]) == ("mine", "first")
    assert logged[3]["id"] == logged[0]["id"] != tmp_path.name
    other = tmp_path / "other" / tmp_path.name
    other.mkdir(parents=True)
    log_of(other, wandb=True).close()
    assert logged[5]["id"] != logged[0]["id"]


def test_without_the_network_training_goes_on_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    def init(**_):
        raise WandBError("no network")

    stand_in_for_wandb(monkeypatch, init)
    log = log_of(tmp_path, wandb=True)
    for step in range(1, 5):
        log.step(StepMetrics(step, 0.1, 1.0, 1.0, False, seconds=float(step)), 0)
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [2, 4]
    assert caplog.text.count("Weights & Biases: no network; training goes on without it") == 1
    assert "Weights & Biases: it is incomplete, one write failed" in caplog.text


def test_on_a_full_disk_the_log_is_left_alone_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    def write(self, row):
        raise OSError(28, "No space left on device")

    log = log_of(tmp_path)
    monkeypatch.setattr(runlog.JsonLines, "write", write)
    for step in range(1, 7):
        log.step(StepMetrics(step, 0.1, 1.0, 1.0, False, seconds=float(step)), 0)
    log.close()
    assert caplog.text.count("No space left on device; training goes on without it") == 1


def test_an_error_of_our_own_is_no_side_matter(tmp_path):
    log = log_of(tmp_path)
    with pytest.raises(ZeroDivisionError), log.aside("samples"):
        raise ZeroDivisionError
