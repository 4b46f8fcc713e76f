"""The guided prediction of a batch along a trajectory, without what need not be computed at every step.

Labels and timesteps of a trajectory are known before it starts, and adaLN's shifts, scales and gates depend on nothing else.
So they are computed ahead, for a chunk of timesteps at once: one product a block of shape (chunk·(B + 1), D) x (D, 6·D) in
place of ``chunk`` products of (2·B, D) x (D, 6·D), the null class as one row for the whole batch. Chunks have one fixed shape,
the last one padded, so what a row is rounded to depends on the batch and not on where the trajectory stands. The blocks then
read rows; everything else is the model's own code. Against the plain path results differ by the rounding of that product.

On a GPU the model's call is captured in a CUDA graph, one for guided and one for conditional steps, over static buffers.
Nothing here reads a value back to the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditkernels.reference import DiT

MODULATION_BYTES = 256 * 2**20
WARM_UP_CALLS = 3
# What the model runs at a step: the labels, the labels and the null class, or the null class alone.
CONDITIONAL, GUIDED, NULL = "conditional", "guided", "null"
ADAPTIVE = ("adaln_zero", "adaln")


class Denoiser:
    """A model with labels and guidance: (x, timesteps) -> prediction, both (B, …), at the step ``move_to`` named.

    Args:
        model: a DiT in eval mode.
        labels: (B,) int64 on the model's device.
        timesteps: the original timestep of each step, ascending.
        scale, guided_channels, interval: as in SampleConfig.
        modulation_bytes: memory for what is computed ahead; 0: nothing is.

    Raises:
        ValueError: guidance without a null class, or an interval that holds none of the timesteps.
    """

    def __init__(
        self,
        model: DiT,
        labels: Tensor,
        timesteps: Sequence[float],
        *,
        scale: float,
        guided_channels: int | None,
        interval: tuple[float, float] | None,
        modulation_bytes: int,
    ) -> None:
        self._ways = _ways(model, timesteps, scale, interval)
        if scale == 0 and interval is None:
            # The null class is then a label like any other.
            labels, self._ways = torch.full_like(labels, model.num_classes), [CONDITIONAL] * len(timesteps)
        self._scale = scale
        self._guided_channels = guided_channels
        self._labels = labels
        self._doubled = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        self._index = 0
        self._model = model
        self._modulation: Modulation | None = None
        if modulation_bytes > 0 and model.conditioning in ADAPTIVE:
            rows = self._doubled[: len(labels) + any(way != CONDITIONAL for way in self._ways)]
            self._modulation = Modulation(model, rows, timesteps, modulation_bytes)
            self._model = self._modulation.model
        self._on_gpu = labels.device.type == "cuda"
        self._graphs: dict[str, Graphed] = {}

    def move_to(self, index: int) -> None:
        """The next call is at step ``index`` of the timesteps."""
        self._index = index
        if self._modulation is not None:
            self._modulation.move_to(index, len(self._labels), self._ways[index])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, C, H, W), t: (B,) original timesteps -> (B, 2·C or C, H, W)."""
        way = self._ways[self._index]
        call = {CONDITIONAL: self._conditional_call, GUIDED: self._guided_call, NULL: self._null_call}[way]
        if not self._on_gpu:
            return call(x, t)
        if way not in self._graphs:
            self._graphs[way] = Graphed(call, x, t)
        return self._graphs[way](x, t)

    def _conditional_call(self, x: Tensor, t: Tensor) -> Tensor:
        return self._model(x, t, self._labels)

    def _null_call(self, x: Tensor, t: Tensor) -> Tensor:
        return self._model(x, t, self._doubled[len(x) :])

    def _guided_call(self, x: Tensor, t: Tensor) -> Tensor:
        doubled = self._model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), self._doubled, self._scale, self._guided_channels
        )
        return doubled[: len(x)]


def _ways(model: DiT, timesteps: Sequence[float], scale: float, interval: tuple[float, float] | None) -> list[str]:
    """For each step, what the model runs. At scale 0 a guided step is the null class's: of that, the label has no part."""
    if scale == 1:
        return [CONDITIONAL] * len(timesteps)
    if model.y_embedder.rows == model.num_classes:
        raise ValueError(
            f"guidance_scale: got {scale}, allowed is 1: the model has no null class, as it was made with class_dropout_prob 0"
        )
    inside = NULL if scale == 0 else GUIDED
    if interval is None:
        return [inside] * len(timesteps)
    low, high = interval
    ways = [inside if low <= timestep <= high else CONDITIONAL for timestep in timesteps]
    if inside not in ways:
        raise ValueError(
            f"guidance_interval: got {low} to {high}, which holds no step; the steps lie from {timesteps[0]:g} to {timesteps[-1]:g}"
        )
    return ways


# ---- Modulation computed ahead ---------------------------------------------------------------------------------------


