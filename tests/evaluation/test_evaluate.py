"""The metrics against torch-fidelity's and scipy's, the sources they read, and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ditkernels import cli
from ditkernels.checkpoints.format import state_sha256
from ditkernels.diffusion import create_diffusion
from ditkernels.evaluation import images as sources
from ditkernels.evaluation.evaluate import Reference, evaluate, load_reference
from ditkernels.evaluation.features import Features, Inception, widths_of
from ditkernels.evaluation.metrics import Gaussian, GaussianSum, InceptionScore, frechet_distance
from ditkernels.evaluation.monitor import Monitor
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.generate import Batches, Job, generate
from ditkernels.sampling.labels import Labels
from tests.numerics import METRIC_AGREEMENT
from tests.sampling.test_sampler import random_model


def random_features(count, seed, *, width=24, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return Features(
        torch.randn(count, width, generator=generator) @ mix + shift,
        torch.randn(count, 15, generator=generator).abs(),
        3 * torch.randn(count, 7, generator=generator),
    )


def as_images(generator, count, size=8):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def brightness(images):
    """A stand-in for Inception: means of the rows, channel by channel, and of the columns."""
    x = images.float()
    return {"pool": x.mean(3).flatten(1), "spatial": x.mean(2).flatten(1), "logits": x.mean((2, 3)) / 20}


def prc(samples, reference):
    settings = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    found = prc_features_to_metric(samples, reference, **settings)
    return found["precision"], found["recall"]


# ---- Against other implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.7, 100.0])
def test_all_metrics_equal_torch_fidelitys_and_scipys(shift):
    samples, reference = random_features(600, 1, shift=shift), random_features(450, 2)
    found = evaluate(samples, reference, split_size=100)
    ours = (found.inception_score, found.inception_score_std)

    statistics = [fid_features_to_statistics(features.pool.double()) for features in (samples, reference)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    score = isc_features_to_metric(samples.logits, splits=6, shuffle=False)
    assert found.fid == pytest.approx(fid, rel=METRIC_AGREEMENT)
    assert ours == pytest.approx(tuple(score.values()), rel=METRIC_AGREEMENT)
    expected = prc(samples.pool, reference.pool)
    assert (found.precision, found.recall) == pytest.approx(expected, abs=METRIC_AGREEMENT)
    assert found.sfid == pytest.approx(scipy_distance(samples.spatial, reference.spatial), rel=METRIC_AGREEMENT)
    assert (found.count, found.reference_count, found.absent) == (600, 450, {})


def scipy_distance(first, second):
    (mu1, sigma1), (mu2, sigma2) = ((x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (first, second))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(-1e4, 1e4))
def test_a_gaussian_summed_in_batches_is_that_of_the_whole(sizes, offset):
    features = torch.randn(sum(sizes), 3, dtype=torch.float64) + offset
    total = GaussianSum("fid")
    for part in features.split(sizes):
        total.add(part)
    found = total.gaussian()
    np.testing.assert_allclose(found.mu, features.mean(0).numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(features.numpy(), rowvar=False), rtol=1e-6, atol=1e-9)


def test_the_distance_to_itself_is_zero_even_where_the_covariance_is_singular():
    features = torch.randn(5, 30, dtype=torch.float64)
    gaussian = Gaussian(features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False))
    assert abs(frechet_distance(gaussian, gaussian)) < 1e-6 * np.trace(gaussian.sigma)


@pytest.mark.parametrize("sizes", [[100], [7, 93], [33, 33, 34]])
def test_the_score_does_not_depend_on_batches_and_its_last_split_may_be_short(sizes):
    logits = torch.randn(100, 6)
    score = InceptionScore(40)
    for part in logits.split(sizes):
        score.add(part)
    by_split = [next(iter(isc_features_to_metric(part, 1, False).values())) for part in logits.split(40)]
    assert score.score() == pytest.approx((np.mean(by_split), np.std(by_split)), rel=METRIC_AGREEMENT)


def test_order_by_class_is_noticed_and_lowers_the_score():
    labels = torch.arange(1000) % 10
    logits = 8.0 * torch.eye(10)[labels] + torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    pool = torch.randn(1000, 4)
    ordered = labels.argsort()
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for order, expected in ((slice(None), "mixed"), (shuffled, "mixed"), (ordered, "by class")):
        found = evaluate(Features(pool, None, logits[order]), Features(pool), split_size=200)
        assert found.order == expected
        assert any("ordered by class" in note for note in found.notes) == (expected == "by class")
        assert (found.inception_score > 8) == (expected == "mixed")
    assert evaluate(Features(pool, None, logits[ordered]), Features(pool), split_size=1000).order == "unknown"


# ---- Sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(5)
    return as_images(generator, 40), as_images(generator, 30)


def write_npz(path, images, **more):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def test_every_source_gives_the_same_numbers(images, tmp_path):
    from PIL import Image

    samples, reference = images
    expected = evaluate(Features(**brightness(samples)), Features(**brightness(reference))).to_json()
    npz = write_npz(tmp_path / "samples.npz", samples)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, image in enumerate(samples):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04}.png")
    features = tmp_path / "features.npz"
    np.savez(features, **{name: array.numpy() for name, array in brightness(samples).items()})
    known = write_npz(tmp_path / "reference.npz", reference)
    for source in (npz, folder, features, str(npz), iter(samples.split(7))):
        found = evaluate(source, known, extractor=brightness, batch_size=7).to_json()
        for name in expected.keys() - {"measured_with"}:
            value = expected[name]
            assert found[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_statistics_come_before_the_images_beside_them(images, tmp_path):
    samples, reference = images
    whole = load_reference(Features(**brightness(reference)))
    pairs = {
        "mu": whole.pool.mu,
        "sigma": whole.pool.sigma,
        "mu_s": whole.spatial.mu,
        "sigma_s": whole.spatial.sigma,
    }
    expected = evaluate(iter([samples]), whole, extractor=brightness)
    both = write_npz(tmp_path / "both.npz", reference[:20], **pairs)
    found = evaluate(iter([samples]), both, extractor=brightness)
    assert (found.fid, found.sfid) == pytest.approx((expected.fid, expected.sfid), rel=1e-9)
    assert found.reference_count == 20
    np.savez(tmp_path / "only.npz", **pairs)
    found = evaluate(iter([samples]), tmp_path / "only.npz", extractor=brightness)
    assert (found.fid, found.sfid) == pytest.approx((expected.fid, expected.sfid), rel=1e-9)
    assert (found.precision, found.reference_count) == (None, None)
    assert found.absent == {"precision_recall": "the reference has statistics only"}


def test_images_are_read_in_batches(images, tmp_path):
    path, seen = write_npz(tmp_path / "samples.npz", images[0]), []

    def extractor(batch):
        seen.append(len(batch))
        return brightness(batch)["pool"]

    evaluate(path, Features(torch.randn(9, 24)), extractor=extractor, batch_size=16)
    assert seen == [16, 16, 8]


def test_the_command_prints_and_writes_the_numbers(images, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("my_features")
    module.brightness = brightness
    monkeypatch.setitem(sys.modules, "my_features", module)
    samples = write_npz(tmp_path / "samples.npz", images[0])
    (tmp_path / "metadata.json").write_text(json.dumps({"labels": {"scheme": "balanced"}}), encoding="utf-8")
    reference = tmp_path / "elsewhere"
    reference.mkdir()
    reference = write_npz(reference / "reference.npz", images[1])
    out = tmp_path / "eval.json"
    flags = ["--extractor", "my_features:brightness", "--json", str(out), "--device", "cpu"]
    assert cli.main(["eval", str(samples), str(reference), *flags]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))
    assert "40 images against 30 images; labels: balanced, order: unknown" in printed
    assert f"FID             {written['fid']:.4f}" in printed
    assert written["labels"] == {"scheme": "balanced"}
    assert cli.main(["eval", str(samples), str(reference)]) == 2
    assert "extractor: got none" in capsys.readouterr().err
    assert cli.main(["eval", str(samples), str(reference), "--extractor", "my_features:absent"]) == 2
    assert "allowed is MODULE:NAME" in capsys.readouterr().err


# ---- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the layout of the real ones; batch norms stay neutral, so that activations neither die nor explode."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def test_inceptions_features_have_the_suites_layout(weights):
    inception = Inception(weights)
    images = as_images(torch.Generator().manual_seed(0), 2, size=32)
    found = inception(images)
    assert [tuple(array.shape) for array in found] == [(2, 2048), (2, 2023), (2, 1008)]
    assert inception.widths == widths_of(found)
    assert inception.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    layer = inception.network.Mixed_6d.branch1x1
    seen = []
    layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    pool, logits = inception.network(images)
    assert torch.equal(found.pool, pool)
    assert torch.equal(found.logits, logits)
    assert seen[0].shape == (2, 192, 17, 17)
    # channels last, as TensorFlow flattens
    assert torch.equal(found.spatial[1, 17 * 7 * 3 + 7 * 5 + 2], seen[0][1, 2, 3, 5])
    torch.testing.assert_close(logits, pool @ inception.network.fc.weight.T)


def test_weights_that_are_not_inceptions_are_named(weights, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Inception(tmp_path / "missing.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights", encoding="utf-8")
    torch.save({"bad": types.SimpleNamespace}, tmp_path / "code.pth")
    for name in ("other", "list", "text", "code"):
        with pytest.raises(ValueError, match=f"{name}.pth does not hold Inception's weights"):
            Inception(tmp_path / f"{name}.pth")


# ---- Bad input -------------------------------------------------------------------------------------------------------

GOOD = Features(torch.randn(9, 4))


@pytest.mark.parametrize(
    "samples, message",
    [
        (Features(torch.randn(0, 4)), "samples: got no images, allowed is 1 or more"),
        (Features(torch.randn(9, 5)), "features: got 5 per image, but the reference has 4"),
        (Features(torch.full((9, 4), float("nan"))), "fid: got features that are not finite"),
        (Features(torch.randn(9, 4), None, torch.randn(8, 4)), r"features: logits: got shape \(8, 4\)"),
        (Features(torch.randn(9, 4, 1)), r"features: pool: got shape \(9, 4, 1\)"),
    ],
)
def test_features_that_cannot_be_compared_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        evaluate(samples, GOOD)


@pytest.mark.parametrize(
    "metric, message",
    [
        ("sfid", "sfid cannot be computed: the samples have no spatial features"),
        ("inception_score", "inception_score cannot be computed: the samples have no logits"),
        ("kid", "metrics: got kid, allowed are fid, sfid"),
    ],
)
def test_a_metric_that_cannot_be_computed_is_named(metric, message):
    with pytest.raises(ValueError, match=message):
        evaluate(GOOD, GOOD, metrics=["fid", metric])


def test_only_the_metrics_asked_for_are_computed():
    found = evaluate(GOOD, GOOD, metrics=["precision_recall"])
    assert found.fid is None
    assert found.precision == 1.0
    assert found.absent["fid"] == "not asked for"


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0: got dtype float32, allowed is uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0: got shape \(2, 3, 8, 8\)"),
        ({"arr_1": np.zeros((2, 8, 8, 3), np.uint8)}, "got arr_1, allowed are arr_0"),
        ({"arr_0": np.array([None])}, "got dtype object, allowed is uint8"),
    ],
)
def test_an_npz_of_another_layout_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "bad.npz", GOOD, extractor=brightness)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got shapes \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(3)}, "got no sigma, allowed are mu and sigma together"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "not finite"),
    ],
)
def test_statistics_of_another_layout_are_named(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        evaluate(GOOD, tmp_path / "bad.npz")


def test_a_path_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        evaluate(tmp_path / "missing.npz", GOOD)
    (tmp_path / "text.npz").write_text("not a zip", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text.npz is not an \.npz file"):
        evaluate(tmp_path / "text.npz", GOOD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        evaluate(tmp_path / "empty", GOOD, extractor=brightness)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        content = np.zeros((4, 8, 8, 3), np.uint8)
        header = content.tobytes()[:100]
        with archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": content.shape})
            file.write(header)
    with pytest.raises(ValueError, match="arr_0 ends early"):
        evaluate(tmp_path / "short.npz", GOOD, extractor=brightness)


def test_an_npz_in_the_order_of_fortran_is_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", arr_0=images)
    np.savez(tmp_path / "f.npz", arr_0=np.asfortranarray(images))
    for batches in zip(*(sources.npz_batches(tmp_path / name, 3) for name in ("c.npz", "f.npz")), strict=True):
        assert torch.equal(*batches)


def test_folders_are_read_as_in_training_and_what_is_passed_over_is_told(tmp_path):
    from PIL import Image

    from ditkernels.data.folder import ImageFolder

    root = tmp_path / "samples"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".ipynb_checkpoints").mkdir()
    (root / "notes.txt").write_text("no image", encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    grey = Image.fromarray((pixels[3, ..., 0].astype(np.uint16) << 8) + 7)
    Image.fromarray(pixels[0]).save(root / "a.webp", lossless=True)
    Image.fromarray(pixels[1]).save(root / "deep" / "b.tif")
    frames = [Image.fromarray(image) for image in pixels[1:3]]
    frames[0].save(root / "deep" / "c.gif", save_all=True, append_images=frames[1:])
    grey.save(root / "deep" / "er" / "d.png")
    folder = ImageFolder.scan(root, unconditional=True)
    notes = []
    (batch,) = sources.folder_batches(folder, 10, 1 << 28, notes)
    assert torch.equal(batch, torch.stack([folder.read(index, 8, 0).image for index in range(4)]))
    passed_over = [
        f"{root}: passed over 1 .txt, 1 hidden or of the system",
        f"{root}: of 1 animated images the first frames were taken",
    ]
    assert [*folder.notes, *notes] == passed_over
    assert evaluate(root, root, extractor=brightness, metrics=["fid"]).notes[:4] == 2 * passed_over


def test_a_truncated_image_is_named(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: damaged: "):
        evaluate(tmp_path, GOOD, extractor=brightness)


def test_images_of_different_size_in_a_folder_are_named(tmp_path):
    from PIL import Image

    for name, size in (("a", 8), ("b", 9)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"b.png: got 9 x 9, the images before it are 8 x 8"):
        evaluate(tmp_path, GOOD, extractor=brightness)


@pytest.mark.parametrize(
    "images, error",
    [(torch.zeros(2, 3, 8, 8), TypeError), (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ValueError)],
)
def test_streamed_batches_of_another_layout_are_named(images, error):
    with pytest.raises(error, match="images: got"):
        evaluate(iter([images]), GOOD, extractor=brightness)


def test_an_extractor_that_returns_something_else_is_named():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for value, error in (({"pools": images}, ValueError), ("no", TypeError), (images, TypeError)):
        with pytest.raises(error, match="features: "):
            evaluate(iter([images]), GOOD, extractor=lambda _images, value=value: value)


def test_a_reference_is_read_once(images):
    reference = load_reference(iter([images[1]]), extractor=brightness)
    assert isinstance(reference, Reference)
    first = evaluate(iter([images[0]]), reference, extractor=brightness)
    assert evaluate(iter([images[0]]), reference, extractor=brightness) == first


# ---- While training --------------------------------------------------------------------------------------------------


def monitor_of(model, images, **changes):
    settings = {
        "diffusion": create_diffusion("3"),
        "config": SampleConfig(guidance_scale=2.0),
        "labels": Labels("balanced", (0, 1, 2)),
        "batches": Batches(10, 4),
        "reference": load_reference(iter([images]), extractor=brightness),
        "extractor": brightness,
    }
    return Monitor(**{**settings, **changes})


def test_a_monitor_measures_what_the_files_would_hold(tmp_path):
    model = random_model(channels=1)
    images = as_images(torch.Generator().manual_seed(1), 30, size=6)[:, :, :4]
    monitor = monitor_of(model, images)
    job = Job(monitor.labels, monitor.config, monitor.batches, formats=("npz",))
    generate(model, monitor.diffusion, job, tmp_path, progress=False)
    expected = evaluate(tmp_path / "samples.npz", monitor.reference, extractor=brightness, batch_size=4)
    found = monitor(model)
    assert found.count == 10
    # The job recorded no checkpoint and no steps.
    told = {name: found.measured_with[name] for name in ("weights_sha256", "weights", "steps")}
    assert told == {"weights_sha256": state_sha256(model.state_dict()), "weights": "ema", "steps": "3"}
    assert expected.measured_with | told == found.measured_with
    assert dataclasses.replace(found, measured_with=expected.measured_with) == expected
    assert expected.labels["scheme"] == "balanced"


def test_a_monitor_draws_the_same_every_time_and_leaves_the_random_state():
    model = random_model(channels=1)
    images = as_images(torch.Generator().manual_seed(1), 30, size=6)[:, :, :4]
    state = torch.get_rng_state()
    first = monitor_of(model, images)(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert monitor_of(model, images)(model) == first
    with pytest.raises(ValueError, match="train mode"):
        monitor_of(model, images)(random_model(channels=1).train())


def test_a_monitor_decodes_latents():
    model = random_model(channels=4)
    images = as_images(torch.Generator().manual_seed(1), 30, size=6)[:, :, :4]
    seen = []

    def decode(latents):
        seen.append(tuple(latents.shape))
        return latents[:, :3].tanh()

    monitor_of(model, images, decode=decode)(model)
    assert seen == [(4, 4, 4, 6), (4, 4, 4, 6), (2, 4, 4, 6)]
