"""The benchmarks as pytest-benchmark suites, for comparing two commits on one machine; the scripts beside it compare contenders.

    pytest benchmarks/ --benchmark-only                         the sizes of DiT-XL/2 on a GPU, small ones on a CPU
    pytest benchmarks/ --benchmark-only --benchmark-autosave    then --benchmark-compare on another commit

Not part of the test suite, which looks into tests/ alone. What breaks the numerical contract fails and is not timed; a backend
that cannot serve is skipped with its reason.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.speed import attention, measure, ops, sampling, training
from benchmarks.speed.measure import Contender
from ditkernels.ops import dispatch
from ditkernels.runtime import resolve_device

DEVICE = resolve_device("auto")
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 20 if ON_GPU else 3
BATCH, GRID, WIDTH, PATCH = (256, (16, 16), 1152, 2) if ON_GPU else (2, (4, 4), 384, 2)
ATTENTION = {"batch": 32, "heads": 16} if ON_GPU else {"batch": 2, "heads": 2}
SITES = ops.sites(BATCH, GRID, WIDTH, PATCH)
CONTENDERS = ("eager", *(("compiled",) if ON_GPU else ()), *dispatch.BACKENDS)


def model_arguments(**more: Any) -> argparse.Namespace:
    """What training.py and sampling.py are asked for."""
    size = ("DiT-XL/2", 32) if ON_GPU else ("DiT-S/8", 16)
    return argparse.Namespace(model=size[0], input_size=size[1], device=str(DEVICE), solver="ddim", **more)


def time_it(benchmark: Any, contender: Contender) -> None:
    """Times a contender to its end on the device."""
    numbers = itertools.count()

    def run(prepared: Any) -> None:
        contender.run(prepared)
        if ON_GPU:
            torch.cuda.synchronize()

    def prepare() -> tuple[tuple[Any], dict[str, Any]]:
        prepared = contender.prepare(next(numbers))
        if ON_GPU:
            torch.cuda.synchronize()
        return (prepared,), {}

    benchmark.pedantic(run, setup=prepare, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("precision", ["bf16", "fp32+bf16"])
@pytest.mark.parametrize("op", SITES)
def test_op(benchmark: Any, op: str, precision: str, way: str, contender: str) -> None:
    site, dtypes = SITES[op], ops.PRECISIONS[precision]
    floor = site.floor(way, dtypes)
    if not floor:
        pytest.skip("views: nothing moves")
    function, backend = ops.functions([contender], op)[contender]
    if backend is not None:
        found = ops.gate(site, backend, dtypes, DEVICE)
        if isinstance(found, str):
            pytest.skip(found)
        assert found.ratio <= 1, f"{found.where}: {found.ratio:.1f} x the error allowed"
    sets = ops.input_sets(site.case, dtypes, DEVICE)
    timed = ops.by_pass(contender, function, backend, site.case, dtypes, sets)[way]
    benchmark.extra_info["floor_bytes"] = floor
    time_it(benchmark, timed)


@pytest.mark.parametrize("backend", dispatch.ATTENTION_BACKENDS)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_attention(benchmark: Any, head_dim: int, way: str, backend: str) -> None:
    tokens = GRID[0] * GRID[1]
    verdict = attention.gate(backend, tokens, head_dim, torch.bfloat16, DEVICE)
    if isinstance(verdict, str):
        wrong = pytest.fail if verdict.startswith("WRONG") else pytest.skip
        wrong(verdict)
    shape = (ATTENTION["batch"], tokens, 3, ATTENTION["heads"], head_dim)
    one = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    sets = [one] + [torch.randn_like(one, requires_grad=True) for _ in range(measure.input_sets(measure.nbytes(one)) - 1)]
    cotangent = torch.randn(shape[0], tokens, shape[3] * head_dim, device=DEVICE, dtype=torch.bfloat16)
    time_it(benchmark, attention.contenders(backend, sets, cotangent)[way])


@pytest.mark.parametrize("contender", ["eager-bf16", "ours-bf16"])
def test_training_step(benchmark: Any, contender: str) -> None:
    args, recipe = model_arguments(), training.RECIPES[contender]
    if recipe.fused:
        assert training.gate(recipe, args, DEVICE) <= 1
    step = training.Step(recipe, args, DEVICE, 64 if ON_GPU else 2)
    time_it(benchmark, Contender(contender, step))


@pytest.mark.parametrize("contender", ["eager-bf16", "ours-bf16", "sampler-bf16"])
def test_guided_steps(benchmark: Any, contender: str) -> None:
    """Twenty steps on a GPU, two on a CPU, of one image."""
    args, recipe = model_arguments(), sampling.RECIPES[contender]
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    model = sampling.build(recipe, args, DEVICE)
    draw: Callable[[int, int], Any] = sampling.drawing(recipe, model, labels, args.solver)
    if recipe.fused:
        assert sampling.Gate(args, labels).ratio(recipe, draw) <= 1
    time_it(benchmark, Contender(contender, lambda seed: draw(20 if ON_GPU else 2, seed)))
