"""What a run starts from: nothing, given weights, or a checkpoint of its own.

:func:`find_start` looks and opens, and changes nothing. The trainer takes over what was found; :func:`open_folder` then makes the
run's folder agree with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ditkernels.checkpoints.format import Checkpoint, CheckpointError, open_checkpoint
from ditkernels.checkpoints.model import read_public
from ditkernels.checkpoints.run import Run, all_checkpoints_of, read, resolve, set_aside
from ditkernels.data.source import TrainingData
from ditkernels.data.vae import LatentSpace
from ditkernels.options import EXECUTION, FREE, IDENTITY, RECIPE, Difference, differences
from ditkernels.runtime import World
from ditkernels.training.config import IMAGE_READER, NUMBERING, TRAINABLE, TrainConfig
from ditkernels.training.finetune import Given, Own, same_names
from ditkernels.training.log import METRICS, cut_back

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: that it goes on from; None for a fresh run.
        origin: where the checkpoint lies.
        weights: a state dict that a fresh run starts from; None for the initialisation.
        classes: how many rows of its labels are classes, where that is told.
        broken: newer checkpoints that were passed over, and why.
    """

    checkpoint: Checkpoint | None = None
    origin: Path | None = None
    given: Given | None = None
    broken: Mapping[Path, str] = field(default_factory=dict)


def find_start(config: TrainConfig, run: Run, world: World) -> Start:
    """What ``run``, of ``config``, starts from.

    Raises:
        CheckpointError: there is nothing to resume, or no weights to start from.
        ValueError: a fresh run would overwrite one.
    """
    start = Start()
    if config.resume == "auto":
        found = world.on_first(lambda: run.newest())
        opened = None if found.path is None else open_checkpoint(found.path)
        start = Start(opened, found.path, broken=found.broken)
    elif config.resume != "none":
        path = world.on_first(lambda: resolve(config.resume))
        start = Start(read(path), path)
    else:
        world.on_first(lambda: _refuse_to_overwrite(run.folder))
    if start.checkpoint is None and config.init_from is not None:
        given = config.init_from
        found_weights = read_public(world.on_first(lambda: resolve(given)))
        return Start(given=Given.of(found_weights, null_class=config.null_class), broken=start.broken)
    return start


def as_begun(config: TrainConfig, start: Start) -> TrainConfig:
    """``config`` with the label dropout of an unconditional run that an earlier version began: it dropped labels all the same.

    Raises:
        ValueError: a fresh run that is unconditional shall drop labels.
    """
    if not config.unconditional:
        return config
    if start.checkpoint is None:
        if config.label_dropout > 0:
            raise ValueError(f"label_dropout: got {config.label_dropout}, allowed is 0 with unconditional, which drops no labels")
        return config
    recorded = start.checkpoint.config.get("training", {})
    dropout = recorded.get("label_dropout", 0.0) if recorded.get("unconditional") else 0.0
    if dropout == 0 or config.label_dropout > 0:
        return config
    logger.info("label_dropout: %g, as this unconditional run was begun by an earlier version", dropout)
    return replace(config, label_dropout=dropout)


def settled(config: TrainConfig, data: TrainingData, start: Start) -> TrainConfig:
    """The config with the size of images and the number of classes, where it leaves them to the data.

    A run that goes on keeps the number it began with, which may have been more than its data had. One that began when everything
    decayed goes on so.
    """
    before = {} if start.checkpoint is None else start.checkpoint.config.get("training", {})
    classes = config.num_classes or before.get("num_classes") or max(1, len(data.class_to_idx))
    decays = "all" if before and "weight_decay_on" not in before else config.weight_decay_on
    return replace(
        config,
        image_size=config.image_size or data.image_size,
        num_classes=classes,
        vae="unknown" if data.encoded else config.vae,
        weight_decay_on=decays,  # type: ignore[arg-type]
    )


def _refuse_to_overwrite(run: Path) -> None:
    if all_checkpoints_of(run) or (run / METRICS).exists():
        raise ValueError(f"results_dir: {run} holds a run; --resume auto goes on with it, another folder starts a new one")


