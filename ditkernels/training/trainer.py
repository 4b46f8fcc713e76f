"""Training: one loop, read from top to bottom, from a config to weights that a crash at any instant cannot change.

Everything random is keyed by (seed, step, position in the batch), so a run is a function of its config and its data: how many
processes read images, in how many microbatches a step is computed and where the run was interrupted does not matter. The host
enqueues a step and reads the loss of the one before; in between it waits for nothing. What several processes do differently from
one is in ``distributed.py``.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ditkernels.checkpoints.format import Checkpoint
from ditkernels.checkpoints.run import Run, checkpoint_directory
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.data.folder import UnreadableImagesError, as_floats
from ditkernels.data.loader import lost_readers_named, stream_batches
from ditkernels.data.order import Batch
from ditkernels.data.source import TrainingData, opened
from ditkernels.data.vae import VAE
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.evaluation.monitor import Monitor
from ditkernels.files import printable
from ditkernels.models import count
from ditkernels.ops.settings import use_backend
from ditkernels.options import recorded_values
from ditkernels.pretrained import arguments_of
from ditkernels.reference import DiT
from ditkernels.rng import Stream, below, normals, uniforms
from ditkernels.runtime import Stopped, StopSignal, World, environment, numerics, process_device, resolve_precision
from ditkernels.training.config import TrainConfig
from ditkernels.training.distributed import Parallel, process_group, step_flags
from ditkernels.training.ema import EMA, copy_for_average, decay_of_update, tell_share_of_start
from ditkernels.training.evaluations import Evaluations
from ditkernels.training.factory import build_model, build_monitor, latent_shape, vae_for
from ditkernels.training.finetune import Own, fitted, renumbered
from ditkernels.training.log import OneStepLate, QuietLog, RunLog, StepMetrics
from ditkernels.training.master_weights import Copies, accumulate_in, make_bf16_copies, move_grads_to_masters, refresh
from ditkernels.training.memory import check_room
from ditkernels.training.optimizer import (
    AdamWEMA,
    LossScale,
    NonFiniteGradientError,
    gradients,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    resolved,
    update,
)
from ditkernels.training.rehearsal import rehearse
from ditkernels.training.rescue import Rescue
from ditkernels.training.start import Start, as_begun, check_same_run, find_start, open_folder, settled, trained_before

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves in memory.

    Attributes:
        model: the trained one, in train mode.
        ema: the moving average of its weights, in eval mode.
        step: steps taken.
        interrupted: the signal that ended the run early, after a checkpoint; None if it is complete.

    With ``parallel="fsdp"`` in several processes both models are FSDP2 modules, of which this process holds its pieces.
    """

    model: DiT
    ema: DiT
    step: int
    interrupted: int | None


