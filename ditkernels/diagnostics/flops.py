"""Parameters and Gflops of the models, beside the numbers of the DiT paper.

The paper (Peebles & Xie, arXiv 2212.09748) counts a multiply-add as one operation, so its Gflops are
multiply-adds (MACs), and a FLOP count is twice that. Both are given here. They are counted, not computed from
a formula: the model runs on the meta device, where tensors have shapes and no values, under
torch.utils.flop_counter, which counts matrix products and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ditkernels import reference
from ditkernels.models import count

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


def table(counted: list[dict[str, Any]]) -> str:
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
