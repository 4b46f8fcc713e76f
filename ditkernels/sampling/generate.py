"""Many samples: fixed batches by image index, resumable, shared among processes, the same bytes however they were made.

Image i is image i: its noise and label are functions of (seed, i), and it is always computed in batch i // batch_size, of
``batch_size`` rows, the last one padded. What shape a row is computed in decides how it is rounded; so the number of processes,
a kill or a restart change no byte, and another batch size is refused when a run is resumed.

A batch is written to ``.parts/`` as one file, whole or not at all. When all are there, process 0 makes the outputs of them,
``metadata.json`` last, and removes the parts.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ditkernels.diffusion import GaussianDiffusion
from ditkernels.files import remove_leftovers, write_json
from ditkernels.reference import DiT
from ditkernels.runtime import StopSignal, World, owned_folder, pinned_threads
from ditkernels.sampling import outputs
from ditkernels.sampling.config import FORMATS, SampleConfig
from ditkernels.sampling.drawing import last_unless_stopped, sample_progressive
from ditkernels.sampling.labels import Labels, parse_classes

SETTINGS, METADATA, PARTS, IMAGES = "run.json", "metadata.json", ".parts", "images"


@dataclass(frozen=True)
class Batches:
    """How a number of images is cut into batches: batch b holds the images b·size .. (b + 1)·size − 1.

    Raises:
        ValueError: a count or size below 1.
    """

    count: int
    size: int

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("batch_size", self.size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def indices(self, batch: int) -> Tensor:
        """(size,) int64, beyond ``count`` too: padding."""
        return torch.arange(batch * self.size, (batch + 1) * self.size)

    def length(self, batch: int) -> int:
        """How many of a batch's images are wanted."""
        return min(self.size, self.count - batch * self.size)


def draw_batch(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Labels,
    config: SampleConfig,
    batches: Batches,
    batch: int,
    stop: StopSignal | None = None,
) -> Tensor:
    """The samples of a batch, (length, C, H, W) float32, computed at the full batch's size; ``stop`` ends it between two steps."""
    indices = batches.indices(batch)
    # A list may end before the padding does; what is padded with does not matter, only that its shape is.
    shown = labels.of(indices.clamp(max=batches.count - 1))
    states = sample_progressive(model, diffusion, shown, config, indices=indices)
    drawn = last_unless_stopped(states, stop or StopSignal())
    return drawn[: batches.length(batch)]


def draw(model: DiT, diffusion: GaussianDiffusion, labels: Labels, config: SampleConfig, batches: Batches) -> Iterator[Tensor]:
    """The samples of all batches in turn, each (length, C, H, W) float32."""
    for batch in range(len(batches)):
        yield draw_batch(model, diffusion, labels, config, batches, batch)


@dataclass(frozen=True)
class Job:
    """A run of ``generate``.

    Args:
        labels, config, batches: what is drawn.
        formats: out of FORMATS.
        threads: CPU threads a process computes with.
        record: what else decides the samples, as JSON values: checkpoint, VAE, precision. It is written to the metadata, and
            a run is resumed only where it is equal.

    Raises:
        ValueError: a format that does not exist, no threads, or a list of labels shorter than the count.
    """

    labels: Labels
    config: SampleConfig
    batches: Batches
    formats: tuple[str, ...] = ("png", "grid", "npz")
    threads: int = 1
    record: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"formats: got {', '.join(unknown) or 'none'}, allowed are {', '.join(FORMATS)}")
        if self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, allowed is 1 or more")
        if self.labels.scheme == "listed" and len(self.labels.classes) < self.batches.count:
            raise ValueError(
                f"labels: got a list of {len(self.labels.classes)} for {self.batches.count} images, allowed is one for each"
            )

    @property
    def with_images(self) -> bool:
        return self.formats != ("latents",)

    def settings(self, model: DiT, diffusion: GaussianDiffusion) -> dict[str, Any]:
        """Everything that decides a byte of the outputs, as JSON values."""
        settings = {
            "count": self.batches.count,
            "batch_size": self.batches.size,
            "formats": list(self.formats),
            "threads": self.threads,
            "labels": self.labels.describe(),
            "sampling": asdict(self.config.for_channels(model.in_channels)),
            "timesteps": diffusion.timestep_map,
            "device": next(model.parameters()).device.type,
            "torch": torch.__version__,
            **(self.record or {}),
        }
        return json.loads(json.dumps(settings))


