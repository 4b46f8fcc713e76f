"""How fast latents are read in the random order of training, beside what a GPU would take of them.

    python -m benchmarks.speed.latents --json benchmarks/results/latents.json --rounds 5
    python -m benchmarks.speed.latents --folder /data --images 1281167 --workers 4,8    as many as ImageNet, on the disk in question

Latents of random numbers are written as `ditkernels encode` lays them out, and read as `ditkernels train` reads them: shuffled,
mirrored by key, in batches, by so many reading processes (0: the training process itself), and on to the device if it is a GPU.
A round maps the files anew and times `--batches` batches once the readers are busy. Warm, the files lie in the page cache; cold,
they are evicted before every round, so that each sample comes from the disk. `--needed` is what XL/2 on one GPU would train on in
a second; no GPU was timed for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.speed import measure
from ditkernels.data.latents import DTYPES, INDEX, LatentBatches, LatentFolder, Shard, make_index
from ditkernels.data.loader import stream_batches
from ditkernels.files import write_json

SHARD = 4096


def write_latents(folder: Path, args: argparse.Namespace, dtype: str) -> None:
    """Shards of one content, but for the labels, under an index; checksums are left out, since nothing verifies them."""
    folder.mkdir()
    shape = (args.channels, args.latent_size, args.latent_size)
    rows = torch.randn(min(SHARD, args.images), 2, 2 * shape[0], *shape[1:]).to(DTYPES[dtype])
    shards = []
    for number, start in enumerate(range(0, args.images, SHARD)):
        path = folder / f"latents-{number:05d}.safetensors"
        held = rows[: args.images - start]
        save_file({"moments": held, "labels": torch.arange(start, start + len(held)) % 1000}, path)
        shards.append(Shard(path.name, len(held), path.stat().st_size, ""))
    content = {
        "count": args.images,
        "image_size": 8 * args.latent_size,
        "shape": shape,
        "dtype": dtype,
        "class_to_idx": {str(label): label for label in range(1000)},
        "vae": {"encoder_sha256": "", "channels": shape[0], "factor": 8, "scale": 0.18215, "shift": 0.0},
    }
    write_json(folder / INDEX, make_index(content, shards))


def evict(folder: Path) -> None:
    """Takes the files out of the page cache; only what is on the disk can be."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(folder: Path) -> None:
    """Brings the files into the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def seconds(folder: Path, args: argparse.Namespace, workers: int, seed: int, device: torch.device) -> float:
    """Of ``args.batches`` batches, mapped anew, in an order of its own."""
    batches = LatentBatches(LatentFolder.open(folder), args.batch, seed, flip=True, unconditional=False)
    # Readers run ahead by two batches each; these were made before anybody waits for them.
    ahead = 2 * workers + 1
    on_gpu = device.type == "cuda"
    stream = stream_batches(batches, range(ahead + args.batches), workers=workers, pin_memory=on_gpu)
    for _ in islice(stream, ahead):
        pass
    start = time.perf_counter()
    for batch in stream:
        if on_gpu:
            batch.images.to(device, non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rows_of(dtype: str, args: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """A row for each state of the cache and number of reading processes."""
    device, folder = measure.device_of(args), root / dtype
    write_latents(folder, args, dtype)
    for cache in args.cache:
        prepare = {"warm": read_through, "cold": evict}[cache]
        for workers in args.workers:
            found = []
            for seed in range(args.rounds):
                prepare(folder)
                found.append(1e3 * seconds(folder, args, workers, seed, device) / args.batches)
            timing = measure.timing(found)
            samples = 1e3 * args.batch / timing.median_ms
            sample_bytes = 2 * args.channels * args.latent_size**2 * DTYPES[dtype].itemsize
            yield {
                "dtype": dtype,
                "cache": cache,
                "workers": workers,
                **timing._asdict(),
                "samples_per_s": samples,
                "mib_per_s": samples * sample_bytes / 2**20,
                "of_needed": samples / args.needed,
            }
    for path in folder.iterdir():
        path.unlink()


def main() -> None:
    parser = measure.resumable(measure.parser(__doc__))
    parser.add_argument("--images", type=measure.positive, default=32768)
    parser.add_argument("--latent-size", type=measure.positive, default=32, help="edge of the latents")
    parser.add_argument("--channels", type=measure.positive, default=4)
    parser.add_argument("--batch", type=measure.positive, default=256)
    parser.add_argument("--batches", type=measure.positive, default=64, help="timed in a round")
    parser.add_argument("--workers", type=counts, default=[0, 1, 2], help="reading processes")
    parser.add_argument("--dtypes", type=measure.names_among(DTYPES), default=["fp16", "fp32"])
    parser.add_argument("--cache", type=measure.names_among(("warm", "cold")), default=["warm", "cold"])
    parser.add_argument("--needed", type=float, default=1000.0, help="samples a second that a GPU takes")
    parser.add_argument("--folder", type=Path, help="where to write them (default: the temporary folder)")
    args = parser.parse_args()
    columns = ("dtype", "cache", "workers", "median_ms", "samples_per_s", "mib_per_s", "of_needed")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="latents-") as root:
        journal = measure.Journal("latents", args)
        for dtype in args.dtypes:
            journal.unit(dtype, rows_of, dtype, args, Path(root))
        journal.close(columns)


def counts(text: str) -> list[int]:
    """An argparse type: whole numbers of 0 or more, separated by commas."""
    if not all(number.isdecimal() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text}, allowed are whole numbers of 0 or more")
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
