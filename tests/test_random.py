"""Keyed random numbers: Philox as published, the same however they are asked for, and distributed as they should be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditkernels import rng as random
from ditkernels.rng import Stream, below, normals, permutation, philox4x32, uniforms, words
from tests.numerics import NORMAL_DEVIATIONS, NORMAL_ULPS

F = 0xFFFFFFFF
# kat_vectors of Random123 (D. E. Shaw Research), the lines "philox4x32 10".
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("array", [torch.tensor, np.array])
@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_philox_gives_the_published_vectors(array, counter, key, expected):
    found = philox4x32(tuple(array([word]) for word in counter), key)
    assert tuple(int(word[0]) for word in found) == expected


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(Stream),
    step=st.integers(0, F),
    sample=st.integers(0, F),
)
def test_words_are_philox_of_the_key(seed, stream, step, sample):
    found = words(seed, stream, step, torch.tensor([sample]), 7)[0].tolist()
    expected = []
    for block in range(2):
        counter = tuple(torch.tensor(word) for word in (block, sample, step, int(stream)))
        expected += [int(word) for word in philox4x32(counter, (seed % 2**32, seed // 2**32))]
    assert found == expected[:7]


def test_torch_and_numpy_give_the_same_integers(monkeypatch):
    samples = torch.arange(1000) * 4_294_967
    counter = (samples, samples + 1, samples * 0, samples % 17)
    found = philox4x32(counter, (1, F))
    expected = philox4x32(tuple(word.numpy() for word in counter), (1, F))
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine.numpy(), theirs)
        assert mine.min() >= 0
        assert mine.max() <= F


def test_a_sample_has_its_numbers_in_whatever_company():
    samples = torch.tensor([5, 0, 3, 9])
    whole = normals(3, Stream.NOISE, 11, samples, (2, 3))
    for row, sample in zip(whole, samples, strict=True):
        assert torch.equal(normals(3, Stream.NOISE, 11, sample[None], (2, 3))[0], row)
    # Fewer numbers are the first of more.
    assert torch.equal(words(3, Stream.NOISE, 11, samples, 5), words(3, Stream.NOISE, 11, samples, 40)[:, :5])


@pytest.mark.parametrize(
    "other",
    [
        (1, Stream.NOISE, 0, 0),
        (2**32, Stream.NOISE, 0, 0),
        (0, Stream.FLIP, 0, 0),
        (0, Stream.NOISE, 1, 0),
        (0, Stream.NOISE, 0, 1),
    ],
)
def test_every_part_of_the_key_counts(other):
    def draw(seed, stream, step, sample):
        return words(seed, stream, step, torch.tensor([sample]), 4)

    assert not torch.equal(draw(0, Stream.NOISE, 0, 0), draw(*other))


def test_streams_keep_their_numbers():
    # A run that is resumed under a newer version must find the same numbers.
    assert [(stream.name, stream.value) for stream in Stream][:6] == [
        ("SHUFFLE", 0),
        ("FLIP", 1),
        ("POSTERIOR", 2),
        ("TIMESTEP", 3),
        ("NOISE", 4),
        ("LABEL_DROP", 5),
    ]


def test_the_generators_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = normals(0, Stream.NOISE, 0, torch.arange(4), (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(normals(0, Stream.NOISE, 0, torch.arange(4), (8,)), first)


def test_normals_are_normal_and_uncorrelated():
    x = normals(1, Stream.NOISE, 0, torch.arange(500), (401,)).double()
    n = x.numel()
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}
    for power, (mean, variance) in moments.items():
        found = (x**power).mean().item()
        assert abs(found - mean) < NORMAL_DEVIATIONS * (variance / n) ** 0.5
    for shifted in (x[:, 1:] * x[:, :-1], x[1:] * x[:-1]):
        assert abs(shifted.mean().item()) < NORMAL_DEVIATIONS / shifted.numel() ** 0.5
    share = (x.abs() < 1).double().mean().item()
    assert abs(share - 0.6826895) < NORMAL_DEVIATIONS * (0.6826895 * 0.3173105 / n) ** 0.5


def test_normals_are_box_and_mullers_to_the_last_place():
    import math

    pairs = words(9, Stream.NOISE, 2, torch.arange(50), 6).tolist()
    found = normals(9, Stream.NOISE, 2, torch.arange(50), (5,))
    for row, numbers in zip(found.tolist(), pairs, strict=True):
        for i, value in enumerate(row):
            u, v = (numbers[i // 2 * 2] + 0.5) / 2**32, numbers[i // 2 * 2 + 1] / 2**32
            wave = math.sin if i % 2 else math.cos
            exact = math.sqrt(-2 * math.log(u)) * wave(2 * math.pi * v)
            assert abs(value - exact) <= NORMAL_ULPS * torch.finfo(torch.float32).eps * max(1, abs(exact))


def test_normals_are_finite_at_the_ends_of_the_words(monkeypatch):
    ends = torch.tensor([[0, 0, 0, F, F, 0, F, F]])
    monkeypatch.setattr(random, "words", lambda *_: ends)
    found = normals(0, Stream.NOISE, 0, torch.arange(1), (8,))
    assert torch.isfinite(found).all()
    assert found.abs().max() < 6.8


@pytest.mark.parametrize("bound", [1, 2, 10, 1000])
def test_integers_below_a_bound_are_even(bound):
    n = 20_000
    found = below(bound, 4, Stream.TIMESTEP, 0, torch.arange(n))
    counts = torch.bincount(found, minlength=bound)
    assert len(counts) == bound
    expected, deviation = n / bound, (n / bound * (1 - 1 / bound)) ** 0.5
    assert (counts - expected).abs().max() <= NORMAL_DEVIATIONS * deviation


def test_uniforms_lie_in_the_half_open_interval():
    found = uniforms(4, Stream.LABEL_DROP, 0, torch.arange(20_000))
    assert found.dtype == torch.float64
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean().item() - 0.5) < NORMAL_DEVIATIONS * (1 / 12 / 20_000) ** 0.5


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000), length=st.integers(1, 200))
def test_an_order_is_a_permutation(seed, epoch, length):
    assert permutation(seed, epoch, length).sort().values.tolist() == list(range(length))


def test_orders_differ_between_seeds_and_epochs():
    first = permutation(0, 0, 100)
    assert not torch.equal(first, permutation(0, 1, 100))
    assert not torch.equal(first, permutation(1, 0, 100))
    assert not torch.equal(first, torch.arange(100))


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"step": -1}, {"step": 2**32}])
def test_a_key_out_of_range_is_named(bad):
    key = {"seed": 0, "step": 0, **bad}
    with pytest.raises(ValueError, match=next(iter(bad))):
        words(key["seed"], Stream.NOISE, key["step"], torch.arange(2), 1)
