"""Which fused forward stands for which class of diffusers, by module and qualified name."""

from __future__ import annotations

from torch import nn

from ditkernels.accelerate.diffusers import cross, joint, norms, others, parallel, sandwich
from ditkernels.accelerate.diffusers.block import ByClass

_MODELS = "diffusers.models"
_TRANSFORMERS = f"{_MODELS}.transformers"

_BY_FILE: dict[str, dict[str, type[ByClass]]] = {
    f"{_MODELS}.normalization": {
        "AdaLayerNorm": norms.Shifted,
        "AdaLayerNormContinuous": norms.Continuous,
        "AdaLayerNormZero": norms.Zero,
        "AdaLayerNormZeroSingle": norms.ZeroSingle,
        "CogVideoXLayerNormZero": norms.BothByOneOpen,
        "CogView3PlusAdaLayerNormZeroTextImage": norms.BothOfCogView3,
        "LuminaLayerNormContinuous": norms.LuminaContinuous,
        "LuminaRMSNormZero": norms.LuminaZero,
        "SD35AdaLayerNormZeroX": norms.DualZero,
    },
    f"{_MODELS}.attention": {"BasicTransformerBlock": cross.PixArt, "JointTransformerBlock": joint.SD3},
    f"{_TRANSFORMERS}.ace_step_transformer": {"AceStepTransformerBlock": cross.AceStep},
    f"{_TRANSFORMERS}.auraflow_transformer_2d": {
        "AuraFlowJointTransformerBlock": joint.AuraFlow,
        "AuraFlowSingleTransformerBlock": parallel.RefiningAuraFlow,
    },
    f"{_TRANSFORMERS}.cogvideox_transformer_3d": {"CogVideoXBlock": joint.CogVideoX},
    f"{_TRANSFORMERS}.consisid_transformer_3d": {"ConsisIDBlock": joint.ConsisID},
    f"{_TRANSFORMERS}.sana_transformer": {"SanaModulatedNorm": norms.Tabled, "SanaTransformerBlock": cross.Sana},
    f"{_TRANSFORMERS}.transformer_allegro": {"AllegroTransformerBlock": cross.Allegro},
    f"{_TRANSFORMERS}.transformer_bria": {
        "BriaSingleTransformerBlock": parallel.ParallelBria,
        "BriaTransformerBlock": joint.Bria,
    },
    f"{_TRANSFORMERS}.transformer_bria_fibo": {
        "BriaFiboSingleTransformerBlock": parallel.ParallelFibo,
        "BriaFiboTransformerBlock": joint.Flux,
    },
    f"{_TRANSFORMERS}.transformer_chroma": {
        "ChromaAdaLayerNormContinuousPruned": norms.ContinuousPruned,
        "ChromaAdaLayerNormZeroPruned": norms.ZeroPruned,
        "ChromaAdaLayerNormZeroSinglePruned": norms.ZeroSinglePruned,
        "ChromaSingleTransformerBlock": parallel.ParallelChroma,
        "ChromaTransformerBlock": joint.Chroma,
    },
    f"{_TRANSFORMERS}.transformer_chronoedit": {"WanTransformerBlock": cross.Wan},
    f"{_TRANSFORMERS}.transformer_cogview3plus": {"CogView3PlusTransformerBlock": joint.CogView3Plus},
    f"{_TRANSFORMERS}.transformer_cogview4": {
        "CogView4AdaLayerNormContinuous": norms.ContinuousPlain,
        "CogView4AdaLayerNormZero": norms.BothInTurn,
        "CogView4TransformerBlock": joint.CogView4,
    },
    f"{_TRANSFORMERS}.transformer_cosmos": {
        "CosmosAdaLayerNorm": norms.LowRank,
        "CosmosTransformerBlock": others.Cosmos,
    },
    f"{_TRANSFORMERS}.transformer_easyanimate": {
        "EasyAnimateLayerNormZero": norms.BothByOne,
        "EasyAnimateTransformerBlock": joint.EasyAnimate,
    },
    f"{_TRANSFORMERS}.transformer_flux": {
        "FluxSingleTransformerBlock": parallel.Parallel,
        "FluxTransformerBlock": joint.Flux,
    },
    f"{_TRANSFORMERS}.transformer_flux2": {
        "Flux2SingleTransformerBlock": parallel.ParallelFlux2,
        "Flux2TransformerBlock": joint.Flux2,
    },
    f"{_TRANSFORMERS}.transformer_glm_image": {
        "GlmImageAdaLayerNormContinuous": norms.ContinuousPlain,
        "GlmImageAdaLayerNormZero": norms.BothInTurn,
        "GlmImageTransformerBlock": joint.GlmImage,
    },
    f"{_TRANSFORMERS}.transformer_hidream_image": {
        "HiDreamImageOutEmbed": norms.FinalOfHiDream,
        "HiDreamImageSingleTransformerBlock": joint.HiDreamSingle,
        "HiDreamImageTransformerBlock": joint.HiDream,
    },
    f"{_TRANSFORMERS}.transformer_hunyuan_video": {
        "HunyuanVideoIndividualTokenRefinerBlock": parallel.Refining,
        "HunyuanVideoSingleTransformerBlock": parallel.ParallelHunyuan,
        "HunyuanVideoTransformerBlock": joint.HunyuanVideo,
    },
    f"{_TRANSFORMERS}.transformer_hunyuan_video15": {
        "HunyuanVideo15IndividualTokenRefinerBlock": parallel.Refining,
        "HunyuanVideo15TransformerBlock": joint.HunyuanVideo,
    },
    f"{_TRANSFORMERS}.transformer_hunyuanimage": {
        "HunyuanImageIndividualTokenRefinerBlock": parallel.Refining,
        "HunyuanImageSingleTransformerBlock": parallel.ParallelHunyuan,
        "HunyuanImageTransformerBlock": joint.HunyuanImage,
    },
    f"{_TRANSFORMERS}.transformer_joyimage": {"JoyImageTransformerBlock": joint.JoyImage},
    f"{_TRANSFORMERS}.transformer_kandinsky": {
        "Kandinsky5OutLayer": others.KandinskyLast,
        "Kandinsky5TransformerDecoderBlock": others.KandinskyVisual,
        "Kandinsky5TransformerEncoderBlock": others.Kandinsky,
    },
    f"{_TRANSFORMERS}.transformer_longcat_image": {
        "LongCatImageSingleTransformerBlock": parallel.Parallel,
        "LongCatImageTransformerBlock": joint.Flux,
    },
    f"{_TRANSFORMERS}.transformer_ltx": {"LTXVideoTransformerBlock": cross.LTX},
    f"{_TRANSFORMERS}.transformer_lumina2": {"Lumina2TransformerBlock": sandwich.Lumina2},
    f"{_TRANSFORMERS}.transformer_mochi": {
        "MochiLayerNormContinuous": sandwich.MochiContinuous,
        "MochiRMSNormZero": sandwich.MochiZero,
        "MochiTransformerBlock": sandwich.Mochi,
    },
    f"{_TRANSFORMERS}.transformer_motif_video": {
        "MotifVideoSingleTransformerBlock": parallel.ParallelMotif,
        "MotifVideoTransformerBlock": joint.MotifVideo,
    },
    f"{_TRANSFORMERS}.transformer_ovis_image": {
        "OvisImageSingleTransformerBlock": parallel.ParallelOvis,
        "OvisImageTransformerBlock": joint.Flux,
    },
    f"{_TRANSFORMERS}.transformer_prx": {"FinalLayer": norms.Final, "PRXBlock": others.PRX},
    f"{_TRANSFORMERS}.transformer_qwenimage": {"QwenImageTransformerBlock": joint.QwenImage},
    f"{_TRANSFORMERS}.transformer_sana_video": {
        "SanaModulatedNorm": norms.TabledFrames,
        "SanaVideoTransformerBlock": cross.SanaVideo,
    },
    f"{_TRANSFORMERS}.transformer_sd3": {"SD3SingleTransformerBlock": parallel.RefiningSD3},
    f"{_TRANSFORMERS}.transformer_skyreels_v2": {"SkyReelsV2TransformerBlock": cross.SkyReels},
    f"{_TRANSFORMERS}.transformer_wan": {"WanTransformerBlock": cross.Wan},
    f"{_TRANSFORMERS}.transformer_wan_animate": {"WanTransformerBlock": cross.Wan},
    f"{_TRANSFORMERS}.transformer_wan_vace": {"WanVACETransformerBlock": cross.WanVACE},
    f"{_TRANSFORMERS}.transformer_z_image": {
        "FinalLayer": norms.FinalScaled,
        "ZImageTransformerBlock": sandwich.ZImage,
    },
}


def known(module: nn.Module) -> type[ByClass] | None:
    """The fused forward that stands for a module's class; a subclass that keeps its parent's forward counts as that parent."""
    kind = type(module)
    for base in kind.__mro__:
        mixin = _BY_FILE.get(base.__module__, {}).get(base.__qualname__)
        if mixin is not None and base.forward is kind.forward:  # type: ignore[attr-defined]
            return mixin if mixin.applies(module) else None
    return None