# ---- The loop --------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    *,
    model: DiT | None = None,
    data: TrainingData | Dataset[Any] | None = None,
    val_data: Dataset[Any] | None = None,
) -> TrainResult:
    """Train as ``config`` says, in ``config.results_dir``.

    The same config and data give the same weights, bit for bit, on the same device with the same number of threads,
    whether the run is broken off and resumed or not. The caller's random state is left as it was.

    Args:
        config: see TrainConfig.
        model: trained in place of the one that ``config.model`` names.
        data: trained on in place of what ``config.data_path`` names: any map-style ``torch.utils.data.Dataset`` of (image, label),
            as :class:`DatasetBatches` takes it.
        val_data: another one, which the validation loss is taken of.

    Raises:
        ValueError: the config does not fit the data, the model or the folder; CheckpointError is one.
        FolderInUseError: another process works in the folder.
        LostRankError: another process of the run is gone.
        NonFiniteGradientError: more than ``config.max_skipped`` steps in a row were skipped.
        OSError: a checkpoint could not be written; the ones before are whole.
    """
    device = process_device(config.device)
    run = Run(config.results_dir)
    with ExitStack() as stack:
        parallel = stack.enter_context(process_group(config, device))
        world = parallel.world
        stack.callback(run.close)
        run.lock(world)
        stack.enter_context(process_settings(config, device))
        start = find_start(config, run, world)
        config = as_begun(config, start)
        data = opened(config, data, val_data)
        config = settled(config, data, start)
        vae = vae_for(config, data, device)
        model = model or build_model(config, latent_shape(config, data, vae))
        check_room(config, model, data, device, world)
        stop = StopSignal(once=world.size > 1)
        trainer = Trainer(config, data, vae, model.to(device), parallel, stop)
        trainer.begin(start)
        rehearse(trainer, run.folder)
        world.on_first(lambda: open_folder(start, trainer.config, trainer.own, run, trainer.step, environment(device, world)))
        if world.first:
            tell_share_of_start(config.ema_decay, trainer.total, warmup=config.ema_warmup)
        stack.enter_context(stop)
        writer = parallel.writer(run.folder, config)
        stack.callback(writer.close)
        log = trainer.new_log()
        stack.callback(log.close)
        steps = range(trainer.step, trainer.total)
        mine = parallel.batches(data.train, config.global_batch_size, config.accumulation)
        batches = stack.enter_context(
            closing(stream_batches(mine, steps, workers=config.num_workers, pin_memory=device.type == "cuda"))
        )
        rescue = stack.enter_context(Rescue(trainer, writer, log))
        stack.enter_context(lost_readers_named())
        stopped, unfinished = None, False
        if start.checkpoint is not None:
            if world.first:
                trainer.evaluations.tell_changes()
            with rescue.agreed():
                stopped = trainer.evaluate(trainer.evaluations.missing(), log)
            unfinished = stopped is not None

        if not steps and world.first:
            logger.info("the run is complete: %d of %d steps are taken", trainer.step, trainer.total)
        for step in steps if stopped is None else ():
            batch = next_batch(batches, stop)
            if batch is None:
                if trainer.step:
                    trainer.save(writer, log)
                stopped = stop.number
                break
            trainer.note_unreadable(batch)
            rate = learning_rate(config, step, trainer.total)
            scalars = trainer.train_step(batch, step, rate, stop.number)
            trainer.record(trainer.late.push(step + 1, rate, scalars, log.seconds()), log)
            # Read once: a signal that comes later than this is the next step's, or an evaluation's.
            stopped = parallel.asked_to_stop(stop.number, trainer.flags)
            due = trainer.evaluations.due()
            with rescue.agreed():
                saves = stopped is not None or trainer.step == trainer.total or trainer.step % config.ckpt_every == 0
                if saves:
                    trainer.save(writer, log)
                if due and stopped is None:
                    # What is due must not cost what it is taken of.
                    writer.wait()
                    world.barrier()
                    stopped = trainer.evaluate(due, log)
                    if stopped is not None and not saves:
                        trainer.save(writer, log)
            unfinished = bool(due) and stopped is not None
            writer.raise_failure()
            if stopped is not None:
                break
        writer.wait()
        # A rank that left earlier would have the others killed, perhaps while they write.
        world.barrier()
        if stopped is not None and world.first:
            whole = f"{checkpoint_directory(run.folder, trainer.step)} is whole" if trainer.step else "no step has been taken"
            logger.info("stopped by %s; %s", signal.Signals(stopped).name, whole)
    interrupted = stopped if trainer.step < trainer.total or unfinished else None
    return TrainResult(trainer.model, trainer.ema.model, trainer.step, interrupted)


def next_batch(batches: Iterator[Batch], stop: StopSignal) -> Batch | None:
    """The next one; None, at once, where a signal comes while it is waited for.

    Among several ranks a signal is heard when all are, after the step.
    """
    if stop.once:
        return next(batches)
    batch = None
    with stop.while_waiting():
        if stop.number is None:
            batch = next(batches)
    return batch


@contextmanager
def process_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The settings of a run that hold for the whole process: TF32, determinism, backends; they are put back at the end."""
    tf32 = resolve_precision(config.precision, device) == "tf32"
    backend = None if config.backend == "auto" else config.backend
    with numerics(tf32=tf32, deterministic=config.deterministic), use_backend(backend):
        yield


def _refuse_narrow_weights(model: nn.Module) -> None:
    """Raises ValueError for trained weights in bf16 or fp16: a step of 1e-4 is lost in most of them."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model: {name} is {weight.dtype}, in which most steps of training round to nothing; give model.float(), "
                "and --precision for the dtype of the products"
            )


