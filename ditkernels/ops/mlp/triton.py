"""The Triton backend of ``mlp``: torch's products, and the kernels of ``bias_gelu`` between them."""

from __future__ import annotations

from ditkernels.ops import _triton
from ditkernels.ops.gelu.triton import backward, forward
from ditkernels.ops.mlp import through_bias_gelu

through_bias_gelu("triton", forward, backward, _triton.refuse)
