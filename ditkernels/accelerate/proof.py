"""Structure cannot prove a forward: each rewired part is run beside its own original before it is kept.

On a deep copy, so that the model's weights, modes and the state of every generator stay untouched. The copy's weights are drawn at
random, because adaLN-Zero starts where nothing shows. Compared are outputs and the gradients of every input and every parameter,
the structure of the result with its dtypes, and what is left in every random generator. In evaluation and in training mode, with
one sample and with several, at the widest dtype the original runs in, which shows a different formula; and at the model's own dtype
on its own device, which shows kernels that fail there. The token count is the model's own, for the sake of tables made for it, and
then two others; gradients are those of the smallest.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ditkernels.accelerate.refusals import Faulted, Refused, attempted
from ditkernels.accelerate.swap import BEYOND, Fused, Swap, rewire, unwire
from ditkernels.accelerate.watch import Trace, is_plain
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

FEW_TOKENS, MORE_TOKENS = 7, 3
"""Other token counts: this one, and the model's own and so many more."""

OWN_FAILS = "its own forward fails on random inputs; an example=(args, kwargs) of a call would show how to draw them"

Inputs = Callable[["Draw"], tuple[tuple[Any, ...], dict[str, Any]]]
Results = dict[str, Tensor]


class Setting(NamedTuple):
    """How a part is run: in which mode, on how many samples of how many tokens, and whether backward follows."""

    training: bool = False
    batch: int = 3
    tokens: int = 0
    gradients: bool = True


class Outcome(NamedTuple):
    """What a run comes to.

    Attributes:
        results: outputs, and gradients where these were asked for.
        structure: the result's types in words, tensors with their dtypes.
        generators: the state of each random generator afterwards, by the name of its library.
        beyond: whether a fused forward handed the call to the original's.
    """

    results: Results
    structure: str
    generators: dict[str, Any]
    beyond: bool = False


class Draw:
    """Random inputs of one run, the same for the original and the rewired part, and for every dtype.

    Attributes:
        batch, tokens: how many samples of how many tokens to draw.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, setting: Setting = Setting()) -> None:  # noqa: B008
        self.dtype, self.device = dtype, device
        self.batch, self.tokens = setting.batch, setting.tokens
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

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Real numbers, all as likely, that ask for no gradient."""
        drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64) * (high - low) + low
        return drawn.to(self.dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)


def prove(
    module: nn.Module,
    swaps: Sequence[Swap],
    inputs: Inputs,
    stand_ins: Mapping[int, nn.Module] | None = None,
    tokens: int = 0,
) -> set[tuple[str, str]]:
    """Runs a copy of ``module`` as it is and with ``swaps`` carried out; raises Refused where the two differ.

    Args:
        swaps: last that of the module itself.
        inputs: draws the arguments of a call.
        stand_ins: modules to put into the copy in the place of others, by the id of these.
        tokens: how many tokens the module is given, for inputs that have any.

    Returns:
        The attributes that the module's own forward read, as ``Trace.read``.
    """
    with isolated(module):
        trial = duplicate(module, stand_ins)
        randomise(trial)
        trace = Trace(trial, swaps[-1].called)
        reason = _compare(trial, swaps, inputs, trace, tokens)
    if reason is not None:
        raise Refused(reason)
    return trace.read


def ran(module: nn.Module, inputs: Inputs, stand_ins: Mapping[int, nn.Module] | None = None) -> Any:
    """A copy of ``module`` that has run once, with its own forward. Raises Refused where it does not run."""
    with isolated(module):
        trial = duplicate(module, stand_ins)
        _widest(trial, inputs, Setting())
    return trial


@contextlib.contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Nothing that a run does to global state outlasts it, and nothing is compiled."""
    device = device_of(module)
    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, enabled=False)
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices), autocast, _uncompiled():
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Runs what torch.compile has wrapped as it was written. Only then is Dynamo loaded already, which takes a second."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


def runs(module: nn.Module, inputs: Inputs) -> bool:
    """Whether the forward of ``module`` runs in fp32 on what ``inputs`` draws."""
    with isolated(module), contextlib.suppress(Faulted):
        trial = duplicate(module).float()
        args, kwargs = inputs(Draw(torch.float32, device_of(module)))
        attempted("it fails", lambda: trial(*args, **kwargs))
        return True
    return False


def counted_anew(probes: Sequence[Any], inputs: Inputs) -> Inputs:
    """``inputs``, at each run of which the calls of ``probes`` count from zero, and these learn whether gradients are asked for."""

    def counted(draw: Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for probe in probes:
            probe.calls, probe.graded = 0, torch.is_grad_enabled()
        return inputs(draw)

    return counted


def duplicate(module: nn.Module, stand_ins: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A deep copy, with ``stand_ins`` in the place of the modules of these ids. Raises Refused where it cannot be copied."""
    copied = attempted("it cannot be copied", lambda: copy.deepcopy(module, dict(stand_ins or {})))
    if {id(p) for p in module.parameters()} & {id(p) for p in copied.parameters()}:
        raise Refused("its copy has the same parameters, which a trial would overwrite")
    return copied


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter lies, else the CPU. Raises Refused on the meta device, where nothing can be run."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise Refused("it lies on the meta device, where nothing can be run")
    return device


