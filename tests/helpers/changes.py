"""What other people do to a layer: each change by name, with the layers that it suits and the package that it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

Log = list[str]
Apply = Callable[[nn.Module, str, Log], None]

MATRICES = (nn.Linear, nn.Conv2d, nn.Embedding)
WEIGHTED = (*MATRICES, nn.LayerNorm)


@dataclass(frozen=True)
class Change:
    """``apply(model, path, log)`` changes the module at ``path``; whatever observes notes the path in ``log`` at every call.

    Attributes:
        kinds: the modules that it suits.
        trains: whether it leaves a model that can be differentiated.
        package: what has to be installed.
    """

    apply: Apply
    kinds: tuple[type[nn.Module], ...]
    trains: bool = True
    package: str | None = None

    def suits(self, module: nn.Module) -> bool:
        if self.kinds == (nn.Module,):
            return not isinstance(module, nn.ModuleList)
        of_kind = isinstance(module, self.kinds) or (nn.LayerNorm in self.kinds and "RMSNorm" in type(module).__name__)
        return of_kind and getattr(module, "weight", None) is not None


def _on_weight(change: Callable[[nn.Module], Any]) -> Apply:
    return lambda model, path, log: change(model.get_submodule(path)) and None


def _replaced(make: Callable[[Any], nn.Module]) -> Apply:
    return lambda model, path, log: model.set_submodule(path, make(model.get_submodule(path)))


# ---- Other weights ---------------------------------------------------------------------------------------------------


def _lora(model: nn.Module, path: str, log: Log) -> None:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, target_modules=rf"{path}".replace(".", r"\."), init_lora_weights=False)
    state = torch.get_rng_state()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or "lora_" in name)
    torch.set_rng_state(state)


def _torchao(model: nn.Module, path: str, log: Log) -> None:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == path)


def _dynamic(linear: nn.Linear) -> nn.Module:
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import default_dynamic_qconfig

    linear.qconfig = default_dynamic_qconfig  # type: ignore[assignment]
    return dynamic.Linear.from_float(linear)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    made.load_state_dict(linear.state_dict())
    return made.to("cpu").train(linear.training)


class Uint8(nn.Linear):
    """A linear whose weight is stored in bytes and computed at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.scale = linear.weight.detach().abs().max() / 8
        stored = (linear.weight.detach() / self.scale + 8).round().clamp(0, 16).to(torch.uint8)
        self.weight, self.bias = nn.Parameter(stored, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, ((self.weight.float() - 8) * self.scale).to(x.dtype), self.bias)


def _fp8(module: nn.Module) -> None:
    casting = importlib.import_module("diffusers.hooks.layerwise_casting")
    casting.apply_layerwise_casting_hook(module, torch.float8_e4m3fn, module.weight.dtype, non_blocking=False)


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def _stretched(make: Callable[[Any], nn.Module]) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        make(module)
        with torch.no_grad():
            module.weight_g.mul_(1.5)

    return change


def _spectral_norm(module: nn.Module) -> None:
    """With its power iterations done: by a first guess a weight may be divided by next to nothing."""
    spectral_norm(module, n_power_iterations=30)
    hook = next(iter(module._forward_pre_hooks.values()))
    hook(module.train(), ())
    module.eval()


def _overlapping(conv: nn.Conv2d) -> nn.Module:
    """As many tokens, of larger patches with the other edge of the image around it."""
    p = conv.kernel_size[0]
    sizes = {"kernel_size": p + 2, "stride": p, "padding": 1, "padding_mode": "circular"}
    made = nn.Conv2d(conv.in_channels, conv.out_channels, **sizes)
    with torch.no_grad():
        made.weight.copy_(F.pad(conv.weight, (1, 1, 1, 1), value=0.1))
        made.bias.zero_()
    return made


def _max_norm(embedding: nn.Embedding) -> None:
    embedding.max_norm = 0.5


