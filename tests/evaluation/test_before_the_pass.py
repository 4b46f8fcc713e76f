"""What headers and arguments tell is refused before the first image, what a batch tells before the second, the rest at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditkernels import cli
from ditkernels.evaluation.evaluate import OpenedReference, evaluate, evaluate_sets, load_reference
from ditkernels.evaluation.features import Features
from ditkernels.evaluation.plan import Plan
from ditkernels.evaluation.sources import Reading

WIDTH = 24


class Counting:
    """Features of 8 x 8 images, and how often they were asked for."""

    def __init__(self, widths: dict[str, int] | None = None, width: int = WIDTH) -> None:
        self.calls = 0
        self.width = width
        if widths is not None:
            self.widths = widths

    def __call__(self, images: Tensor) -> Features:
        self.calls += 1
        rows = images.float().flatten(1)
        return Features(rows[:, : self.width], rows[:, 30:36])


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def statistics(width: int, spatial: int = 0) -> dict[str, np.ndarray]:
    more = {"mu_s": np.zeros(spatial), "sigma_s": np.eye(spatial)} if spatial else {}
    return {"mu": np.zeros(width), "sigma": np.eye(width), **more}


def folder(path: Path, count: int) -> Path:
    path.mkdir()
    for index, image in enumerate(pixels(count)):
        Image.fromarray(image).save(path / f"{index}.png")
    return path


def features(count: int = 9, width: int = WIDTH, **more: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(count, size)).astype(np.float32) for name, size in {"pool": width, **more}.items()}


Side = Callable[[Path], Any]
IMAGES: Side = lambda folder: npz(folder / "images.npz", arr_0=pixels(40))  # noqa: E731
THREE: Side = lambda folder: npz(folder / "three.npz", arr_0=pixels(3))  # noqa: E731

REFUSED: dict[str, tuple[Side, Side, dict[str, Any], str]] = {
    "an unknown metric": (IMAGES, IMAGES, {"metrics": ["kid"]}, "metrics: got kid"),
    "no neighbours": (IMAGES, IMAGES, {"neighbours": 0}, "neighbours: got 0, allowed is 1 or more"),
    "no split": (IMAGES, IMAGES, {"split_size": 0}, "split_size: got 0, allowed is 1 or more"),
    "no batch": (IMAGES, IMAGES, {"batch_size": 0}, "batch_size: got 0, allowed is 1 or more"),
    "few samples": (
        THREE,
        IMAGES,
        {"metrics": ["precision_recall"]},
        "precision_recall cannot be computed: got 3 samples, needs at least 4",
    ),
    "few of the reference": (
        IMAGES,
        THREE,
        {"metrics": ["precision_recall"]},
        "precision_recall cannot be computed: the reference has 3 images, needs at least 4",
    ),
    "few for k": (IMAGES, IMAGES, {"metrics": ["precision_recall"], "neighbours": 40}, "got 40 samples, needs at least 41"),
    "a folder of one": (lambda at: folder(at / "one", 1), IMAGES, {"metrics": ["fid"]}, "fid cannot be computed: got 1 samples"),
    "none": (lambda at: npz(at / "none.npz", arr_0=pixels(0)), IMAGES, {}, "samples: got no images, allowed is 1 or more"),
    "statistics of another width": (
        IMAGES,
        lambda at: npz(at / "s.npz", **statistics(7)),
        {"extractor": Counting({"pool": WIDTH, "spatial": 6})},
        "features: got 24 per image, but the reference has 7",
    ),
    "spatial statistics of another width": (
        IMAGES,
        lambda at: npz(at / "s.npz", **statistics(WIDTH, 9)),
        {"extractor": Counting({"pool": WIDTH, "spatial": 6})},
        "spatial features: got 6 per image, but the reference has 9",
    ),
    "stored features of another width": (
        lambda at: npz(at / "f.npz", **features(width=5)),
        IMAGES,
        {"extractor": Counting({"pool": WIDTH})},
        "features: got 5 per image, but the reference has 24",
    ),
    "no spatial statistics": (
        IMAGES,
        lambda at: npz(at / "s.npz", **statistics(WIDTH)),
        {"metrics": ["sfid"]},
        "sfid cannot be computed: the reference has no spatial features",
    ),
    "statistics alone": (
        IMAGES,
        lambda at: npz(at / "s.npz", **statistics(WIDTH)),
        {"metrics": ["precision_recall"]},
        "precision_recall cannot be computed: the reference has statistics only",
    ),
    "stored features without logits": (
        lambda at: npz(at / "f.npz", **features()),
        IMAGES,
        {"metrics": ["inception_score"]},
        "inception_score cannot be computed: the samples have no logits",
    ),
    "declared features without logits": (
        IMAGES,
        IMAGES,
        {"metrics": ["inception_score"], "extractor": Counting({"pool": WIDTH})},
        "inception_score cannot be computed: the samples have no logits",
    ),
    "samples of another dtype": (
        lambda at: npz(at / "f.npz", arr_0=pixels(9).astype(np.float32)),
        IMAGES,
        {},
        "arr_0: got dtype float32, allowed is uint8",
    ),
    "stored features of another dtype": (
        lambda at: npz(at / "f.npz", pool=np.zeros((9, WIDTH), np.int64)),
        IMAGES,
        {},
        "pool: got int64, allowed is floating point",
    ),
    "stored features of unequal length": (
        lambda at: npz(at / "f.npz", **features(), spatial=np.zeros((8, 3), np.float32)),
        IMAGES,
        {},
        r"features: spatial: got shape \(8, 3\), allowed is \(9, any width\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_the_first_image(case: str, tmp_path: Path) -> None:
    samples, reference, settings, message = REFUSED[case]
    extractor = settings.get("extractor", Counting())
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(samples(tmp_path), reference(tmp_path), **{"extractor": extractor, **settings})
    assert extractor.calls == 0


def test_of_several_sets_all_are_opened_before_the_first_image(tmp_path: Path) -> None:
    extractor = Counting()
    with pytest.raises(ValueError, match="fid cannot be computed: got 1 samples"):
        evaluate_sets([IMAGES(tmp_path), folder(tmp_path / "one", 1)], IMAGES(tmp_path), extractor=extractor, metrics=["fid"])
    assert extractor.calls == 0


@pytest.mark.parametrize(
    "samples, reference, metrics, message",
    [
        (IMAGES, lambda at: npz(at / "s.npz", **statistics(7)), None, "features: got 24 per image, but the reference has 7"),
        (lambda at: npz(at / "f.npz", **features(width=5)), IMAGES, None, "features: got 5 per image, but the reference has 24"),
        (
            IMAGES,
            lambda at: npz(at / "f.npz", **features()),
            ["sfid"],
            "sfid cannot be computed: the reference has no spatial features",
        ),
        (IMAGES, lambda at: npz(at / "s.npz", **statistics(WIDTH)), ["inception_score"], "the samples have no logits"),
    ],
)
def test_what_a_batch_tells_is_refused_before_the_second(
    samples: Side, reference: Side, metrics: list[str] | None, message: str, tmp_path: Path
) -> None:
    extractor = Counting()
    with pytest.raises(ValueError, match=message):
        evaluate(samples(tmp_path), reference(tmp_path), extractor=extractor, metrics=metrics, batch_size=4)
    assert extractor.calls <= 1


def stream(count: int) -> Any:
    return iter(torch.from_numpy(pixels(count).transpose(0, 3, 1, 2).copy()).split(2)) if count else iter([])


def test_a_stream_tells_its_count_at_its_end(tmp_path: Path) -> None:
    extractor = Counting()
    with pytest.raises(ValueError, match="precision_recall cannot be computed: got 3 samples, needs at least 4"):
        evaluate(stream(3), IMAGES(tmp_path), extractor=extractor, metrics=["fid", "precision_recall"])
    assert extractor.calls == 1 + 2
    with pytest.raises(ValueError, match="samples: got no images"):
        evaluate(stream(0), IMAGES(tmp_path), extractor=extractor)
    with pytest.raises(ValueError, match="reference: got no images"):
        load_reference(stream(0), extractor=extractor)


def test_without_metrics_what_is_too_few_is_absent_with_its_reason(tmp_path: Path) -> None:
    found = evaluate(THREE(tmp_path), IMAGES(tmp_path), extractor=Counting())
    assert found.fid is not None
    assert found.absent["precision_recall"] == "got 3 samples, needs at least 4"
    found = evaluate(IMAGES(tmp_path), folder(tmp_path / "one", 1), extractor=Counting())
    few = "the reference has 1 images, needs at least {}".format
    assert found.absent == {
        "fid": few(2),
        "sfid": few(2),
        "inception_score": "the samples have no logits",
        "precision_recall": few(4),
    }
    assert (found.fid, found.precision, found.count, found.reference_count) == (None, None, 40, 1)


def test_statistics_need_no_images_beside_them(tmp_path: Path) -> None:
    both = npz(tmp_path / "both.npz", **statistics(WIDTH), arr_0=pixels(1))
    found = evaluate(IMAGES(tmp_path), both, extractor=Counting())
    assert found.fid is not None
    assert found.absent["precision_recall"] == "the reference has 1 images, needs at least 4"
    assert found.absent["sfid"] == "the reference has no spatial features"


def test_a_width_that_changes_on_the_way_is_refused(tmp_path: Path) -> None:
    extractor = Counting()

    def widening(images: Tensor) -> Features:
        extractor.width += 1
        return extractor(images)

    with pytest.raises(ValueError, match=r"features: got widths .*26.*, the images before have .*25"):
        load_reference(IMAGES(tmp_path), extractor=widening, batch_size=20)


@pytest.mark.parametrize(
    "reference, least",
    [
        (IMAGES, (4, "precision_recall")),
        (THREE, (2, "sfid")),
        (lambda at: npz(at / "s.npz", **statistics(WIDTH)), (2, "fid")),
        (lambda at: npz(at / "s.npz", **statistics(WIDTH), arr_0=pixels(9)), (4, "precision_recall")),
    ],
)
def test_a_reference_tells_how_many_images_its_metrics_need(reference: Side, least: tuple[int, str], tmp_path: Path) -> None:
    extractor = Counting()
    assert Plan().least_of_all(OpenedReference.of(reference(tmp_path), Reading(extractor, 4)).side) == least
    assert extractor.calls == 0


@pytest.mark.parametrize(
    "content",
    [b'[{"file_name": "0.png"}]', b'{"a": 1}\n{"a": 2}\n', '{"labels": {"scheme": "random"}}'.encode("utf-16"), b'{"labels": []}'],
    ids=["a list", "JSON lines", "UTF-16", "another mapping"],
)
def test_metadata_of_another_program_is_passed_over_with_a_note(content: bytes, tmp_path: Path) -> None:
    samples = IMAGES(tmp_path)
    (tmp_path / "metadata.json").write_bytes(content)
    found = evaluate(samples, samples, extractor=Counting(), metrics=["fid"])
    assert f"{tmp_path / 'metadata.json'} is not what ditkernels sample writes, and is passed over" in found.notes
    assert found.labels is None
    (tmp_path / "metadata.json").write_bytes(b'{"labels": {"scheme": "random"}}')
    found = evaluate(samples, samples, extractor=Counting(), metrics=["fid"])
    assert not [note for note in found.notes if "passed over" in note]
    assert found.labels == {"scheme": "random"}


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nowhere/eval.json"
    assert cli.main(["eval", "absent.npz", "absent.npz", "--json", str(out)]) == 2
    assert f"--json: got {out}, but {out.parent} is no folder" in capsys.readouterr().err