def _seed(device: torch.device) -> None:
    """Of the CPU and of this device alone; torch.manual_seed would reach generators that nobody puts back."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(SEED)


def _generators(device: torch.device) -> dict[str, Any]:
    """The state of every random generator, comparable."""
    of_numpy = [item.tobytes() if isinstance(item, np.ndarray) else item for item in np.random.get_state()]
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "numpy": of_numpy, "Python": random.getstate()}
    if device.type == "cuda":
        states["torch on the device"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first parameter of floating point, else fp32."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def moved(module: nn.Module, draw: Draw) -> nn.Module:
    """A copy of a module that is an argument, such as a rotary embedding, as the run's dtype and device want it."""
    return copy.deepcopy(module).to(draw.device, draw.dtype)


def is_ordinary(parameter: Tensor) -> bool:
    """Whether a trial draws the values of a parameter."""
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point()


def randomise(module: nn.Module) -> None:
    """Draws every ordinary parameter of floating point, and has all of them ask for gradients."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in module.parameters():
        if is_ordinary(parameter):
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            drawn = torch.randn(parameter.shape, generator=generator) * std
            with torch.no_grad():
                parameter.copy_(drawn)
            parameter.requires_grad_()


def _compare(trial: nn.Module, swaps: Sequence[Swap], inputs: Inputs, trace: Trace, tokens: int) -> str | None:
    own, low = dtype_of(trial), {}
    lengths = _other_lengths(trial, inputs, own, tokens)
    settings = [Setting(training, batch, tokens, gradients=False) for batch in (3, 1) for training in (False, True)]
    for setting in (settings[0], *_with_gradients(lengths, tokens)):
        with contextlib.suppress(Faulted):  # many a public model runs in bf16 under autocast only
            low[setting] = _original(trial, inputs, own, setting)
    got_low = {setting: _rewired(trial, swaps, inputs, own, setting) for setting in low}
    with use_backend("torch", attention="plain"):
        wide = _widest(trial, inputs, settings[0])
        lengths = lengths or _other_lengths(trial, inputs, wide, tokens)
        others = [Setting(False, 1, length, gradients=False) for length in lengths]
        for setting in (*settings, *_with_gradients(lengths, tokens), *others):
            want = _original(trial, inputs, wide, setting, trace if setting in settings[:2] else None)
            if trace.written:
                return f"its own forward writes {', '.join(sorted(trace.written))}, which a fused one would not"
            got = _rewired(trial, swaps, inputs, wide, setting)
            if setting == settings[0] and got.beyond:
                return "a fused forward does not take such a call: it would hand it to its own forward"
            reason = _difference(got, want, WIDE_TOLERANCE[wide])
            if reason is None and own != wide and setting in low:
                reason = _difference_at(own, got_low[setting], low[setting], want.results)
            if reason is not None:
                return reason
    return None


def _widest(trial: nn.Module, inputs: Inputs, setting: Setting) -> torch.dtype:
    """Brings the trial to the widest dtype that the original runs in."""
    for dtype in WIDE_TOLERANCE:
        try:
            attempted(f"it cannot be taken to {dtype}", partial(trial.to, dtype))
            _original(trial, inputs, dtype, setting._replace(gradients=False))
            return dtype
        except Faulted as fault:
            last = fault
    raise last


def _with_gradients(lengths: Sequence[int], tokens: int) -> list[Setting]:
    """Both modes and both batches, of few tokens where the original runs on few.

    Gradients take longest, and those of another formula differ whatever the number of tokens.
    """
    few = FEW_TOKENS if FEW_TOKENS in lengths else tokens
    return [Setting(True, 3, few), Setting(False, 1, few)]


def _other_lengths(trial: nn.Module, inputs: Inputs, dtype: torch.dtype, tokens: int) -> list[int]:
    """Other token counts that the original runs on: a part may well be made for its own alone."""
    found = []
    for count in (FEW_TOKENS, tokens + MORE_TOKENS) if tokens else ():
        setting = Setting(False, 1, count, gradients=False)
        with contextlib.suppress(Refused):
            _original(trial, inputs, dtype, setting)
            found.append(count)
    return found


def _original(trial: nn.Module, inputs: Inputs, dtype: torch.dtype, setting: Setting, trace: Trace | None = None) -> Outcome:
    return attempted(OWN_FAILS, lambda: ran_once(trial, inputs, dtype, setting, trace))


def _rewired(trial: nn.Module, swaps: Sequence[Swap], inputs: Inputs, dtype: torch.dtype, setting: Setting) -> Outcome:
    try:
        attempted("it cannot be rewired", lambda: rewire(trial, swaps))
        own: Any = trial.get_submodule(swaps[-1].path)
        beyond: list[bool] = []
        own._ditkernels[BEYOND] = beyond
        outcome = attempted("the fused forward fails", lambda: ran_once(trial, inputs, dtype, setting))
        return outcome._replace(beyond=bool(beyond))
    finally:
        for module in list(trial.modules()):
            if isinstance(module, Fused):
                unwire(module)


def ran_once(module: nn.Module, inputs: Inputs, dtype: torch.dtype, setting: Setting, trace: Trace | None = None) -> Outcome:
    """What one run comes to, with seeds of its own."""
    device = device_of(module)
    module.train(setting.training)
    draw = Draw(dtype, device, setting)
    with torch.set_grad_enabled(setting.gradients):
        args, kwargs = inputs(draw)
    _seed(device)
    with trace() if trace else contextlib.nullcontext(), torch.set_grad_enabled(setting.gradients):
        result = module(*args, **kwargs)
    generators = _generators(device)
    outputs = tensors_in(result)
    if not outputs:
        raise Refused("its own forward returns no tensor")
    results = {f"output {i}": value.detach() for i, value in enumerate(outputs)}
    if setting.gradients:
        results |= _gradients(module, draw, outputs)
    return Outcome(results, structure(result), generators)


def _gradients(module: nn.Module, draw: Draw, outputs: Sequence[Tensor]) -> Results:
    leaves = {f"gradient of argument {i}": leaf for i, leaf in enumerate(draw.leaves)}
    leaves |= {f"{_OF_PARAMETER}{n}": p for n, p in module.named_parameters() if p.requires_grad}
    cotangents = [draw.normal(*value.shape).detach().to(value.dtype) for value in outputs]
    grads = attempted(
        "its gradients cannot be taken",
        lambda: torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True),
    )
    return {name: grad for name, grad in zip(leaves, grads) if grad is not None}


def structure(value: Any) -> str:
    """A result's types in words: tensors with their dtypes, the items of containers, plain values as they are."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind}({', '.join(f'{key}: {structure(item)}' for key, item in value.items())})"
    if isinstance(value, (tuple, list)):
        return f"{kind}({', '.join(map(structure, value))})"
    return repr(value) if is_plain(value) else kind


