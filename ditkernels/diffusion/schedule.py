"""Noise schedules: the betas, the timesteps that a chain keeps, and every table that follows from them.

The "linear" betas are those of Ho et al. 2020 (arXiv 2006.11239). The "squaredcos_cap_v2" betas are those of Nichol &
Dhariwal 2021 (arXiv 2102.09672), who also describe respacing. NumPy computes everything in float64. A device sees one
packed table, copied there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditkernels.diffusion.inputs import check_count

FloatArray = npt.NDArray[np.floating[Any]]


# ---- Betas -----------------------------------------------------------------------------------------------------------


def _linear_betas(steps: int) -> FloatArray:
    if steps <= 20:
        raise ValueError(
            f"diffusion_steps: got {steps}, allowed for the linear schedule are 21 and more, "
            "since its last beta is 20 / diffusion_steps"
        )
    # Ho et al. chose 1e-4 .. 0.02 for 1000 steps. The scale keeps the noise at the end the same for any number of steps.
    scale = 1000 / steps
    return np.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=np.float64)


def _cosine_betas(steps: int) -> FloatArray:
    alphas_cumprod = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in pairwise(alphas_cumprod)])


BETA_SCHEDULES: dict[str, Callable[[int], FloatArray]] = {
    "linear": _linear_betas,
    "squaredcos_cap_v2": _cosine_betas,
    "cosine": _cosine_betas,
}


def named_beta_schedule(name: str, diffusion_steps: int) -> FloatArray:
    """The betas of a named schedule, (diffusion_steps,) float64.

    With T steps, "linear" is linspace(1e-4·s, 0.02·s, T), where s = 1000/T. "squaredcos_cap_v2", also called "cosine",
    follows from alpha_bar(u) = cos²((u + 0.008)/1.008 · π/2), and no beta of it is above 0.999.

    Raises ValueError for an unknown name or too few steps, and TypeError for steps that are no int.
    """
    if name not in BETA_SCHEDULES:
        raise ValueError(f"noise_schedule: got {name!r}, allowed are {', '.join(map(repr, BETA_SCHEDULES))}")
    check_count("diffusion_steps", diffusion_steps, least=2)
    return BETA_SCHEDULES[name](diffusion_steps)


# ---- Respacing -------------------------------------------------------------------------------------------------------


def space_timesteps(diffusion_steps: int, timestep_respacing: str | int | Sequence[int] | None) -> list[int]:
    """The timesteps to keep out of ``range(diffusion_steps)``, ascending.

    ``""`` or None keeps all. ``"250"`` (or 250, or [250]) keeps 250, evenly spread, the first and the last included.
    ``"10,15,20"`` (or a list) cuts the range into one section per number, of (nearly) equal lengths. It spreads 10 steps
    over the first section, 15 over the second and 20 over the third. ``"ddim250"`` keeps 0, s, 2s … for the integer
    stride s that gives exactly 250, as Song et al. 2020 do.

    Raises ValueError where the range cannot give these steps, and the message names what it can give. Raises TypeError for
    a respacing of another type.
    """
    check_count("diffusion_steps", diffusion_steps, least=2)
    if isinstance(timestep_respacing, str) and timestep_respacing.startswith("ddim"):
        return _strided_timesteps(diffusion_steps, timestep_respacing)
    counts = _section_counts(diffusion_steps, timestep_respacing)
    length, longer = divmod(diffusion_steps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = length + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"timestep_respacing: got {timestep_respacing!r}, which wants {count} steps from section {i} "
                f"of {len(counts)}; allowed are 1 to {size}, its share of {diffusion_steps} diffusion steps"
            )
        # The positions are a running sum, as in published sampling results. i·stride would round differently where a
        # position falls on one half.
        positions = accumulate(repeat((size - 1) / max(count - 1, 1), count - 1), initial=0.0)
        kept.extend(start + round(position) for position in positions)
        start += size
    return kept


def _section_counts(diffusion_steps: int, respacing: str | int | Sequence[int] | None) -> list[int]:
    if respacing is None or respacing == "":
        return [diffusion_steps]
    if isinstance(respacing, str):
        parts = respacing.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"timestep_respacing: got {respacing!r}, allowed are '' (all steps), 'N', 'N,M,…' (steps per "
                "section) and 'ddimN' (integer stride)"
            )
        return [int(part) for part in parts]
    if not isinstance(respacing, int | Sequence):
        raise TypeError(f"timestep_respacing: got {respacing!r}, allowed is a str, an int or a list of ints")
    counts = [respacing] if isinstance(respacing, int) else [*respacing]
    for count in counts:
        check_count("timestep_respacing", count, least=1)
    if not counts:
        raise ValueError("timestep_respacing: got an empty list, allowed is one step count per section")
    return counts


def _strided_timesteps(diffusion_steps: int, respacing: str) -> list[int]:
    number = respacing.removeprefix("ddim")
    if not number.isdecimal():
        raise ValueError(f"timestep_respacing: got {respacing!r}, allowed after 'ddim' is a number, as in 'ddim50'")
    # Stride s keeps ceil(T / s) steps. If any stride keeps N, then ceil(T / N) does, and it is the smallest.
    wanted = int(number)
    if wanted > 0:
        kept = range(0, diffusion_steps, -(-diffusion_steps // wanted))
        if len(kept) == wanted:
            return list(kept)
    possible = sorted({len(range(0, diffusion_steps, stride)) for stride in range(1, diffusion_steps)})
    nearest = sorted(sorted(possible, key=lambda count: abs(count - wanted))[:4])
    raise ValueError(
        f"timestep_respacing: got {respacing!r}, but no integer stride over {diffusion_steps} steps keeps "
        f"exactly {wanted}; the nearest that work are {', '.join(f'ddim{count}' for count in nearest)}"
    )


def half_log_snr(alphas_cumprod: FloatArray) -> FloatArray:
    """λ = ½ log(ᾱ / (1 − ᾱ)), of the shape of ᾱ."""
    return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))


def uniform_log_snr_timesteps(betas: FloatArray, steps: int) -> list[float]:
    """``steps`` timesteps, ascending, at equal distances in λ, from the first of ``betas`` (T,) to the last, both included.

    They are fractions, because this function takes λ as linear in t between two timesteps. Raises ValueError for fewer
    than 2 steps.
    """
    check_count("timestep_respacing", steps, least=2)
    half = half_log_snr(np.cumprod(1 - betas))
    wanted = np.linspace(half[0], half[-1], steps)
    # λ falls with t, and np.interp wants ascending points, so λ goes in with its sign turned.
    timesteps = np.interp(-wanted, -half, np.arange(len(betas)))
    timesteps[[0, -1]] = 0, len(betas) - 1
    return timesteps.tolist()


def _alphas_cumprod_at(betas: FloatArray, timesteps: Sequence[float]) -> FloatArray:
    alphas_cumprod = np.cumprod(1 - betas)
    if all(isinstance(timestep, int) for timestep in timesteps):
        return alphas_cumprod[np.array(timesteps, dtype=np.int64)]
    half = np.interp(timesteps, np.arange(len(betas)), half_log_snr(alphas_cumprod))
    return 1 / (1 + np.exp(-2 * half))


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """The schedule at the timesteps of a batch. Each field is (B, 1, …, 1), to broadcast against x (B, C, …).

    ᾱ is the cumulative product of 1 − β. ᾱ_prev and ᾱ_next are its neighbours: 1 before the first step, 0 after the last.
    β̃ = β·(1 − ᾱ_prev)/(1 − ᾱ) is the variance of q(x_{t−1} | x_t, x_0). The solver coefficients are those of
    DPM-Solver++(2M): x_{t−1} = state·x_t + data·(x̂_0 + history·(x̂_0 − x̂_0 of the step before)).
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod_next: Tensor
    one_minus_alphas_cumprod: Tensor
    one_minus_alphas_cumprod_prev: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod_next: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    log_betas: Tensor
    fixed_large_variance: Tensor
    fixed_large_log_variance: Tensor
    solver_state_coef: Tensor
    solver_data_coef: Tensor
    solver_history_coef: Tensor


