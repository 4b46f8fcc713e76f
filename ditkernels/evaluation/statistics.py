"""Statistics of a reference as people have them: files of pytorch-fid, clean-fid, EDM, the ADM suite and torch-fidelity."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditkernels.evaluation.metrics import FloatArray, Gaussian
from ditkernels.files import first_line

NAMES = {"mu": "sigma", "mu_s": "sigma_s"}
"""Mean and covariance, of the pool features and of the spatial ones."""

ASYMMETRY = NEGATIVE = 1e-5
"""How far a covariance may be from symmetric, and its eigenvalues below zero, beside its largest entry and eigenvalue: what was
summed in fp32 is."""

# What torch-fidelity's files hold beside floats: arrays of numpy.
_ARRAYS: list[Any] = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64)),
]

_HOW_TO_CONVERT = "np.savez('statistics.npz', mu=mean, sigma=covariance) makes one"


def of_npz(path: Path, held: Collection[str]) -> dict[str, Gaussian]:
    """The Gaussians in an ``.npz`` with the entries ``held``, by the name of the mean; none where it has no statistics.

    Raises:
        ValueError: one of a pair is missing, or they are no mean and covariance; the message names the file.
    """
    if not {*NAMES, *NAMES.values()} & set(held):
        return {}
    with np.load(path) as arrays:
        return _gaussians(path, held, arrays.__getitem__)


def of_pt(path: Path) -> dict[str, Gaussian]:
    """The Gaussian in a file that torch-fidelity keeps of a dataset. Nothing but arrays and tensors is unpickled.

    Raises:
        ValueError: no such file, another content, or as ``of_npz``.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: holds more than arrays ({first_line(error)}); {_HOW_TO_CONVERT}") from error
    if not isinstance(content, Mapping) or "mu" not in content:
        raise ValueError(f"{path}: got {type(content).__name__}, allowed is a dict of mu and sigma, as torch-fidelity keeps it")
    return _gaussians(path, content, lambda name: np.asarray(content[name]))


def refuse_pickle(path: Path) -> None:
    """Raises ValueError on a pickle, which runs whatever its author wrote."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise ValueError(
            f"{path}: a pickle is not read, since it may run any program; load it where you trust it: {_HOW_TO_CONVERT}"
        )


def _gaussians(path: Path, held: Collection[str], read: Callable[[str], Any]) -> dict[str, Gaussian]:
    found = {}
    for pair in NAMES.items():
        missing = [name for name in pair if name not in held]
        if len(missing) == 1:
            raise ValueError(f"{path}: got no {missing[0]}, allowed are {' and '.join(pair)} together")
        if not missing:
            found[pair[0]] = _checked(path, pair, *(read(name) for name in pair))
    return found


def _checked(path: Path, pair: tuple[str, str], mean: Any, covariance: Any) -> Gaussian:
    what = f"{path}: {', '.join(pair)}"
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{what}: got {mean.dtype} and {covariance.dtype}, allowed is floating point")
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(f"{what}: got shapes {mean.shape} and {covariance.shape}, allowed are (F,) and (F, F)")
    gaussian = Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
    if not all(np.isfinite(array).all() for array in gaussian):
        raise ValueError(f"{what}: got values that are not finite")
    _check_covariance(f"{path}: {pair[1]}", gaussian.sigma)
    return gaussian


def _check_covariance(what: str, sigma: FloatArray) -> None:
    apart, largest = np.abs(sigma - sigma.T).max(), np.abs(sigma).max()
    if apart > ASYMMETRY * largest:
        raise ValueError(f"{what} is no covariance: it is not symmetric, by {apart:.3g} beside entries up to {largest:.3g}")
    values = np.linalg.eigvalsh(sigma)
    if values[0] < -NEGATIVE * values[-1]:
        raise ValueError(f"{what} is no covariance: it has the eigenvalue {values[0]:.3g}, the largest is {values[-1]:.3g}")
