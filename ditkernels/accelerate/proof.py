"""Structure cannot prove a forward: each rewired part is run beside its own original before it is kept.

On a deep copy, so that the model's weights, modes and the state of every generator stay untouched. The copy's weights are drawn at
random, because adaLN-Zero starts where nothing shows. Compared are outputs and the gradients of every input and every parameter,
in evaluation and in training mode, twice: at the widest dtype the original runs in, which shows a different formula, and at the
model's own dtype on its own device, which shows kernels that fail there.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditkernels.accelerate.refusals import FAULTS, Refused
from ditkernels.accelerate.swap import Fused, Swap, rewire, unwire
from ditkernels.files import first_line
from ditkernels.ops.dispatch import use_backend

SEED = 20221219
WIDE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest difference at the widest dtype, relative to the largest value. In fp64 not less, since a model may compute a norm in fp32
inside: 6e-8 a rounding and some hundred of them; the two GELUs, the closest pair of different formulas, differ by 5e-4. In fp32,
for models that run in nothing wider, whole gradients are sums of rounded sums."""

OWN_FACTOR, OWN_ULPS = 4.0, 8.0
"""At the model's own dtype: at most this many times the original's own error, plus units in the last place (as whole models are
held against the reference in the tests)."""

NOISE_FLOOR = 1e-2
"""A parameter's gradient smaller than this part of the largest such is compared with that part: the K half of a qkv bias has a true
gradient of zero."""

_OF_PARAMETER = "gradient of parameter "

Inputs = Callable[["Draw"], tuple[tuple[Any, ...], dict[str, Any]]]
Results = dict[str, Tensor]


class Draw:
    """Random inputs of one run, the same for the original and the rewired part, and for every dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(SEED)
        self.leaves: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values that ask for a gradient."""
        value = torch.randn(shape, generator=self._generator).to(torch.bfloat16)
        leaf = value.to(self.dtype).to(self.device).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def rows(self, batch: int, length: int, width: int) -> Tensor:
        """As ``normal``, rows of sizes from 2^-6 to 4, so that an eps of 1e-5 shows beside one of 1e-6."""
        sizes = 2.0 ** torch.linspace(-6, 2, batch * length).round().reshape(batch, length, 1)
        with torch.no_grad():
            return self.normal(batch, length, width).mul_(sizes.to(self.dtype).to(self.device)).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)


def disagreement(
    module: nn.Module, swaps: Sequence[Swap], inputs: Inputs, stand_ins: Mapping[int, nn.Module] | None = None
) -> str | None:
    """Why ``module`` with ``swaps`` carried out cannot be kept, or None if it computes what it did before.

    Args:
        inputs: draws the arguments of a call.
        stand_ins: modules to put into the copy in the place of others, by the id of these.
    """
    try:
        with _isolated(module):
            trial = duplicate(module, stand_ins)
            randomise(trial)
            return _compare(trial, swaps, inputs)
    except Refused as refused:
        return str(refused)


@contextlib.contextmanager
def _isolated(module: nn.Module) -> Iterator[None]:
    """Nothing that a run does to global state outlasts it."""
    device = device_of(module)
    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices), autocast:
        yield


