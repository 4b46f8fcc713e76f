"""Models of which a part is trained, and what autograd keeps of them for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lora(nn.Module):
    """A frozen linear with a trained product of rank 2 beside it (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def add_lora(model: nn.Module, names: tuple[str, ...]) -> None:
    """Puts a ``Lora`` around the linears whose names end so."""
    for name, module in list(model.named_modules()):
        if name.endswith(names) and isinstance(module, nn.Linear):
            model.set_submodule(name, Lora(module))


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Freezes all parameters but those of the chosen names; positions stay frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name) and "pos_embed" not in name)


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is given twice
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert run().requires_grad
    return sum(kept.values())
