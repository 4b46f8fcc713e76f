"""`ditkernels sample`: guided samples of a checkpoint, a handful or 50,000."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("ditkernels: error: run `python -m ditkernels sample ...` or `torchrun -m ditkernels sample ...`", file=sys.stderr)
    sys.exit(2)

import argparse
import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.check import resolve_device
from ditkernels.diffusion import create_diffusion
from ditkernels.sampler.drawing import SOLVERS, SampleConfig
from ditkernels.sampler.generate import FORMATS, METADATA, Batches, Job, World, generate
from ditkernels.sampler.labels import SCHEMES, Labels, parse_classes, read_labels
from ditkernels.sampler.loading import WEIGHTS, load_model
from ditkernels.torchrun import local_device, place
from ditkernels.words import counted

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DRIFTING_APART = datetime.timedelta(days=7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels sample`."""
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a checkpoint or of a training run, or a public .pt file")
    add("--out", type=Path, default=Path("samples"), help=f"folder to write to, or to resume {default}")
    add("--weights", choices=WEIGHTS, default="ema", help=f"moving average or trained weights {default}")
    add("--num-heads", type=int, help="where neither the checkpoint nor the paper tells")
    add("--count", type=int, default=16, help=f"images {default}")
    add("--batch-size", type=int, default=16, help=f"images at once; fixed for a run {default}")
    add("--solver", choices=SOLVERS, default="ddpm", help=default)
    add("--steps", default="250", help=f"respacing: 250, ddim50, 10,15,20 or logsnr20 {default}")
    add("--noise-schedule", default="linear", help=default)
    add("--cfg-scale", type=float, default=4.0, help=f"guidance scale, 1 is none {default}")
    add("--guided-channels", default="3", help=f"how many, or all {default}")
    add("--guidance-interval", metavar="LOW,HIGH", help="original timesteps that are guided, ends included")
    add("--clip-denoised", action="store_true", help="clip x_0 to [-1, 1], for pixels")
    add("--labels", choices=SCHEMES[:2], default="balanced", help=f"{default}; both interleaved")
    add("--classes", help="ids and ranges, as in 207,360 or 0-9 (default: all)")
    add("--labels-file", type=Path, help="one class id a line, for each image")
    add("--seed", type=int, default=0, help=default)
    add("--formats", default="png,grid,npz", help=f"of {', '.join(FORMATS)} {default}")
    add(
        "--vae",
        type=lambda name: None if name == "none" else name,
        help="ema, mse or a folder: latents become images; none, the default, where the model draws pixels",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help=f"of the products {default}")
    add("--threads", type=int, default=1, help=f"CPU threads a process, fixed for a run {default}")


def run(args: argparse.Namespace) -> int:
    """Draws the samples, or those still missing. Returns 0.

    Raises:
        ValueError, ImportError, OSError: as ``load_model``, ``SampleConfig`` and ``generate``; a flag that cannot be read.
    """
    device = process_device(args.device)
    with processes() as world:
        loaded = load_model(args.checkpoint, weights=args.weights, num_heads=args.num_heads)
        model = loaded.model.to(device)
        diffusion = create_diffusion(args.steps, args.noise_schedule, learn_sigma=model.learn_sigma)
        record = {
            "checkpoint": {"sha256": loaded.digest, "weights": args.weights, "step": loaded.checkpoint.step},
            "model": dict(loaded.checkpoint.config),
            "steps": args.steps,
            "noise_schedule": args.noise_schedule,
            "precision": args.precision,
            "vae": args.vae,
        }
        job = Job(
            labels=_labels(args, model.num_classes),
            config=_config(args),
            batches=Batches(args.count, args.batch_size),
            formats=tuple(args.formats.split(",")),
            threads=args.threads,
            record=record,
        )
        dtype = PRECISIONS[args.precision]
        started = time.perf_counter()
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False):
            generate(model, diffusion, job, args.out, decode=_decoder(args.vae, device), world=world)
        if world.rank == 0:
            seconds = time.perf_counter() - started
            print(f"{counted(args.count, 'image')} in {args.out}, {seconds:.1f} s; what made them: {args.out / METADATA}")
    return 0


def _config(args: argparse.Namespace) -> SampleConfig:
    channels = None if args.guided_channels == "all" else _whole("guided-channels", args.guided_channels)
    return SampleConfig(
        solver=args.solver,
        guidance_scale=args.cfg_scale,
        guided_channels=channels,
        clip_denoised=args.clip_denoised,
        seed=args.seed,
        guidance_interval=_interval(args.guidance_interval),
    )


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--{name}: got {text!r}, allowed is a whole number or all")
    return int(text)


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance-interval: got {text!r}, allowed is LOW,HIGH in timesteps") from error
    return low, high


def _labels(args: argparse.Namespace, num_classes: int) -> Labels:
    if args.labels_file is not None:
        if args.classes is not None:
            raise ValueError("--labels-file: got one beside --classes, allowed is only one of the two")
        return Labels("listed", read_labels(args.labels_file))
    classes = tuple(range(num_classes)) if args.classes is None else parse_classes(args.classes)
    return Labels(args.labels, classes, args.seed)


def _decoder(vae: str | None, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    if vae is None:
        return None
    from ditkernels.vae import load_vae

    return load_vae(vae, device).decode


def process_device(name: str) -> torch.device:
    """The device of that name; of several processes each has its own GPU, which becomes the current one.

    Raises:
        ValueError: as ``local_device`` and ``resolve_device``.
    """
    device = resolve_device(local_device(name))
    if device.type == "cuda" and place().size > 1:
        torch.cuda.set_device(device)
    return device


@contextmanager
def processes() -> Iterator[World]:
    """The processes that torchrun started; this one alone without it.

    Raises:
        ValueError: a variable of torchrun's is missing or wrong.
    """
    size = place().size
    if size == 1:
        yield World()
        return
    from torch import distributed

    from ditkernels.distributed import keep_groups

    # A process may have days of work left when another is done.
    distributed.init_process_group("gloo", timeout=DRIFTING_APART)
    try:
        yield World(distributed.get_rank(), size, _barrier(distributed))
    finally:
        keep_groups()
        distributed.destroy_process_group()


def _barrier(distributed: Any) -> Callable[[], object]:
    return lambda: distributed.barrier()
