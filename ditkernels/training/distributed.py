"""Many processes, one training run: what each of them computes, and how all of them come to the same decision.

`torchrun` starts the processes (ranks). Each takes its positions of every microbatch of the global batch, so that the noise,
timesteps and labels of a sample are those it has in one process. Gradients are averaged over the ranks by torch's own engines:

- "ddp" (DistributedDataParallel): every rank holds everything; rank 0 writes checkpoints as a single process does.
- "fsdp" (FSDP2, ``fully_shard``): parameters, gradients, AdamW's moments and the moving average are cut along their first
  dimension into ``shard_size`` pieces, block by block; with fewer pieces than ranks the groups are replicas of each other
  (HSDP). The ranks of the first group write checkpoints together.

What must not differ between ranks is decided on reduced numbers. One all-reduce a step carries the loss, the squared norm of the
gradient and the step flags, which say who has been asked to stop: so a step is skipped by all or by none, and all stop after the
same step. It reaches the host one step late, with the loss, and costs no further synchronisation.

:class:`Parallel` is a single process, which needs no process group.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditkernels._version import __version__
from ditkernels.checkpoints.format import CheckpointError
from ditkernels.checkpoints.sharded import Peers, Piece, ShardWriter
from ditkernels.checkpoints.writer import CheckpointWriter, IdleWriter
from ditkernels.data.order import Batch, Batches
from ditkernels.files import first_line
from ditkernels.reference import DiT
from ditkernels.runtime import STOP_SIGNALS, World, place, processes
from ditkernels.training.config import TrainConfig
from ditkernels.training.master_weights import Copies, accumulate_in, move_grads_to_masters
from ditkernels.training.optimizer import gradient_norm

# What may differ between the machines of a run: where the data lies, and who reads it.
OWN_SETTINGS = ("data_path", "val_path", "num_workers")
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|[Tt]imeout")


class LostRankError(ConnectionError):
    """Another rank has died, or has not answered for ``collective_timeout`` seconds; the last checkpoint is whole."""


class Reduced(NamedTuple):
    """A step's numbers, over all ranks; 0-dim fp32 on the device.

    Attributes:
        loss: mean over the global batch.
        norm: of the whole gradient.
        flags: the step flags, as of :meth:`Parallel.reduce`, summed.
    """

    loss: Tensor
    norm: Tensor
    flags: list[Tensor]


# ---- One process -----------------------------------------------------------------------------------------------------


class Parallel:
    """How the processes of a run share a model; this class is a process on its own.

    Attributes:
        world: the processes.
        whole_here: each of them holds all weights.
    """

    whole_here = True

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()

    def positions(self, batch_size: int, microbatches: int) -> Tensor:
        """This rank's share of each microbatch in turn: positions (batch_size / size,) int64 in the global batch."""
        return torch.arange(batch_size).view(microbatches, self.world.size, -1)[:, self.world.rank].flatten()

    def batches(self, batches: Batches, batch_size: int, microbatches: int) -> Batches:
        """The batches of this rank: the samples at its :meth:`positions`; no others are read."""
        return batches

    def wrap(self, model: DiT, average: DiT, autocast: torch.dtype | None, images: int, copies: Copies) -> Callable[..., Tensor]:
        """Wraps the model and its moving average for the ranks, in place.

        Args:
            model, average: equal on all ranks, where they are to be cut into pieces; else the first rank's are taken.
            autocast: dtype of the products; None is the weights' own.
            images: of a rank in one forward.
            copies: the weights of the model that are copies of a master; their gradients are averaged in fp32.

        Returns:
            What to call in training in place of the model.
        """
        return model

    def microbatch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a microbatch: gradients are averaged over ranks after the last one only."""
        return nullcontext()

    def reduce(self, loss: Tensor, gradients: Sequence[Tensor], flags: Sequence[float]) -> Reduced:
        """The loss and gradient norm of the global batch.

        Args:
            loss: mean over this rank's samples, 0-dim.
            gradients: averaged over ranks already.
            flags: of this rank, to be summed over ranks; a single process needs none, and gets none back.
        """
        return Reduced(loss, gradient_norm(gradients), [])

    def asked_to_stop(self, here: int | None, flags: Sequence[float]) -> int | None:
        """The signal to stop for, the same on every rank.

        Args:
            here: that has reached this process.
            flags: the sums of :func:`step_flags` in the step before; empty if there was none.
        """
        return here

    def whole(self, model: DiT) -> DiT:
        """The moving average as an ordinary model on this device, for everything but training."""
        return model

    def whole_tensor(self, tensor: Tensor) -> Tensor:
        """A tensor of the model, all of it."""
        return tensor

    def load(self, model: DiT, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a state dict of whole tensors; RuntimeError if it does not fit."""
        model.load_state_dict(tensors)

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A copy of a whole tensor, or of a scalar, cut and placed as ``like`` is."""
        return tensor.to(like.device, copy=True)

    def writer(self, run: Path, config: TrainConfig) -> CheckpointWriter:
        """What writes this rank's part of the checkpoints."""
        return CheckpointWriter(run, keep_last=config.keep_last, keep_every=config.keep_every)


