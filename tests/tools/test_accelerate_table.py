"""The table of diffusers' transformers in docs/accelerate.md."""

from __future__ import annotations

import pytest

from tools import accelerate_table
from tools.diffusers_models import MODELS

pytest.importorskip("diffusers")


def rows() -> dict[str, list[str]]:
    text = accelerate_table.PAGE.read_text(encoding="utf-8")
    lines = text.partition(accelerate_table.BEGIN)[2].partition(accelerate_table.END)[0].splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: rest for name, *rest in cells}


def test_every_class_has_a_row_and_every_trial_nine_tenths_of_its_sites() -> None:
    from diffusers.models import transformers

    written = rows()
    tried = {tiny.name for tiny in MODELS.values()}
    assert set(written) == set(MODELS) | {name for name in dir(transformers) if name[0].isupper() and name not in tried}
    assert {name for name, cells in written.items() if cells[0] == "not tried"} == set(written) - set(MODELS) - set(
        accelerate_table.ELSEWHERE
    )
    for name in MODELS:
        ran, of, error = written[name][0].split(" of ")[0], written[name][0].split(" of ")[1], written[name][1]
        assert int(ran) >= 0.9 * int(of), name
        assert float(error) < 1e-5, name
        assert (ran == of) == (written[name][2] == ""), name


@pytest.mark.slow
def test_the_table_is_what_trials_give() -> None:
    """But for the errors, which a machine rounds its own way."""
    fresh = accelerate_table.table().splitlines()[2:]
    made = {name: rest for name, *rest in ([cell.strip() for cell in line.strip("|").split("|")] for line in fresh)}
    assert {name: (cells[0], cells[2]) for name, cells in made.items()} == {n: (cells[0], cells[2]) for n, cells in rows().items()}
