"""How a run begins: its model, and whether it is fresh, starts from given weights, or goes on from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkernels.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_of,
    load_checkpoint,
    load_public_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    set_aside,
    verify_checkpoint,
)
from ditkernels.config import FIRST, TrainConfig, differences
from ditkernels.data import TrainingData
from ditkernels.models import DiT_models
from ditkernels.reference import DiT
from ditkernels.runlog import METRICS, cut_back
from ditkernels.vae import VAE, LatentSpace

if TYPE_CHECKING:
    from ditkernels.trainer import Trainer

RESIDUAL_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


# ---- A fresh run, or one that goes on --------------------------------------------------------------------------------


def begin(run: Path, trainer: Trainer) -> None:
    """Puts the trainer where the run stands, and cuts the run's metrics back to there.

    Raises:
        CheckpointError: nothing to resume, or it is of another run.
        ValueError: a fresh run would overwrite one.
    """
    config, ranks = trainer.config, trainer.ranks
    if config.resume == "auto":
        _resume_newest(run, trainer)
    elif config.resume != "none":
        _resume_from(Path(config.resume), run, trainer)
    else:
        ranks.on_first(lambda: _refuse_to_overwrite(run))
    if trainer.step == 0 and config.init_from is not None:
        initialise(trainer, config.init_from)
    ranks.agree(
        data_length=trainer.data.length,
        class_to_idx=trainer.data.class_to_idx,
        model=model_arguments(trainer.model),
    )
    ranks.on_first(lambda: _open_folder(run, trainer.step))


def _refuse_to_overwrite(run: Path) -> None:
    if checkpoints_of(run) or (run / METRICS).exists():
        raise ValueError(f"results_dir: {run} holds a run; --resume auto goes on with it, another folder starts a new one")


def _open_folder(run: Path, step: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    cut_back(run / METRICS, step)


def _resume_newest(run: Path, trainer: Trainer) -> None:
    found = trainer.ranks.on_first(lambda: newest_checkpoint(run)._replace(checkpoint=None))
    if found.path is not None:
        _take_over(open_checkpoint(found.path), found.path, trainer)
    where = f"step {trainer.step}, {found.path}" if found.path else f"nothing: {run} holds no whole checkpoint"
    trainer.ranks.on_first(lambda: _set_aside(found.broken))
    trainer.ranks.on_first(lambda: print(f"resumed from {where}"))


def _set_aside(broken: Mapping[Path, str]) -> None:
    for path, reason in broken.items():
        print(f"ditkernels: passed over a broken checkpoint, now {set_aside(path)}: {reason}", file=sys.stderr)


def _resume_from(path: Path, run: Path, trainer: Trainer) -> None:
    trainer.ranks.on_first(lambda: verify_checkpoint(path))
    _take_over(open_checkpoint(path), path, trainer)
    newer = [step for step in checkpoints_of(run) if step > trainer.step]
    if newer:
        raise CheckpointError(
            f"resume: {run} holds checkpoints newer than {path}, up to step {newer[-1]}; give another results_dir"
        )
    trainer.ranks.on_first(lambda: print(f"resumed from step {trainer.step}, {path}"))


def _take_over(checkpoint: Checkpoint, origin: Path, trainer: Trainer) -> None:
    """Goes on from a checkpoint of the same run; CheckpointError lists what differs if it is of another one."""
    if checkpoint.ema is None or checkpoint.optimizer is None or "training" not in checkpoint.config:
        raise CheckpointError(f"{origin} holds weights but no training state; init_from starts from weights")
    recorded = checkpoint.config["training"]
    trainer.keep_optimizer(recorded.get("optimizer", FIRST["optimizer"]))
    found = differences(recorded, trainer.config)
    if trainer.config.lr_schedule == "constant":
        # How long the run shall be changes no step of it, unless the rate depends on it.
        found = [text for text in found if not text.startswith(("steps:", "epochs:"))]
    mine, theirs = model_arguments(trainer.model), checkpoint.config["model"]
    found += [f"{name}: {theirs.get(name)!r} there, {mine[name]!r} here" for name in mine if theirs.get(name) != mine[name]]
    for name, here in (("data_length", trainer.data.length), ("class_to_idx", trainer.data.class_to_idx)):
        if checkpoint.state[name] != here:
            found.append(f"{name}: other data")
    space = checkpoint.state.get("latent_space")
    if space is not None and trainer.latent_space is not None:
        found += LatentSpace(**space).differences(trainer.latent_space)
    if found:
        raise CheckpointError(f"{origin} is of another run: {'; '.join(found)}")
    trainer.resume(checkpoint)


# ---- Starting from weights -------------------------------------------------------------------------------------------


def initialise(trainer: Trainer, source: str) -> None:
    """Starts model and moving average from the weights of a checkpoint's folder or a public ``.pt`` file.

    The moving average is taken where there is one. Positions are made anew for another image size. With another number of
    classes the labels' rows start afresh, and the null class keeps its row.

    Raises:
        CheckpointError: no checkpoint, or tensors that do not fit; they are listed.
    """
    path = Path(source)
    checkpoint = load_checkpoint(path) if path.is_dir() else load_public_checkpoint(path)
    own = {name: trainer.ranks.whole_tensor(tensor) for name, tensor in trainer.model.state_dict().items()}
    given = {**checkpoint.sampling_weights}
    if "pos_embed" in own:
        given["pos_embed"] = own["pos_embed"]
    table = "y_embedder.embedding_table.weight"
    if table in given:
        given[table] = _resized_table(given[table], own[table], trainer.model.num_classes)
    wrong = [
        f"{name} {_shape(given.get(name))}, here {_shape(own.get(name))}"
        for name in sorted(own.keys() | given.keys())
        if _shape(given.get(name)) != _shape(own.get(name))
    ]
    if wrong:
        raise CheckpointError(f"init_from: {source} does not fit the model: {'; '.join(wrong[:8])}")
    trainer.load(given, given)
    trainer.ranks.on_first(lambda: print(f"initialised from {source}"))


def _resized_table(given: Tensor, own: Tensor, classes: int) -> Tensor:
    """The rows of ``given`` for a table (rows, D) like ``own``, which has ``classes`` rows and perhaps the null class."""
    if given.shape == own.shape or given.shape[1] != own.shape[1]:
        return given
    resized = own.detach().cpu().clone()
    if abs(len(given) - len(own)) == 1 and classes in (len(given), len(given) - 1):
        # The same classes, with and without a null class.
        resized[:classes] = given[:classes]
    elif len(own) > classes:
        resized[classes] = given[-1]
    return resized


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


# ---- The model -------------------------------------------------------------------------------------------------------


def latent_shape(config: TrainConfig, data: TrainingData, vae: VAE | None) -> tuple[int, int, int]:
    """(C, H, W) of what the model sees; errors as of :meth:`VAE.latent_shape`."""
    if vae is None or data.latents is not None:
        return data.shape
    return vae.latent_shape(config.image_size)


def build_model(config: TrainConfig, shape: tuple[int, int, int]) -> DiT:
    """The model of a config for inputs (C, H, W), freshly initialised on the CPU by ``global_seed``."""
    sizes = {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.global_seed)
        model: DiT = DiT_models[config.model](
            input_size=shape[1:],
            in_channels=shape[0],
            num_classes=1 if config.unconditional else config.num_classes,
            class_dropout_prob=config.label_dropout,
            conditioning=config.conditioning,
            residual_dtype=RESIDUAL_DTYPES[config.residual_dtype],
            attention_backend=config.attention_backend,
            checkpointing=config.checkpointing,
            **{name: size for name, size in sizes.items() if size is not None},
        )
    return model


def model_arguments(model: DiT) -> dict[str, Any]:
    """The arguments that make a DiT of the same shapes, as JSON values."""
    rows = model.y_embedder.embedding_table.num_embeddings
    hidden_size = model.x_embedder.proj.weight.shape[0]
    return {
        "input_size": list(model.input_size),
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "hidden_size": hidden_size,
        "depth": len(model.blocks),
        "num_heads": model.num_heads,
        "mlp_ratio": model.state_dict()["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "class_dropout_prob": model.y_embedder.dropout_prob if rows > model.num_classes else 0.0,
        "num_classes": model.num_classes,
        "learn_sigma": model.learn_sigma,
        "conditioning": model.conditioning,
    }
