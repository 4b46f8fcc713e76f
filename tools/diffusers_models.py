"""Tiny models of diffusers with random weights, and calls of them, for tests and for the table of docs/accelerate.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HEADS, HEAD_DIM = 4, 12
WIDTH = HEADS * HEAD_DIM
TEXT = 20
ROPE = (4, 4, 4)

Arguments = dict[str, Any]


class Inputs:
    """Draws the arguments of a call, the same for every dtype."""

    def __init__(self, batch: int, dtype: torch.dtype = torch.float32) -> None:
        self.batch, self.dtype = batch, dtype
        self._generator = torch.Generator().manual_seed(batch)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self._generator).to(torch.bfloat16).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, (self.batch, *shape), generator=self._generator)

    def ids(self, count: int) -> Tensor:
        """Positions on three axes, of one sample."""
        return torch.stack([torch.zeros(count), torch.arange(count) // 3, torch.arange(count) % 3], dim=-1)

    def times(self) -> Tensor:
        """Between 0 and 1, so that no table of sinusoids is rounded differently by the dtypes."""
        return (torch.arange(self.batch) + 1).to(self.dtype) / 8


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers.models.transformers, how to build it small, and a call of it."""

    name: str
    config: Mapping[str, Any]
    call: Callable[[Inputs], Arguments]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> nn.Module:
        """A model whose every parameter counts: what starts at zero would prove nothing."""
        import diffusers

        torch.manual_seed(seed)
        model: nn.Module = getattr(diffusers, self.name)(**self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
        return model


HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
FLUX = {**HEADED, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE}


def _flux(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(9, 8),
        "encoder_hidden_states": draw.normal(4, TEXT),
        "timestep": draw.times(),
        "img_ids": draw.ids(9),
        "txt_ids": draw.ids(4),
    }


def _pooled(draw: Inputs) -> Arguments:
    return {**_flux(draw), "pooled_projections": draw.normal(16)}


def _sd3(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, TEXT),
        "pooled_projections": draw.normal(16),
        "timestep": draw.times(),
    }


SD3 = {
    **HEADED,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}


def _image(draw: Inputs) -> Arguments:
    return {"hidden_states": draw.normal(4, 8, 8), "encoder_hidden_states": draw.normal(5, TEXT), "timestep": draw.times()}


def _masked(draw: Inputs) -> Arguments:
    mask = torch.ones(draw.batch, 5)
    mask[:, 4:] = 0
    return {**_image(draw), "encoder_attention_mask": mask}


def _video(draw: Inputs) -> Arguments:
    return {"hidden_states": draw.normal(4, 2, 4, 4), "encoder_hidden_states": draw.normal(5, TEXT), "timestep": draw.times()}


WAN = {
    **HEADED,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 16,
}


def _vace(draw: Inputs) -> Arguments:
    return {**_video(draw), "control_hidden_states": draw.normal(6, 2, 4, 4)}


def _ltx(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(8, 8),
        "encoder_hidden_states": draw.normal(5, TEXT),
        "timestep": draw.times(),
        "encoder_attention_mask": torch.ones(draw.batch, 5),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


COGVIDEO = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}


def _cogvideo(draw: Inputs) -> Arguments:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(5, TEXT), "timestep": draw.times()}


def _sized(draw: Inputs) -> Arguments:
    sizes = torch.tensor([[8.0, 8.0]]).repeat(draw.batch, 1).to(draw.dtype)
    return {**_image(draw), "original_size": sizes, "target_size": sizes, "crop_coords": sizes * 0}


COGVIEW = {
    **HEADED,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "text_embed_dim": TEXT,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "sample_size": 8,
    "pos_embed_max_size": 8,
}


def _glm(draw: Inputs) -> Arguments:
    sized = {name: value for name, value in _sized(draw).items() if name != "original_size"}
    return {**sized, "prior_token_id": draw.integers(16, 16), "prior_token_drop": torch.zeros(draw.batch, 16, dtype=torch.bool)}


HUNYUAN = {
    **HEADED,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "rope_axes_dim": ROPE,
}


def _hunyuan(draw: Inputs) -> Arguments:
    mask = torch.ones(draw.batch, 5)
    mask[:, 4:] = 0
    return {**_video(draw), "encoder_attention_mask": mask, "pooled_projections": draw.normal(16)}


