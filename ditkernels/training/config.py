"""What a training run is made of: one dataclass, from which flags, YAML file and checkpoint's record all follow."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ditkernels.models import DiT_models

Config = TypeVar("Config")


def option(default: Any, text: str, *, least: float | None = None, free: bool = False) -> Any:
    """A field of a config.

    Args:
        default: its default.
        text: what ``--help`` says.
        least: the smallest value allowed.
        free: it changes no number that is trained, so a run may be resumed with another value.
    """
    return field(default=default, metadata={"text": text, "least": least, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field is a flag of ``ditkernels train`` and a key of its YAML file, explained in docs/training.md.

    Raises:
        ValueError: a value of another type than its field's, one out of range, or two that exclude each other; the field is
            named.
    """

    data_path: str = option("", "folder of images, one subfolder a class; or of latents; or 'digits'", free=True)
    val_path: str | None = option(None, "folder of images or of latents to measure the validation loss on", free=True)
    unconditional: bool = option(False, "one class for all images, no label dropout")
    image_size: int = option(256, "edge of the square images, in pixels", least=1)
    num_classes: int = option(1000, "classes of the model, at least those of the data", least=1)
    flip: bool = option(True, "mirror half of the images of a folder")
    vae: str = option("ema", "ema, mse, a folder with an AutoencoderKL, or 'none' for pixels")
    num_workers: int = option(4, "processes that read images", least=0, free=True)
    max_unreadable: int = option(100, "unreadable images that are skipped before the run stops", least=0, free=True)

    model: str = option("DiT-XL/2", "DiT-{S,B,L,XL}/{2,4,8}")
    hidden_size: int | None = option(None, "in place of the model's own", least=4)
    depth: int | None = option(None, "in place of the model's own", least=1)
    num_heads: int | None = option(None, "in place of the model's own", least=1)
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = option(
        "adaln_zero", "how timestep and label enter the blocks"
    )
    label_dropout: float = option(0.1, "share of labels that become the null class", least=0)

    steps: int | None = option(None, "optimizer steps; default: as many as the epochs hold", least=1)
    epochs: int = option(1400, "passes over the data, where steps is not given", least=1)
    global_batch_size: int = option(256, "images a step", least=1)
    accumulation: int = option(1, "parts that a batch is computed in, one after the other", least=1)
    learning_rate: float = option(1e-4, "peak rate of AdamW")
    lr_schedule: Literal["constant", "cosine"] = option("constant", "what follows the warm-up; cosine ends at 0")
    warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "of AdamW", least=0)
    grad_clip: float | None = option(None, "largest norm of the gradient")
    optimizer: Literal["auto", "torch", "fused"] = option(
        "auto", "AdamW: torch's and then the moving average, or both in one pass; auto: in one where that was measured to be faster"
    )
    master_weights: bool = option(False, "bf16 matrices to compute with, their fp32 masters for the fused optimizer", free=True)
    ema_decay: float = option(0.9999, "of the moving average of the weights", least=0)
    max_skipped: int = option(20, "non-finite gradients in a row that are skipped before the run stops", least=0, free=True)
    global_seed: int = option(0, "fixes the initial weights, the order of the data and all noise", least=0)

    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto is cuda if there is one", free=True)
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "how torchrun's processes share a model: each has all of it, or a piece of it", free=True
    )
    shard_size: int | None = option(
        None, "processes that share one copy with fsdp; default: all; fewer keep replicas", least=1, free=True
    )
    collective_timeout: int = option(600, "seconds that processes wait for each other before the run ends", least=1, free=True)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto", "of the products; auto is bf16 on GPUs that have it, else fp32"
    )
    residual_dtype: Literal["auto", "bf16", "fp32"] = option("auto", "of the residual stream; auto: as plain PyTorch")
    checkpointing: Literal["none", "selective", "full"] = option("none", "activations recomputed in backward")
    compile: bool = option(False, "torch.compile each block")
    backend: str = option("auto", "of the ops: auto, torch, triton, cuda, cpu")
    attention_backend: str = option("auto", "of attention; ditkernels info lists them")
    deterministic: bool = option(False, "refuse operations that may round differently from run to run")

    results_dir: str = option("results", "the run's folder: checkpoints, metrics.jsonl, samples", free=True)
    resume: str = option("none", "auto: the newest whole checkpoint of the folder, if any; or its path", free=True)
    init_from: str | None = option(None, "weights to start from: a checkpoint's folder or a public .pt file", free=True)
    ckpt_every: int = option(50_000, "steps between checkpoints", least=1, free=True)
    keep_last: int = option(3, "newest checkpoints that are kept", least=1, free=True)
    keep_every: int = option(0, "checkpoints at multiples of this step are kept too; 0: none", least=0, free=True)
    log_every: int = option(100, "steps between lines", least=1, free=True)
    val_every: int = option(0, "steps between validation losses; 0: none", least=0, free=True)
    val_images: int = option(256, "images a validation loss is the mean over", least=1, free=True)
    sample_every: int = option(0, "steps between grids of EMA samples; 0: none", least=0, free=True)
    sample_guidance: float = option(4.0, "guidance scale of those samples", least=0, free=True)
    sample_steps: int = option(50, "DDPM steps of those samples", least=1, free=True)
    eval_every: int = option(0, "steps between evaluations of EMA samples: FID and the others; 0: none", least=0, free=True)
    eval_reference: str | None = option(None, "what they are compared with: .npz of images or statistics, or a folder", free=True)
    eval_weights: str | None = option(None, "Inception's weights for torch-fidelity; nothing is downloaded", free=True)
    eval_extractor: str | None = option(None, "MODULE:NAME, a function from images to features, in its place", free=True)
    eval_images: int = option(10_000, "images that are drawn for it", least=1, free=True)
    eval_batch_size: int = option(64, "images that are drawn at once", least=1, free=True)
    eval_guidance: float = option(1.0, "guidance scale of those images", least=0, free=True)
    tensorboard: bool = option(False, "log to TensorBoard too", free=True)
    wandb: bool = option(False, "log to Weights & Biases too", free=True)
    peak_tflops: float | None = option(None, "what MFU is a share of, where the GPU is not a known one", free=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in DiT_models:
            raise ValueError(f"model: got {self.model!r}, allowed are {', '.join(DiT_models)}")
        for name in ("learning_rate", "grad_clip", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: got {value}, allowed is a positive number")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, allowed is 0 up to, not including, 1")
        if not self.label_dropout < 1:
            raise ValueError(f"label_dropout: got {self.label_dropout}, allowed is 0 up to, not including, 1")
        if self.global_seed >= 1 << 64:
            raise ValueError(f"global_seed: got {self.global_seed}, allowed are 0..2**64 - 1")
        if self.global_batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: got {self.accumulation}, which does not divide global_batch_size {self.global_batch_size}"
            )
        if self.master_weights:
            self._check_master_weights()
        if self.shard_size is not None and self.parallel != "fsdp":
            raise ValueError(f"shard_size: got {self.shard_size}, allowed with parallel fsdp only, got {self.parallel}")
        if self.resume != "none" and self.init_from is not None and self.resume != "auto":
            raise ValueError("init_from: got one beside the checkpoint to resume, allowed is only one of the two")

    def _check_master_weights(self) -> None:
        for name, allowed in (("optimizer", "fused"), ("precision", "bf16"), ("parallel", "ddp")):
            value = getattr(self, name)
            if value not in (allowed, "auto"):
                raise ValueError(f"master_weights: got {name} {value}, allowed is {allowed}")


