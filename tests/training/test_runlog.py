"""What people look at: lines, metrics.jsonl, TensorBoard and wandb."""

import json
import sys
import types

import pytest
import torch

from ditkernels.training import log as runlog
from ditkernels.training.config import TrainConfig
from ditkernels.training.log import METRICS, RunLog, StepMetrics, cut_back, line, read_metrics

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
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    log = log_of(tmp_path, peak_tflops=0.016)
    log.step(StepMetrics(1, 0.1, 1.0, 1.0, False), 0)
    log.step(StepMetrics(2, 0.1, 1.0, 1.0, False), 0)
    (row,) = read_metrics(tmp_path / METRICS)
    # Two steps of four images in two seconds, 1 GFLOP each, on a device of 16 GFLOP/s.
    assert (row["images_per_second"], row["gflops_per_second"], row["mfu"]) == (4.0, 4.0, 0.25)
    assert row["memory_gib"] > 0


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


def test_metrics_are_cut_back_to_a_step(tmp_path):
    path = tmp_path / METRICS
    lines = [json.dumps({"step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo', encoding="utf-8")
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6]
    cut_back(path, 4)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:2]) + "\n"
    cut_back(tmp_path / "absent", 4)
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    log = log_of(tmp_path, tensorboard=True)
    log.write({"step": 5, "loss": 0.5, "mfu": None})
    log.close()
    assert written == [tmp_path / "tensorboard", ("loss", 0.5, 5), "closed"]


def test_wandb_gets_every_number_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    logged = []
    module = types.ModuleType("wandb")

    class Run:
        def log(self, values, step):
            logged.append((values, step))

        def finish(self):
            logged.append("finished")

    def init(**arguments):
        logged.append((arguments["id"], arguments["resume"], arguments["config"]["log_every"]))
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = log_of(tmp_path, wandb=True)
    log.write({"step": 5, "loss": 0.5, "mfu": None})
    log.close()
    assert logged == [(tmp_path.name, "allow", 2), ({"loss": 0.5}, 5), "finished"]