def check_same_run(start: Start, config: TrainConfig, own: Own) -> Checkpoint:
    """The checkpoint of ``start``, if it is of the run that these describe.

    Raises:
        CheckpointError: the checkpoint is of another run, or of another recipe that ``config.override`` does not name, and what
            differs is listed; it holds no training state; the run's folder holds newer ones.
    """
    checkpoint, origin = start.checkpoint, start.origin
    assert checkpoint is not None
    assert origin is not None
    if checkpoint.ema is None or checkpoint.optimizer is None or "training" not in checkpoint.config:
        raise CheckpointError(f"{origin} holds weights but no training state; init_from starts from weights")
    found = differences(checkpoint.config["training"], config)
    other = [str(difference) for difference in found[IDENTITY]]
    theirs, ours = checkpoint.config["model"], own.model
    other += [f"{name}: {theirs.get(name)!r} there, {ours[name]!r} here" for name in ours if theirs.get(name) != ours[name]]
    before, now = checkpoint.state["class_to_idx"], own.data.class_to_idx
    if checkpoint.state["data_length"] != own.data.length:
        other.append("data_length: other data")
    if before != now and not same_names(before, now):
        other.append("class_to_idx: other data")
    space = checkpoint.state.get("latent_space")
    if space is not None and own.latent_space is not None:
        other += LatentSpace(**space).differences(own.latent_space)
    if other:
        raise CheckpointError(f"{origin} is of another run: {'; '.join(other)}")
    _check_overridden(origin, changed_recipe(checkpoint, config, own), config)
    newer = [step for step, _ in all_checkpoints_of(Path(config.results_dir)) if step > (checkpoint.step or 0)]
    if newer and config.resume != "auto":
        raise CheckpointError(
            f"resume: {config.results_dir} holds checkpoints newer than {origin}, up to step {newer[-1]}; give another results_dir"
        )
    return checkpoint


def changed_recipe(checkpoint: Checkpoint, config: TrainConfig, own: Own) -> list[Difference]:
    """The settings of the recipe that differ: those that change what is trained from here on.

    How long the run shall be changes no step of it, unless the rate depends on it. Of images the number of the reader counts, which
    tells what pixels a file becomes. Of the trained parameters those count that are trained on one side alone.
    """
    found = differences(checkpoint.config["training"], config)
    length = [] if config.lr_schedule == "constant" else [change for change in found[FREE] if change.name in ("steps", "epochs")]
    # What a run began with before readers had numbers was read by the first.
    reader = checkpoint.state.get("image_reader", 1)
    beside = []
    if None not in (reader, own.data.image_reader) and reader != own.data.image_reader:
        beside.append(Difference(IMAGE_READER, reader, own.data.image_reader))
    if same_names(checkpoint.state["class_to_idx"], own.data.class_to_idx):
        beside.append(Difference(NUMBERING, checkpoint.state["class_to_idx"], own.data.class_to_idx))
    before = trained_before(checkpoint)
    if before != own.trainable:
        beside.append(Difference(TRAINABLE, _some(before - own.trainable), _some(own.trainable - before)))
    return found[RECIPE] + length + beside


def trained_before(checkpoint: Checkpoint) -> frozenset[str]:
    """The names of the parameters that a checkpoint's run trained; an old one tells by its moments."""
    assert checkpoint.optimizer is not None
    known = checkpoint.state.get("trainable")
    return frozenset(known if known is not None else (name.rpartition(".")[0] for name in checkpoint.optimizer))


def _some(names: frozenset[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"only {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "no other"


def _check_overridden(origin: Path, changed: Sequence[Difference], config: TrainConfig) -> None:
    unnamed = [change for change in changed if change.name not in config.overridden]
    if unnamed:
        flag = ",".join(sorted({change.name for change in unnamed} | config.overridden))
        raise CheckpointError(
            f"{origin} was trained by another recipe: {'; '.join(map(str, unnamed))}; --override {flag} goes on by this one"
        )


def _tell_changes(checkpoint: Checkpoint, config: TrainConfig, own: Own, step: int) -> None:
    for change in changed_recipe(checkpoint, config, own):
        logger.info("from step %d on: %s %s, was %s", step, change.name, change.here, change.there)
    execution = differences(checkpoint.config["training"], config)[EXECUTION]
    if execution:
        logger.info("from step %d on bits may differ: %s", step, "; ".join(map(str, execution)))


def open_folder(start: Start, config: TrainConfig, own: Own, run: Run, step: int, environment: Mapping[str, Any]) -> None:
    """Makes the run's folder tell what the run is and where it stands, and says where that is.

    Broken checkpoints are set aside, and the metrics after ``step`` are dropped.
    """
    run.begin(asdict(config), environment)
    for path, reason in start.broken.items():
        logger.warning("passed over a broken checkpoint, now %s: %s", set_aside(path), reason)
    if start.checkpoint is not None:
        logger.info("resumed from step %d, %s", step, start.origin)
        _tell_changes(start.checkpoint, config, own, step)
    elif config.resume == "auto":
        logger.info("starting at step 0: %s holds no whole checkpoint", run.folder)
    if start.given is not None:
        logger.info("initialised from %s", config.init_from)
    for note in own.data.notes:
        logger.warning("%s", note)
    cut_back(run.folder / METRICS, step)
