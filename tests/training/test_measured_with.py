"""A run's evaluations record what they were measured with; where that changes, the run says so and the plot breaks."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditkernels.checkpoints.model import load_model
from ditkernels.checkpoints.run import checkpoint_directory
from ditkernels.sampling.labels import Labels
from ditkernels.training import plot
from ditkernels.training.log import METRICS, read_metrics
from tests.training.test_trainer import brightness, config, evaluated, run, small_model, some_data


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / METRICS) if "fid" in row]


def test_every_row_records_what_it_was_measured_with(tmp_path: Path) -> None:
    run(tmp_path, model=small_model(random=True), ckpt_every=2, guided_channels="1", **evaluated(tmp_path, eval_guidance=2.0))
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["measured_with"] == {
            "reference_sha256": hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest(),
            "extractor": f"{brightness.__module__}:brightness",
            "extractor_sha256": None,
            "count": 10,
            "reference_count": 20,
            "neighbours": 3,
            "split_size": 5000,
            "weights_sha256": load_model(checkpoint_directory(tmp_path / "run", row["step"])).digest,
            "weights": "ema",
            "steps": "2",
            "solver": "ddpm",
            "guidance_scale": 2.0,
            "guided_channels": 1,
            "guidance_interval": None,
            "seed": 0,
            "labels": "balanced",
        }


def test_a_resumed_run_says_what_is_measured_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ditkernels")
    settings = evaluated(tmp_path)
    run(tmp_path, **settings)
    run(tmp_path, **settings, resume="auto", steps=6)
    assert "do not compare" not in caplog.text.replace("with other counts they do not compare", "")
    said = "evaluations are measured otherwise from here on and do not compare: "
    run(tmp_path, **settings | {"eval_images": 8, "sample_steps": 3}, resume="auto", steps=8)
    assert caplog.text.count(f"{said}count 8, was 10; steps 3, was 2\n") == 1
    # The file has the same name, and another image in it.
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((20, 4, 4, 3), np.uint8))
    run(tmp_path, **settings | {"eval_images": 8, "sample_steps": 3}, resume="auto", steps=10)
    assert caplog.text.count(f"{said}reference_sha256 ") == 1
    assert caplog.text.count(said) == 2


def forget(path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "measured_with"} for row in read_metrics(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_rows_of_an_earlier_version_have_no_record_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, **evaluated(tmp_path))
    forget(tmp_path / "run" / METRICS)
    run(tmp_path, **evaluated(tmp_path), resume="auto", steps=6)
    assert caplog.text.count("the evaluation of step 4 does not record what it was measured with: it may not compare") == 1
    run(tmp_path, **evaluated(tmp_path), resume="auto", steps=8)
    assert caplog.text.count("does not record") == 1


def test_notes_and_metrics_that_are_absent_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ditkernels")
    run(tmp_path, **evaluated(tmp_path))
    assert caplog.text.count("evaluation: inception_score is not computed: the samples have no logits") == 1
    assert caplog.text.count("evaluation: precision and recall are of 10 images against 20, ADM's of 50,000") == 1


# ---- Before the first step -------------------------------------------------------------------------------------------

calls: list[int] = []


def watched(images: Tensor) -> Tensor:
    calls.append(len(images))
    return brightness(images)


def test_too_few_images_for_a_metric_are_refused_before_the_reference_is_read(tmp_path: Path) -> None:
    calls.clear()
    settings = evaluated(tmp_path, eval_images=3, eval_extractor=f"{__name__}:watched")
    with pytest.raises(ValueError, match=r"eval_images: got 3, allowed is 4 or more, which precision_recall against .* needs"):
        run(tmp_path, **settings)
    assert calls == []
    assert not (tmp_path / "run").exists()
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"eval_images: got 1, allowed is 2 or more, which fid against .* needs"):
        run(tmp_path, **settings | {"eval_images": 1})
    run(tmp_path, **settings)
    assert len(rows_of(tmp_path / "run")) == 2


def declared(images: Tensor) -> Tensor:
    return watched(images)


declared.widths = {"pool": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name, asked", [("watched", 1), ("declared", 0)])
def test_a_reference_of_another_width_is_refused_before_the_first_step(tmp_path: Path, name: str, asked: int) -> None:
    calls.clear()
    settings = evaluated(tmp_path, eval_extractor=f"{__name__}:{name}")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="features: got 2 per image, but the reference has 3"):
        run(tmp_path, **settings)
    assert len(calls) == asked
    assert not (tmp_path / "run").exists()


# ---- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, scheme", [(4, "spread"), (5, "balanced")])
def test_fewer_images_than_classes_are_spread(tmp_path: Path, images: int, scheme: str) -> None:
    from ditkernels.training.trainer import Trainer

    settings = config(tmp_path, num_classes=5, **evaluated(tmp_path, eval_images=images))
    trainer = Trainer(settings, some_data(settings), None, small_model(num_classes=5, random=True))
    monitor = trainer.evaluations.monitor
    assert monitor is not None
    found = monitor(trainer.ema.model)
    assert found.measured_with["labels"] == scheme
    assert found.measured_with == monitor.measured_with(trainer.model) | {"weights_sha256": found.measured_with["weights_sha256"]}
    shown = monitor.labels.of(torch.arange(images)).tolist()
    assert shown == Labels(scheme, tuple(range(5))).of(torch.arange(images)).tolist()


# ---- The picture -----------------------------------------------------------------------------------------------------


def row(step: int, fid: float | None, **record: Any) -> dict[str, Any]:
    return {"step": step, "fid": fid, **({"measured_with": record} if record else {})}


def drawn(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    axes = plot.new_figure(width=4, height=2).subplots()
    plot.draw_evaluations(axes, {"run": rows})
    (line,) = axes.lines
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_line_breaks_where_evaluations_are_measured_otherwise() -> None:
    same = [row(2, 9.0, steps="50", weights_sha256="a"), {"step": 3, "loss": 1.0}, row(4, 8.0, steps="50", weights_sha256="b")]
    steps, values = drawn([*same, row(5, None, steps="2"), row(6, 5.0, steps="250"), row(8, 4.0, steps="250")])
    assert [step for step in steps if not math.isnan(step)] == [2, 4, 6, 8]
    assert [index for index, step in enumerate(steps) if math.isnan(step)] == [2]
    assert math.isnan(values[2])
    assert drawn([row(2, 9.0), row(4, 8.0)]) == ([2, 4], [9.0, 8.0])
    assert len(drawn([row(2, 9.0), row(4, 8.0, steps="50")])[0]) == 3


def test_the_picture_has_fid_where_a_run_has_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[list[str]] = []
    genuine = plot.save
    monkeypatch.setattr(
        plot, "save", lambda figure, path: titles.append([axes.get_title() for axes in figure.axes]) or genuine(figure, path)
    )
    for name, rows in {"plain": [], "evaluated": [row(2, 9.0, steps="50")]}.items():
        (tmp_path / name).mkdir()
        written = [{"step": 1, "loss": 1.0, "images_per_second": 1.0}, *rows]
        (tmp_path / name / METRICS).write_text("".join(json.dumps(one) + "\n" for one in written), encoding="utf-8")
    plot.draw_runs([tmp_path / "plain"], tmp_path / "a.png")
    plot.draw_runs([tmp_path / "plain", tmp_path / "evaluated"], tmp_path / "b.png")
    assert [len(each) for each in titles] == [2, 3]
    assert "FID" in titles[1][2]
