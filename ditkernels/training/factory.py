"""What a config describes: the model, the autoencoder, and the monitor that evaluates while training goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditkernels.data.source import TrainingData
from ditkernels.data.vae import VAE, load_vae
from ditkernels.diffusion import create_diffusion
from ditkernels.evaluation.evaluate import OpenedReference
from ditkernels.evaluation.features import load_extractor
from ditkernels.evaluation.monitor import Monitor
from ditkernels.evaluation.plan import Plan
from ditkernels.evaluation.sources import Reading
from ditkernels.models import DiT_models
from ditkernels.reference import DiT
from ditkernels.rng import seed_of_weights
from ditkernels.runtime import StopSignal, World
from ditkernels.sampling.config import SampleConfig, guided_channels
from ditkernels.sampling.generate import Batches
from ditkernels.sampling.labels import Labels
from ditkernels.training.config import TrainConfig

RESIDUAL_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: TrainConfig, shape: tuple[int, int, int]) -> DiT:
    """The model of a config for inputs (C, H, W), freshly initialised on the CPU by ``global_seed``.

    Raises:
        ValueError: the config says no number of classes; :func:`settled` has asked the data.
    """
    if config.num_classes is None and not config.unconditional:
        raise ValueError("num_classes: got none, allowed is 1 or more")
    sizes = {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of_weights(config.global_seed))
        model: DiT = DiT_models[config.model](
            input_size=shape[1:],
            in_channels=shape[0],
            num_classes=1 if config.unconditional else config.num_classes,
            class_dropout_prob=config.label_dropout,
            conditioning=config.conditioning,
            residual_dtype=RESIDUAL_DTYPES[config.residual_dtype],
            attention_backend=config.attention_backend,
            checkpointing=config.checkpointing,
            **{name: size for name, size in sizes.items() if size is not None},
        )
    return model


def latent_shape(config: TrainConfig, data: TrainingData, vae: VAE | None) -> tuple[int, int, int]:
    """(C, H, W) of what the model sees; errors as of :meth:`VAE.latent_shape`."""
    if vae is None or data.latents is not None:
        return data.shape
    return vae.latent_shape(data.image_size)


def vae_for(config: TrainConfig, data: TrainingData, device: torch.device) -> VAE | None:
    """The autoencoder that a run needs: to encode its images or, where it trains on latents, to show samples.

    Args:
        data: what is trained on.

    Returns:
        None for pixels, and for latents where nothing is decoded and ``config.vae`` is the default.

    Raises:
        ImportError, ValueError: as :func:`load_vae`; the latents are of another autoencoder, or there is none to decode with.
    """
    decodes = [name for name in ("sample_every", "eval_every") if getattr(config, name)]
    if data.encoded:
        if decodes:
            raise ValueError(
                f"{decodes[0]}: got {getattr(config, decodes[0])}, allowed is 0: what made these latents is not known here"
            )
        return None
    latents = data.latents
    if latents is None:
        return None if config.vae == "none" else load_vae(config.vae, device)
    if config.vae == "none" and decodes:
        raise ValueError(f"vae: got 'none', but {decodes[0]} decodes latents; allowed is the VAE that made them")
    if config.vae == "none" or (config.vae == TrainConfig.vae and not decodes):
        return None
    vae = load_vae(config.vae, device)
    different = latents.differences(vae.space)
    if different:
        raise ValueError(f"vae: {config.vae} is not the one that made the latents: {'; '.join(different)}")
    return vae


def build_monitor(
    config: TrainConfig,
    model: DiT,
    *,
    device: torch.device,
    decode: Callable[[Tensor], Tensor] | None,
    autocast: torch.dtype | None,
    world: World,
    stop: StopSignal,
) -> Monitor:
    """The monitor that the ``eval_`` fields of a config describe; its reference is read here, once.

    Args:
        config: ``sample_steps`` DDPM steps, classes in turn.
        model: that is trained.
        device: of the features.
        decode, autocast, world, stop: as of :class:`Monitor`.

    Raises:
        ValueError, ImportError: no reference or no features named, too few images for a metric that the reference allows, or as
            ``evaluate``, ``load_extractor`` and :class:`Monitor`.
    """
    if config.eval_guidance != 1 and model.y_embedder.rows == model.num_classes:
        raise ValueError(f"eval_guidance: got {config.eval_guidance}, allowed is 1: the model has no null class")
    if config.eval_reference is None:
        raise ValueError("eval_every: got no eval_reference, which samples are compared with")
    extractor = load_extractor(config.eval_weights, config.eval_extractor, device)
    if extractor is None:
        raise ValueError("eval_every: got no features, allowed are eval_weights or eval_extractor")
    reference = OpenedReference.of(config.eval_reference, Reading(extractor, config.eval_batch_size))
    least, metric = Plan().least_of_all(reference.side)
    if config.eval_images < least:
        needed = f"{least} or more, which {metric} against {config.eval_reference} needs"
        raise ValueError(f"eval_images: got {config.eval_images}, allowed is {needed}")
    settings = SampleConfig(
        guidance_scale=config.eval_guidance,
        guided_channels=guided_channels(config.guided_channels),
        clip_denoised=decode is None,
    )
    return Monitor(
        create_diffusion(str(config.sample_steps), learn_sigma=model.learn_sigma),
        settings,
        # Fewer images than classes would show the first ones alone.
        Labels("spread" if config.eval_images < model.num_classes else "balanced", tuple(range(model.num_classes))),
        Batches(config.eval_images, config.eval_batch_size),
        reference.read(),
        extractor,
        decode=decode,
        autocast=autocast,
        world=world,
        stop=stop,
    )