def generate(
    model: DiT,
    diffusion: GaussianDiffusion,
    job: Job,
    out: Path,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    world: World | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draws the job's samples into ``out``, or what is still missing there; returns the metadata.

    Args:
        model: in eval mode.
        out: gets ``images/000000.png`` ..., ``grid.png``, ``samples.npz`` (arr_0 (N, H, W, 3) uint8, arr_1 (N,) int64 labels),
            ``latents.npy`` (N, C, H, W) float32, by format; ``run.json`` at the start, ``metadata.json`` at the end.
        decode: latents (B, C, H, W) to images (B, 3, H, W) in [-1, 1]; None where the model draws pixels.
        world: the processes that share the work; each calls this. Default: this one alone.
        progress: show a bar.

    Raises:
        ValueError: ``out`` holds a run with other settings; labels out of range; latents asked for as images without a VAE.
        FolderInUseError: another process works in ``out``.
    """
    world = world or World()
    job.labels.check(model.num_classes)
    if decode is None and job.with_images and model.in_channels not in (1, 3):
        raise ValueError(
            f"formats: got {', '.join(job.formats)} of a model with {model.in_channels} channels and no VAE; allowed is latents"
        )
    settings = job.settings(model, diffusion)
    if world.first:
        job.labels.tell_unseen(job.batches.count)
    with owned_folder(out, world):
        if world.first:
            _open(out, settings)
        world.barrier()
        if not (out / METADATA).exists():
            with pinned_threads(job.threads):
                _draw_missing(model, diffusion, job, out, decode, world, progress)
            world.barrier()
            if world.first:
                for folder in (out, out / IMAGES):
                    remove_leftovers(folder)
                _assemble(out, job, settings)
        world.barrier()
        if world.first:
            shutil.rmtree(out / PARTS, ignore_errors=True)
        return json.loads((out / METADATA).read_text(encoding="utf-8"))


def _open(out: Path, settings: dict[str, Any]) -> None:
    """Makes ``out`` a folder of these settings: a new one, one that goes on, or one that gets more images."""
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    if not (out / SETTINGS).exists():
        write_json(out / SETTINGS, settings)
        return
    there = _settings_of(out)
    _check_same(out, there, settings)
    if there["count"] > settings["count"]:
        raise ValueError(f"count: got {settings['count']}, {out} is of {there['count']}; allowed are as many or more")
    if there["count"] < settings["count"]:
        _recover_parts(out, there)
        (out / METADATA).unlink(missing_ok=True)
        write_json(out / SETTINGS, settings)


def _settings_of(out: Path) -> dict[str, Any]:
    path = out / SETTINGS
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, so what {out} holds is not known: {error}") from error
    if not isinstance(there, dict) or not isinstance(there.get("count"), int):
        raise ValueError(f"{path} holds no settings of a run, so what {out} holds is not known")
    return there


def _check_same(out: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that differ, each by its name; the count of images may."""
    mine, theirs = _flat(settings), _flat(there)
    different = [
        f"{name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
        for name in sorted({*mine, *theirs})
        if theirs.get(name) != mine.get(name) and not _grows(name, theirs.get(name), mine.get(name))
    ]
    if different:
        raise ValueError(f"{out} holds a run with other settings, which cannot be resumed: {'; '.join(different)}")


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return found


def _grows(name: str, there: Any, here: Any) -> bool:
    """Whether a setting may differ where there are more images: their count, and a list of labels that begins as it was."""
    if name == "count":
        return True
    if name != "labels.classes" or not isinstance(there, str) or not isinstance(here, str):
        return False
    before = parse_classes(there)
    return parse_classes(here)[: len(before)] == before


def _recover_parts(out: Path, there: Mapping[str, Any]) -> None:
    """Makes the parts of whole batches again of the outputs of a run that was complete, so that they need not be drawn again."""
    count, size, formats = there["count"], there["batch_size"], there["formats"]
    # The last batch may have been cut; its part, if it is there, is too short.
    if count % size:
        _part(out, count // size).unlink(missing_ok=True)
    if not (out / METADATA).exists():
        return
    held = {}
    if "latents" in formats:
        held["latents"] = np.load(out / "latents.npy", mmap_mode="r")
    if "npz" in formats:
        with np.load(out / "samples.npz") as arrays:
            held["pixels"] = arrays["arr_0"]
    elif formats != ["latents"]:
        return
    for batch in range(count // size):
        cut = {name: array[batch * size : (batch + 1) * size] for name, array in held.items()}
        outputs.write_npz(_part(out, batch), {name: outputs.Streamed(a.shape, a.dtype, [a]) for name, a in cut.items()})


def _is_whole(part: Path) -> bool:
    """Whether a part is there and has not been cut short or changed since."""
    if not part.exists():
        return False
    try:
        with zipfile.ZipFile(part) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _part(out: Path, batch: int) -> Path:
    return out / PARTS / f"batch-{batch:06d}.npz"


def _draw_missing(
    model: DiT,
    diffusion: GaussianDiffusion,
    job: Job,
    out: Path,
    decode: Callable[[Tensor], Tensor] | None,
    world: World,
    progress: bool,
) -> None:
    missing = [batch for batch in range(len(job.batches)) if not _is_whole(_part(out, batch))]
    # Everybody has looked before anybody writes, so all share out the same list.
    world.barrier()
    mine = missing[world.rank :: world.size]
    if "png" in job.formats:
        (out / IMAGES).mkdir(exist_ok=True)
    with tqdm(
        total=sum(job.batches.length(batch) for batch in mine),
        unit=" images",
        desc=f"sampling ({world.rank + 1}/{world.size})",
        disable=not progress,
    ) as bar:
        for batch in mine:
            drawn = draw_batch(model, diffusion, job.labels, job.config, job.batches, batch)
            _write_part(out, job, batch, drawn, decode)
            bar.update(job.batches.length(batch))


def _write_part(out: Path, job: Job, batch: int, drawn: Tensor, decode: Callable[[Tensor], Tensor] | None) -> None:
    arrays: dict[str, np.ndarray] = {}
    if "latents" in job.formats:
        arrays["latents"] = drawn.cpu().numpy()
    if job.with_images:
        arrays["pixels"] = outputs.to_pixels(decoded(drawn, decode, job.batches.size))
    if "png" in job.formats:
        for offset, pixels in enumerate(arrays["pixels"]):
            outputs.write_png(out / IMAGES / f"{batch * job.batches.size + offset:06d}.png", pixels)
    held = {name: outputs.Streamed(array.shape, array.dtype, [array]) for name, array in arrays.items()}
    outputs.write_npz(_part(out, batch), held)


def decoded(drawn: Tensor, decode: Callable[[Tensor], Tensor] | None, size: int) -> Tensor:
    """The images of what a model has drawn, decoded in batches of ``size``."""
    if decode is None:
        return drawn
    # The decoder too rounds by the shape it is given.
    padded = torch.cat([drawn, drawn[-1:].expand(size - len(drawn), -1, -1, -1)])
    return decode(padded)[: len(drawn)]


def _assemble(out: Path, job: Job, settings: dict[str, Any]) -> None:
    def pieces(name: str) -> Iterator[np.ndarray]:
        for batch in range(len(job.batches)):
            with np.load(_part(out, batch)) as part:
                yield part[name]

    def stream(name: str) -> outputs.Streamed:
        first = next(pieces(name))
        return outputs.Streamed((job.batches.count, *first.shape[1:]), first.dtype, pieces(name))

    if "npz" in job.formats:
        labels = job.labels.of(torch.arange(job.batches.count)).numpy()
        named = {"arr_0": stream("pixels"), "arr_1": outputs.Streamed(labels.shape, labels.dtype, [labels])}
        outputs.write_npz(out / "samples.npz", named)
    if "latents" in job.formats:
        outputs.write_npy(out / "latents.npy", stream("latents"))
    if "grid" in job.formats:
        shown: list[outputs.Pixels] = []
        for piece in pieces("pixels"):
            shown.extend(piece)
            if len(shown) >= outputs.GRID_IMAGES:
                break
        outputs.write_png(out / "grid.png", outputs.grid_of(shown))
    write_json(out / METADATA, settings)
