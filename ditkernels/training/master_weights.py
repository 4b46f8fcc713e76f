"""Master weights: a model that computes with bf16 matrices, of which the optimizer holds the fp32 originals, the masters.

Under autocast a step casts every fp32 matrix to bf16 and every gradient of one back to fp32. Here the matrices that compute are
bf16 parameters: the ``copies`` that ``ops.adamw_ema`` rewrites while it updates their masters, and whose gradients it reads as they
come. Autocast stays on, and finds no matrix left to cast. Biases, norms, tables and positions are the master model's own.

The numbers stay those of autocast over fp32 weights: a copy is its master rounded to nearest, as a cast makes it, and a gradient in
bf16 is widened exactly where it is read. Gradients that are sums of several are added in fp32 (``grad_dtype``), as they were.

A master's gradient stands in ``master.grad`` once it is complete, so whatever reads gradients finds them on the masters.

Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# The copy of every master that has one.
Copies = Mapping[Tensor, nn.Parameter]


def make_bf16_copies(model: Model) -> tuple[Model, Copies]:
    """A model that computes with bf16 copies of the matrices of linears and convolutions, the weights that autocast would cast.

    Args:
        model: the masters', in fp32. It is left as it is, but that the matrices' gradients may come in any dtype.

    Returns:
        The model that computes, which shares all other parameters with the given one, and the copies.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    # One that a parametrization computes has no master: it comes anew in every step, and autocast casts it.
    matrices = [weight for weight in weights if weight.requires_grad and weight.is_leaf]
    copies = {master: nn.Parameter(master.detach().to(torch.bfloat16)) for master in matrices}
    shared = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    for master in matrices:
        master.grad_dtype = None
    return copy.deepcopy(model, shared | {id(master): made for master, made in copies.items()}), copies


def accumulate_in(dtype: torch.dtype, copies: Copies) -> None:
    """From now on the copies' gradients are of this dtype, and added in it: fp32 for sums over microbatches."""
    for made in copies.values():
        made.grad_dtype = dtype


@torch.no_grad()
def refresh(copies: Copies) -> None:
    """Takes over masters that were changed by anything but ``ops.adamw_ema``."""
    for master, made in copies.items():
        made.copy_(master)


def move_grads_to_masters(copies: Copies) -> None:
    """Gives the masters the gradients of their copies, but for masters that have theirs."""
    for master, made in copies.items():
        if master.grad is None:
            master.grad = made.grad
        made.grad = None