def _by_frequency(embedding: nn.Embedding) -> None:
    embedding.scale_grad_by_freq = True


def _offloaded(module: nn.Module) -> None:
    hooks = importlib.import_module("accelerate.hooks")
    state = {name: value.detach().clone() * 1.5 for name, value in module.named_parameters()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=state, offload_buffers=False)
    hooks.add_hook_to_module(module, hook)


# ---- Somebody looks on -----------------------------------------------------------------------------------------------


def _times(values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple(_times(v) for v in values)
    return values * 1.25 if isinstance(values, Tensor) and values.is_floating_point() else values


def _first(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_times(args[0]), *args[1:]) if args else args


def _noting(log: Log, path: str, change: Callable[..., Any]) -> Callable[..., Any]:
    def hook(*values: Any) -> Any:
        log.append(path)
        return change(*values)

    return hook


HOOKS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "forward": ("register_forward_hook", lambda module, args, out: _times(out), {}),
    "forward_kwargs": ("register_forward_hook", lambda module, args, options, out: _times(out), {"with_kwargs": True}),
    "forward_pre": ("register_forward_pre_hook", lambda module, args: _first(args), {}),
    "full_backward": ("register_full_backward_hook", lambda module, grads, outs: _times(grads), {}),
    "full_backward_pre": ("register_full_backward_pre_hook", lambda module, outs: _times(outs), {}),
}


def _hook(kind: str) -> Apply:
    register, change, options = HOOKS[kind]

    def apply(model: nn.Module, path: str, log: Log) -> None:
        getattr(model.get_submodule(path), register)(_noting(log, path, change), **options)

    return apply


def _own_forward(model: nn.Module, path: str, log: Log) -> None:
    module = model.get_submodule(path)
    genuine = type(module).forward

    def forward(*args: Any, **options: Any) -> Any:
        log.append(path)
        return _times(genuine(module, *args, **options))

    module.forward = forward  # type: ignore[method-assign]


CHANGES: dict[str, Change] = {
    "lora": Change(_lora, MATRICES, package="peft"),
    "torchao": Change(_torchao, (nn.Linear,), trains=False, package="torchao"),
    "dynamic": Change(_replaced(_dynamic), (nn.Linear,), trains=False),
    "bitsandbytes": Change(_replaced(_bitsandbytes), (nn.Linear,), trains=False, package="bitsandbytes"),
    "uint8": Change(_replaced(Uint8), (nn.Linear,), trains=False),
    "fp8": Change(_on_weight(_fp8), MATRICES, trains=False, package="diffusers"),
    "prune": Change(_on_weight(lambda m: prune.l1_unstructured(m, "weight", 0.5)), WEIGHTED),
    "parametrization": Change(_on_weight(lambda m: parametrize.register_parametrization(m, "weight", Larger())), WEIGHTED),
    "weight_norm": Change(_on_weight(_stretched(weight_norm)), MATRICES),
    "spectral_norm": Change(_on_weight(_spectral_norm), MATRICES),
    "new_spectral_norm": Change(_on_weight(parametrizations.spectral_norm), MATRICES),
    "padding_mode": Change(_replaced(_overlapping), (nn.Conv2d,)),
    "max_norm": Change(_on_weight(_max_norm), (nn.Embedding,)),
    "scale_grad_by_freq": Change(_on_weight(_by_frequency), (nn.Embedding,)),
    "offload": Change(_on_weight(_offloaded), WEIGHTED, trains=False, package="accelerate"),
    "own_forward": Change(_own_forward, (nn.Module,)),
    **{f"{kind}_hook": Change(_hook(kind), (nn.Module,)) for kind in HOOKS},
}


def covering(allowed: Callable[..., bool], *factors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Combinations that show every allowed pair of values of any two factors, the greediest first."""
    rows = [row for row in product(*factors) if allowed(*row)]
    pairs = {row: {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)} for row in rows}
    missing = set().union(*pairs.values())
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        yield best
