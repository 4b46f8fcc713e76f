"""What the trainer costs on top of the step itself: forward, backward, AdamW, moving average and gradient norm.

    python -m benchmarks.speed.trainer_overhead --json benchmarks/results/trainer_overhead.json    DiT-S/8 at 256 px, batch 8
    python -m benchmarks.speed.trainer_overhead --model DiT-XL/2 --batch 256 --precision bf16      a GPU

Both contenders train the same model at the same batch, in turns, a few steps a turn. The bare one gets latents, labels, timesteps
and noise made beforehand. The trainer makes them: it permutes the data, draws timesteps, noise and dropped labels by key, sets the
learning rate, decides on the device whether to skip, and reads and logs the loss a step late. Reading and decoding of images is
left out, since worker processes do it. The overhead is the median over turns of the trainer's time over the bare one's in the
same turn, less one. On a CPU it is processor time, which other processes disturb less; on a GPU it is time on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

import ditkernels
from benchmarks.speed import measure
from ditkernels.data.digits import InMemoryBatches, LabelledImages
from ditkernels.data.source import TrainingData
from ditkernels.training.config import TrainConfig
from ditkernels.training.ema import EMA
from ditkernels.training.factory import build_model
from ditkernels.training.log import OneStepLate
from ditkernels.training.optimizer import make_optimizer
from ditkernels.training.trainer import Trainer, process_settings

LIMIT = 0.05  # of the bare step: what the trainer may cost


def settings(args: argparse.Namespace, folder: str) -> TrainConfig:
    """The run of both contenders."""
    return TrainConfig(
        data_path="random latents",
        vae="none",
        image_size=args.input_size,
        num_classes=1000,
        model=args.model,
        steps=1_000_000,
        global_batch_size=args.batch,
        precision=args.precision,
        device=args.device,
        results_dir=folder,
        log_every=args.log_every,
    )


def random_data(config: TrainConfig) -> TrainingData:
    """A data set of random latents."""
    count, shape = 4 * config.global_batch_size, (4, config.image_size, config.image_size)
    data = LabelledImages(torch.randn(count, *shape), torch.randint(1000, (count,)))
    batches = InMemoryBatches(data, config.global_batch_size, config.global_seed)
    return TrainingData(batches, None, count, shape, shape[-1], {})


def bare(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A step with nothing around it."""
    shape = (4, config.image_size, config.image_size)
    trainer = Trainer(config, random_data(config), None, build_model(config, shape).to(device))
    model, diffusion = trainer.model, trainer.diffusion
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = list(trained.values())
    optimizer, ema = make_optimizer(trained, config), EMA(model, config.ema_decay)
    batch = (config.global_batch_size,)
    x, noise = (torch.randn(*batch, *shape, device=device) for _ in range(2))
    t, y = (torch.randint(1000, batch, device=device) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
        loss.backward()
        torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        optimizer.step()
        ema.update()

    return step


def trained(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A step of the trainer, its data and its log."""
    shape = (4, config.image_size, config.image_size)
    trainer = Trainer(config, random_data(config), None, build_model(config, shape).to(device))
    log, late = trainer.new_log(), OneStepLate()

    def step() -> None:
        batch = trainer.data.train[trainer.step]
        scalars = trainer.train_step(batch, trainer.step, config.learning_rate)
        trainer.record(late.push(trainer.step, config.learning_rate, scalars), log)

    return step


def turns(args: argparse.Namespace, contenders: dict[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds a step of each contender in each turn; the order alternates."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(args.rounds + 1):
        names = list(contenders) if index % 2 else list(reversed(contenders))
        for name in names:
            start = clock()
            for _ in range(args.steps):
                contenders[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The first turn warms up.
            if index:
                found[name].append(1e3 * (clock() - start) / args.steps)
    return found


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a contender, and the verdict."""
    device = measure.device_of(args)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args, folder)
        with process_settings(config, device), redirect_stdout(StringIO()):
            contenders = {"bare": bare(config, device), "trainer": trained(config, device)}
            found = turns(args, contenders, device)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    overhead = statistics.median(mine / theirs for mine, theirs in zip(found["trainer"], found["bare"], strict=True))
    common = {
        "model": args.model,
        "input_size": args.input_size,
        "batch": args.batch,
        "precision": args.precision,
    }
    yield {**common, "contender": "bare", "ms_a_step": statistics.median(found["bare"])}
    yield {
        **common,
        "contender": "trainer",
        "ms_a_step": statistics.median(found["trainer"]),
        "overhead": overhead - 1,
        "within_limit": overhead - 1 <= LIMIT,
        "logged_lines": lines,
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--model", default="DiT-S/8", choices=list(ditkernels.DiT_models))
    parser.add_argument("--input-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--batch", type=measure.positive, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16", "fp16"))
    parser.add_argument("--steps", type=measure.positive, default=3, help="steps of each contender in a turn")
    parser.add_argument("--log-every", type=measure.positive, default=10, help="steps between logged lines")
    args = parser.parse_args(argv)
    columns = ("model", "batch", "precision", "contender", "ms_a_step", "overhead", "within_limit")
    journal = measure.Journal("trainer_overhead", args)
    journal.unit("paired", rows, args)
    journal.close(columns)


if __name__ == "__main__":
    main()
