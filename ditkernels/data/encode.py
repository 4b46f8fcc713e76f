"""A folder of images to latents, once, in place of encoding every image again each epoch.

Image i of the folder is row i % shard_size of shard i // shard_size. A shard is encoded in batches from its first row on, the last
one padded, and what shape a row is computed in decides how it is rounded; so neither the number of processes nor a kill changes
a byte. A process takes the shards that are its by their numbers.

A shard is written whole or not at all, then a record beside it (`.parts/`) with its SHA-256, sums for the statistics, and the files
that could not be read. A run that goes on keeps the shards whose bytes match their records. When all are there, process 0
writes the index, last, and removes the records. Run again after that, it mends: a shard that is missing or altered is made anew,
and must come out with the SHA-256 in the index.

A file that is no readable image is replaced by the next one that is, with its label, as while training on images: so every index
keeps its place, and a run on latents sees what a run on the images would see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ditkernels._version import __version__
from ditkernels.data.config import EncodeConfig
from ditkernels.data.folder import ImageFolder, UnreadableImagesError, as_floats, read_batch
from ditkernels.data.images import READER
from ditkernels.data.latents import DTYPES, INDEX, LatentFolder, LatentsError, Shard, make_index, read_index
from ditkernels.data.loader import lost_readers_named, stream_batches
from ditkernels.data.order import Batch
from ditkernels.data.vae import VAE, load_vae
from ditkernels.files import printable, remove_leftovers, sha256, write_bytes, write_json
from ditkernels.runtime import World, owned_folder, pinned_threads

PARTS, SETTINGS = ".parts", "settings.json"

logger = logging.getLogger(__name__)


class Batches:
    """The images of a folder shard by shard, in order: item k is batch k % ``per_shard`` of shard k // ``per_shard``."""

    def __init__(self, folder: ImageFolder, config: EncodeConfig) -> None:
        self.folder = folder
        self.config = config
        self.per_shard = -(-config.shard_size // config.batch_size)

    @property
    def shards(self) -> int:
        """How many."""
        return -(-len(self.folder) // self.config.shard_size)

    def rows(self, shard: int) -> int:
        """Images in a shard."""
        return min(self.config.shard_size, len(self.folder) - shard * self.config.shard_size)

    def of(self, shard: int) -> range:
        """The numbers of the shard's batches."""
        start = shard * self.per_shard
        return range(start, start - (-self.rows(shard) // self.config.batch_size))

    def __getitem__(self, number: int) -> Batch:
        shard, batch = divmod(number, self.per_shard)
        first = shard * self.config.shard_size
        start = first + batch * self.config.batch_size
        end = min(start + self.config.batch_size, first + self.rows(shard))
        config = self.config
        return read_batch(self.folder, range(start, end), config.image_size, config.max_unreadable, config.max_pixels)


def encode(config: EncodeConfig, device: torch.device, world: World | None = None) -> LatentFolder:
    """Encodes the images, or those of shards that are missing or altered.

    Args:
        config: see EncodeConfig.
        device: where the VAE goes.
        world: the processes that share the work; each calls this. Default: this one alone.

    Raises:
        ValueError: ``out`` holds latents of other settings, and what differs is listed; the images or the VAE do not fit; a
            latent is too large for ``dtype``; a shard made again comes out different.
        UnreadableImagesError: more than ``max_unreadable`` images.
        FolderInUseError: another process works in ``out``.
    """
    world = world or World()
    if not config.data_path:
        raise ValueError("data_path: got nothing, allowed is a folder of images")
    images = ImageFolder.scan(config.data_path, unconditional=config.unconditional, keep_empty=config.keep_empty_classes)
    out = Path(config.out)
    if out.resolve() == images.root.resolve():
        raise ValueError(f"out: got {out}, which holds the images; allowed is another folder")
    vae = load_vae(config.vae, device)
    settings = settings_of(config, images, vae, device)
    batches = Batches(images, config)
    with owned_folder(out, world):
        if world.first:
            for note in images.notes:
                logger.warning("%s", note)
            _begin(out, settings)
        world.barrier()
        with pinned_threads(config.threads), _deterministic_convolutions():
            _encode_missing(vae, batches, out, world)
        world.barrier()
        if world.first and not (out / INDEX).exists():
            _finish(out, settings)
        world.barrier()
    return LatentFolder.open(out)


def settings_of(config: EncodeConfig, images: ImageFolder, vae: VAE, device: torch.device) -> dict[str, Any]:
    """What decides a byte of the latents and is known before they are made, as JSON values: the head of their index."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "count": len(images),
        "image_size": config.image_size,
        "shape": list(vae.latent_shape(config.image_size)),
        "dtype": config.dtype,
        "class_to_idx": images.class_to_idx,
        "vae": asdict(vae.space),
        "made_with": {
            "files_sha256": hashlib.sha256(os.fsencode("\n".join(images.files))).hexdigest(),
            "image_reader": READER,
            "unconditional": config.unconditional,
            "batch_size": config.batch_size,
            "shard_size": config.shard_size,
            "threads": config.threads,
            "device": where,
            "ditkernels": __version__,
            "torch": torch.__version__,
        },
    }


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or checks that what is there has the same settings; removes what a killed run had only begun."""
    if (out / INDEX).exists():
        there = read_index(out / INDEX)
    elif (out / PARTS / SETTINGS).exists():
        there = json.loads((out / PARTS / SETTINGS).read_text(encoding="utf-8"))
    else:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        return write_json(out / PARTS / SETTINGS, settings)
    there, here = {"made_with.image_reader": 1} | _flat(there), _flat(settings)
    different = [f"{name}: {there.get(name)!r} there, {here[name]!r} here" for name in here if there.get(name) != here[name]]
    if different:
        raise ValueError(f"out: {out} holds latents of other settings: {'; '.join(different)}")
    remove_leftovers(out)
    if (out / INDEX).exists():
        # A run may have been killed while it removed them.
        shutil.rmtree(out / PARTS, ignore_errors=True)
    return None


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """With the keys of the mappings within, but for the classes."""
    nested = {name: settings[name] for name in ("vae", "made_with")}
    kept = {name: value for name, value in settings.items() if name not in nested}
    return kept | {f"{outer}.{name}": value for outer, inner in nested.items() for name, value in inner.items()}


# ---- Shards ----------------------------------------------------------------------------------------------------------


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"latents-{shard:05d}.safetensors"


def _encode_missing(vae: VAE, batches: Batches, out: Path, world: World) -> None:
    config = batches.config
    _check_unreadable(_records(out), config.max_unreadable)
    missing = [shard for shard in range(world.rank, batches.shards, world.size) if not _is_finished(out, shard)]
    numbers = [number for shard in missing for number in batches.of(shard)]
    reading = stream_batches(batches, numbers, workers=config.num_workers, pin_memory=vae.device.type == "cuda")
    total, title = sum(batches.rows(shard) for shard in missing), f"encoding ({world.rank + 1}/{world.size})"
    with closing(reading) as stream, lost_readers_named(), tqdm(total=total, unit=" images", desc=title) as bar:
        for shard in missing:
            tensors, unreadable = _encode_shard(vae, batches, shard, stream, bar)
            _write_shard(out, shard, tensors, unreadable)
            _check_unreadable(_records(out), config.max_unreadable)


def _encode_shard(vae: VAE, batches: Batches, shard: int, stream: Iterator[Batch], bar: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a shard, of its batches as they come from ``stream``, and the unreadable files among them."""
    moments, labels, unreadable, animated = [], [], [], []
    for number in batches.of(shard):
        batch = next(stream)
        found = _moments(vae, batch.images, batches.config)
        _check_finite(found, batches, number)
        moments.append(found)
        labels.append(batch.labels)
        for file, reason in batch.unreadable:
            name = printable(os.path.relpath(file, batches.folder.root))
            logger.warning("%s: unreadable, %s", name, reason)
            unreadable.append(name)
        animated += [printable(file) for file in batch.animated]
        bar.update(len(found))
    if animated:
        logger.warning(
            "%s: the first frames of %d animated images, the first of them %s", shard_name(shard), len(animated), animated[0]
        )
    return {"moments": torch.cat(moments), "labels": torch.cat(labels)}, unreadable


def _moments(vae: VAE, images: Tensor, config: EncodeConfig) -> Tensor:
    """Of images (n, 3, H, W) uint8 and their mirror images: (n, 2, 2·C, h, w) in the stored dtype, on the CPU."""
    padding = images[-1:].expand(config.batch_size - len(images), -1, -1, -1)
    padded = as_floats(torch.cat([images, padding]).to(vae.device))
    sides = [torch.cat(vae.posterior(side), dim=1) for side in (padded, padded.flip(-1))]
    return torch.stack(sides, dim=1)[: len(images)].to(DTYPES[config.dtype]).cpu()


def _check_finite(moments: Tensor, batches: Batches, number: int) -> None:
    wrong = ~torch.isfinite(moments).flatten(1).all(1)
    if wrong.any():
        shard, batch = divmod(number, batches.per_shard)
        config = batches.config
        index = shard * config.shard_size + batch * config.batch_size + int(wrong.nonzero()[0])
        raise ValueError(
            f"dtype: got {config.dtype}, in which the latent of {printable(batches.folder.files[index])} is not finite; "
            "bf16 and fp32 hold larger numbers"
        )


def _write_shard(out: Path, shard: int, tensors: dict[str, Tensor], unreadable: Sequence[str]) -> None:
    content, name = save(tensors), shard_name(shard)
    digest = hashlib.sha256(content).hexdigest()
    recorded = _recorded(out, shard)
    if recorded not in (None, digest):
        raise LatentsError(f"{out / name} cannot be made again: its images, or what reads them, are no longer the same")
    write_bytes(out / name, content)
    if recorded is not None:
        return
    mean, std = tensors["moments"].double().chunk(2, dim=2)
    record = {
        "shard": asdict(Shard(name, len(mean), len(content), digest)),
        "sums": mean.sum(dim=(0, 1, 3, 4)).tolist(),
        "sums_of_squares": (mean.square() + std.square()).sum(dim=(0, 1, 3, 4)).tolist(),
        "unreadable": list(unreadable),
    }
    write_json(_record(out, shard), record)


def _record(out: Path, shard: int) -> Path:
    return out / PARTS / f"{shard:05d}.json"


def _recorded(out: Path, shard: int) -> str | None:
    """SHA-256 of a shard that has been finished, whatever has become of it since."""
    if (out / INDEX).exists():
        digest: str = read_index(out / INDEX)["shards"][shard]["sha256"]
        return digest
    if _record(out, shard).exists():
        digest = json.loads(_record(out, shard).read_text(encoding="utf-8"))["shard"]["sha256"]
        return digest
    return None


def _is_finished(out: Path, shard: int) -> bool:
    """Whether the shard is there with the bytes it was finished with."""
    recorded = _recorded(out, shard)
    if recorded is None:
        return False
    path = out / shard_name(shard)
    whole = path.exists() and sha256(path) == recorded
    if not whole:
        logger.warning("%s is missing or altered; it is made again", path)
    return whole


def _records(out: Path) -> list[dict[str, Any]]:
    """Those that are there, in order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / PARTS).glob("[0-9]*.json"))]


def _unreadable(records: Sequence[dict[str, Any]]) -> list[str]:
    # A file may be met from the one before it too.
    return sorted({file for record in records for file in record["unreadable"]})


def _check_unreadable(records: Sequence[dict[str, Any]], allowed: int) -> None:
    found = _unreadable(records)
    if len(found) > allowed:
        raise UnreadableImagesError(
            f"unreadable images: got {len(found)}, allowed are {allowed} (max_unreadable); the last one is {found[-1]}"
        )


def _finish(out: Path, settings: dict[str, Any]) -> None:
    """Writes the index of all shards, then removes their records."""
    records = _records(out)
    _, height, width = settings["shape"]
    numbers = 2 * settings["count"] * height * width
    # Exact sums: no order of theirs shows in the index.
    mean, squares = (
        [math.fsum(channel) / numbers for channel in zip(*(record[name] for record in records), strict=True)]
        for name in ("sums", "sums_of_squares")
    )
    std = [math.sqrt(square - value**2) for square, value in zip(squares, mean, strict=True)]
    content = {
        **settings,
        "statistics": {"mean": mean, "std": std},
        "unreadable": _unreadable(records),
    }
    write_json(out / INDEX, make_index(content, [Shard(**record["shard"]) for record in records]))
    shutil.rmtree(out / PARTS)


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """cuDNN takes the algorithms that give the same bits every time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


# ---- Verifying -------------------------------------------------------------------------------------------------------


def verify(root: Path) -> LatentFolder:
    """Reads every shard at ``root``, and returns the latents.

    Raises:
        LatentsError: shards are altered; all of them are named.
    """
    folder = LatentFolder.open(root)
    wrong = []
    for number in tqdm(range(len(folder.shards)), unit=" shards", desc="verifying"):
        try:
            folder.verify(number)
        except LatentsError as error:
            wrong.append(str(error))
    if wrong:
        raise LatentsError("; ".join(wrong))
    return folder
