"""`ditkernels plot`: runs side by side."""

import json
import sys

import pytest

from ditkernels.cli import main
from ditkernels.training import plot
from ditkernels.training.log import METRICS


@pytest.fixture
def runs(tmp_path):
    folders = []
    for index in (1, 2):
        folder = tmp_path / f"run{index}"
        folder.mkdir()
        rows = [{"step": step, "loss": index / step, "images_per_second": 100.0 * index} for step in (1, 2, 3)]
        rows.insert(2, {"step": 2, "validation_loss": 0.5})
        rows.append({"step": 4, "loss": None, "images_per_second": 90.0})
        (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        folders.append(folder)
    return folders


def test_losses_and_speeds_of_all_runs_are_drawn(runs):
    read = {str(folder): plot.read_metrics(folder / METRICS) for folder in runs}
    losses, speeds = plot.new_figure(width=4, height=2).subplots(1, 2)
    plot.draw_losses(losses, read)
    plot.draw_speeds(speeds, read)
    lines = {text.get_label(): (list(text.get_xdata()), list(text.get_ydata())) for text in losses.lines}
    assert lines == {
        str(runs[0]): ([1, 2, 3], [1, 0.5, 1 / 3]),
        f"{runs[0]}, validation": ([2], [0.5]),
        str(runs[1]): ([1, 2, 3], [2, 1, 2 / 3]),
        f"{runs[1]}, validation": ([2], [0.5]),
    }
    assert [list(text.get_ydata()) for text in speeds.lines] == [[100, 100, 100, 90], [200, 200, 200, 90]]
    assert speeds.lines[0].get_color() != speeds.lines[1].get_color()


@pytest.mark.parametrize("name, magic", [("a.png", b"\x89PNG"), ("new/a.svg", b"<?xml")])
def test_the_command_writes_a_picture(runs, tmp_path, capsys, name, magic):
    assert main(["plot", *map(str, runs), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert capsys.readouterr().out == f"wrote {tmp_path / name}\n"


def test_equal_runs_make_equal_files(runs, tmp_path):
    for name in ("a.png", "b.png"):
        assert main(["plot", str(runs[0]), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_without_metrics_is_named(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert f"{tmp_path / METRICS}: no such file" in capsys.readouterr().err


def test_a_missing_matplotlib_names_the_extra(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(runs[0])]) == 2
    assert "pip install ditkernels[demo]" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["", "picture", "picture.txt"])
def test_what_is_no_picture_is_refused_before_it_is_drawn(tmp_path, out):
    with pytest.raises(ValueError, match=r"out: got .*, allowed is a file that ends in \.png, \.svg or \.pdf"):
        plot.draw_runs([tmp_path / "absent"], tmp_path / out)