def duplicate(module: nn.Module, stand_ins: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A deep copy, with ``stand_ins`` in the place of the modules of these ids. Raises Refused where it cannot be copied."""
    try:
        return copy.deepcopy(module, dict(stand_ins or {}))
    except FAULTS as fault:
        raise Refused(f"it cannot be copied ({first_line(fault)})") from fault


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter lies, else the CPU. Raises Refused on the meta device, where nothing can be run."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise Refused("it lies on the meta device, where nothing can be run")
    return device


def _seed(device: torch.device) -> None:
    """Of the CPU and of this device alone; torch.manual_seed would reach generators that nobody puts back."""
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(SEED)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first parameter of floating point, else fp32."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def moved(module: nn.Module, draw: Draw) -> nn.Module:
    """A copy of a module that is an argument, such as a rotary embedding, as the run's dtype and device want it."""
    return copy.deepcopy(module).to(draw.device, draw.dtype)


def randomise(module: nn.Module) -> None:
    """Draws every ordinary parameter of floating point, and has all of them ask for gradients."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in module.parameters():
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            drawn = torch.randn(parameter.shape, generator=generator) * std
            with torch.no_grad():
                parameter.copy_(drawn)
            parameter.requires_grad_()


def _compare(trial: nn.Module, swaps: Sequence[Swap], inputs: Inputs) -> str | None:
    own, low = dtype_of(trial), {}
    for training in (False, True):
        with contextlib.suppress(*FAULTS):  # many a public model runs in bf16 under autocast only
            low[training] = _run(trial.train(training), inputs, own)
    got_low = _rewired(trial, swaps, inputs, own, list(low))
    wide, want = _widest(trial, inputs)
    with use_backend("torch", attention="plain"):
        got = _rewired(trial, swaps, inputs, wide, list(want))
    for training, results in want.items():
        reason = _largest_violation(got[training], results, _wide_bounds(results, WIDE_TOLERANCE[wide]))
        if reason is None and own != wide and training in low:
            bounds = _own_bounds(results, low[training], torch.finfo(own).eps)
            reason = _largest_violation(got_low[training], results, bounds)
            reason = reason and f"in {own}, {reason}"
        if reason is not None:
            return reason
    return None


def _widest(trial: nn.Module, inputs: Inputs) -> tuple[torch.dtype, dict[bool, Results]]:
    """The results of the original, by training mode, at the widest dtype it runs in."""
    faults = []
    for dtype in WIDE_TOLERANCE:
        try:
            trial.to(dtype)
            with use_backend("torch", attention="plain"):
                return dtype, {mode: _run(trial.train(mode), inputs, dtype) for mode in (False, True)}
        except FAULTS as fault:
            faults.append(f"{type(fault).__name__}: {first_line(fault)}")
    raise Refused(f"its own forward does not run on random input ({faults[-1]})")


def _rewired(
    trial: nn.Module, swaps: Sequence[Swap], inputs: Inputs, dtype: torch.dtype, modes: Sequence[bool]
) -> dict[bool, Results]:
    try:
        rewire(trial, swaps)
        return {mode: _run(trial.train(mode), inputs, dtype) for mode in modes}
    except FAULTS as fault:
        raise Refused(f"the fused forward fails ({type(fault).__name__}: {first_line(fault)})") from fault
    finally:
        for module in list(trial.modules()):
            if isinstance(module, Fused):
                unwire(module)


def _run(module: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Results:
    """Outputs, and the gradients of every input and parameter, for random cotangents."""
    device = device_of(module)
    draw = Draw(dtype, device)
    args, kwargs = inputs(draw)
    _seed(device)
    outputs = tensors_in(module(*args, **kwargs))
    if not outputs:
        raise Refused("its own forward returns no tensor")
    results = {f"output {i}": value.detach() for i, value in enumerate(outputs)}
    leaves = {f"gradient of argument {i}": leaf for i, leaf in enumerate(draw.leaves)}
    leaves |= {f"{_OF_PARAMETER}{n}": p for n, p in module.named_parameters() if p.requires_grad}
    cotangents = [draw.normal(*value.shape).detach().to(value.dtype) for value in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return results | {name: grad for name, grad in zip(leaves, grads) if grad is not None}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a model's result: a tensor, a sequence, or a mapping as diffusers' outputs are."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _scales(want: Results) -> dict[str, float]:
    largest = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in want.items()}
    parameters = {name for name in largest if name.startswith(_OF_PARAMETER)}
    floor = NOISE_FLOOR * max((largest[name] for name in parameters), default=0.0)
    return {name: max(size, floor) if name in parameters else size for name, size in largest.items()}


def _wide_bounds(want: Results, tolerance: float) -> dict[str, float]:
    return {name: tolerance * scale for name, scale in _scales(want).items()}


def _own_bounds(want: Results, low: Results, eps: float) -> dict[str, float]:
    return {name: OWN_FACTOR * _distance(low[name], want[name]) + OWN_ULPS * eps * scale for name, scale in _scales(want).items()}


def _largest_violation(got: Results, want: Results, bounds: Mapping[str, float]) -> str | None:
    if got.keys() != want.keys():
        return f"its results differ from its own forward's: {', '.join(sorted(got.keys() ^ want.keys()))}"
    worst, name = 1.0, ""
    for key, value in want.items():
        if got[key].shape != value.shape:
            return f"its {key} has shape {tuple(got[key].shape)}, its own forward's {tuple(value.shape)}"
        excess = _distance(got[key], value) / bounds[key] if bounds[key] else 0.0
        if not excess <= worst:
            worst, name = excess, key
    if not name:
        return None
    return f"its own forward computes something else: the {name} differs by {worst:.3g} times what rounding allows"


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
