"""Every tolerance of the suite, each with its origin."""

from __future__ import annotations

import torch
from torch import Tensor

CONTRACT_FACTOR = 2.0
"""An op may err at most twice as much as plain PyTorch at the same dtypes (the library's numerical contract) ..."""

CONTRACT_ULPS = 2.0
"""... plus two units in the last place of the largest value: one rounding of the result, one of an intermediate."""


TERM_ULPS = 0.25
"""A sum of n terms, added one after the other, strays by the root of n times this much of a unit in the last place: a rounding is
uniform within half a unit, 0.29 in the root mean square, and the sum is smaller on its way."""


def contract_bound(low: Tensor, exact: Tensor, terms: int = 0) -> float:
    """The largest error allowed by the contract, given plain PyTorch's result ``low`` and the fp64 result ``exact``.

    Args:
        terms: of the longest fp32 sum in a result that is a product. How far plain PyTorch's own strays depends on how many partial
            sums the processor's vectors hold: with AVX-512 it is far less than one after the other.
    """
    exact = exact.double()
    largest = exact.abs().max().item()
    one_by_one = TERM_ULPS * terms**0.5 * torch.finfo(torch.float32).eps * largest
    plain_error = max((low.double() - exact).abs().max().item(), one_by_one)
    return CONTRACT_FACTOR * plain_error + CONTRACT_ULPS * torch.finfo(low.dtype).eps * largest


def assert_contract(actual: Tensor, low: Tensor, exact: Tensor, name: str = "result", terms: int = 0) -> None:
    """Holds ``actual`` to the numerical contract against fp64.

    Args:
        actual: what the op returned.
        low: the same computation in plain PyTorch at the same dtypes.
        exact: the same computation in fp64 on the same (exactly converted) inputs.
        terms: as of ``contract_bound``.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == low.dtype, f"{name}: dtype {actual.dtype}, expected {low.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - exact.double()).abs().max().item()
    bound = contract_bound(low, exact, terms)
    assert error <= bound, f"{name}: error {error:.3e} exceeds the contract's {bound:.3e}"


MODEL_FACTOR = 6.0
"""A whole model rounds in many places, and two orders of the same sums then differ by chance; three times the op's allowance. Twice
was enough where plain PyTorch's products hold 8 partial sums; with AVX-512 they hold more, and err less than ours beside them."""


