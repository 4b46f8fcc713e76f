"""What lies in folders beside images: nothing of it is a class or an image, and what is passed over is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditkernels.checkpoints.format import CheckpointError, load_checkpoint, save_checkpoint
from ditkernels.cli import main
from ditkernels.data.folder import FolderBatches, ImageFolder
from ditkernels.data.images import READER
from ditkernels.data.loader import stream_batches
from ditkernels.training.config import TrainConfig
from ditkernels.training.trainer import train


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        for index in range(2):
            image(tmp_path / "images" / name / f"{index}.png", index)
    return tmp_path / "images"


def test_hidden_and_system_folders_and_files_are_no_classes_and_no_images(root: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX"):
        image(root / name / "x.png")
        image(root / "ant" / name / "x.png")
    for name in ("._0.png", "Thumbs.db", "desktop.ini"):
        (root / "ant" / name).write_bytes(b"")
    (root / ".DS_Store").write_bytes(b"")
    found = ImageFolder.scan(root)
    assert found.class_to_idx == {"ant": 0, "bee": 1}
    assert found.files == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert found.notes == (f"{root}: passed over 8 hidden or of the system",)


def test_an_empty_class_is_named_or_keeps_its_number(root: Path) -> None:
    (root / "ape").mkdir()
    (root / "ape" / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes without images: ape; .*--keep-empty-classes"):
        ImageFolder.scan(root)
    found = ImageFolder.scan(root, keep_empty=True)
    assert found.class_to_idx == {"ant": 0, "ape": 1, "bee": 2}
    assert found.labels.tolist() == [0, 0, 2, 2]


def test_what_is_no_image_is_counted(root: Path) -> None:
    (root / "ant" / "notes.txt").write_text("", encoding="utf-8")
    (root / "ant" / "README").write_text("", encoding="utf-8")
    image(root / "loose.png")
    os.mkfifo(root / "bee" / "pipe.png")
    os.symlink("nowhere", root / "bee" / "gone.png")
    os.symlink("itself.png", root / "bee" / "itself.png")
    found = ImageFolder.scan(root)
    assert len(found) == 4
    expected = "1 .txt, 1 an image outside of the folders of classes, 3 no regular file, 1 without a suffix"
    assert found.notes == (f"{root}: passed over {expected}",)


def test_a_link_to_a_folder_that_contains_it_is_not_followed(root: Path) -> None:
    os.symlink(root, root / "ant" / "up")
    os.symlink("..", root / "bee" / "up")
    os.symlink(".", root / "self")
    found = ImageFolder.scan(root)
    assert found.class_to_idx == {"ant": 0, "bee": 1}
    assert len(found) == 4
    assert found.notes == (f"{root}: passed over 3 a link to a folder that is read already",)


def test_no_folder_is_read_twice_within_a_class(root: Path, tmp_path: Path) -> None:
    image(root / "ant" / "z" / "deep.png")
    os.symlink("z", root / "ant" / "a")
    image(tmp_path / "elsewhere" / "y.png")
    os.symlink(tmp_path / "elsewhere", root / "ant" / "one")
    os.symlink(tmp_path / "elsewhere", root / "ant" / "two")
    os.symlink(tmp_path / "elsewhere", root / "bee" / "one")
    # A file keeps the path that it lies at; links are taken in order.
    assert ImageFolder.scan(root).files == [
        *("ant/0.png", "ant/1.png", "ant/one/y.png", "ant/z/deep.png"),
        *("bee/0.png", "bee/1.png", "bee/one/y.png"),
    ]


NO_UTF8 = os.fsdecode(b"caf\xe9")


def test_names_that_are_no_utf8_work_everywhere_and_print(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.data.test_encode import make_vae

    image(root / NO_UTF8 / f"{NO_UTF8}.png")
    (root / NO_UTF8 / f"a{NO_UTF8}.png").write_bytes(b"no image")
    flags = ["--data-path", str(root), "--image-size", "8", "--device", "cpu"]
    small = [
        *("--vae", "none", "--num-classes", "3", "--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1", "--num-heads", "2")
    ]
    for workers in ("0", "1"):
        out = ["--results-dir", str(tmp_path / workers), "--num-workers", workers]
        assert main(["train", *flags, *small, *out, "--global-batch-size", "6", "--steps", "1"]) == 0
        assert r"caf\udce9/acaf\udce9.png: not a readable image: no image of a format that is read" in capsys.readouterr().err
    vae = make_vae(tmp_path_factory.mktemp("vae"))
    assert main(["encode", *flags, "--vae", vae, "--out", str(tmp_path / "latents"), "--num-workers", "0"]) == 0
    told = capsys.readouterr()
    assert r"caf\udce9/acaf\udce9.png: unreadable, no image of a format that is read" in told.err
    index = json.loads((tmp_path / "latents/latents.json").read_text(encoding="utf-8"))
    assert index["unreadable"] == [r"caf\udce9/acaf\udce9.png"]
    assert index["made_with"]["image_reader"] == READER


# ---- Faults of the disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_disk_ends_the_run_with_its_reason(root: Path, workers: int) -> None:
    folder = ImageFolder.scan(root)
    (root / "bee" / "1.png").unlink()
    batches = FolderBatches(folder, 4, 0, image_size=8, flip=False, max_unreadable=3)
    with pytest.raises(FileNotFoundError) as raised:
        next(stream_batches(batches, range(1), workers=workers, pin_memory=False))
    assert str(raised.value) == f"[Errno 2] No such file or directory: '{root}/bee/1.png'"


def test_the_reason_of_every_unreadable_image_is_kept(root: Path) -> None:
    (root / "ant" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (30, 30)).save(root / "ant" / "1.png")
    read = ImageFolder.scan(root).read(0, 8, 3, 800)
    assert read.at == 2
    assert read.unreadable == (
        ("ant/0.png", "no image of a format that is read"),
        ("ant/1.png", "30 x 30 pixels are more than max_pixels, 800"),
    )


# ---- The reader's version --------------------------------------------------------------------------------------------


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def made(**changes: object) -> TrainConfig:
        small = {"model": "DiT-S/2", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2, "image_size": 8}
        run = {"data_path": str(root), "vae": "none", "global_batch_size": 2, "num_workers": 0, "device": "cpu"}
        return TrainConfig(**{**small, **run, "results_dir": str(tmp_path / "run"), "steps": 1, **changes})  # type: ignore[arg-type]

    return made


def test_a_run_of_another_reader_is_refused_by_name(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings())
    path = tmp_path / "run/checkpoints/step-00000001"
    checkpoint = load_checkpoint(path)
    assert checkpoint.state["image_reader"] == READER
    # A run of before readers had versions.
    del checkpoint.state["image_reader"]
    save_checkpoint(path, checkpoint)
    with pytest.raises(
        CheckpointError, match=f"another recipe: image_reader: 1 there, {READER} here; --override image_reader goes on"
    ):
        train(settings(steps=2, resume="auto"))
    assert train(settings(steps=2, resume="auto", override="image_reader")).step == 2


def test_the_first_frame_is_told_once(root: Path, settings: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture) -> None:
    for index in range(2):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(root / "ant" / f"{index}.gif", save_all=True, append_images=frames[1:])
    (root / "ant" / "notes.txt").write_text("", encoding="utf-8")
    caplog.set_level("INFO", "ditkernels")
    train(settings(steps=3))
    told = caplog.text
    assert told.count("the first frame is taken") == 1
    assert f"{root}: passed over 1 .txt" in told