def _hunyuan_image(draw: Inputs) -> Arguments:
    mask = torch.ones(draw.batch, 5)
    mask[:, 4:] = 0
    image = {"hidden_states": draw.normal(4, 4, 4), "encoder_hidden_states": draw.normal(5, TEXT)}
    return {**image, "timestep": draw.times(), "encoder_attention_mask": mask}


def _hunyuan_15(draw: Inputs) -> Arguments:
    return {
        **_video(draw),
        "encoder_attention_mask": torch.ones(draw.batch, 5, dtype=torch.bool),
        "encoder_hidden_states_2": draw.normal(3, TEXT),
        "encoder_attention_mask_2": torch.ones(draw.batch, 3, dtype=torch.bool),
        "image_embeds": torch.zeros(draw.batch, 3, 16).to(draw.dtype),
    }


def _qwen(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(9, 8),
        "encoder_hidden_states": draw.normal(5, TEXT),
        "encoder_hidden_states_mask": torch.ones(draw.batch, 5, dtype=torch.bool),
        "timestep": draw.times(),
        "img_shapes": [[(1, 3, 3)]] * draw.batch,
    }


def _flux2(draw: Inputs) -> Arguments:
    four = lambda count: torch.cat([draw.ids(count), torch.zeros(count, 1)], dim=-1)  # noqa: E731
    return {**_flux(draw), "img_ids": four(9), "txt_ids": four(4), "guidance": draw.times()}


def _easy(draw: Inputs) -> Arguments:
    return {"hidden_states": draw.normal(4, 2, 4, 4), "encoder_hidden_states": draw.normal(5, TEXT), "timestep": draw.times() * 8}


def _hidream(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "timesteps": draw.times(),
        "encoder_hidden_states_t5": draw.normal(4, TEXT),
        "encoder_hidden_states_llama3": draw.normal(2, 4, TEXT).transpose(0, 1),
        "pooled_embeds": draw.normal(16),
    }


def _latte(draw: Inputs) -> Arguments:
    return {"hidden_states": draw.normal(4, 2, 8, 8), "encoder_hidden_states": draw.normal(5, TEXT), "timestep": draw.times()}


