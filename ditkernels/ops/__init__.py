"""The fused ops. Each file tells one family's whole story; ``ditkernels.reference`` says what each op means."""

from ditkernels.ops import (  # noqa: F401 (they register a backend)
    adaln_cuda,
    adaln_triton,
    adamw_ema_cuda,
    adamw_ema_triton,
    bias_gelu_cuda,
    bias_gelu_triton,
    final_layer_cuda,
    final_layer_triton,
    mlp_cuda,
    patch_embed_cuda,
    patch_embed_triton,
    qkv_cuda,
    qkv_triton,
    unpatchify_triton,
)
from ditkernels.ops.adaln import gated_residual, gated_residual_norm, modulate_norm
from ditkernels.ops.adamw_ema import adamw_ema
from ditkernels.ops.attention import attention
from ditkernels.ops.bias_gelu import bias_gelu
from ditkernels.ops.final_layer import final_layer, unpatchify
from ditkernels.ops.mlp import mlp
from ditkernels.ops.patch_embed import patch_embed
from ditkernels.ops.qkv import split_qkv

__all__ = [
    "adamw_ema",
    "attention",
    "bias_gelu",
    "final_layer",
    "gated_residual",
    "gated_residual_norm",
    "mlp",
    "modulate_norm",
    "patch_embed",
    "split_qkv",
    "unpatchify",
]