def check_fields(config: Any) -> None:
    """Every field of a dataclass made of :func:`option` has its type and is not below its least value."""
    hints = get_type_hints(type(config))
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value is None and type(None) in get_args(hints[spec.name]):
            continue
        kind = _kind(hints[spec.name])
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                allowed = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"{spec.name}: got {value!r}, allowed are {allowed}")
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{spec.name}: got {value!r}, allowed is {_described(kind)}")
        least = spec.metadata["least"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{spec.name}: got {value}, allowed is a finite number")
        if least is not None and value < least:
            raise ValueError(f"{spec.name}: got {value}, allowed is {least} or more")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for every field, and ``--config FILE``; :func:`from_flags` makes the config of what they were given."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the same settings; flags go before it")
    hints = get_type_hints(config)
    for spec in dataclasses.fields(config):
        kind = _kind(hints[spec.name])
        text = spec.metadata["text"].replace("%", "%%")
        default = "" if spec.default is None or spec.default == "" else f" (default: {spec.default})"
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + default}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        else:
            arguments |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + spec.name.replace("_", "-"), **arguments)


def from_flags(config: type[Config], args: argparse.Namespace) -> Config:
    """The config of the flags that were given, of the YAML file they name, and of the defaults, in this order.

    Raises:
        ValueError: as the config; a file that is no mapping, or holds unknown keys, which are named.
        OSError: the file cannot be read.
    """
    values = {} if args.config is None else read_yaml(config, Path(args.config))
    names = {spec.name for spec in dataclasses.fields(config)}  # type: ignore[arg-type]
    values |= {name: value for name, value in vars(args).items() if name in names}
    return config(**values)


def read_yaml(config: type, path: Path) -> dict[str, Any]:
    """The fields of ``config`` that a YAML file sets; errors as of :func:`from_flags`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, allowed is a mapping of settings")
    hints = get_type_hints(config)
    unknown = [str(key) for key in content if key not in hints]
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; allowed are {', '.join(hints)}")
    return {name: _number(hints[name], value) for name, value in content.items()}


# What a field did before it could be set, where its default is another by now.
FIRST = {"optimizer": "torch"}


def differences(recorded: Mapping[str, Any], config: Any) -> list[str]:
    """The fields, not free ones, in which a config differs from one recorded in a checkpoint: "name: 1 there, 2 here"."""
    here = dataclasses.asdict(config)
    # A field that is younger than the record had its default's effect.
    there = {spec.name: recorded.get(spec.name, FIRST.get(spec.name, spec.default)) for spec in dataclasses.fields(config)}
    return [
        f"{spec.name}: {there[spec.name]!r} there, {here[spec.name]!r} here"
        for spec in dataclasses.fields(config)
        if not spec.metadata["free"] and there[spec.name] != here[spec.name]
    ]


def _kind(hint: Any) -> Any:
    """The type of a field, without the None that may stand beside it."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _described(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]


def _number(hint: Any, value: Any) -> Any:
    # YAML 1.1, which PyYAML reads, takes 1e-4 for a string: it wants a dot and a sign.
    if _kind(hint) is not float or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