def step_flags(stopping: int | None, unreadable: int) -> tuple[float, ...]:
    """What the others must know of a rank at each step: which signal has reached it, and how many files it could not read."""
    return (*(float(stopping == number) for number in STOP_SIGNALS), float(unreadable))


# ---- Many ------------------------------------------------------------------------------------------------------------


class _Share:
    """Batches of which a rank reads its own positions."""

    def __init__(self, batches: Batches, positions: Tensor) -> None:
        self._batches = batches
        self._positions = positions
        self.stream = batches.stream

    def __getitem__(self, step: int) -> Batch:
        return self._batches.at(step, self._positions)

    def at(self, step: int, positions: Tensor) -> Batch:
        return self._batches.at(step, self._positions[positions])


class ManyRanks(Parallel):
    """What is common to both ways of sharing a model.

    Args:
        world: the processes, more than one.
        config: the run's.
        device: this rank's.
    """

    def __init__(self, world: World, config: TrainConfig, device: torch.device) -> None:
        super().__init__(world)
        self.device = device
        self.timeout = timedelta(seconds=config.collective_timeout)

    def batches(self, batches: Batches, batch_size: int, microbatches: int) -> Batches:
        return _Share(batches, self.positions(batch_size, microbatches))

    def reduce(self, loss: Tensor, gradients: Sequence[Tensor], flags: Sequence[float]) -> Reduced:
        norm = gradient_norm([_local(gradient) for gradient in gradients])
        # Filled in by a kernel each: a tensor made of a list would be copied, and the copy waited for.
        numbers = [torch.full((), value, dtype=torch.float64, device=self.device) for value in flags]
        # fp64, in which no sum of squares of fp32 norms overflows or vanishes.
        packed = torch.stack([loss.double(), norm.double().square(), *numbers])
        dist.all_reduce(packed)
        return Reduced((packed[0] / self.world.size).float(), self._norm(norm, packed[1]), list(packed[2:].float()))

    def _norm(self, local: Tensor, squares: Tensor) -> Tensor:
        """The norm of the whole gradient out of that of this rank's and the sum of its square over all ranks."""
        raise NotImplementedError

    def asked_to_stop(self, here: int | None, flags: Sequence[float]) -> int | None:
        asked = zip(STOP_SIGNALS, flags, strict=False)
        return next((int(number) for number, ranks in asked if ranks), None)


