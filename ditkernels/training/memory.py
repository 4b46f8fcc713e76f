"""What a run is, told before it starts, and whether the machine has room for it.

Weights, gradients, moments and average are known to the byte. What a forward keeps for its backward is counted by running one on
the meta device, which computes nothing, in the dtype of the weights; products in half the bits keep about half.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ditkernels.data.source import TrainingData
from ditkernels.reference import DiT
from ditkernels.runtime import World, resolve_precision
from ditkernels.training.config import TrainConfig

GIB = 2**30
# Limits of control groups, in both of their versions, as a container sees its own.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """Bytes that a process is expected to hold.

    Attributes:
        state: weights, gradients, moments, average and bf16 copies.
        batch: of its images, as floats.
        activations: kept for the backward; an estimate.
    """

    state: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.batch + self.activations


def check_room(config: TrainConfig, model: DiT, data: TrainingData, device: torch.device, world: World) -> None:
    """Tells what the run is and how much memory it is expected to take.

    Raises:
        ValueError: weights, gradients, moments and average, or the images of a step, exceed the machine alone.
    """
    expected, there = expect(config, model, data, device, world), memory_of(device, world)
    name = f"the GPU's {_gib(there)}" if device.type == "cuda" else f"the {_gib(there)} a process has of this machine"
    for what, amount in (
        (f"model: weights, gradients, moments and average of {config.model}", expected.state),
        (f"global_batch_size: the images of a step, of which there are {config.global_batch_size}", expected.batch),
    ):
        if amount > there:
            raise ValueError(f"{what}, take {_gib(amount)}, more than {name}")
    if world.first:
        for line in _described(config, model, data, device, world):
            logger.info("%s", line)
        logger.info(
            "expected memory: %s a process, %s of it weights, gradients, moments and average",
            _gib(expected.total),
            _gib(expected.state),
        )
        if expected.total > there:
            logger.warning(
                "a step is expected to take %s, more than %s: --accumulation, --checkpointing or a smaller batch need less",
                _gib(expected.total),
                name,
            )


def expect(config: TrainConfig, model: DiT, data: TrainingData, device: torch.device, world: World) -> Expected:
    """What a process of the run is expected to hold at once."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    held = sum(tensor.numel() for tensor in model.state_dict().values())
    pieces = (config.shard_size or world.size) if config.parallel == "fsdp" else 1
    # fp32: the weights and their average; of what is trained, the gradient and two moments; bf16 copies with their gradients.
    state = (8 * held + (12 + 4 * config.master_weights) * trained) // pieces
    images = config.global_batch_size // world.size
    channels, height, width = data.shape
    narrow = resolve_precision(config.precision, device) in ("bf16", "fp16")
    kept = kept_for_backward(model) // (2 if narrow else 1)
    return Expected(state, 4 * images * channels * height * width, kept * max(1, images // config.accumulation))


def kept_for_backward(model: DiT) -> int:
    """Bytes that the forward of one sample keeps, in the weights' dtype; nothing is computed."""
    own = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    weights = {tensor.untyped_storage()._cdata for tensor in own.values()}
    kept: list[Tensor] = []
    x = torch.empty(1, model.in_channels, *model.input_size, device="meta", requires_grad=True)
    inputs = (x, torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.int64))
    for tensor in own.values():
        tensor.requires_grad_(tensor.is_floating_point())
    # No backward will ask for what is packed.
    with torch.autograd.graph.saved_tensors_hooks(kept.append, kept.append):  # type: ignore[arg-type]
        torch.func.functional_call(model, own, inputs)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for storage, size in storages.items() if storage not in weights)


def memory_of(device: torch.device, world: World) -> int:
    """Bytes that a process has: of its GPU, or its share of the machine as far as a control group lets it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits()]) // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def _limits() -> Iterator[int]:
    for path in LIMITS:
        if path.exists():
            word = path.read_text(encoding="utf-8").strip()
            if word.isdecimal():
                yield int(word)


def _described(config: TrainConfig, model: DiT, data: TrainingData, device: torch.device, world: World) -> Iterator[str]:
    parameters = sum(weight.numel() for weight in model.parameters())
    width = model.x_embedder.proj.weight.shape[0]
    yield (
        f"{config.model}: {parameters / 1e6:,.1f} million parameters, {len(model.blocks)} blocks of {width} channels; "
        f"{device}, {resolve_precision(config.precision, device)}, backends {config.backend}, "
        f"{'1 process' if world.size == 1 else f'{world.size} processes with {config.parallel}'}"
    )
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:,} epochs in steps"
    classes = len(data.class_to_idx) or "no"
    yield f"{data.length:,} images, {classes} classes; {length} of {config.global_batch_size} images"


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.1f} GiB"