class Trainer:
    """The state of a run, and what it does with a batch.

    Args:
        config: the run's.
        data: what it trains on.
        vae: turns images into latents, and latents into pictures; None trains on pixels, or on latents unseen.
        model: on the device that trains.
        parallel: how processes share the model; None: this one trains it alone.
        stop: ends evaluations; None: nothing does.

    Attributes:
        model: the trained one, in fp32. With ``master_weights`` another one computes, which holds bf16 copies of its matrices.
        step: steps taken.
        updating: an update has begun and not ended: weights, moments and average may be of two steps.
        flags: the step flags of all ranks in the last step that has reached the host.
        evaluations: of the weights, as they are due.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        vae: VAE | None,
        model: DiT,
        parallel: Parallel | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self.parallel = parallel or Parallel()
        self.world = self.parallel.world
        self.data = data
        self.vae = vae
        self.latent_space = vae.space if data.latents is None and vae is not None else data.latents
        _refuse_narrow_weights(model)
        self.model = model
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(config.precision, self.device)
        if config.master_weights and self.precision != "bf16":
            raise ValueError(
                f"master_weights: got precision {config.precision}, which is {self.precision} on {self.device.type}, "
                "allowed is bf16"
            )
        # What "auto" became is what the run is, and what it records.
        device = self.device.type if config.device == "auto" else config.device
        self.config = config = replace(config, precision=self.precision, device=device)  # type: ignore[arg-type]
        self.diffusion: GaussianDiffusion = create_diffusion("", learn_sigma=model.learn_sigma)
        # Counted before the model is wrapped. Forward and backward cost three times the forward; a multiply-add is two operations.
        self.flops_per_image = 3 * count(model).flops
        self._positions = self.parallel.positions(config.global_batch_size, config.accumulation).to(self.device)
        self._check_label_dropout()
        model.train()
        # Labels are dropped below, by keyed draws; in train mode the embedder would drop again.
        model.y_embedder.eval()
        average = copy_for_average(model)
        computing, self._copies = self._computing()
        if config.compile:
            for block in (*computing.blocks, computing.final_layer):
                block.compile(dynamic=False)
        images = len(self._positions) // config.accumulation
        self._forward = self.parallel.wrap(computing, average, AUTOCAST_DTYPES.get(self.precision), images, self._copies)
        if config.accumulation > 1:
            accumulate_in(torch.float32, self._copies)
        self.ema = EMA(model, config.ema_decay, average)
        self._may_choose_optimizer = config.optimizer == "auto" and not config.master_weights
        self._use_optimizer("fused" if config.master_weights else resolved(config.optimizer, next(model.parameters())))
        self.loss_scale = LossScale(self.device) if self.precision == "fp16" else None
        self.step = 0
        self._images_before = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.flags: tuple[float, ...] = ()
        self.unreadable: set[str] = set()
        self._animated = False
        # Those that all ranks know of since they resumed.
        self._unreadable_before = 0
        self.stop = stop or StopSignal()
        self.evaluations = Evaluations(self, self._monitor() if config.eval_every else None, self.stop)
        self._pending: Mapping[str, float] | None = None
        self.late = OneStepLate()
        self.updating = False

    @property
    def own(self) -> Own:
        """What the run is, beside its settings."""
        return Own(arguments_of(self.model), self.data, self.latent_space, frozenset(self._trained))

    @property
    def images_seen(self) -> int:
        """Those of all steps taken; of the run's present batch size but where it was another before."""
        return self._images_before + self.step * self.config.global_batch_size

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        images = self.config.epochs * self.data.length - self._images_before
        return self.config.steps or max(1, images // self.config.global_batch_size)

    def _use_optimizer(self, name: Literal["torch", "fused"]) -> None:
        self.config = replace(self.config, optimizer=name)
        self._trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = make_optimizer(self._trained, self.config, self.ema, self._copies)

    def keep_optimizer(self, recorded: Literal["auto", "torch", "fused"]) -> None:
        """Goes on with the kernel that a run began with, unless the config names one; before the first step."""
        if self._may_choose_optimizer and recorded != "auto":
            self._use_optimizer(recorded)

    # --------------------------------------------------------------------------------------------------------
    # One step
    # --------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, rate: float, stopping: int | None = None) -> list[Tensor]:
        """Forward, backward, optimizer, moving average.

        Args:
            batch: this rank's.
            stopping: a signal that has reached it.

        Returns:
            loss, gradient norm, skipped, and the step flags of all ranks; 0-dim on the device.
        """
        microbatches = self.config.accumulation
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        images, labels = self._to_device(batch.images), self._to_device(batch.labels)
        chunks = zip(*(tensor.chunk(microbatches) for tensor in (self._positions, images, labels)), strict=True)
        for number, (positions, some_images, some_labels) in enumerate(chunks, start=1):
            with self.parallel.microbatch(last=number == microbatches):
                share = self._loss(some_images, some_labels, step, positions) / microbatches
                (share if self.loss_scale is None else share * self.loss_scale.value).backward()
            loss += share.detach()
        move_grads_to_masters(self._copies)
        flags = step_flags(stopping, len(self.unreadable) - self._unreadable_before)
        whole = self.parallel.reduce(loss, gradients(self._trained.values()), flags)
        self.updating = True
        self.ema.decay = decay_of_update(self.config.ema_decay, step, warmup=self.config.ema_warmup)
        norm, skipped = update(self.optimizer, whole.loss, whole.norm, self.loss_scale, self.config.grad_clip)
        if not isinstance(self.optimizer, AdamWEMA):
            self.ema.update()
        self.step = step + 1
        self.updating = False
        return [whole.loss, norm, skipped, *whole.flags]

    def _loss(self, images: Tensor, labels: Tensor, step: int, positions: Tensor) -> Tensor:
        """Mean loss of the samples at ``positions`` (b,) of the global batch of ``step``."""
        seed, dropout = self.config.global_seed, self.config.label_dropout
        latents = self.latents(images, Stream.POSTERIOR, step, positions)
        if dropout > 0:
            dropped = uniforms(seed, Stream.LABEL_DROP, step, positions) < dropout
            labels = torch.where(dropped, self.model.num_classes, labels)
        t = below(self.diffusion.num_timesteps, seed, Stream.TIMESTEP, step, positions)
        noise = normals(seed, Stream.NOISE, step, positions, tuple(latents.shape[1:]))
        with self.autocast():
            losses = self.diffusion.training_losses(self._forward, latents, t, {"y": labels}, noise)
        return losses["loss"].mean()

    def latents(self, images: Tensor, stream: Stream, step: int, positions: Tensor) -> Tensor:
        """What the model sees of a batch's images, (b, C, H, W), with the draws of ``stream`` where there are any."""
        seed = self.config.global_seed
        if self.data.latents is not None:
            mean, std = images.float().chunk(2, dim=1)
            return self.data.latents.draw(mean, std, normals(seed, stream, step, positions, self.data.shape))
        if images.dtype == torch.uint8:
            images = as_floats(images)
        if self.vae is None:
            return images
        shape = self.vae.latent_shape(images.shape[-1])
        return self.vae.latents(images, normals(seed, stream, step, positions, shape))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run's products."""
        dtype = AUTOCAST_DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # --------------------------------------------------------------------------------------------------------
    # What the host learns
    # --------------------------------------------------------------------------------------------------------

    def new_log(self) -> RunLog:
        """The log that goes on where the run stands."""
        kind = RunLog if self.world.first else QuietLog
        return kind(
            self.config,
            total=self.total,
            start=self.step,
            flops_per_image=self.flops_per_image,
            device=self.device,
            pending=self._pending,
            devices=self.world.size,
        )

    def record(self, metrics: StepMetrics | None, log: RunLog) -> None:
        """Counts and logs a step that has reached the host.

        Raises:
            NonFiniteGradientError: it is one skipped step too many.
            UnreadableImagesError: as of :meth:`note_unreadable`, of all ranks together.
        """
        if metrics is None:
            return
        self.flags = metrics.flags
        if self.flags:
            self._limit_unreadable(self._unreadable_before + int(self.flags[-1]))
        self.skipped += metrics.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.skipped else 0
        log.step(metrics, self.skipped)
        if self.skipped_in_a_row > self.config.max_skipped:
            count = "1 step" if self.skipped_in_a_row == 1 else f"{self.skipped_in_a_row} steps"
            raise NonFiniteGradientError(
                f"{count} in a row up to step {metrics.step} had a loss or gradient that is not finite "
                f"(the last: loss {metrics.loss}, norm {metrics.norm}); a lower learning rate is the usual cure"
            )

    def flush(self, log: RunLog) -> None:
        """:meth:`record` of the last step, for which the host waits."""
        self.record(self.late.pop(), log)

    def save(self, writer: CheckpointWriter, log: RunLog) -> None:
        """Hands a checkpoint of the last step to ``writer``."""
        self.flush(log)
        log.flush()
        with log.apart("saving"):
            writer.save(self.checkpoint(log))

    def note_unreadable(self, batch: Batch) -> None:
        """Names and counts the files that could not be read, and says where first frames are taken.

        Raises:
            UnreadableImagesError: they are more than ``max_unreadable``.
        """
        for path, reason in batch.unreadable:
            if path not in self.unreadable:
                self.unreadable.add(path)
                logger.warning("skipped %s: not a readable image: %s (%d so far)", printable(path), reason, len(self.unreadable))
        if batch.animated and not self._animated:
            self._animated = True
            logger.info("%s is animated: of it, and of others like it, the first frame is taken", printable(batch.animated[0]))
        if self.world.size == 1:
            self._limit_unreadable(len(self.unreadable))

    def _limit_unreadable(self, count: int) -> None:
        if count > self.config.max_unreadable:
            last = f"; one is {printable(min(self.unreadable))}" if self.unreadable else ""
            raise UnreadableImagesError(
                f"unreadable images: got {count}, allowed are {self.config.max_unreadable} (max_unreadable){last}"
            )

    def evaluate(self, kinds: list[str], log: RunLog) -> int | None:
        """Takes these kinds of what is due; returns the signal that broke them off, if one did."""
        if not kinds:
            return None
        self.flush(log)
        try:
            self.evaluations.take(kinds, log)
        except Stopped as stopped:
            return stopped.number
        return None

    def _monitor(self) -> Monitor:
        return build_monitor(
            self.config,
            self.model,
            device=self.device,
            decode=None if self.vae is None else self.vae.decode,
            autocast=AUTOCAST_DTYPES.get(self.precision),
            world=self.world,
            stop=self.stop,
        )

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints
    # --------------------------------------------------------------------------------------------------------

    def checkpoint(self, log: RunLog, world: World | None = None) -> Checkpoint:
        """Everything that training goes on from; the tensors are those in use, not copies.

        Args:
            log: of the steps so far.
            world: the processes that make it together; default: all.
        """
        unreadable = set().union(*(world or self.world).gather(self.unreadable))
        return Checkpoint(
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            step=self.step,
            config={"model": arguments_of(self.model), "training": asdict(self.config)},
            optimizer=optimizer_tensors(self.optimizer, self.model),
            state={
                "images_seen": self.images_seen,
                "data_length": self.data.length,
                "class_to_idx": self.data.class_to_idx,
                "images_per_class": None if self.data.images_per_class is None else list(self.data.images_per_class),
                "image_reader": self.data.image_reader,
                "trainable": sorted(self._trained),
                "latent_space": None if self.latent_space is None else asdict(self.latent_space),
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "unreadable": sorted(unreadable),
                "loss_scale": None if self.loss_scale is None else self.loss_scale.state(),
                "pending": log.pending(),
            },
        )

    def begin(self, start: Start) -> None:
        """Takes over what the run starts from.

        Raises:
            CheckpointError: the checkpoint is of another run, or the weights do not fit the model.
            ValueError: the ranks differ in data or model.
        """
        if start.checkpoint is not None:
            recorded = start.checkpoint.config.get("training", {})
            self.keep_optimizer(recorded_values(recorded, self.config)["optimizer"])
            self.resume(check_same_run(start, self.config, self.own))
        elif start.given is not None:
            tensors = {name: self.parallel.whole_tensor(tensor) for name, tensor in self.model.state_dict().items()}
            weights, told = fitted(start.given, tensors, self.own, self.config)
            if told is not None and self.world.first:
                logger.info("%s", told)
            self.load(weights, weights)
        self.data.train.stream.offset = self._images_before
        self.world.agree(data_length=self.data.length, class_to_idx=self.data.class_to_idx, model=self.own.model)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes over a checkpoint of the same run."""
        assert checkpoint.ema is not None
        assert checkpoint.optimizer is not None
        assert checkpoint.step is not None
        before, now = checkpoint.state["class_to_idx"], self.data.class_to_idx
        parts = (checkpoint.model, checkpoint.ema, checkpoint.optimizer)
        model, average, moments = (renumbered(part, before, now) if before != now else part for part in parts)
        # What has not been trained so far has no average of its own yet.
        fresh = self._trained.keys() - trained_before(checkpoint)
        self.load(model, {**average, **{name: model[name] for name in fresh}})
        load_optimizer_tensors(self.optimizer, self.model, moments, self.parallel.shard_like)
        self.step = checkpoint.step
        self._images_before = checkpoint.state["images_seen"] - self.step * self.config.global_batch_size
        self.skipped = checkpoint.state["skipped"]
        self.skipped_in_a_row = checkpoint.state["skipped_in_a_row"]
        self.unreadable = set(checkpoint.state["unreadable"])
        self._unreadable_before = len(self.unreadable)
        self._pending = checkpoint.state["pending"]
        if self.loss_scale is not None and checkpoint.state["loss_scale"] is not None:
            self.loss_scale.load(checkpoint.state["loss_scale"])

    def load(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        """Takes over state dicts of whole tensors; RuntimeError if one does not fit."""
        self.parallel.load(self.model, weights)
        self.parallel.load(self.ema.model, average)
        refresh(self._copies)

    def _computing(self) -> tuple[DiT, Copies]:
        """The model that computes, and the copies of the model's weights in it."""
        return make_bf16_copies(self.model) if self.config.master_weights else (self.model, {})

    def _check_label_dropout(self) -> None:
        if self.config.label_dropout > 0 and self.model.y_embedder.rows == self.model.num_classes:
            raise ValueError(f"label_dropout: got {self.config.label_dropout}, allowed is 0: the model has no null class")