class Replicated(ManyRanks):
    """Every rank holds the whole model: DistributedDataParallel."""

    _engine: nn.parallel.DistributedDataParallel

    def wrap(self, model: DiT, average: DiT, autocast: torch.dtype | None, images: int, copies: Copies) -> Callable[..., Tensor]:
        # All ranks begin with the first one's model: DDP sees to the weights that compute, not to their masters and the average.
        for tensor in (*copies, *average.parameters()):
            dist.broadcast(tensor.detach(), src=0)
        self._engine = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._copies = copies
        if copies:
            masters = {made: master for master, made in copies.items()}
            # DDP would compare a function's annotations, which are strings here, with types.
            self._engine.register_comm_hook(masters, lambda state, bucket: _average_in_fp32(state, bucket))
        self._settle(model, autocast, images)
        return self._engine

    def _settle(self, model: DiT, autocast: torch.dtype | None, images: int) -> None:
        # After its first backward DDP groups the gradients anew, in the order in which they came, and with three ranks or more
        # the order of a sum depends on the grouping. A resumed run must not have a first step of its own, so there is one for
        # nothing before the first, of the same shapes.
        x = torch.zeros(images, model.in_channels, *model.input_size, device=self.device)
        zeros = torch.zeros(images, dtype=torch.int64, device=self.device)
        products = nullcontext() if autocast is None else torch.autocast(self.device.type, autocast)
        with products:
            out = self._engine(x, zeros, zeros)
        (out.float().sum() * 0).backward()
        model.zero_grad(set_to_none=True)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if last:
            # DDP takes gradients in their parameter's dtype. Those of the microbatches before wait on the masters for the hook.
            move_grads_to_masters(self._copies)
            accumulate_in(torch.bfloat16, self._copies)
            yield
            return
        accumulate_in(torch.float32, self._copies)
        with self._engine.no_sync():
            yield

    def _norm(self, local: Tensor, squares: Tensor) -> Tensor:
        return local

    def writer(self, run: Path, config: TrainConfig) -> CheckpointWriter:
        return super().writer(run, config) if self.world.first else IdleWriter(run)


