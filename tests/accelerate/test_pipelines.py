"""accelerate() and restore() on diffusers' pipelines, built without text encoders and given prompt embeddings."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkernels
from ditkernels import accelerate, restore, use_backend
from ditkernels.accelerate import swap
from tests import numerics
from tests.accelerate.test_diffusers import ideal_of
from tests.helpers.counting import counted
from tools.diffusers_models import FLUX, MODELS, TEXT, Inputs, Tiny
from tools.kernel_proof import emulated_cuda
from tools.tree import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

F64 = torch.float64


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def prompts(dtype: torch.dtype) -> dict[str, Tensor]:
    text = seeded(2, 1, 5, TEXT).to(dtype)
    return {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}


def pooled(dtype: torch.dtype) -> dict[str, Tensor]:
    text = seeded(2, 1, 16).to(dtype)
    return {**prompts(dtype), "pooled_prompt_embeds": text[0], "negative_pooled_prompt_embeds": text[1]}


def of_flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = Tiny("FluxTransformer2DModel", {**FLUX, "in_channels": 16, "pooled_projection_dim": 16}, dict).make()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)


def of_sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    encoders = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    model = MODELS["SD3Transformer2DModel"].make()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, vae=None, **dict.fromkeys(encoders)
    )


def of_wan() -> Any:
    """Wan 2.2's, of two transformers: one for much noise, one for little."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    models = {name: MODELS["WanTransformer3DModel"].make(seed) for seed, name in enumerate(("transformer", "transformer_2"))}
    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.6, **models, **encoders)


def step_of_flux(pipe: Any, dtype: torch.dtype) -> Tensor:
    return pipe(height=32, width=32, true_cfg_scale=3.0, guidance_scale=1.0, latents=seeded(1, 4, 16).to(dtype), **pooled(dtype))


def step_of_sd3(pipe: Any, dtype: torch.dtype) -> Tensor:
    return pipe(height=64, width=64, guidance_scale=4.0, latents=seeded(1, 4, 8, 8).to(dtype), **pooled(dtype))


def step_of_wan(pipe: Any, dtype: torch.dtype) -> Tensor:
    latents = seeded(1, 4, 2, 4, 4).to(dtype)
    return pipe(height=32, width=32, num_frames=5, guidance_scale=4.0, latents=latents, **prompts(dtype))


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "flux": (of_flux, step_of_flux),
    "sd3": (of_sd3, step_of_sd3),
    "wan": (of_wan, step_of_wan),
}


def sampled(pipe: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Latents after two guided steps: with two transformers, one of each."""
    pipe.set_progress_bar_config(disable=True)
    step = PIPELINES[name][1]
    call = lambda **options: pipe(num_inference_steps=2, output_type="latent", return_dict=False, **options)[0]  # noqa: E731
    return step(call, dtype)


def transformers_of(pipe: Any) -> list[nn.Module]:
    return [part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]


def quietly(subject: Any) -> ditkernels.accelerate.Report:
    return accelerate(subject, file=io.StringIO())


def ideal(name: str) -> Tensor:
    pipe = PIPELINES[name][0]()
    for model in transformers_of(pipe):
        ideal_of(model)
    return sampled(pipe, name, F64)


def assert_steps_agree(name: str) -> None:
    """A guided sampling, by the whole-model contract, with every part fused."""
    plain, pipe = (PIPELINES[name][0]() for _ in range(2))
    report = quietly(pipe)
    assert not report.left, str(report)
    with counted() as calls:
        got = sampled(pipe, name)
    assert all(calls.values())
    numerics.assert_model_contract(got, sampled(plain, name), ideal(name), name)


# ---- A guided step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", PIPELINES)
def test_guided_steps_agree(name: str, backend: str) -> None:
    with use_backend(backend):
        assert_steps_agree(name)


@pytest.mark.parametrize("name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sd3"))])
def test_guided_steps_agree_on_interpreted_triton(name: str) -> None:
    """In a process of its own, since the variable is read at import."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DITKERNELS", "TRITON"))}
    program = (
        f"import ditkernels; from tests.accelerate import test_pipelines as t\n"
        f"with ditkernels.use_backend('triton'):\n    t.assert_steps_agree({name!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", PIPELINES)
def test_guided_steps_agree_on_emulated_cuda(name: str) -> None:
    if emulated_cuda.why_not() is not None:
        pytest.skip(str(emulated_cuda.why_not()))
    with emulated_cuda.running():
        assert_steps_agree(name)


# ---- A pipeline in place of a model ----------------------------------------------------------------------------------