class _Rows(nn.Module):
    """Stands in for an adaLN linear: its outputs of the present step, whatever the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.present = torch.empty(0)

    def forward(self, c: Tensor) -> Tensor:
        return self.present


class _Unread(nn.Module):
    """Stands in for an embedder whose result nobody reads."""

    def forward(self, value: Tensor) -> Tensor:
        return value.new_zeros(())


class _Site(NamedTuple):
    """An adaLN linear of the model, what stands in for it, and its columns among those of all sites."""

    compute: nn.Module
    rows: _Rows
    columns: slice


class Modulation:
    """Shifts, scales and gates of all blocks and of the final layer, for the rows of a batch, chunk by chunk of timesteps.

    Args:
        model: a DiT with adaLN.
        conditions: (R,) int64, the labels of the batch and, where a step is guided, one null class behind them.
        timesteps: of the trajectory, ascending.
        max_bytes: of one chunk; a chunk holds one timestep at least.

    Attributes:
        model: shares everything with the given one, but reads its modulation here.
    """

    def __init__(self, model: DiT, conditions: Tensor, timesteps: Sequence[float], max_bytes: int) -> None:
        self._embed_t, self._embed_y = model.t_embedder, model.y_embedder
        self.model, self._sites = _rewired(model)
        self._conditions = conditions
        self._width = self._sites[-1].columns.stop
        weight = next(model.final_layer.adaLN_modulation.parameters())
        step_bytes = len(conditions) * self._width * weight.element_size()
        self.chunk = min(len(timesteps), max(1, max_bytes // step_bytes))
        # From the noisiest on, which is the order of a trajectory; the last chunk repeats the cleanest.
        padding = -len(timesteps) % self.chunk
        kept = [*reversed(timesteps), *[timesteps[0]] * padding]
        self._timesteps = torch.tensor(kept, dtype=torch.float32, device=conditions.device)
        self._count = len(timesteps)
        self._held: int | None = None
        self._bank = torch.empty(0)
        self._present: dict[str, Tensor] = {}

    def move_to(self, index: int, batch: int, way: str) -> None:
        """Makes the blocks see the rows of step ``index``: ``batch`` conditional ones, as many of the null class, or both."""
        chunk, within = divmod(self._count - 1 - index, self.chunk)
        if chunk != self._held:
            self._fill(chunk)
        found = self._bank[within]
        present = self._buffer(batch, way)
        if way != NULL:
            present[:batch].copy_(found[:batch])
        if way != CONDITIONAL:
            present[-batch:].copy_(found[batch:].expand(batch, -1))
        for site in self._sites:
            site.rows.present = present[:, site.columns]

    @torch.no_grad()
    def _fill(self, chunk: int) -> None:
        t = self._timesteps[chunk * self.chunk : (chunk + 1) * self.chunk]
        rows = len(self._conditions)
        c = self._embed_t(t).unsqueeze(1) + self._embed_y(self._conditions)
        flat = c.flatten(0, 1)
        for site in self._sites:
            computed = site.compute(flat)
            if self._bank.numel() == 0:
                self._bank = computed.new_empty(self.chunk, rows, self._width)
            self._bank.flatten(0, 1)[:, site.columns].copy_(computed)
        self._held = chunk

    def _buffer(self, batch: int, way: str) -> Tensor:
        # Allocated once: a CUDA graph reads these addresses.
        if way not in self._present:
            self._present[way] = self._bank.new_empty(batch * (1 + (way == GUIDED)), self._width)
        return self._present[way]


def _rewired(model: DiT) -> tuple[DiT, list[_Site]]:
    """A model of the same parameters whose adaLN linears are stood in for, and those linears in order."""
    sites: list[_Site] = []

    def rewire(module: Any) -> Any:
        found = _shallow(module)
        compute = found.adaLN_modulation
        start = sites[-1].columns.stop if sites else 0
        width = compute[-1].out_features
        sites.append(_Site(compute, _Rows(), slice(start, start + width)))
        found.adaLN_modulation = sites[-1].rows
        return found

    view: Any = _shallow(model)
    view.blocks = nn.ModuleList(rewire(block) for block in model.blocks)
    view.final_layer = rewire(model.final_layer)
    view.t_embedder = _Unread()
    view.y_embedder = _Unread()
    return view, sites


def _shallow(module: Any) -> Any:
    """The same parameters and submodules in a module of its own, so that replacing a submodule leaves the original alone."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Graphed:
    """``call(x, t)`` recorded once and replayed; x and t keep their shapes. Results are copies, as the next replay overwrites."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> None:
        self._x, self._t = x.clone(), t.clone()
        # Lazy set-up, of Triton and cuBLAS, must not fall into the capture.
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                call(self._x, self._t)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = call(self._x, self._t)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        self._graph.replay()
        return self._out.clone()