class NoiseSchedule:
    """A chain of betas, the original timestep of each of its steps, and the tables of :class:`Coefficients`.

    ``betas``, (T,) in (0, 1), belong to the original chain. ``timesteps`` are those to keep, ascending (default: all). A
    fraction lies between two timesteps, where the schedule takes λ = ½ log(ᾱ/(1 − ᾱ)) as linear. Over the kept steps the
    betas become β_i = 1 − ᾱ_i / ᾱ_{i−1}, so that ᾱ at a kept step stays what it was.

    With T' kept steps, the attributes are ``num_timesteps`` (T'), ``original_num_steps`` (T), ``timestep_map`` (a list of
    T' numbers), ``betas`` and ``alphas_cumprod`` (both (T',) float64, read-only).

    Raises ValueError for betas outside (0, 1), for timesteps outside the chain or unsorted, and for a chain of fewer than
    two steps, whose only step would have no posterior variance.
    """

    def __init__(self, betas: npt.ArrayLike, timesteps: Sequence[float] | None = None) -> None:
        original = np.asarray(betas, dtype=np.float64)
        if original.ndim != 1 or not ((original > 0) & (original < 1)).all():
            raise ValueError(f"betas: got shape {original.shape}, allowed is one axis of values inside (0, 1)")
        self.original_num_steps = len(original)
        self.timestep_map: list[Any] = list(range(len(original)) if timesteps is None else timesteps)
        _check_kept(self.timestep_map, self.original_num_steps)
        self.num_timesteps = len(self.timestep_map)
        self.alphas_cumprod = _alphas_cumprod_at(original, self.timestep_map)
        respaced = 1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])
        whole = self.timestep_map == list(range(len(original)))
        self.betas = original.copy() if whole else respaced
        self._packed = _pack(self.betas, self.alphas_cumprod)
        for table in (self.betas, self.alphas_cumprod):
            table.flags.writeable = False
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._timestep_maps: dict[torch.device, Tensor] = {}

    @property
    def alphas_cumprod_prev(self) -> FloatArray:
        """ᾱ of the step before, (T',): 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def alphas_cumprod_next(self) -> FloatArray:
        """ᾱ of the step behind, (T',): 0 behind the last."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    def table(self, name: str) -> FloatArray:
        """A field of :class:`Coefficients` over all steps, (T',) float64."""
        return self._packed[:, Coefficients._fields.index(name)].copy()

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """The coefficients at steps t, (B,) int64 on x's device. They have x's dtype and broadcast against x (B, …)."""
        key = (t.device, x.dtype)
        if key not in self._tables:
            self._tables[key] = _constant(self._packed, x.dtype, t.device)
        rows = self._tables[key][t]
        return Coefficients(*rows.view(*rows.shape, *[1] * (x.ndim - 1)).unbind(1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps of the original chain that steps t, (B,) int64, stand for: (B,) int64, or float32 for fractions."""
        if t.device not in self._timestep_maps:
            kept = np.array(self.timestep_map)
            dtype = torch.int64 if np.issubdtype(kept.dtype, np.integer) else torch.float32
            self._timestep_maps[t.device] = _constant(kept, dtype, t.device)
        return self._timestep_maps[t.device][t]


def _check_kept(kept: list[Any], steps: int) -> None:
    if len(kept) < 2:
        raise ValueError(f"timestep_respacing: got {len(kept)} step(s) out of {steps}, a chain needs at least 2")
    if kept[0] < 0 or kept[-1] > steps - 1 or any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"timesteps: got {kept}, allowed are ascending steps out of 0..{steps - 1}")


def _pack(betas: FloatArray, alphas_cumprod: FloatArray) -> FloatArray:
    """Every field of Coefficients as a column, (T, number of fields), so that one gather serves a whole batch."""
    prev = np.append(1.0, alphas_cumprod[:-1])
    following = np.append(alphas_cumprod[1:], 0.0)
    posterior_variance = betas * (1 - prev) / (1 - alphas_cumprod)
    # β̃ is 0 at the first step. Its logarithm and the large variance take the second step's β̃ there.
    clipped_variance = np.append(posterior_variance[1], posterior_variance[1:])
    large_variance = np.append(posterior_variance[1], betas[1:])
    tables = {
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_alphas_cumprod_prev": np.sqrt(prev),
        "sqrt_alphas_cumprod_next": np.sqrt(following),
        "one_minus_alphas_cumprod": 1 - alphas_cumprod,
        "one_minus_alphas_cumprod_prev": 1 - prev,
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod_next": np.sqrt(1 - following),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(alphas_cumprod / prev) / (1 - alphas_cumprod),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(clipped_variance),
        "log_betas": np.log(betas),
        "fixed_large_variance": large_variance,
        "fixed_large_log_variance": np.log(large_variance),
        **_solver_coefficients(alphas_cumprod, prev),
    }
    return np.stack([tables[name] for name in Coefficients._fields], axis=1)


def _solver_coefficients(alphas_cumprod: FloatArray, prev: FloatArray) -> dict[str, FloatArray]:
    """The coefficients of DPM-Solver++(2M), algorithm 2 of Lu et al. 2022 (arXiv 2211.01095).

    With α = √ᾱ, σ = √(1 − ᾱ) and h = λ_{t−1} − λ_t, they are σ_{t−1}/σ_t for the state, −α_{t−1}·(e^{−h} − 1) for the
    data and h/(2·h of the step before) for the history. The history counts 0 at two steps of a trajectory: the first has
    nothing before it, and the last, to λ = ∞, is of first order.
    """
    half = half_log_snr(alphas_cumprod)
    h = np.append(np.inf, half[:-1] - half[1:])
    history = np.zeros_like(h)
    history[1:-1] = h[1:-1] / (2 * h[2:])
    return {
        "solver_state_coef": np.sqrt((1 - prev) / (1 - alphas_cumprod)),
        "solver_data_coef": -np.sqrt(prev) * np.expm1(-h),
        "solver_history_coef": history,
    }


def _constant(values: npt.NDArray[np.generic], dtype: torch.dtype, device: torch.device) -> Tensor:
    # from_numpy(), unlike tensor(), does not obey a default device. The cast comes first, because some devices have no
    # float64.
    return torch.from_numpy(values).to(dtype).to(device)