class Sharded(ManyRanks):
    """Parameters, gradients, moments and moving average cut into pieces: FSDP2.

    Raises:
        ValueError: ``shard_size`` does not divide the number of ranks.
    """

    whole_here = False

    def __init__(self, world: World, config: TrainConfig, device: torch.device) -> None:
        super().__init__(world, config, device)
        size = world.size
        self.pieces = config.shard_size or size
        if size % self.pieces:
            raise ValueError(f"shard_size: got {self.pieces}, which does not divide the number of processes, {size}")
        self.replicas = size // self.pieces
        replica, self.piece_index = divmod(world.rank, self.pieces)
        self.writes = replica == 0
        # Checkpoints are agreed on in a thread of their own, which must not get between the collectives of the others.
        self._writers: Any = dist.new_group(list(range(self.pieces)), timeout=self.timeout, backend="gloo")

    def wrap(self, model: DiT, average: DiT, autocast: torch.dtype | None, images: int, copies: Copies) -> Callable[..., Tensor]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        # FSDP2 warns of outputs that are views, as a block's gate and the image are; nobody changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        shape, names = ((self.pieces,), ("shard",))
        if self.replicas > 1:
            shape, names = ((self.replicas, self.pieces), ("replicate", "shard"))  # type: ignore[assignment]
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        # A copy of everything but the weights.
        empty: dict[int, Any] = {
            id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in average.parameters()
        }
        self._skeleton = copy.deepcopy(average, empty)
        # Inputs keep their dtype: the residual stream and the conditioning have their own.
        kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (average, model):
            for block in module.blocks:
                # Products only: autocast would make the same cast after twice the communication.
                cast = autocast if _has_products_only(block) else None
                policy = MixedPrecisionPolicy(cast, torch.float32, cast_forward_inputs=False)
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(module, mesh=mesh, mp_policy=kept)
        assert isinstance(model, FSDPModule)
        self._engine: FSDPModule = model
        return model

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self._engine.set_requires_gradient_sync(last)
        yield

    def _norm(self, local: Tensor, squares: Tensor) -> Tensor:
        return (squares / self.replicas).sqrt().float()

    def whole(self, model: DiT) -> DiT:
        tensors = {name: self.whole_tensor(tensor) for name, tensor in model.state_dict().items()}
        plain = copy.deepcopy(self._skeleton)
        plain.load_state_dict(tensors, assign=True)
        return plain.requires_grad_(False)

    def whole_tensor(self, tensor: Tensor) -> Tensor:
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full

    def load(self, model: DiT, tensors: Mapping[str, Tensor]) -> None:
        own = model.state_dict()
        if own.keys() != tensors.keys():
            raise CheckpointError(f"other tensors than the model's: {sorted(own.keys() ^ tensors.keys())[:8]}")
        for name, tensor in own.items():
            self._fill(tensor, tensors[name])

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        if tensor.shape != like.shape:
            return super().shard_like(tensor, like)
        sharded = torch.zeros_like(like)
        self._fill(sharded, tensor)
        return sharded

    @torch.no_grad()
    def _fill(self, sharded: Tensor, whole: Tensor) -> None:
        local = _local(sharded)
        start = self._start(sharded)
        local.copy_(whole[start : start + len(local)])

    def _start(self, sharded: Tensor) -> int:
        """The first row of this rank's piece; the pieces are as long as each other, but for the last ones."""
        rows = len(sharded)
        return min(rows, self.piece_index * -(-rows // self.pieces))

    def piece(self, tensor: Tensor) -> Piece | None:
        """What this rank writes of a tensor of a checkpoint; None: nothing."""
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            return Piece(tensor, tuple(tensor.shape), 0) if self.world.first else None
        local = _local(tensor)
        return Piece(local, tuple(tensor.shape), self._start(tensor)) if local.numel() else None

    def writer(self, run: Path, config: TrainConfig) -> CheckpointWriter:
        if not self.writes:
            return IdleWriter(run)
        return ShardWriter(
            run,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            peers=Peers(self.piece_index, self.pieces, self._exchange),
            piece=self.piece,
        )

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.pieces
        dist.all_gather_object(values, value, group=self._writers)
        return values


def _average_in_fp32(masters: Mapping[Tensor, Tensor], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP: the mean of a bucket over the ranks, in fp32.

    Gradients of copies are added to what their masters have, and their means become the masters' gradients; the bucket, in the
    copies' dtype, could not hold them.
    """
    buffer, copies = bucket.buffer(), bucket.parameters()
    wide = buffer.float()
    for made, piece in zip(copies, wide.split([made.numel() for made in copies])):
        master = masters.get(made)
        if master is not None:
            gradient = piece.view_as(made)
            master.grad = gradient if master.grad is None else gradient.add_(master.grad)
    # As DDP does without a hook.
    wide.mul_(1 / dist.get_world_size())
    mean: torch.futures.Future[Any] = dist.all_reduce(wide, async_op=True).get_future()
    return mean.then(lambda _: buffer)


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, in the same memory; any other tensor as it is."""
    piece = getattr(tensor.detach(), "_local_tensor", tensor)
    return piece


def _has_products_only(block: nn.Module) -> bool:
    """Whether every parameter is a linear's."""
    return all(isinstance(module, nn.Linear) for module in block.modules() if module._parameters)


# ---- Coming together -------------------------------------------------------------------------------------------------


@contextmanager
def process_group(config: TrainConfig, device: torch.device) -> Iterator[Parallel]:
    """Brings together the processes that torchrun has started, and parts them at the end.

    Args:
        config: the run's, the same on all ranks but for ``OWN_SETTINGS``.
        device: of this process.

    Raises:
        ValueError: the ranks disagree on the config, a variable of torchrun's is wrong, or the global batch cannot be split evenly.
        LostRankError: a rank did not come, died, or did not answer.
    """
    size = place().size
    if size > 1 and config.global_batch_size % (size * config.accumulation):
        raise ValueError(
            f"global_batch_size: got {config.global_batch_size}, which is no multiple of {size} processes x "
            f"accumulation {config.accumulation}"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _lost_ranks_named(), processes(backend, timeout=timedelta(seconds=config.collective_timeout)) as world:
        if world.size == 1:
            yield Parallel(world)
            return
        world.agree(ditkernels=__version__, torch=torch.__version__, **_common(config))
        yield (Sharded if config.parallel == "fsdp" else Replicated)(world, config, device)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    return place().size > 1 and isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise LostRankError(
            f"rank {os.environ.get('RANK')}: another rank is gone or does not answer, so the run ends here; "
            f"--resume auto goes on from the last whole checkpoint ({first_line(error)})"
        ) from error


def _common(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in OWN_SETTINGS}