def shape_in_words(value: Any) -> str:
    """What a value is, a tensor with its shape."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def same_bits(got: Outcome, want: Outcome) -> bool:
    """Whether two runs came to the same, bit for bit, and left the same in every generator."""
    if got.structure != want.structure or got.generators != want.generators or got.results.keys() != want.results.keys():
        return False
    return all(torch.equal(got.results[name], value) for name, value in want.results.items())


def _difference(got: Outcome, want: Outcome, tolerance: float) -> str | None:
    drawn = [name for name, state in want.generators.items() if got.generators[name] != state]
    if drawn:
        return f"its own forward draws random numbers ({', '.join(drawn)}) that a fused one would not"
    return _other_structure(got, want) or _largest_violation(got.results, want.results, _wide_bounds(want.results, tolerance))


def _difference_at(own: torch.dtype, got: Outcome, low: Outcome, ideal: Results) -> str | None:
    """How a run at the model's own dtype differs from the original's there, which errs as well."""
    bounds = _own_bounds(ideal, low.results, torch.finfo(own).eps)
    reason = _other_structure(got, low) or _largest_violation(got.results, ideal, bounds)
    return reason and f"in {own}, {reason}"


def _other_structure(got: Outcome, want: Outcome) -> str | None:
    same = got.structure == want.structure
    return None if same else f"its own forward returns {want.structure}, the fused one {got.structure}"


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
