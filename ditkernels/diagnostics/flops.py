"""`ditkernels flops`: parameters and Gflops of the models, beside the numbers of the DiT paper.

The paper (Peebles & Xie, arXiv 2212.09748) counts a multiply-add as one operation, so its Gflops are
multiply-adds (MACs), and a FLOP count is twice that. Both are given here. They are counted, not computed from
a formula: the model runs on the meta device, where tensors have shapes and no values, under
torch.utils.flop_counter, which counts matrix products and convolutions.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("ditkernels: error: run `python -m ditkernels flops ...`", file=sys.stderr)
    sys.exit(2)

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ditkernels import reference

LATENT_FACTOR = 8  # edge of an image over edge of its latent, in the autoencoder of the paper


class Published(NamedTuple):
    """A row of the paper: 10^9 multiply-adds of one forward, millions of parameters where it gives them."""

    model: str
    image_size: int
    conditioning: str
    gmacs: float
    params_millions: int | None


PAPER = (
    Published("DiT-S/8", 256, "adaln_zero", 0.36, 33),
    Published("DiT-S/4", 256, "adaln_zero", 1.41, 33),
    Published("DiT-S/2", 256, "adaln_zero", 6.06, 33),
    Published("DiT-B/8", 256, "adaln_zero", 1.42, 131),
    Published("DiT-B/4", 256, "adaln_zero", 5.56, 130),
    Published("DiT-B/2", 256, "adaln_zero", 23.01, 130),
    Published("DiT-L/8", 256, "adaln_zero", 5.01, 459),
    Published("DiT-L/4", 256, "adaln_zero", 19.70, 458),
    Published("DiT-L/2", 256, "adaln_zero", 80.71, 458),
    Published("DiT-XL/8", 256, "adaln_zero", 7.39, 676),
    Published("DiT-XL/4", 256, "adaln_zero", 29.05, 675),
    Published("DiT-XL/2", 256, "adaln_zero", 118.64, 675),
    Published("DiT-XL/2", 512, "adaln_zero", 524.60, None),
    Published("DiT-XL/2", 256, "adaln", 118.56, 600),
    Published("DiT-XL/2", 256, "cross_attention", 137.62, 598),
    Published("DiT-XL/2", 256, "in_context", 119.37, 449),
)


class Count(NamedTuple):
    """What one forward of one sample costs.

    Attributes:
        macs: multiply-adds, the paper's unit.
        params: all parameters, the frozen position embedding among them.
    """

    macs: int
    params: int

    @property
    def flops(self) -> int:
        """A multiply and an add as two operations."""
        return 2 * self.macs


def count(model: reference.DiT) -> Count:
    """Counts one forward of one sample through ``model``, a ``DiT`` on any device; no arithmetic is done.

    The model is neither moved nor changed. A backward costs about twice as much again.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    x = torch.empty(1, model.in_channels, *model.input_size, device="meta")
    t = torch.empty(1, device="meta")
    y = torch.empty(1, device="meta", dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, (x, t, y))
    return Count(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))


def rows() -> list[dict[str, Any]]:
    """Every model of ``PAPER``, counted."""
    return [_row(published, reference.DiT_models[published.model]) for published in PAPER]


def _row(published: Published, constructor: Callable[..., reference.DiT]) -> dict[str, Any]:
    with torch.device("meta"):
        model = constructor(input_size=published.image_size // LATENT_FACTOR, conditioning=published.conditioning)
    counted = count(model)
    return {
        "model": published.model,
        "image_size": published.image_size,
        "conditioning": published.conditioning,
        "gmacs": counted.macs / 1e9,
        "gflops": counted.flops / 1e9,
        "params": counted.params,
        "paper_gmacs": published.gmacs,
        "paper_params_millions": published.params_millions,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status."""
    counted = rows()
    print(json.dumps(counted, indent=2) if args.json else _table(counted))
    return 0


def _table(counted: list[dict[str, Any]]) -> str:
    head = f"{'model':<9} {'px':>4} {'conditioning':<16} {'params':>12} {'paper':>6} {'GFLOP':>9} {'GMAC':>8} {'paper':>7}"
    lines = [head, "-" * len(head)]
    for row in counted:
        millions = row["paper_params_millions"]
        lines.append(
            f"{row['model']:<9} {row['image_size']:>4} {row['conditioning']:<16} {row['params']:>12,} "
            f"{'' if millions is None else f'{millions}M':>6} {row['gflops']:>9.2f} {row['gmacs']:>8.2f} "
            f"{row['paper_gmacs']:>7.2f}"
        )
    lines.append("One forward of one image. The paper's Gflops are multiply-adds (GMAC); GFLOP counts them as two.")
    return "\n".join(lines)
