"""Random numbers that are a function of their key, (seed, stream, step, sample), and of nothing else.

The generator is Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten
rounds turn a counter of four 32-bit words, under a key of two, into four random words. The seed is the key; the counter is

    (block of four numbers, sample, step, stream).

So the noise of sample 7 at step 1000 is the same whether a batch is drawn whole, in parts, by several processes or after a
restart. Integers are identical on every device. Normals come from them by Box and Muller in fp64, rounded once to fp32: between
devices they may differ in the last place, where the logarithms and cosines do. There is no state to save.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORD = 1 << 32
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Words = tuple[Any, Any, Any, Any]


class Stream(IntEnum):
    """What a number is for. Numbers of different streams are independent; the values are part of a run's definition."""

    SHUFFLE = 0
    FLIP = 1
    POSTERIOR = 2
    TIMESTEP = 3
    NOISE = 4
    LABEL_DROP = 5
    VALIDATION_POSTERIOR = 6
    VALIDATION_TIMESTEP = 7
    VALIDATION_NOISE = 8
    SAMPLING_NOISE = 9
    SAMPLING_LABEL = 10
    WEIGHTS = 11
    ITEM = 12


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four words out of four words and a key, by ten rounds.

    Args:
        counter: four arrays of one shape, all NumPy int64 or all torch int64 on one device, each in 0..2³²−1.
        key: two ints in 0..2³²−1.

    Returns:
        Four arrays like the counter's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return c0, c1, c2, c3


def _multiply(word: Any, multiplier: int) -> tuple[Any, Any]:
    # word·multiplier needs 64 bits, one more than int64 has. The multipliers exceed 2³¹, so multiplier − 2³² is a negative
    # number of 31 bits; word·2³², left out of the product, belongs to the high half as it is.
    product = word * (multiplier - WORD)
    return (product >> 32) + word & WORD - 1, product & WORD - 1


def words(seed: int, stream: Stream, step: int, samples: Tensor, count: int) -> Tensor:
    """Random integers, ``count`` for each sample.

    Args:
        seed: 0..2⁶⁴−1.
        stream: what the numbers are for.
        step: 0..2³²−1.
        samples: (B,) int64, each 0..2³²−1; the result lies on its device.
        count: numbers a sample.

    Returns:
        (B, count) int64, uniform in 0..2³²−1.

    Raises:
        ValueError: ``seed`` or ``step`` out of range.
    """
    _check("seed", seed, 1 << 64)
    _check("step", step, WORD)
    blocks = -(-count // 4)
    on_cpu = samples.device.type == "cpu"
    # On a CPU NumPy takes a third of the time: it has less to do before each small operation.
    sample: Any = samples.numpy() if on_cpu else samples
    block: Any = np.arange(blocks) if on_cpu else torch.arange(blocks, device=samples.device)
    counter0, counter1 = block[None, :] + 0 * sample[:, None], sample[:, None] + 0 * block[None, :]
    nothing = 0 * counter0
    out = philox4x32((counter0, counter1, nothing + step, nothing + int(stream)), (seed % WORD, seed // WORD))
    if on_cpu:
        return torch.from_numpy(np.stack(out, axis=-1)).flatten(1)[:, :count]
    return torch.stack(out, dim=-1).flatten(1)[:, :count]


def seed_of_weights(seed: int) -> int:
    """What torch's generator is seeded with for initial weights: ``seed`` itself below 2³², of which alone it reads all bits."""
    return seed if seed < WORD else int(words(seed, Stream.WEIGHTS, 0, torch.zeros(1, dtype=torch.int64), 1))


def uniforms(seed: int, stream: Stream, step: int, samples: Tensor) -> Tensor:
    """One number in [0, 1) for each sample, (B,) fp64, a multiple of 2⁻³²; arguments as of :func:`words`."""
    return words(seed, stream, step, samples, 1)[:, 0].double() / WORD


def below(bound: int, seed: int, stream: Stream, step: int, samples: Tensor) -> Tensor:
    """One integer in 0..bound−1 for each sample, (B,) int64; bound <= 2³¹, arguments as of :func:`words`.

    The integer is ⌊word·bound / 2³²⌋, so no value is likelier than another by more than bound / 2³².
    """
    _check("bound", bound - 1, 1 << 31)
    return words(seed, stream, step, samples, 1)[:, 0] * bound >> 32


def normals(seed: int, stream: Stream, step: int, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals, (B, *shape) fp32; other arguments as of :func:`words`.

    Two words make two normals: √(−2 ln u)·cos 2πv and √(−2 ln u)·sin 2πv, with u in (0, 1). The largest is 6.8.
    """
    count = math.prod(shape)
    pairs = words(seed, stream, step, samples, count + count % 2).unflatten(1, (-1, 2)).double()
    radius = torch.sqrt(-2 * torch.log((pairs[..., 0] + 0.5) / WORD))
    angle = pairs[..., 1] * (2 * math.pi / WORD)
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return both.flatten(1)[:, :count].float().reshape(-1, *shape)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of ``length`` samples in an epoch, (length,) int64 on the CPU: they are sorted by 62 random bits each."""
    pairs = words(seed, Stream.SHUFFLE, epoch, torch.arange(length), 2)
    return torch.argsort((pairs[:, 0] >> 1 << 31) | pairs[:, 1] >> 1, stable=True)


def _check(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{name}: got {value}, allowed are 0..{end - 1}")
