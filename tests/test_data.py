"""The digits and the order in which training sees a data set."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkernels.data import LabelledImages, ShuffledStream, load_digits


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
        share = (held_out.labels == label).sum() / (
            (held_out.labels == label).sum() + (train.labels == label).sum()
        )
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