def assert_model_contract(actual: Tensor, low: Tensor, exact: Tensor, name: str = "result") -> None:
    """As ``assert_contract``, for outputs and gradients of a whole model."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (actual.double() - exact.double()).abs().max().item()
    bound = MODEL_FACTOR / CONTRACT_FACTOR * contract_bound(low, exact)
    assert error <= bound, f"{name}: error {error:.3e} exceeds the model's {bound:.3e}"


FP64_AGREEMENT = 1e-11
"""Two fp64 evaluations of one model, relative to the largest value: some 1e4 roundings of 1.1e-16 that do not cancel."""


def assert_fp64_agreement(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    bound = FP64_AGREEMENT * expected.abs().max().item() + FP64_AGREEMENT
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


DIFFUSION_ROUNDINGS = 32
"""An identity of the diffusion schedulers is a handful of products and sums on each side; 32 roundings cover the longest."""

EPSILON_AMPLIFICATION = 157.41
"""On the linear schedule an error of the noise grows by √(1/ᾱ − 1) <= 157.41 on its way into the predicted x_0."""

DIFFUSION_TABLE_RTOL = 1e-10
"""1 − ᾱ loses 2.2e-16 / (1 − ᾱ_0) <= 5.5e-12 in float64, a few times over where a table is a quotient of such differences."""

DIFFUSION_TABLE_ATOL = 2.3e-16
"""One rounding at 1: what log(1 − ᾱ) loses where a cosine schedule ends in ᾱ = 2e-9."""

NORMAL_CDF_APPROXIMATION = 2 * 1.79e-4
"""max |tanh approximation − normal distribution function| is 1.789e-4, at z = ±2.592; a bin has two ends."""


def assert_identity(actual: Tensor, expected: Tensor, amplification: float = 1.0) -> None:
    """|actual − expected| <= DIFFUSION_ROUNDINGS·eps(actual's dtype)·amplification·max(1, max|expected|), everywhere."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    largest = max(1.0, expected.abs().max().item())
    bound = DIFFUSION_ROUNDINGS * torch.finfo(actual.dtype).eps * amplification * largest
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"


DRIFT_FACTOR = 2.0
"""Runs that round differently part at the same rate: the fused one may stray from fp64 twice as far as the plain one has."""

DRIFT_ULPS = 8.0
"""Where neither has strayed yet: a loss is the mean of a few hundred rounded squares, each through a few layers."""


def assert_drift(actual: list[float], low: list[float], exact: list[float]) -> None:
    """Losses of the fused run, of the plain run at the same dtype and of the plain run in fp64, step by step."""
    strayed = 0.0
    for step, (a, b, c) in enumerate(zip(actual, low, exact, strict=True)):
        strayed = max(strayed, abs(b - c))
        bound = DRIFT_FACTOR * strayed + DRIFT_ULPS * torch.finfo(torch.float32).eps * abs(c)
        assert abs(a - c) <= bound, f"step {step}: loss {a:.9f} is {abs(a - c):.2e} from fp64, allowed {bound:.2e}"


NORMAL_DEVIATIONS = 5.0
"""A mean of independent draws lies five standard deviations off once in two million times; the draws are fixed by their keys."""

NORMAL_ULPS = 1.0
"""Box and Muller in fp64, rounded once to fp32: half a unit in the last place, and what fp64 itself may add."""


METRIC_AGREEMENT = 1e-4
"""Two implementations of FID, sFID or the Inception Score on the same fp32 features, relative: their covariances are summed in
different orders, and one takes roots of unsymmetric eigenvalues. Precision and recall are shares and must agree as closely."""


ORDER_MARGIN = 0.15
"""A fitted order of convergence approaches the whole number only as the step vanishes; at 64 to 512 steps the next term of the
error, one order higher, bends it by less than this."""


TRAJECTORY_FACTOR = 4.0
"""As ``MODEL_FACTOR``: two fp32 trajectories leave the exact one at the same rate, in directions that chance decides."""

TRAJECTORY_ULPS = 64.0
"""Where the plain one has hardly strayed: a step is a whole model, some tens of roundings deep, and an update."""

SAMPLE_AGREEMENT = 1e-3
"""Final states of a small random model, drawn by two fp32 paths that round differently: errors of 1e-6 a step, amplified at the
noisy end by at most ``EPSILON_AMPLIFICATION``, with room for growth through the steps that follow."""


def assert_trajectory(actual: list[Tensor], low: list[Tensor], exact: list[Tensor]) -> None:
    """States of the fast path, of the plain fp32 path and of the plain fp64 path, step by step, in the largest norm.

    An error, once made, is carried on, so the allowance is what the plain path has strayed so far, relative to the state.
    """
    strayed = 0.0
    for step, (a, b, c) in enumerate(zip(actual, low, exact, strict=True)):
        size = c.abs().max().item()
        assert torch.isfinite(a).all(), f"step {step}: not finite"
        strayed = max(strayed, (b.double() - c).abs().max().item() / size)
        error = (a.double() - c).abs().max().item() / size
        bound = TRAJECTORY_FACTOR * strayed + TRAJECTORY_ULPS * torch.finfo(torch.float32).eps
        assert error <= bound, f"step {step}: {error:.2e} from fp64 relative to the state, allowed {bound:.2e}"


ACCELERATED_AGREEMENT = 1e-6
"""A public model in fp64 still computes its sinusoids, and LLaMA's RMS norm, in fp32: 6e-8 a rounding, a few norms deep."""


def assert_accelerated_agreement(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """A rewired model in fp64 against itself before, relative to the largest value."""
    error = (actual - expected).abs().max().item()
    bound = ACCELERATED_AGREEMENT * expected.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


ACCELERATED_TRAINING = 1e-4
"""Losses after three AdamW steps in fp32: Adam divides by gradients' own size, so their rounding, 1e-6, grows tens of times."""


ACCUMULATION_ULPS = 32.0
"""The same sums over a batch, grouped otherwise: some tens of roundings, relative to the largest element of each gradient."""


GUIDED_SAMPLES = 1e-3
"""Latents of size 1 after a few guided steps in fp32: each step's noise errs by 1e-6, guidance multiplies that by 7, the first
step's √(1/ᾱ − 1) by 157."""


ROUNDED_NORM = {"rtol": 2 * 2.0**-8, "atol": 2 * 2.0**-8}
"""Plain PyTorch rounds the norm of a bf16 stream to bf16 before an fp32 modulation, the fused op does not: one rounding of values
up to 4."""

ROUNDED_MODEL = {"rtol": 4 * 2.0**-8, "atol": 4 * 2.0**-8}
"""Two bf16 models of a few blocks, of which one rounds its norms so: a rounding more on the way through."""

REORDERING_FACTOR = 16.0
"""Times the furthest of four training runs that add the same numbers in other orders. The tail is long, since AdamW divides a
gradient's rounding by the gradient's own size; a sample left out or weighed wrongly shows at a hundred times this."""

# Between two machines' rounding of a few steps of a toy run, relative, and of five sampling steps, absolute.
AGREES_ELSEWHERE = 1e-5


CHANGED_AGREEMENT = 2e-5
"""Two fp32 evaluations of a model of two blocks, relative to the largest value: some hundred roundings of 6e-8, and more where a
change of a layer makes norms of small differences."""

CHANGED_SHOWS = 3.0
"""A change of a layer counts as seen from this many times ``CHANGED_AGREEMENT``; int8 in the least of the linears makes as many."""


def assert_changed_agreement(actual: Tensor, expected: Tensor, scale: Tensor | float, name: str = "result") -> None:
    """A fused model in fp32 against the plain one, relative to ``scale``."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max().item()
    bound = CHANGED_AGREEMENT * float(scale)
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"