def _allegro(draw: Inputs) -> Arguments:
    rotary = tuple(torch.ones(draw.batch, 8, 4).to(draw.dtype) * 0.5 for _ in range(2))
    grid = (torch.arange(8) % 2, torch.arange(8) // 2 % 2, torch.arange(8) // 4)
    del rotary
    axis = torch.stack([torch.ones(8, HEAD_DIM // 3), torch.zeros(8, HEAD_DIM // 3)])
    freqs = tuple((axis[0].to(draw.dtype), axis[1].to(draw.dtype)) for _ in range(3))
    sizes = tuple(position[None].long() for position in grid)
    return {
        "hidden_states": draw.normal(4, 2, 4, 4),
        "encoder_hidden_states": draw.normal(5, TEXT),
        "timestep": draw.times(),
        "encoder_attention_mask": torch.ones(draw.batch, 5),
        "image_rotary_emb": (freqs, sizes),
    }


def _skyreels(draw: Inputs) -> Arguments:
    return _video(draw)


def _cosmos(draw: Inputs) -> Arguments:
    return {**_video(draw), "fps": 8, "padding_mask": torch.zeros(1, 1, 4, 4).to(draw.dtype)}


def _kandinsky(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(2, 4, 4, 4),
        "encoder_hidden_states": draw.normal(5, TEXT),
        "pooled_projections": draw.normal(16),
        "timestep": draw.times(),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(5),
    }


def _ace(draw: Inputs) -> Arguments:
    return {
        "hidden_states": draw.normal(8, 4),
        "timestep": draw.times(),
        "timestep_r": draw.times(),
        "encoder_hidden_states": draw.normal(5, WIDTH),
        "context_latents": draw.normal(8, 8),
    }


def _zimage(draw: Inputs) -> Arguments:
    return {
        "x": list(draw.normal(4, 1, 8, 8)),
        "t": draw.times(),
        "cap_feats": list(draw.normal(5, TEXT)),
    }


def _lumina(draw: Inputs) -> Arguments:
    return {**_image(draw), "encoder_attention_mask": torch.ones(draw.batch, 5, dtype=torch.int64)}


def _mochi(draw: Inputs) -> Arguments:
    mask = torch.ones(draw.batch, 5, dtype=torch.bool)
    mask[:, 4:] = False
    return {**_video(draw), "encoder_hidden_states": draw.normal(5, 16), "encoder_attention_mask": mask}


def _motif(draw: Inputs) -> Arguments:
    return {**_video(draw), "encoder_attention_mask": torch.ones(draw.batch, 5)}


MODELS: dict[str, Tiny] = {
    tiny.name if not tiny.options else f"{tiny.name}-{'-'.join(tiny.options)}": tiny
    for tiny in (
        Tiny("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 16}, _pooled),
        Tiny("BriaTransformer2DModel", FLUX, _flux),
        Tiny(
            "BriaFiboTransformer2DModel",
            {**FLUX, "text_encoder_dim": TEXT},
            lambda d: {**_flux(d), "text_encoder_layers": [d.normal(4, TEXT)] * 4},
        ),
        Tiny(
            "ChromaTransformer2DModel",
            {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
            _flux,
        ),
        Tiny("LongCatImageTransformer2DModel", {**FLUX, "pooled_projection_dim": 16}, _flux),
        Tiny("OvisImageTransformer2DModel", {**FLUX, "out_channels": 8}, _flux),
        Tiny("Flux2Transformer2DModel", {**FLUX, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 2, 2)}, _flux2),
        Tiny("SD3Transformer2DModel", SD3, _sd3),
        Tiny("SD3Transformer2DModel", {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, _sd3, {"3.5": True}),
        Tiny(
            "AuraFlowTransformer2DModel",
            {
                **{k: v for k, v in SD3.items() if k not in ("num_layers", "pooled_projection_dim")},
                "num_mmdit_layers": 2,
                "num_single_dit_layers": 2,
                "pos_embed_max_size": 16,
            },
            _image,
        ),
        Tiny(
            "QwenImageTransformer2DModel",
            {**HEADED, "in_channels": 8, "out_channels": 2, "num_layers": 3, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE},
            _qwen,
        ),
        Tiny(
            "HunyuanVideoTransformer3DModel",
            {**HUNYUAN, "num_single_layers": 2, "guidance_embeds": False, "pooled_projection_dim": 16},
            _hunyuan,
        ),
        Tiny("HunyuanImageTransformer2DModel", {**HUNYUAN, "num_single_layers": 2, "rope_axes_dim": (6, 6)}, _hunyuan_image),
        Tiny(
            "HunyuanVideo15Transformer3DModel",
            {**HUNYUAN, "text_embed_2_dim": TEXT, "image_embed_dim": 16, "target_size": 16},
            _hunyuan_15,
        ),
        Tiny(
            "MotifVideoTransformer3DModel",
            {
                **{k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"},
                "num_single_layers": 2,
                "enable_text_cross_attention_dual": True,
                "enable_text_cross_attention_single": True,
            },
            _motif,
        ),
        Tiny("CogView3PlusTransformer2DModel", COGVIEW, _sized),
        Tiny("CogView4Transformer2DModel", {**COGVIEW, "rope_axes_dim": (8, 8)}, _sized),
        Tiny(
            "GlmImageTransformer2DModel",
            {
                **{k: v for k, v in COGVIEW.items() if k not in ("sample_size", "pos_embed_max_size")},
                "prior_vq_quantizer_codebook_size": 16,
            },
            _glm,
        ),
        Tiny("CogVideoXTransformer3DModel", COGVIDEO, _cogvideo),
        Tiny("ConsisIDTransformer3DModel", COGVIDEO, _cogvideo),
        Tiny(
            "EasyAnimateTransformer3DModel",
            {
                "num_attention_heads": HEADS,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": 2,
                "num_layers": 3,
                "mmdit_layers": 2,
                "time_embed_dim": 16,
                "text_embed_dim": TEXT,
            },
            _easy,
        ),
        Tiny(
            "JoyImageEditTransformer3DModel",
            {
                "in_channels": 4,
                "hidden_size": WIDTH,
                "num_attention_heads": HEADS,
                "text_dim": TEXT,
                "num_layers": 3,
                "rope_dim_list": ROPE,
            },
            _video,
        ),
        Tiny(
            "HiDreamImageTransformer2DModel",
            {
                **HEADED,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "num_single_layers": 2,
                "caption_channels": [TEXT, TEXT],
                "text_emb_dim": 16,
                "axes_dims_rope": ROPE,
                "max_resolution": (8, 8),
                "llama_layers": [0, 1, 0, 1],
                "force_inference_output": True,
            },
            _hidream,
        ),
        Tiny(
            "PixArtTransformer2DModel",
            {**HEADED, "sample_size": 8, "num_layers": 3, "cross_attention_dim": WIDTH, "caption_channels": TEXT},
            _masked,
        ),
        Tiny(
            "SanaTransformer2DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                **HEADED,
                "num_layers": 3,
                "num_cross_attention_heads": HEADS,
                "cross_attention_head_dim": HEAD_DIM,
                "cross_attention_dim": WIDTH,
                "caption_channels": TEXT,
                "sample_size": 8,
            },
            _masked,
        ),
        Tiny(
            "SanaVideoTransformer3DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                **HEADED,
                "num_layers": 3,
                "num_cross_attention_heads": HEADS,
                "cross_attention_head_dim": HEAD_DIM,
                "cross_attention_dim": WIDTH,
                "caption_channels": TEXT,
                "sample_size": 4,
            },
            lambda d: {**_video(d), "encoder_attention_mask": torch.ones(d.batch, 5)},
        ),
        Tiny(
            "LatteTransformer3DModel",
            {
                **HEADED,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "cross_attention_dim": WIDTH,
                "attention_bias": True,
                "sample_size": 8,
                "patch_size": 2,
                "activation_fn": "gelu-approximate",
                "num_embeds_ada_norm": 1000,
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
                "caption_channels": TEXT,
                "video_length": 2,
            },
            _latte,
        ),
        Tiny(
            "AllegroTransformer3DModel",
            {
                **HEADED,
                "num_layers": 3,
                "cross_attention_dim": WIDTH,
                "sample_height": 4,
                "sample_width": 4,
                "sample_frames": 2,
                "caption_channels": TEXT,
            },
            _allegro,
        ),
        Tiny("WanTransformer3DModel", WAN, _video),
        Tiny("SkyReelsV2Transformer3DModel", WAN, _skyreels),
        Tiny("ChronoEditTransformer3DModel", WAN, _video),
        Tiny("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}, _vace),
        Tiny(
            "LTXVideoTransformer3DModel",
            {
                **HEADED,
                "in_channels": 8,
                "out_channels": 8,
                "cross_attention_dim": WIDTH,
                "num_layers": 3,
                "caption_channels": TEXT,
            },
            _ltx,
        ),
        Tiny(
            "AceStepTransformer1DModel",
            {
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": HEADS,
                "num_key_value_heads": 2,
                "head_dim": HEAD_DIM,
                "in_channels": 12,
                "audio_acoustic_hidden_dim": 4,
            },
            _ace,
        ),
        Tiny(
            "CosmosTransformer3DModel",
            {
                **HEADED,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "text_embed_dim": TEXT,
                "adaln_lora_dim": 8,
                "max_size": (4, 8, 8),
            },
            _cosmos,
        ),
        Tiny(
            "Kandinsky5Transformer3DModel",
            {
                "in_text_dim": TEXT,
                "in_text_dim2": 16,
                "time_dim": 16,
                "model_dim": WIDTH,
                "ff_dim": 64,
                "num_text_blocks": 1,
                "num_visual_blocks": 3,
                "axes_dims": ROPE,
            },
            _kandinsky,
        ),
        Tiny(
            "PRXTransformer2DModel",
            {
                "in_channels": 4,
                "context_in_dim": TEXT,
                "hidden_size": WIDTH,
                "mlp_ratio": 2.0,
                "num_heads": HEADS,
                "depth": 3,
                "axes_dim": [6, 6],
            },
            _image,
        ),
        Tiny(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 8,
                "in_channels": 4,
                "hidden_size": WIDTH,
                "num_layers": 3,
                "num_refiner_layers": 1,
                "num_attention_heads": HEADS,
                "num_kv_heads": 2,
                "multiple_of": 16,
                "axes_dim_rope": ROPE,
                "axes_lens": (16, 16, 16),
                "cap_feat_dim": TEXT,
            },
            _lumina,
        ),
        Tiny(
            "ZImageTransformer2DModel",
            {
                "in_channels": 4,
                "dim": WIDTH,
                "n_layers": 3,
                "n_refiner_layers": 1,
                "n_heads": HEADS,
                "n_kv_heads": HEADS,
                "cap_feat_dim": TEXT,
                "axes_dims": list(ROPE),
                "axes_lens": [64, 64, 64],
            },
            _zimage,
        ),
        Tiny(
            "MochiTransformer3DModel",
            {
                **HEADED,
                "num_layers": 3,
                "pooled_projection_dim": 24,
                "in_channels": 4,
                "text_embed_dim": 16,
                "time_embed_dim": 16,
                "max_sequence_length": 5,
            },
            _mochi,
        ),
    )
}
