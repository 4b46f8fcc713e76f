"""What a run measures of its weights while it trains: the loss on held-out images, a grid of samples, an evaluation's metrics.

All of it is a function of the weights, with noise that is always the same. What is due at a step comes after the step's checkpoint,
so an error in it costs nothing, and a run that goes on from there makes up for what is missing. A signal to any rank ends it on
all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ditkernels.data.order import Batch, Batches
from ditkernels.data.source import TrainingData
from ditkernels.data.vae import VAE
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.evaluation.monitor import Monitor
from ditkernels.evaluation.record import differences
from ditkernels.evaluation.sets import NUMBERS
from ditkernels.reference import DiT
from ditkernels.rng import Stream, below, normals
from ditkernels.runtime import StopSignal, World, gather_unless_stopped
from ditkernels.sampling.config import SampleConfig, guided_channels
from ditkernels.sampling.drawing import last_unless_stopped, sample_progressive
from ditkernels.sampling.outputs import Pixels, grid_of, pixels_of, write_png
from ditkernels.training.config import TrainConfig
from ditkernels.training.distributed import Parallel
from ditkernels.training.ema import EMA
from ditkernels.training.log import MEASURED_WITH, METRICS, RunLog, read_metrics

# The kinds, and what a row of metrics.jsonl has of those that have one.
VALIDATION, SAMPLES, EVALUATION = "validation", "samples", "evaluation"
COLUMNS = {VALIDATION: "validation_loss", EVALUATION: "evaluated_images"}
SEED = 0  # of validation, whatever the run's

logger = logging.getLogger(__name__)


class Validation(NamedTuple):
    """The loss on held-out images.

    Attributes:
        average, raw: mean loss of the moving average, and of the weights themselves.
        images: how many it was taken of.
        passes: how often each held-out image is among them; 1 where a part of them is taken.
    """

    average: float
    raw: float
    images: int
    passes: int

    def row(self, step: int) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {
            "step": step,
            "validation_loss": self.average,
            "validation_loss_raw": self.raw,
            "validation_images": self.images,
            "validation_passes": self.passes,
        }


class Evaluated(Protocol):
    """A trainer, as far as its weights are measured."""

    config: TrainConfig
    data: TrainingData
    vae: VAE | None
    world: World
    parallel: Parallel
    model: DiT
    ema: EMA[DiT]
    device: torch.device
    diffusion: GaussianDiffusion
    step: int

    def latents(self, images: Tensor, stream: Stream, step: int, positions: Tensor) -> Tensor: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


class Evaluations:
    """Takes what is due.

    Args:
        trainer: whose weights are measured.
        monitor: of the run; None where it evaluates nothing.
        stop: ends everything here by Stopped, on all ranks.
    """

    def __init__(self, trainer: Evaluated, monitor: Monitor | None, stop: StopSignal) -> None:
        self.trainer = trainer
        self.monitor = monitor
        self.stop = stop
        self._folder = Path(trainer.config.results_dir)
        self._told: set[str] = set()

    # ---- What is due -------------------------------------------------------------------------------------------------

    def due(self) -> list[str]:
        """The kinds that are asked for at the trainer's step."""
        config = self.trainer.config
        every = {VALIDATION: config.val_every, SAMPLES: config.sample_every, EVALUATION: config.eval_every}
        return [kind for kind, steps in every.items() if steps and self.trainer.step and self.trainer.step % steps == 0]

    def missing(self) -> list[str]:
        """Those of :meth:`due` that the folder of a run that goes on has not; on all ranks."""
        world, due = self.trainer.world, self.due()
        return world.gather([kind for kind in due if not self._is_there(kind)] if world.first else [])[0]

    def _is_there(self, kind: str) -> bool:
        if kind == SAMPLES:
            return self._grid_path().exists()
        return any(row["step"] == self.trainer.step and COLUMNS[kind] in row for row in self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        path = self._folder / METRICS
        return read_metrics(path) if path.exists() else []

    def _grid_path(self) -> Path:
        return self._folder / "samples" / f"step-{self.trainer.step:08d}.png"

    def take(self, kinds: list[str], log: RunLog) -> None:
        """Takes them, and writes what they found.

        Raises:
            Stopped: a signal has come to a rank; what was begun is dropped.
        """
        step = self.trainer.step
        if VALIDATION in kinds:
            with log.apart("evaluation"):
                found = self.validate()
            log.write(found.row(step))
        if SAMPLES in kinds:
            with log.apart("sampling"):
                pixels = self.grid(self.trainer.config.sample_steps)
            if pixels is not None:
                with log.aside("samples"):
                    self._write_grid(pixels)
        if EVALUATION in kinds and self.monitor is not None:
            with log.apart("evaluation"):
                metrics = self.evaluate(self.monitor)
            log.write({"step": step, **metrics})

    def tell_changes(self) -> None:
        """Says once, where a run goes on, that its validation or its evaluations are measured otherwise than before."""
        if self.trainer.config.val_every and self.trainer.data.validation is not None:
            self._tell_other_validation(self.trainer.data.validation)
        if self.monitor is not None:
            self._tell_other_evaluation(self.monitor)

    def _last(self, kind: str) -> dict[str, Any] | None:
        return next((row for row in reversed(self._rows()) if COLUMNS[kind] in row), None)

    def _tell_other_evaluation(self, monitor: Monitor) -> None:
        before = self._last(EVALUATION)
        if before is None:
            return
        if MEASURED_WITH not in before:
            logger.warning(
                "the evaluation of step %d does not record what it was measured with: it may not compare", before["step"]
            )
            return
        found = differences(before[MEASURED_WITH], monitor.measured_with(self.trainer.model))
        if found:
            logger.warning("evaluations are measured otherwise from here on and do not compare: %s", "; ".join(found))

    def _tell_other_validation(self, held_out: Batches) -> None:
        before = self._last(VALIDATION)
        images, passes = self._amount(held_out)
        if before is not None and (before.get("validation_images"), before.get("validation_passes")) != (images, passes):
            logger.warning(
                "validation is of %d images in %d passes from here on, was of %s in %s: its losses do not compare",
                images,
                passes,
                before.get("validation_images", "an unknown number"),
                before.get("validation_passes", "an unknown number"),
            )

    # ---- The loss on held-out images ---------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batches: int | None = None) -> Validation:
        """Mean loss on held-out images, always with the same timesteps and noise.

        Where there are fewer than ``val_images``, all of them are read so often that there are as many.

        Args:
            batches: the most that are taken; default: all.

        Raises:
            ValueError: there are no held-out images.
            Stopped: as of :meth:`take`.
        """
        config, parallel = self.trainer.config, self.trainer.parallel
        held_out = self.trainer.data.validation
        if held_out is None:
            raise ValueError(f"val_every: got {config.val_every} and no held-out images, allowed is 0; val_path names some")
        images, passes = self._amount(held_out)
        average = parallel.whole(self.trainer.ema.model)
        weights = {name: parallel.whole_tensor(tensor) for name, tensor in self.trainer.model.state_dict().items()}

        def raw(*args: Any, **labels: Any) -> Tensor:
            prediction: Tensor = torch.func.functional_call(average, weights, args, labels)
            return prediction

        def compute() -> dict[int, Tensor]:
            return {index: self._losses((average, raw), batch, at) for index, at, batch in self._mine(held_out, images, batches)}

        some = gather_unless_stopped(self.trainer.world, self.stop, compute)
        everyone = {index: losses for own in some for index, losses in own.items()}
        losses = torch.cat([everyone[index] for index in sorted(everyone)], dim=1)[:, :images].mean(dim=1)
        return Validation(losses[0].item(), losses[1].item(), images, passes)

    def _amount(self, held_out: Batches) -> tuple[int, int]:
        """Images and passes."""
        wanted, length = self.trainer.config.val_images, held_out.stream.length
        passes = -(-wanted // length)
        return (wanted, 1) if wanted <= length else (passes * length, passes)

    def _mine(self, held_out: Batches, images: int, batches: int | None) -> Iterator[tuple[int, int, Batch]]:
        """Number, place and content of this rank's batches: the ranks take them in turn, and their numbers tell their noise."""
        world, size = self.trainer.world, held_out.stream.batch_size
        count = -(-images // size)
        for index in range(world.rank, count if batches is None else min(count, batches), world.size):
            self.stop.check()
            yield index, index * size, held_out[index]

    def _losses(self, models: tuple[Callable[..., Tensor], ...], batch: Batch, start: int) -> Tensor:
        """Of each sample by each model, (models, b) fp64; ``start``: the first's position among all that are held out."""
        trainer = self.trainer
        positions = torch.arange(start, start + len(batch.labels), device=trainer.device)
        images, labels = (tensor.to(trainer.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        latents = trainer.latents(images, Stream.VALIDATION_POSTERIOR, 0, positions)
        t = below(trainer.diffusion.num_timesteps, SEED, Stream.VALIDATION_TIMESTEP, 0, positions)
        noise = normals(SEED, Stream.VALIDATION_NOISE, 0, positions, tuple(latents.shape[1:]))
        with trainer.autocast():
            found = [trainer.diffusion.training_losses(model, latents, t, {"y": labels}, noise)["loss"] for model in models]
        return torch.stack(found).double().cpu()

    # ---- A grid of samples -------------------------------------------------------------------------------------------

    def _write_grid(self, pixels: Pixels) -> None:
        path = self._grid_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, pixels)

    def grid(self, steps: int) -> Pixels | None:
        """A grid of 16 images drawn from the moving average, of classes spread over all, always from the same noise.

        Args:
            steps: of DDPM.

        Returns:
            Its pixels on the first rank; None on the others.

        Raises:
            Stopped: as of :meth:`take`.
        """
        model = self.trainer.parallel.whole(self.trainer.ema.model)
        drawn = gather_unless_stopped(
            self.trainer.world, self.stop, lambda: self._draw_grid(model, steps) if self.trainer.world.first else None
        )
        return drawn[0] if self.trainer.world.first else None

    def _draw_grid(self, model: DiT, steps: int) -> Pixels:
        config, vae = self.trainer.config, self.trainer.vae
        settings = SampleConfig(
            guidance_scale=config.sample_guidance if config.label_dropout > 0 else 1.0,
            guided_channels=guided_channels(config.guided_channels),
            clip_denoised=vae is None,
        )
        labels = torch.arange(16) * max(1, model.num_classes // 16) % model.num_classes
        diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
        with self.trainer.autocast():
            drawn = last_unless_stopped(sample_progressive(model, diffusion, labels, settings), self.stop)
        return grid_of(pixels_of(drawn if vae is None else vae.decode(drawn)))

    # ---- An evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, monitor: Monitor) -> Mapping[str, Any]:
        """The metrics of the moving average that could be computed, by name, how many images they are of, and the record."""
        found = monitor(self.trainer.parallel.whole(self.trainer.ema.model))
        self._tell_once([*found.notes, *(f"{name} is not computed: {reason}" for name, reason in found.absent.items())])
        metrics = {name: getattr(found, name) for name in NUMBERS}
        known = {name: value for name, value in metrics.items() if value is not None}
        return known | {COLUMNS[EVALUATION]: found.count, MEASURED_WITH: found.measured_with}

    def _tell_once(self, notes: list[str]) -> None:
        for note in notes if self.trainer.world.first else []:
            if note not in self._told:
                logger.info("evaluation: %s", note)
        self._told.update(notes)
