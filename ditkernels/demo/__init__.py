"""The demo: a small DiT learns real handwritten digits, draws some, and a classifier reads them."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ditkernels._version import __version__
from ditkernels.data.digits import LabelledImages, load_digits
from ditkernels.demo.pictures import CLASSES, PER_CLASS, Read, picture_of_samples
from ditkernels.diagnostics import check
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.files import write_json
from ditkernels.reference import DiT
from ditkernels.runtime import pinned_threads, resolve_device
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.drawing import sample_progressive
from ditkernels.training.config import TrainConfig
from ditkernels.training.log import METRICS, read_metrics
from ditkernels.training.plot import draw_losses, new_figure, save
from ditkernels.training.trainer import train

# In the folder of a run that a demo has made, and another demo may replace.
MARK = ".demo"
TRAINING = TrainConfig(
    data_path="digits",
    vae="none",
    image_size=8,
    num_classes=CLASSES,
    num_workers=0,
    model="DiT-S/2",
    hidden_size=64,
    depth=4,
    num_heads=4,
    global_batch_size=64,
    learning_rate=3e-3,
    ema_decay=0.995,
    log_every=50,
)
# All channels are guided, since there is only one; x_0 is clipped, since these are pixels.
SAMPLING = SampleConfig(guided_channels=None, clip_denoised=True)

Classifier = Callable[[Tensor], Tensor]


def demonstrate(out: Path, *, steps: int, seed: int, device: str, guidance: float, sampling_steps: int) -> bool:
    """Checks, trains, samples, scores, draws.

    On a CPU the same arguments write the same samples.png and loss.png, byte for byte, however many cores it has.

    Args:
        out: folder to write to.
        steps: of training.
        seed: the same seed gives the same picture.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        guidance: scale; 1 is none.
        sampling_steps: of DDPM, 1..1000.

    Returns:
        False if the check of the ops fails on this machine; nothing is trained then.

    Raises:
        ValueError: an argument out of range, a device that is not there, or a run in ``out`` that no demo has made.
        ImportError: scikit-learn or matplotlib is not installed.
    """
    _require_demo_extra()
    found = resolve_device(device)
    training = replace(TRAINING, steps=steps, global_seed=seed, device=device, results_dir=str(out / "run"))
    sampling = replace(SAMPLING, guidance_scale=guidance, seed=seed)
    sampling_diffusion = create_diffusion(str(sampling_steps))
    _check_own(out)
    out.mkdir(parents=True, exist_ok=True)

    if not check.report(sys.stdout):
        print("The check failed, so nothing is trained: its results could not be trusted.")
        return False
    # Rounding depends on the number of threads, so the picture would depend on the number of cores. A model
    # this small gains little from more, and loses much when another process competes for them.
    with pinned_threads(1):
        _demonstrate(out, found, training, sampling, sampling_diffusion)
    return True


def _demonstrate(
    out: Path,
    device: torch.device,
    training: TrainConfig,
    sampling: SampleConfig,
    sampling_diffusion: GaussianDiffusion,
) -> None:
    digits, held_out = load_digits()
    classify = _train_classifier(digits)
    run = Path(training.results_dir)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / MARK).touch()
    print(f"\nTraining a DiT on {len(digits):,} handwritten digits, on {device}")
    with _Stopwatch() as training_time:
        trained = train(training)
    rows = read_metrics(Path(training.results_dir) / METRICS)

    print(f"Drawing {CLASSES * PER_CLASS} digits with guidance, and as many without")
    with _Stopwatch() as sampling_time:
        guided_steps = _draw(trained.ema, sampling_diffusion, sampling)
        unguided_steps = _draw(trained.ema, sampling_diffusion, replace(sampling, guidance_scale=1.0))

    guided = Read(guided_steps[-1], _wanted_labels(), classify(guided_steps[-1]))
    unguided = Read(unguided_steps[-1], _wanted_labels(), classify(unguided_steps[-1]))
    real = Read(held_out.images, held_out.labels, classify(held_out.images))
    metrics = {
        "guided_sample_accuracy": guided.accuracy,
        "unguided_sample_accuracy": unguided.accuracy,
        "real_accuracy": real.accuracy,
        "training_seconds": round(training_time.seconds, 2),
        "images_per_second": round(trained.step * training.global_batch_size / training_time.seconds, 1),
        "sampling_seconds": round(sampling_time.seconds, 2),
        "last_loss": rows[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in trained.ema.parameters()),
        "device": str(device),
        "machine": platform.machine(),
        "versions": {
            "ditkernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "training": asdict(training),
        "sampling": {**asdict(sampling), "steps": sampling_diffusion.num_timesteps},
    }
    write_json(out / "metrics.json", metrics)
    save(picture_of_samples(guided, unguided, real, guided_steps, sampling), out / "samples.png")
    losses = new_figure(width=8.0, height=4.0)
    draw_losses(losses.add_axes((0.09, 0.14, 0.88, 0.76)), {f"mean of {training.log_every} steps": rows})
    save(losses, out / "loss.png")

    print(f"\nguided_sample_accuracy {guided.accuracy:.3f}   (drawn with guidance {sampling.guidance_scale:g})")
    print(f"unguided_sample_accuracy {unguided.accuracy:.3f}")
    print(f"real_accuracy {real.accuracy:.3f}   (the same classifier on {len(held_out)} held-out real digits)")
    for name in ("samples.png", "loss.png", "metrics.json", "run/"):
        print(f"wrote {out / name}")


# ---- Parts of the run ------------------------------------------------------------------------------------------------


def _check_own(out: Path) -> None:
    """Raises ValueError where ``out`` holds a run that no demo has made, which this one would replace."""
    run = out / "run"
    if run.exists() and any(run.iterdir()) and not (run / MARK).exists():
        raise ValueError(f"out: {run} was made by no demo and would be replaced; remove it, or give another folder")


def _require_demo_extra() -> None:
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install ditkernels[demo]")


class _Stopwatch:
    seconds = 0.0

    def __enter__(self) -> _Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


def _train_classifier(digits: LabelledImages) -> Classifier:
    """A support vector machine on the real digits: exact, quick, and not a network like the one it judges."""
    from sklearn.svm import SVC

    machine = SVC(C=10.0, gamma=0.064).fit(digits.images.flatten(1).numpy(), digits.labels.numpy())

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(machine.predict(images.flatten(1).numpy()))

    return classify


def _wanted_labels() -> Tensor:
    return torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def _draw(model: DiT, diffusion: GaussianDiffusion, config: SampleConfig) -> list[Tensor]:
    steps = sample_progressive(model, diffusion, _wanted_labels(), config, progress=True)
    return [state.cpu() for state in steps]
