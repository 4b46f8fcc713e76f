"""What a training run is made of: one dataclass, from which flags, YAML file and checkpoint's record all follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditkernels.options import EXECUTION, FREE, RECIPE, check_fields, names_of, option
from ditkernels.sampling.config import AUTO, GUIDED_CHANNELS, guided_channels

# What a checkpoint records beside the fields, and what may be overridden as they may.
IMAGE_READER, TRAINABLE, NUMBERING = "image_reader", "trainable", "class_to_idx"
"""What ``override`` names where images are read by another version of the reader than a run began with."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field is a flag of ``ditkernels train`` and a key of its YAML file, explained in docs/training.md.

    Raises:
        ValueError: a value of another type than its field's, one out of range, or two that exclude each other; the field is
            named.
    """

    data_path: str = option("", "folder of images, one subfolder a class; or of latents; or 'digits'", FREE)
    val_path: str | None = option(None, "folder of images or of latents to measure the validation loss on", FREE)
    unconditional: bool = option(False, "one class for all images, no label dropout")
    keep_empty_classes: bool = option(False, "a class folder without images keeps its number, in place of being an error", FREE)
    image_size: int | None = option(
        None, "edge of the square images, in pixels; default: that of the latents or the digits, and 256 for images", least=1
    )
    num_classes: int | None = option(None, "classes of the model, at least those of the data; default: those", least=1)
    flip: bool = option(True, "mirror half of the images of a folder")
    vae: str = option("ema", "ema, mse, a folder with an AutoencoderKL, or 'none' for pixels")
    num_workers: int = option(4, "processes that read images", FREE, least=0)
    max_unreadable: int = option(100, "unreadable images that are skipped before the run stops", FREE, least=0)
    max_pixels: int = option(1 << 28, "pixels of an image that is read; a larger one is unreadable", FREE, least=1)

    model: str = option("DiT-XL/2", "DiT-{S,B,L,XL}/{2,4,8}")
    hidden_size: int | None = option(None, "channels of a token, in place of the model's own", least=4)
    depth: int | None = option(None, "blocks, in place of the model's own", least=1)
    num_heads: int | None = option(None, "heads of attention, in place of the model's own", least=1)
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = option(
        "adaln_zero", "how timestep and label enter the blocks"
    )
    label_dropout: float = option(
        None, "share of labels that become the null class; default: 0.1, and none with unconditional", least=0, first=0.1
    )

    steps: int | None = option(None, "optimizer steps; default: as many as the epochs hold", FREE, least=1)
    epochs: int = option(1400, "passes over the data, where steps is not given", FREE, least=1)
    global_batch_size: int = option(256, "images a step", RECIPE, least=1)
    accumulation: int = option(1, "microbatches that a step is computed in, one after the other", EXECUTION, least=1)
    learning_rate: float = option(1e-4, "peak rate of AdamW", RECIPE)
    lr_schedule: Literal["constant", "cosine"] = option("constant", "what follows the warm-up; cosine ends at 0", RECIPE)
    warmup_steps: int = option(0, "steps of linear warm-up", RECIPE, least=0)
    weight_decay: float = option(0.0, "AdamW weight decay", RECIPE, least=0)
    weight_decay_on: Literal["matrices", "all"] = option(
        "matrices",
        "what decays: matrices of the blocks and of the final layer, or all that is trained",
        RECIPE,
        first="all",
    )
    grad_clip: float | None = option(None, "largest norm of the gradient", RECIPE)
    optimizer: Literal["auto", "torch", "fused"] = option(
        "auto",
        "torch: AdamW, then the moving average; fused: both in one pass; auto: fused where that was measured to be faster",
        EXECUTION,
        first="torch",
    )
    master_weights: bool = option(False, "bf16 matrices to compute with, their fp32 masters for the fused optimizer", EXECUTION)
    ema_decay: float = option(0.9999, "decay of the moving average of the weights", RECIPE, least=0)
    ema_warmup: bool = option(False, "a moving average that decays faster in its first updates: (1 + n) / (10 + n)", RECIPE)
    max_skipped: int = option(20, "non-finite gradients in a row that are skipped before the run stops", FREE, least=0)
    global_seed: int = option(0, "fixes the initial weights, the order of the data and all noise", least=0)

    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto is cuda if there is one", EXECUTION)
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "how torchrun's processes share a model: each has all of it, or a piece of it", EXECUTION
    )
    shard_size: int | None = option(
        None, "processes that share one copy with fsdp; default: all; fewer keep replicas", EXECUTION, least=1
    )
    collective_timeout: int = option(600, "seconds that processes wait for each other before the run ends", FREE, least=1)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto", "dtype of the products; auto is bf16 on GPUs that have it, else fp32", EXECUTION
    )
    residual_dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", "dtype of the residual stream; auto: as plain PyTorch", EXECUTION
    )
    checkpointing: Literal["none", "selective", "full"] = option("none", "which activations are recomputed in backward", EXECUTION)
    compile: bool = option(False, "torch.compile each block", EXECUTION)
    backend: str = option("auto", "backend of the ops: auto, torch, triton, cuda, cpu", EXECUTION)
    attention_backend: str = option("auto", "backend of attention; ditkernels info lists them", EXECUTION)
    deterministic: bool = option(False, "refuse operations that may round differently from run to run", EXECUTION)

    results_dir: str = option("results", "the run's folder: checkpoints, metrics.jsonl, samples", FREE)
    resume: str = option("none", "auto: the newest whole checkpoint of the folder, if any; or its path", FREE)
    override: str = option("", "settings of the recipe that a resumed run shall change, comma-separated", FREE)
    init_from: str | None = option(None, "weights to start from: a run, a checkpoint, or a file or folder of other programs", FREE)
    init_classes: Literal["auto", "names", "position", "fresh"] = option(
        "auto", "which rows of labels init_from gives to which classes; auto: by name where both have names, else by position", FREE
    )
    null_class: bool = option(True, "whether the labels of init_from end in a null class, where it does not tell", FREE)
    ckpt_every: int = option(50_000, "steps between checkpoints", FREE, least=1)
    keep_last: int = option(3, "newest checkpoints that are kept", FREE, least=1)
    keep_every: int = option(0, "checkpoints at multiples of this step are kept too; 0: none", FREE, least=0)
    log_every: int = option(100, "steps between lines", FREE, least=1)
    val_every: int = option(0, "steps between validation losses; 0: none", FREE, least=0)
    val_images: int = option(256, "images a validation loss is the mean over", FREE, least=1)
    sample_every: int = option(0, "steps between grids of EMA samples; 0: none", FREE, least=0)
    sample_guidance: float = option(4.0, "guidance scale of the samples in those grids", FREE, least=0)
    guided_channels: str = option(AUTO, f"{GUIDED_CHANNELS}; of samples, while training and later", FREE)
    sample_steps: int = option(50, "DDPM steps of samples that are drawn while training", FREE, least=2)
    eval_every: int = option(0, "steps between evaluations of EMA samples: FID and the others; 0: none", FREE, least=0)
    eval_reference: str | None = option(
        None, "what evaluations compare samples with: .npz of images or statistics, or a folder", FREE
    )
    eval_weights: str | None = option(None, "Inception's weights for torch-fidelity; nothing is downloaded", FREE)
    eval_extractor: str | None = option(None, "MODULE:NAME, a function from images to features, in place of Inception", FREE)
    eval_images: int = option(10_000, "images that an evaluation draws", FREE, least=1)
    eval_batch_size: int = option(64, "images that an evaluation draws at once", FREE, least=1)
    eval_guidance: float = option(1.0, "guidance scale of the images that an evaluation draws", FREE, least=0)
    tensorboard: bool = option(False, "log to TensorBoard too", FREE)
    wandb: bool = option(False, "log to Weights & Biases too", FREE)
    wandb_project: str = option("ditkernels", "its project", FREE)
    wandb_entity: str | None = option(None, "its team or user; default: your own", FREE)
    wandb_name: str | None = option(None, "its name there; default: the folder's", FREE)
    peak_tflops: float | None = option(None, "peak that MFU is a share of, where the GPU is not a known one", FREE)

    def __post_init__(self) -> None:
        from ditkernels.reference import DiT_models

        if self.label_dropout is None:
            object.__setattr__(self, "label_dropout", 0.0 if self.unconditional else 0.1)
        check_fields(self)
        guided_channels(self.guided_channels)
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
        self._check_override()
        if self.resume != "none" and self.init_from is not None and self.resume != "auto":
            raise ValueError("init_from: got one beside the checkpoint to resume, allowed is only one of the two")

    @property
    def overridden(self) -> set[str]:
        """The settings that ``override`` names."""
        return {name.strip() for name in self.override.split(",") if name.strip()}

    def _check_override(self) -> None:
        allowed = [*names_of(TrainConfig, RECIPE), "steps", "epochs", IMAGE_READER, TRAINABLE, NUMBERING]
        unknown = sorted(self.overridden - set(allowed))
        if unknown:
            raise ValueError(f"override: got {', '.join(unknown)}, allowed are {', '.join(allowed)}")

    def _check_master_weights(self) -> None:
        for name, allowed in (("optimizer", "fused"), ("precision", "bf16"), ("parallel", "ddp")):
            value = getattr(self, name)
            if value not in (allowed, "auto"):
                raise ValueError(f"master_weights: got {name} {value}, allowed is {allowed}")
