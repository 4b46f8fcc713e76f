"""A data set of one's own: its images and labels as they should be, the same bytes however it is read, and errors with an index."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from ditkernels.data.dataset import DatasetBatches, ItemError
from ditkernels.data.folder import FolderBatches, ImageFolder
from ditkernels.data.loader import stream_batches
from ditkernels.training.config import TrainConfig
from ditkernels.training.trainer import train
from tests.helpers.runs import newest_checkpoint
from tests.training.test_trainer import same_bits

SIZE = 8


class Drawn(Dataset):
    """Items that draw from every generator, as augmentations do."""

    classes = ("a", "b", "c")

    def __len__(self):
        return 11

    def __getitem__(self, index):
        fixed = torch.linspace(-0.5, 0.5, SIZE * SIZE).reshape(1, SIZE, SIZE)
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return fixed * noise / 3, index % 3


class Listed(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def batches(dataset, size=4, classes=3):
    return DatasetBatches(dataset, size, 0, image_size=SIZE, classes=classes)


def of(image, label=0):
    return batches(Listed((image, label)), size=1)[0]


# ---- Images and labels -----------------------------------------------------------------------------------------------


def test_pil_images_are_cropped_as_a_folders_are(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), np.uint8)
    for number, mode in enumerate(("RGB", "RGBA", "L")):
        Image.fromarray(pixels).convert(mode).save(tmp_path / "a" / f"{number}.png")
    folder = ImageFolder.scan(tmp_path)
    expected = FolderBatches(folder, 3, 0, image_size=SIZE, flip=False, max_unreadable=0)[0]
    images = [Image.open(tmp_path / name) for name in folder.files]
    found = batches(Listed(*((image, 0) for image in images)), size=3)[0]
    assert found.images.dtype == torch.uint8
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize("as_array", [False, True])
def test_bytes_and_floats_are_taken_as_they_are(as_array):
    shown = torch.arange(3 * SIZE * SIZE, dtype=torch.uint8).reshape(3, SIZE, SIZE)
    given = (lambda tensor: tensor.numpy()) if as_array else (lambda tensor: tensor)
    assert torch.equal(of(given(shown)).images[0], shown)
    assert torch.equal(of(given(shown.permute(1, 2, 0))).images[0], shown)
    floats = shown.double() / 127.5 - 1
    assert torch.equal(of(given(floats)).images[0], floats.float())
    both = batches(Listed((given(shown), 0), (given(floats), 1)), size=2)[0]
    assert both.images.dtype == torch.float32
    torch.testing.assert_close(both.images[0], both.images[1])


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), torch.tensor([2]), np.array(2)])
def test_a_label_is_a_whole_number_of_any_kind(label):
    assert of(torch.zeros(1, SIZE, SIZE), label).labels.tolist() == [2]


def grey(mode):
    from PIL import Image

    return Image.new(mode, (SIZE, SIZE))


@pytest.mark.parametrize(
    "image, label, message",
    [
        ("a", 0, "got an image of str"),
        (torch.zeros(SIZE, SIZE), 0, r"got an image of shape \(8, 8\)"),
        (torch.zeros(1, SIZE, SIZE, dtype=torch.int64), 0, "got an image of torch.int64"),
        (torch.full((1, SIZE, SIZE), 255.0), 0, "got floats from 255 to 255, allowed are -1 to 1"),
        (torch.full((1, SIZE, SIZE), float("nan")), 0, "got floats from nan to nan"),
        (lambda: grey("I;16"), 0, "got a PIL image of mode I;16"),
        (torch.zeros(1, SIZE, SIZE), 3, r"got label 3, allowed are 0\.\.2"),
        (torch.zeros(1, SIZE, SIZE), -1, "got label -1"),
        (torch.zeros(1, SIZE, SIZE), 1.5, "got label 1.5, allowed are whole numbers"),
        (torch.zeros(1, SIZE, SIZE), True, "got label True"),
        (torch.zeros(1, SIZE, SIZE), torch.zeros(2), "got label tensor"),
        (torch.zeros(1, SIZE, SIZE + 1), 0, r"got shape \(1, 8, 9\), item 0 has \(1, 8, 8\)"),
    ],
)
def test_another_item_is_refused_by_its_index(image, label, message):
    image = image() if callable(image) else image
    found = batches(Listed((torch.zeros(1, SIZE, SIZE), 0), (image, label)), size=2)
    with pytest.raises(ItemError, match=f"data: item 1: {message}"):
        found[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_set_raises_names_the_index(workers):
    class Broken(Drawn):
        def __getitem__(self, index):
            if index == 7:
                raise KeyError("lost")
            return super().__getitem__(index)

    with pytest.raises(ItemError, match="data: item 7: KeyError: 'lost'"):
        list(stream_batches(batches(Broken(), size=11), range(1), workers=workers, pin_memory=False))


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, SIZE, SIZE), 0


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Endless(), "IterableDataset, which cannot go on at a step"),
        (Listed(), "the data set is empty"),
        (object(), "got object, allowed are map-style data sets"),
    ],
)
def test_what_is_no_map_style_data_set_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        batches(dataset)


# ---- The same bytes --------------------------------------------------------------------------------------------------


def drawn(workers, steps):
    return [batch.images for batch in stream_batches(batches(Drawn()), steps, workers=workers, pin_memory=False)]


def test_workers_and_a_restart_change_no_byte_and_generators_are_put_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    alone = drawn(0, range(6))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert len({float(image.amax()) for images in alone for image in images}) == 24
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    for workers in (0, 1, 3):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(drawn(workers, range(2, 6)), alone[2:], strict=True))


def settings(folder, **changes):
    sizes = {"vae": "none", "model": "DiT-S/2", "hidden_size": 16, "depth": 1, "num_heads": 2}
    quick = {"global_batch_size": 4, "num_workers": 0, "device": "cpu", "steps": 4, "learning_rate": 1e-2}
    return TrainConfig(**{**sizes, **quick, "results_dir": str(folder), **changes})


def test_a_run_on_it_is_resumed_bit_for_bit_with_any_number_of_workers(tmp_path):
    whole = train(settings(tmp_path / "whole", num_workers=2), data=Drawn())
    assert (whole.model.num_classes, whole.model.input_size) == (3, (SIZE, SIZE))
    train(settings(tmp_path / "run", steps=2), data=Drawn())
    resumed = train(settings(tmp_path / "run", resume="auto"), data=Drawn())
    assert same_bits(whole.model, resumed.model)
    assert newest_checkpoint(tmp_path / "run").checkpoint.state["class_to_idx"] == {"a": 0, "b": 1, "c": 2}


def test_it_may_be_held_out_too(tmp_path):
    train(settings(tmp_path / "run", val_every=2, val_images=4), data=Drawn(), val_data=Drawn())
    with pytest.raises(ValueError, match="val_data: got a data set, allowed beside a data set as data"):
        train(settings(tmp_path / "none", data_path="digits"), val_data=Drawn())
    shown = Listed((torch.zeros(1, 4, 4), 0))
    with pytest.raises(ValueError, match=r"val_data: got images of shape \(1, 4, 4\), those of data have \(1, 8, 8\)"):
        train(settings(tmp_path / "other"), data=Drawn(), val_data=shown)


def test_the_number_of_classes_must_be_known(tmp_path):
    images = Listed(*((torch.zeros(1, SIZE, SIZE), 0),) * 4)
    with pytest.raises(ValueError, match=r"num_classes: got none, and the data set has no \.classes"):
        train(settings(tmp_path / "run"), data=images)
    assert train(settings(tmp_path / "run", num_classes=2), data=images).model.num_classes == 2
    lone = train(settings(tmp_path / "lone", unconditional=True, label_dropout=0.0), data=images)
    assert lone.model.num_classes == 1
