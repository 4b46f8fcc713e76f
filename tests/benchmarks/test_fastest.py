"""What was measured decides what `auto` chooses: benchmarks/gpu/fastest.py, on results made up."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import fastest
from ditkernels.ops import choice


def row(contender: str, median: float, spread: float = 0.01, **what: Any) -> dict[str, Any]:
    return {
        "contender": contender,
        "median_ms": median,
        "low_ms": median - spread,
        "high_ms": median + spread,
        **what,
    }


def write(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> None:
    environment = {"compute_capability": "9.0", "device": "NVIDIA H200"} | changes.pop("environment", {})
    result = {"benchmark": name.partition("-")[0], "environment": environment, "complete": True, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result | changes), encoding="utf-8")


BEFORE = {("8.0", "patch_embed"): "cuda", ("9.0", "bias_gelu"): "cuda"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of choice.py that knows of another device."""
    path = tmp_path / "choice.py"
    path.write_text(fastest.with_table(Path(choice.__file__).read_text(encoding="utf-8"), BEFORE), encoding="utf-8")
    monkeypatch.setattr(fastest, "TABLE", path)
    monkeypatch.setattr(choice, "PREFERRED", BEFORE)
    return path


def written(path: Path) -> dict[tuple[str, str], str]:
    """The table in a copy of choice.py, as Python reads it."""
    found = next(
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PREFERRED"
    )
    assert found.value is not None
    return ast.literal_eval(found.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CUDA wins modulate_norm's forward, and one of two settings of its backward; the spreads of gated_residual overlap; of the MLP
    a slower forward is outweighed by the backward."""
    made = tmp_path / "results"
    made.mkdir()
    forward, backward = (
        {"op": "modulate_norm", "pass": "forward"},
        {"op": "modulate_norm", "pass": "backward"},
    )
    close = {"op": "gated_residual", "pass": "forward", "precision": "bf16"}
    write(
        made,
        "ops",
        [
            {"op": "copy", "gbps": 4000},
            {"op": "final_layer", "contender": "cuda", "note": "cannot serve: no"},
            *(row(name, ms, **forward, precision="bf16") for name, ms in (("triton", 2.0), ("cuda", 1.0))),
            *(row(name, ms, **backward, precision="bf16") for name, ms in (("triton", 2.0), ("cuda", 1.0))),
            *(row(name, ms, **backward, precision="fp32") for name, ms in (("triton", 1.0), ("cuda", 2.0))),
            *(row(name, ms, 0.2, **close) for name, ms in (("triton", 1.0), ("cuda", 0.9))),
            row("eager", 0.1, **forward, precision="bf16"),
        ],
    )
    write(made, "ops-384", [row(n, ms, **forward) for n, ms in (("triton", 3.0), ("cuda", 1.0))])
    mlp = {"model": "DiT-XL/2", "precision": "bf16"}
    times = {"forward": (("triton", 1.0), ("cuda", 1.1)), "backward": (("triton", 3.0), ("cuda", 2.0))}
    rows = [row(n, ms, **mlp, **{"pass": phase}) for phase, found in times.items() for n, ms in found]
    write(made, "mlp", rows)
    state = [row(n, ms, op="adamw_ema", copied=False) for n, ms in (("triton", 1.0), ("cuda", 2.0))]
    write(made, "optimizer", state)
    write(made, "ops-cut", [row("triton", 1.0, **forward), row("cuda", 9.0, **forward)], complete=False)
    write(made, "attention", [row("cuda", 1.0)])
    (made / "stages.json").write_text("[]", encoding="utf-8")
    return made


WINNERS = {"modulate_norm": "cuda", "mlp": "cuda", "mlp_backward": "cuda", "adamw_ema": "triton"}


def test_a_winner_is_faster_in_every_setting_beyond_the_spread(
    folder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fastest.main([str(folder), "--write"])
    of_this_device = {("9.0", op): backend for op, backend in WINNERS.items()}
    assert written(table) == {("8.0", "patch_embed"): "cuda", **of_this_device}
    said = capsys.readouterr().out
    assert "compute capability 9.0" in said
    assert "0.50 to 2.00" in said  # modulate_norm's backward


def test_nothing_is_written_unasked(folder: Path, table: Path) -> None:
    before = table.read_text(encoding="utf-8")
    fastest.main([str(folder)])
    assert table.read_text(encoding="utf-8") == before


def test_auto_goes_by_the_table(folder: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest.main([str(folder), "--write"])
    monkeypatch.setattr(choice, "PREFERRED", written(table))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choice.fastest("modulate_norm", torch.device("cuda")) == "cuda"
    assert choice.fastest("modulate_norm_backward", torch.device("cuda")) is None


def test_what_says_nothing_of_a_gpu_is_refused(folder: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete result of ops, mlp, optimizer"):
        fastest.main([str(tmp_path)])
    write(folder, "ops", [], environment={"compute_capability": None, "device": "a CPU"})
    with pytest.raises(ValueError, match=r"ops.json: measured on a CPU, allowed is a GPU"):
        fastest.main([str(folder), "--write"])
    assert written(table) == BEFORE
