"""Statistics of a reference: what files are read, and what is no covariance."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from ditkernels.commands.eval import report
from ditkernels.evaluation.evaluate import evaluate, load_reference
from ditkernels.evaluation.features import Features
from ditkernels.evaluation.metrics import Gaussian, frechet_distance

WIDTH = 6
FEATURES = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(3)) @ torch.diag(torch.arange(1.0, WIDTH + 1))
STATISTICS = {"mu": FEATURES.double().numpy().mean(0), "sigma": np.cov(FEATURES.double().numpy(), rowvar=False)}


def npz(path: Path, **arrays: object) -> Path:
    # By an open file, since numpy adds its own suffix to a name.
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return path


def of_torch_fidelity(path: Path, dtype: torch.dtype = torch.float64) -> Path:
    torch.save(fid_features_to_statistics(FEATURES.to(dtype)), path)
    return path


READ: dict[str, Callable[[Path], Path]] = {
    "pytorch_fid": lambda folder: npz(folder / "a.npz", **STATISTICS),
    "clean_fid": lambda folder: npz(folder / "a.npz", **{k: v.astype(np.float32) for k, v in STATISTICS.items()}),
    "upper_case": lambda folder: npz(folder / "A.NPZ", **STATISTICS),
    "adm": lambda folder: npz(folder / "a.npz", **STATISTICS, mu_s=STATISTICS["mu"], sigma_s=STATISTICS["sigma"]),
    "odd_entry": lambda folder: npz(folder / "a.npz", **STATISTICS, notes=np.array([{"by": "somebody"}], dtype=object)),
    "fortran": lambda folder: npz(folder / "a.npz", mu=STATISTICS["mu"], sigma=np.asfortranarray(STATISTICS["sigma"])),
    "torch_fidelity": lambda folder: of_torch_fidelity(folder / "a.pt"),
    "torch_fidelity_fp32": lambda folder: of_torch_fidelity(folder / "a.PT", torch.float32),
}


@pytest.mark.parametrize("kind", READ)
def test_statistics_are_read(kind: str, tmp_path: Path) -> None:
    found = load_reference(READ[kind](tmp_path))
    assert found.pool is not None
    np.testing.assert_allclose(found.pool.mu, STATISTICS["mu"], rtol=1e-5)
    np.testing.assert_allclose(found.pool.sigma, STATISTICS["sigma"], rtol=1e-4, atol=1e-4)
    assert (found.spatial is not None) == (kind == "adm")
    assert (found.pool_features, found.count) == (None, None)


def triangular(sigma: np.ndarray) -> np.ndarray:
    return np.triu(sigma)


def indefinite(sigma: np.ndarray) -> np.ndarray:
    return sigma - 2 * np.eye(WIDTH)


@pytest.mark.parametrize(
    "spoil, said", [(triangular, "sigma is no covariance: it is not symmetric"), (indefinite, "it has the eigenvalue -")]
)
@pytest.mark.parametrize("names", [("mu", "sigma"), ("mu_s", "sigma_s")])
def test_what_is_no_covariance_is_refused(
    spoil: Callable[[np.ndarray], np.ndarray], said: str, names: tuple[str, str], tmp_path: Path
) -> None:
    spoiled = dict(zip(names, (STATISTICS["mu"], spoil(STATISTICS["sigma"]))))
    path = npz(tmp_path / "bad.npz", **{**STATISTICS, **spoiled})
    with pytest.raises(ValueError, match=f"bad.npz: {names[1]} is no covariance") as raised:
        load_reference(path)
    assert said.removeprefix("sigma ") in str(raised.value)


@pytest.mark.parametrize("error", [0.5e-5, 2e-5])
def test_what_summing_in_fp32_leaves_is_let_pass(error: float, tmp_path: Path) -> None:
    sigma = STATISTICS["sigma"].copy()
    sigma[0, 1] += error * np.abs(sigma).max()
    path = npz(tmp_path / "a.npz", mu=STATISTICS["mu"], sigma=sigma)
    if error < 1e-5:
        assert load_reference(path).pool is not None
    else:
        with pytest.raises(ValueError, match="not symmetric"):
            load_reference(path)


def test_files_that_are_no_statistics_are_named(tmp_path: Path) -> None:
    pickled = tmp_path / "a.pkl"
    pickled.write_bytes(pickle.dumps(STATISTICS))
    with pytest.raises(ValueError, match=r"a.pkl: a pickle is not read.*np.savez"):
        load_reference(pickled)
    torch.save({"mu": STATISTICS["mu"], "sigma": STATISTICS["sigma"], "by": Path("x")}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: holds more than arrays .*np.savez"):
        load_reference(tmp_path / "b.pt")
    torch.save([1.0], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: got list, allowed is a dict of mu and sigma"):
        load_reference(tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"d.pt: no such file"):
        load_reference(tmp_path / "d.pt")
    with pytest.raises(ValueError, match=r"e.npz: got no sigma, allowed are mu and sigma together"):
        load_reference(npz(tmp_path / "e.npz", mu=STATISTICS["mu"]))
    with pytest.raises(ValueError, match=r"f.npz: mu, sigma: got int64 and float64"):
        load_reference(npz(tmp_path / "f.npz", mu=np.arange(WIDTH), sigma=STATISTICS["sigma"]))


def test_a_distance_of_equals_is_zero_and_one_below_is_an_error() -> None:
    gaussian = Gaussian(**STATISTICS)
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(gaussian, gaussian) >= 0
    negative = Gaussian(gaussian.mu, gaussian.sigma - 20 * np.eye(WIDTH))
    with pytest.raises(ValueError, match="below zero: one of the two covariances is none"):
        frechet_distance(negative, gaussian)
    other = Gaussian(gaussian.mu + 1, 2 * gaussian.sigma + np.eye(WIDTH))
    root = scipy.linalg.sqrtm(gaussian.sigma @ other.sigma).real
    expected = WIDTH + np.trace(gaussian.sigma + other.sigma - 2 * root)
    assert frechet_distance(gaussian, other) == pytest.approx(expected, rel=1e-9)


def test_one_split_has_no_spread() -> None:
    features = Features(FEATURES, None, FEATURES)
    one, many = (evaluate(features, Features(FEATURES), split_size=size) for size in (500, 50))
    assert one.inception_score_std is None
    assert "±" not in report(one)
    assert many.inception_score_std is not None
    assert f"± {many.inception_score_std:.4f}" in report(many)
