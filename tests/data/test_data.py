"""The digits, folders of images, and the order in which training sees them."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditkernels.data.crop import center_crop
from ditkernels.data.digits import InMemoryBatches, LabelledImages, load_digits
from ditkernels.data.folder import FolderBatches, ImageFolder, UnreadableImagesError
from ditkernels.data.loader import stream_batches
from ditkernels.data.order import ShuffledStream
from ditkernels.data.source import open_data
from ditkernels.training.config import TrainConfig


def test_digits_are_images_in_minus_one_to_one():
    for split in load_digits():
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(split), 1, 8, 8)
        assert split.images.min() == -1
        assert split.images.max() == 1


def test_the_split_is_fixed_disjoint_and_holds_out_a_fifth_of_each_class():
    train, held_out = load_digits()
    again, _ = load_digits()
    assert torch.equal(train.images, again.images)
    assert (len(train), len(held_out)) == (1433, 364)

    def rows(split):
        return {tuple(image.tolist()) for image in split.images.flatten(1)}

    assert not rows(train) & rows(held_out)
    for label in range(10):
        share = (held_out.labels == label).sum() / ((held_out.labels == label).sum() + (train.labels == label).sum())
        assert 0.19 < share < 0.21


def test_labels_belong_to_their_images():
    # A digit's nearest neighbour nearly always is the same digit; with shuffled labels one in ten would be.
    train, held_out = load_digits()
    nearest = torch.cdist(held_out.images.flatten(1), train.images.flatten(1)).argmin(1)
    assert (train.labels[nearest] == held_out.labels).float().mean() > 0.95


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install ditkernels\[demo\]"):
        load_digits()


def test_mismatched_labels_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\) and \(2,\)"):
        LabelledImages(torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64))


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 3),
)
def test_every_epoch_of_a_stream_is_a_permutation(length, batch_size, seed, epochs):
    stream = ShuffledStream(length, batch_size, seed)
    steps = -(-length * epochs // batch_size)
    indices = torch.cat([stream.batch(step) for step in range(steps)])
    for epoch in indices[: length * epochs].split(length):
        assert epoch.sort().values.tolist() == list(range(length))


def test_a_stream_is_addressed_by_step_alone():
    forward = ShuffledStream(10, 4, seed=3)
    batches = [forward.batch(step) for step in range(12)]
    backward = ShuffledStream(10, 4, seed=3)
    for step in reversed(range(12)):
        assert torch.equal(backward.batch(step), batches[step])


@pytest.mark.parametrize("other", [1, 2**32, 2**40])
def test_seeds_and_epochs_shuffle_differently(other):
    first = ShuffledStream(100, 100, seed=0)
    second = ShuffledStream(100, 100, seed=other)
    assert not torch.equal(first.batch(0), second.batch(0))
    assert not torch.equal(first.batch(0), first.batch(1))


@pytest.mark.parametrize("bad", [{"length": 0}, {"batch_size": 0}, {"seed": -1}])
def test_a_stream_names_the_bad_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ShuffledStream(**{"length": 5, "batch_size": 2, "seed": 0, **bad})


# ---- Folders of images -----------------------------------------------------------------------------------------------

CLASSES = ("n01", "n02", "n10")


def write_image(path, seed, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for label, name in enumerate(CLASSES):
        for index in range(4):
            write_image(root / name / f"{index}.png", seed=10 * label + index)
    (root / "n01" / "notes.txt").write_text("no image", encoding="utf-8")
    return root


def batches(root, batch_size=5, seed=0, **options):
    options = {"image_size": 8, "flip": True, "max_unreadable": 3, **options}
    return FolderBatches(ImageFolder.scan(root), batch_size, seed, **options)


def test_a_folder_has_a_class_a_subfolder_in_sorted_order(folder):
    write_image(folder / "n02" / "deeper" / "x.JPEG", seed=99)
    found = ImageFolder.scan(folder)
    assert found.class_to_idx == {"n01": 0, "n02": 1, "n10": 2}
    assert len(found) == 13
    assert [file.split("/")[0] for file in found.files] == [CLASSES[label] for label in found.labels.tolist()]
    assert "n02/deeper/x.JPEG" in found.files


def test_an_unconditional_folder_has_one_class(folder):
    found = ImageFolder.scan(folder, unconditional=True)
    assert (len(found), found.class_to_idx) == (12, {})
    assert not found.labels.any()


def test_an_epoch_holds_every_image_with_its_label(folder):
    stream = batches(folder, batch_size=4, flip=False)
    seen = []
    for step in range(3):
        images, labels, unreadable, _ = stream[step]
        assert (images.dtype, images.shape, unreadable) == (torch.uint8, (4, 3, 8, 8), ())
        seen += [(label, image.numpy().tobytes()) for image, label in zip(images, labels.tolist(), strict=True)]
    expected = set()
    for file, label in zip(stream.folder.files, stream.folder.labels.tolist(), strict=True):
        with Image.open(folder / file) as image:
            expected.add((label, np.ascontiguousarray(center_crop(image, 8).transpose(2, 0, 1)).tobytes()))
    assert set(seen) == expected


def test_half_of_the_images_are_mirrored_by_key(folder):
    plain, flipped = batches(folder, batch_size=200, flip=False)[3], batches(folder, batch_size=200)[3]
    same = (plain.images == flipped.images).flatten(1).all(1)
    mirrored = (plain.images == flipped.images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # 200 draws: the standard deviation is 7.
    assert 65 < mirrored.sum() < 135
    assert torch.equal(batches(folder, batch_size=200)[3].images, flipped.images)
    plain_later, flipped_later = (
        batches(folder, batch_size=200, flip=False)[4],
        batches(folder, batch_size=200)[4],
    )
    assert not torch.equal((plain_later.images == flipped_later.images).flatten(1).all(1), same)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(folder, workers):
    def drawn(number, steps):
        found = stream_batches(batches(folder), steps, workers=number, pin_memory=False)
        return [(batch.images, batch.labels) for batch in found]

    alone = drawn(0, range(7))
    assert len(alone) == 7
    for mine, theirs in zip(drawn(workers, range(3, 7)), alone[3:], strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_in_memory_batches_are_addressed_by_step():
    data = LabelledImages(torch.arange(6.0).reshape(6, 1, 1, 1), torch.arange(6))
    stream = InMemoryBatches(data, 4, seed=1)
    for step in (2, 0, 1):
        images, labels, *_ = stream[step]
        assert torch.equal(images.flatten().long(), labels)
        assert torch.equal(labels, ShuffledStream(6, 4, 1).batch(step))


@pytest.mark.parametrize("size", [(12, 10), (100, 37), (37, 100), (16, 16), (5, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_crop_is_the_centre_of_the_image(size, mode):
    # Brightness grows to the right: what is kept must be symmetric about the middle.
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1)).astype(np.uint8)
    cropped = center_crop(Image.fromarray(ramp).convert(mode), 8).astype(float)
    assert cropped.shape[:2] == (8, 8)
    columns = cropped.mean(axis=0) if mode == "L" else cropped.mean(axis=(0, 2))
    assert abs(columns.mean() - 127.5) < 255 / size[0] + 2
    assert columns[-1] - columns[0] > 0.5 * 255 * min(1, size[1] / size[0])


def test_large_images_are_halved_by_boxes_first():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    # Box averages of a checkerboard are grey; bicubic alone would alias.
    cropped = center_crop(Image.fromarray(checkers.astype(np.uint8)), 16)
    assert cropped.std() == 0


def damage(path, content=b"no image"):
    path.write_bytes(content)


def test_an_unreadable_image_is_named_and_the_next_one_takes_its_place(folder):
    damage(folder / "n01" / "1.png")
    cut = (folder / "n02" / "3.png").read_bytes()
    damage(folder / "n02" / "3.png", cut[: len(cut) // 2])
    stream = batches(folder, batch_size=12, flip=False)
    images, labels, unreadable, _ = stream[0]
    assert sorted(file for file, _ in unreadable) == [str(folder / "n01" / "1.png"), str(folder / "n02" / "3.png")]
    assert len(images) == 12
    assert torch.bincount(labels).tolist() == [4, 3, 5]


def test_too_many_unreadable_images_in_a_row_are_an_error(folder):
    for index in range(4):
        damage(folder / "n01" / f"{index}.png")
    with pytest.raises(UnreadableImagesError, match=r"unreadable images: got 4 in a row, the last .*n01/3\.png"):
        batches(folder, batch_size=12, max_unreadable=3)[0]


def test_the_trainer_counts_unreadable_images_and_stops_at_the_limit(folder, tmp_path, capsys):
    from ditkernels.cli import main

    damage(folder / "n01" / "1.png")
    damage(folder / "n10" / "0.png")
    flags = [
        *("train", "--data-path", str(folder), "--vae", "none", "--image-size", "8", "--num-classes", "3"),
        *("--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--device", "cpu"),
        *("--global-batch-size", "12", "--num-workers", "0", "--steps", "2"),
    ]
    assert main([*flags, "--results-dir", str(tmp_path / "a"), "--max-unreadable", "2"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("skipped ") == 2
    assert f"skipped {folder}/n01/1.png: not a readable image" in shown
    assert main([*flags, "--results-dir", str(tmp_path / "b"), "--max-unreadable", "1"]) == 2
    assert "unreadable images: got 2, allowed are 1" in capsys.readouterr().err


def test_a_missing_pillow_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ImportError, match=r"Pillow: pip install ditkernels\[vae\]"):
        batches(folder)


# ---- What a config opens ---------------------------------------------------------------------------------------------

DIGITS = {"data_path": "digits", "vae": "none", "image_size": 8, "num_classes": 10}


def test_a_folder_is_opened_with_its_validation_images(folder, tmp_path):
    for name in CLASSES:
        write_image(tmp_path / "held out" / name / "0.png", seed=50)
    found = open_data(
        TrainConfig(
            data_path=str(folder),
            val_path=str(tmp_path / "held out"),
            image_size=8,
            global_batch_size=4,
            val_images=3,
        )
    )
    assert (found.length, found.shape) == (12, (3, 8, 8))
    assert len(found.train[0].labels) == 4
    assert sorted(found.validation[0].labels.tolist()) == [0, 1, 2]


def test_the_digits_are_opened_with_those_held_out():
    found = open_data(TrainConfig(**DIGITS, global_batch_size=4))
    assert (found.length, found.shape, found.class_to_idx["7"]) == (1433, (1, 8, 8), 7)
    assert found.validation[0].images.shape == (4, 1, 8, 8)
    alone = open_data(TrainConfig(**DIGITS, unconditional=True, label_dropout=0.0))
    assert not alone.train[0].labels.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_path": ""}, "data_path: got nothing"),
        ({"data_path": "/no/such/folder"}, "data_path: /no/such/folder is no folder"),
        ({"image_size": 256}, "image_size: got 256, the digits have 8"),
        ({"vae": "ema"}, "vae: got 'ema', the digits are trained on as pixels"),
        ({"num_classes": 9}, "num_classes: got 9, but digits has 10 classes"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(TrainConfig(**{**DIGITS, **changes}))


def test_an_empty_folder_and_foreign_validation_classes_are_named(folder, tmp_path):
    (tmp_path / "nothing" / "n01").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no subfolder with images"):
        ImageFolder.scan(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no image "):
        ImageFolder.scan(tmp_path / "nothing", unconditional=True)
    write_image(tmp_path / "other" / "n99" / "0.png", seed=1)
    with pytest.raises(ValueError, match="val_path: the classes"):
        open_data(TrainConfig(data_path=str(folder), val_path=str(tmp_path / "other"), image_size=8))