def test_every_transformer_is_rewired_and_restored() -> None:
    pipe = of_wan()
    want = sampled(pipe, "wan")
    report = quietly(pipe)
    assert report.model == "WanPipeline"
    assert {part.name.split(".")[0] for part in report.fused} == {"transformer", "transformer_2"}
    restore(pipe)
    assert torch.equal(sampled(pipe, "wan"), want)
    assert not any(isinstance(module, swap.Fused) for model in transformers_of(pipe) for module in model.modules())


def test_what_is_no_pipeline_and_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="dict is neither a module nor a pipeline"):
        accelerate({})
    pipe = of_wan()
    pipe.transformer = pipe.transformer_2 = None
    with pytest.raises(ValueError, match=r"WanPipeline has no transformer; its parts are .*scheduler"):
        accelerate(pipe)
    with pytest.raises(ValueError, match="give that model in place of its pipeline"):
        accelerate(of_wan(), example=((), {}))


def test_nothing_is_rewired_where_one_transformer_cannot_be() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    pipe = of_wan()
    pipe.transformer_2.blocks[0] = checkpoint_wrapper(pipe.transformer_2.blocks[0])
    with pytest.raises(ValueError, match=r"transformer_2.blocks.0 is already wrapped"):
        accelerate(pipe)
    assert not any(isinstance(module, swap.Fused) for model in transformers_of(pipe) for module in model.modules())


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", PIPELINES)
def test_gradient_checkpointing_before_or_after(name: str, after: bool) -> None:
    plain, pipe = (PIPELINES[name][0]() for _ in range(2))
    switch = lambda each: [model.train().enable_gradient_checkpointing() for model in transformers_of(each)]  # noqa: E731
    if after:
        quietly(pipe)
        switch(pipe)
    else:
        switch(pipe)
        quietly(pipe)
    model, own = transformers_of(pipe)[0], transformers_of(plain)[0]
    with counted() as calls:
        got = gradients(model, name)
    assert sum(calls.values()) > 0
    for key, value in gradients(own, name).items():
        numerics.assert_changed_agreement(got[key], value, max(value.abs().max().item(), 1e-3), key)


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    tiny = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel", "wan": "WanTransformer3DModel"}[name]
    arguments = MODELS[tiny].call(Inputs(2))
    if name == "flux":
        arguments["hidden_states"] = arguments["hidden_states"].repeat(1, 1, 2)
    model(**arguments).sample.square().mean().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0", "net.0.proj", "linear"])
    for model in transformers_of(pipe):
        model.add_adapter(config)


def offload(pipe: Any) -> None:
    accelerate_library = pytest.importorskip("accelerate")
    for model in transformers_of(pipe):
        accelerate_library.cpu_offload_with_hook(model, "cpu")


def offload_one_by_one(pipe: Any) -> None:
    accelerate_library = pytest.importorskip("accelerate")
    for model in transformers_of(pipe):
        accelerate_library.cpu_offload(model, "cpu")


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("change", [add_lora, offload, offload_one_by_one])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_lora_and_offloading_before_or_after(name: str, change: Callable[[Any], None], after: bool) -> None:
    plain, pipe = (PIPELINES[name][0]() for _ in range(2))
    change(plain)
    if after:
        quietly(pipe)
        change(pipe)
    else:
        change(pipe)
        quietly(pipe)
    with counted() as calls:
        got = sampled(pipe, name)
    assert sum(calls.values()) > 0 or (change is offload_one_by_one and not after)
    want = sampled(plain, name)
    numerics.assert_changed_agreement(got, want, want.abs().max().item())
    restore(pipe)
    assert torch.equal(sampled(pipe, name), want)


@pytest.mark.parametrize("name", PIPELINES)
def test_saves_the_same_files(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name][0]()
    for folder in ("before", "after"):
        pipe.save_pretrained(tmp_path / folder)
        quietly(pipe)
    files = {
        folder: sorted(p.relative_to(tmp_path / folder) for p in (tmp_path / folder).rglob("*") if p.is_file())
        for folder in ("before", "after")
    }
    assert files["before"] == files["after"]
    assert any("transformer" in str(path) for path in files["before"])
    for path in files["before"]:
        assert (tmp_path / "before" / path).read_bytes() == (tmp_path / "after" / path).read_bytes(), path


def test_a_copy_of_a_rewired_transformer_computes_the_same() -> None:
    pipe = of_wan()
    quietly(pipe)
    copied = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        assert torch.equal(
            *(model(**MODELS["WanTransformer3DModel"].call(Inputs(2))).sample for model in (pipe.transformer, copied))
        )
