"""A fresh run that starts from given weights: what a checkpoint knows of its classes, heads and latents comes from the checkpoint.

Rows of the label table stand for classes, and the row behind them, where labels are dropped, for the null class. A row that takes
another's place speaks of another class, so rows go by name where both sides have names, and the null row goes to the null row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ditkernels.checkpoints.format import Checkpoint, CheckpointError
from ditkernels.checkpoints.layouts import TABLE, sincos_grid
from ditkernels.checkpoints.model import recorded_heads, told_classes
from ditkernels.data.source import TrainingData
from ditkernels.data.vae import LatentSpace
from ditkernels.training.config import TrainConfig

# What else a table's rows are kept in.
MOMENTS = (f"{TABLE}.exp_avg", f"{TABLE}.exp_avg_sq")


@dataclass(frozen=True)
class Given:
    """Weights to start from, and what their checkpoint knows of them.

    Attributes:
        weights: a state dict in the public layout.
        classes: how many rows of labels are classes; None where there are no rows.
        names: row by name of class; empty where they have none.
        heads: of attention; None where that is not recorded.
        latent_space: of what was trained on; None where that is not recorded.
    """

    weights: Mapping[str, Tensor]
    classes: int | None
    names: Mapping[str, int]
    heads: int | None
    latent_space: LatentSpace | None

    @staticmethod
    def of(checkpoint: Checkpoint, *, null_class: bool) -> Given:
        """What a checkpoint gives; where nothing tells, its last row of labels is the null class's.

        Args:
            null_class: False where the caller says that there is none.
        """
        weights = checkpoint.sampling_weights
        rows = len(weights[TABLE]) if TABLE in weights else None
        classes = None
        if rows is not None:
            told = told_classes(checkpoint.config, rows, null_class=null_class)
            classes = max(1, rows - 1) if told is None else told
        space = checkpoint.state.get("latent_space")
        return Given(
            weights,
            classes,
            checkpoint.state.get("class_to_idx") or {},
            recorded_heads(checkpoint.config),
            None if space is None else LatentSpace(**space),
        )


class Own(NamedTuple):
    """What a run is, beside its settings.

    Attributes:
        model: the arguments of the model that is trained.
        data: what it is trained on.
        latent_space: of that; None for pixels.
        trainable: the names of the parameters that are trained.
    """

    model: Mapping[str, Any]
    data: TrainingData
    latent_space: LatentSpace | None
    trainable: frozenset[str]

    @property
    def classes(self) -> int:
        """How many the model has."""
        classes: int = self.model["num_classes"]
        return classes

    @property
    def names(self) -> Mapping[str, int]:
        """Label by name of class."""
        return self.data.class_to_idx


class Fitted(NamedTuple):
    """Given weights as a state dict that fits the model, and a line of what was kept, matched and made afresh, if any was."""

    weights: dict[str, Tensor]
    told: str | None


def fitted(given: Given, tensors: Mapping[str, Tensor], own: Own, config: TrainConfig) -> Fitted:
    """The given weights made to fit.

    Positions of sines and cosines are made anew, for any image size; learned ones are kept.

    Args:
        tensors: the model's own state dict, of whole tensors.

    Raises:
        CheckpointError: tensors do not fit, heads or latents are others, or classes cannot be matched as the config wants.
    """
    _check_origin(given, own, config)
    made, told = {**given.weights}, None
    if "pos_embed" in tensors and sincos_grid(made.get("pos_embed", tensors["pos_embed"])) is not None:
        made["pos_embed"] = tensors["pos_embed"]
    if TABLE in made and made[TABLE].ndim == 2 and made[TABLE].shape[1] == tensors[TABLE].shape[1]:
        made[TABLE], told = _fitted_table(given, tensors[TABLE], own, config)
    wrong = [
        f"{name} {_shape(made.get(name))}, here {_shape(tensors.get(name))}"
        for name in sorted(tensors.keys() | made.keys())
        if _shape(made.get(name)) != _shape(tensors.get(name))
    ]
    if wrong:
        raise CheckpointError(f"init_from: {config.init_from} does not fit the model: {'; '.join(wrong[:8])}")
    return Fitted(made, told)


def _check_origin(given: Given, own: Own, config: TrainConfig) -> None:
    heads = own.model["num_heads"]
    if given.heads not in (None, heads):
        raise CheckpointError(
            f"init_from: {config.init_from} was trained with {given.heads} heads, the model has {heads}; "
            f"--num-heads {given.heads} makes as many"
        )
    if given.latent_space is not None and own.latent_space is not None:
        other = given.latent_space.differences(own.latent_space)
        if other:
            raise CheckpointError(f"init_from: {config.init_from} was trained on other latents: {'; '.join(other)}")


def _fitted_table(given: Given, mine: Tensor, own: Own, config: TrainConfig) -> tuple[Tensor, str]:
    """The label table, (rows, D): matched rows of the given one, others as the model has them; and which those are."""
    assert given.classes is not None
    theirs, resized = given.weights[TABLE], mine.detach().cpu().clone()
    has_null, gives_null = len(resized) > own.classes, len(theirs) > given.classes
    if config.unconditional:
        # One class that is every image's: what stood for no class in particular.
        rows = {0: given.classes} if gives_null else {}
        how = "the null class's row for its one class" if gives_null else "no null class for its one class, which is fresh"
    else:
        rows, how = _matched(given, own, config)
    for label, row in rows.items():
        resized[label] = theirs[row]
    if has_null and gives_null:
        resized[own.classes] = theirs[given.classes]
    null = ""
    if has_null:
        null = "; the null class is kept" if gives_null else "; the null class is fresh, so guidance needs training"
    told = f"init_from: of {own.classes} classes {len(rows)} kept, {how}, {own.classes - len(rows)} fresh{null}"
    return resized, told


def _matched(given: Given, own: Own, config: TrainConfig) -> tuple[dict[int, int], str]:
    """The given row for each row of the model that gets one, and how they were found."""
    assert given.classes is not None
    way, both = config.init_classes, bool(given.names and own.names)
    if way == "fresh":
        return {}, "as init_classes fresh has it"
    if way == "names" and not both:
        side = "the checkpoint" if not given.names else "the data"
        raise CheckpointError(f"init_classes: got names, and {side} has none; allowed are auto, position, fresh")
    if way == "position" or not both:
        return {row: row for row in range(min(given.classes, own.classes))}, "by position"
    rows = {mine: given.names[name] for name, mine in own.names.items() if name in given.names}
    if not rows:
        raise CheckpointError(
            f"init_classes: {config.init_from} and the data have no name of a class in common; --init-classes position or fresh"
        )
    unnamed = set(range(len(own.names), own.classes)) & set(range(len(given.names), given.classes))
    return rows | {row: row for row in unnamed}, "by name"


# ---- A run that goes on with other numbers of its classes -----------------------------------------------------------


def same_names(there: Mapping[str, int], here: Mapping[str, int]) -> bool:
    """Whether two numberings are of the same classes."""
    return there != here and there.keys() == here.keys()


def renumbered(tensors: Mapping[str, Tensor], there: Mapping[str, int], here: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors by name, those that have a row a class with the rows where the classes now are."""
    made = dict(tensors)
    for name in (TABLE, *MOMENTS):
        if name in made:
            moved = made[name].clone()
            for label, row in here.items():
                moved[row] = made[name][there[label]]
            made[name] = moved
    return made


def _shape(tensor: Any) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
