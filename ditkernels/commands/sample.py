"""`ditkernels sample`: guided samples of a checkpoint, a handful or 50,000."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkernels.checkpoints.config import WEIGHTS
from ditkernels.commands import DEFAULT, DEVICE, LONG_WORK, add_weights_flags, counted
from ditkernels.sampling.config import AUTO, FORMATS, GUIDED_CHANNELS, SCHEMES, SOLVERS, SampleConfig, guided_channels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ditkernels.checkpoints.model import Loaded
    from ditkernels.sampling.labels import Labels

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels sample`."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run, a checkpoint, or a file or folder of other programs (docs/checkpoints.md)")
    add("--out", type=Path, default=Path("samples"), help=f"folder to write to, or to resume {DEFAULT}")
    add("--weights", choices=WEIGHTS, default="ema", help=f"moving average or trained weights {DEFAULT}")
    add_weights_flags(parser)
    add("--count", type=int, default=16, help=f"images to draw {DEFAULT}")
    add("--batch-size", type=int, default=16, help=f"images at once; fixed for a run {DEFAULT}")
    add("--solver", choices=SOLVERS, default="ddpm", help=f"what follows the trajectory {DEFAULT}")
    add("--steps", default="250", help=f"respacing: 250, ddim50, 10,15,20 or logsnr20 {DEFAULT}")
    add("--noise-schedule", default="linear", help=f"schedule that the model was trained with {DEFAULT}")
    add("--cfg-scale", type=float, help="guidance scale, 1 is none (default: 4.0, and 1 where the model has no null class)")
    add("--guided-channels", help=f"{GUIDED_CHANNELS} (default: the run's, else auto)")
    add("--guidance-interval", metavar="LOW,HIGH", help="original timesteps that are guided, ends included")
    add(
        "--clip-denoised",
        action=argparse.BooleanOptionalAction,
        help="clip x_0 to [-1, 1]; default: for a run that was trained on pixels",
    )
    add(
        "--labels",
        choices=SCHEMES[:4],
        default="balanced",
        help="how classes are given to images, interleaved in each way; spread: few images show classes from all over; "
        f"data: as often as the training data has them {DEFAULT}",
    )
    add("--classes", help="ids and ranges, as in 207,360 or 0-9 (default: all)")
    add("--labels-file", type=Path, help="one class id a line, for each image")
    add("--seed", type=int, default=0, help=f"same seed, same images {DEFAULT}")
    add("--formats", default="png,grid,npz", help=f"what to write, out of {', '.join(FORMATS)} {DEFAULT}")
    add(
        "--vae",
        type=lambda name: None if name == "none" else name,
        help="ema, mse or a folder: latents become images; none, the default, where the model draws pixels",
    )
    add("--device", default="auto", help=DEVICE)
    add("--precision", choices=PRECISIONS, default="fp32", help=f"dtype of the products {DEFAULT}")
    add("--threads", type=int, default=1, help=f"CPU threads a process, fixed for a run {DEFAULT}")


def run(args: argparse.Namespace) -> int:
    """Draws the samples, or those still missing. Returns 0.

    Raises:
        ValueError, ImportError, OSError: as ``load_model``, ``SampleConfig`` and ``generate``; a flag that cannot be read.
    """
    import torch

    from ditkernels.checkpoints.model import load_model
    from ditkernels.diffusion import create_diffusion
    from ditkernels.runtime import numerics, process_device, processes
    from ditkernels.sampling.generate import METADATA, Batches, Job, generate

    device = process_device(args.device)
    with processes(timeout=LONG_WORK) as world:
        told = {name: getattr(args, name) for name in ("num_heads", "input_size", "null_class")}
        loaded = load_model(args.checkpoint, weights=args.weights, **told)
        model = loaded.model.to(device)
        run = loaded.training
        formats = tuple(args.formats.split(","))
        _check_decoder(args, run, formats)
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
            labels=_labels(args, loaded),
            config=_config(args, loaded),
            batches=Batches(args.count, args.batch_size),
            formats=formats,
            threads=args.threads,
            record=record,
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
        started = time.perf_counter()
        autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)
        with numerics(tf32=args.precision == "tf32", deterministic=False), autocast:
            generate(model, diffusion, job, args.out, decode=_decoder(args.vae, device), world=world)
        if world.first:
            seconds = time.perf_counter() - started
            print(f"{counted(args.count, 'image')} in {args.out}, {seconds:.1f} s; what made them: {args.out / METADATA}")
    return 0


def _is_of_pixels(run: Mapping[str, Any]) -> bool:
    return run.get("vae") == "none"


def _check_decoder(args: argparse.Namespace, run: Mapping[str, Any], formats: tuple[str, ...]) -> None:
    if run.get("vae") == "unknown" and args.vae is None and formats != ("latents",):
        raise ValueError(
            "--vae: got none, and what made the latents of this run is not known; --formats latents leaves them as they are"
        )
    if run and args.vae is None and not _is_of_pixels(run) and formats != ("latents",):
        raise ValueError(
            f"--vae: got none, and the run was trained on latents of the VAE {run['vae']!r}; "
            f"--vae {run['vae']} makes images of them, --formats latents leaves them as they are"
        )


def _config(args: argparse.Namespace, loaded: Loaded) -> SampleConfig:
    training = loaded.training
    of_run = training.get("guided_channels", AUTO)
    has_null_class = loaded.model.y_embedder.rows > loaded.model.num_classes
    return SampleConfig(
        solver=args.solver,
        guidance_scale=(4.0 if has_null_class else 1.0) if args.cfg_scale is None else args.cfg_scale,
        guided_channels=guided_channels(args.guided_channels or of_run),
        clip_denoised=_is_of_pixels(training) if args.clip_denoised is None else args.clip_denoised,
        seed=args.seed,
        guidance_interval=_interval(args.guidance_interval),
    )


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance-interval: got {text!r}, allowed is LOW,HIGH in timesteps") from error
    return low, high


def _labels(args: argparse.Namespace, loaded: Loaded) -> Labels:
    from ditkernels.sampling.labels import Labels, parse_classes, read_labels

    if args.labels_file is not None:
        if args.classes is not None:
            raise ValueError("--labels-file: got one beside --classes, allowed is only one of the two")
        return Labels("listed", read_labels(args.labels_file))
    classes = None if args.classes is None else parse_classes(args.classes)
    if args.labels == "data":
        counts = loaded.checkpoint.state.get("images_per_class")
        if counts is None:
            raise ValueError(
                f"--labels: got data, but {args.checkpoint} records no images per class; allowed are {', '.join(SCHEMES[:3])}"
            )
        return Labels.of_data(counts, classes, args.seed)
    return Labels(args.labels, classes or tuple(range(loaded.model.num_classes)), args.seed)


def _decoder(vae: str | None, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    if vae is None:
        return None
    from ditkernels.data.vae import load_vae

    return load_vae(vae, device).decode
