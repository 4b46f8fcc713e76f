"""The registry: pinned schemas, choice of a backend, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ditkernels
from ditkernels.ops import _registry as registry

# Compiled libraries and exported programs depend on these: change one only together with a new op name.
SCHEMAS = Path(__file__).with_name("schemas.txt").read_text().splitlines()


def schema(call: torch._ops.OpOverload) -> str:
    return str(call._schema).removeprefix("ditkernels::")


def test_schemas_are_pinned() -> None:
    assert sorted(schema(op.call) for op in registry.OPS.values()) == SCHEMAS


def test_every_op_has_a_torch_kernel_of_the_same_schema() -> None:
    for name, op in registry.OPS.items():
        internal = schema(op.implementations["torch"].call)
        assert internal == schema(op.call).replace(name, f"{name}_torch", 1)


def test_settings_nest_and_return() -> None:
    assert registry.backend_setting() is None
    with ditkernels.use_backend("torch", attention="plain"):
        assert (registry.backend_setting(), registry.attention_setting()) == ("torch", "plain")
        with ditkernels.use_backend("auto"):
            assert (registry.backend_setting(), registry.attention_setting()) == (None, "plain")
        assert registry.backend_setting() == "torch"
    assert (registry.backend_setting(), registry.attention_setting()) == (None, None)


def test_a_setting_holds_until_the_next_and_after_an_error() -> None:
    with ditkernels.use_backend("auto"):
        ditkernels.use_backend("torch")
        assert registry.backend_setting() == "torch"
    with pytest.raises(RuntimeError, match="inside"), ditkernels.use_backend("torch"):
        raise RuntimeError("inside")
    assert registry.backend_setting() is None


def test_environment_variables_force_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKERNELS_BACKEND", "torch")
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "plain")
    assert (registry.backend_setting(), registry.attention_setting()) == ("torch", "plain")
    with ditkernels.use_backend("auto"):
        assert registry.backend_setting() is None
    monkeypatch.setenv("DITKERNELS_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="DITKERNELS_BACKEND: unknown backend 'fast', allowed are auto, cuda, triton, torch"
    ):
        ditkernels.ops.modulate_norm(torch.zeros(1, 1, 4))


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(
        ValueError, match="use_backend: unknown backend 'fast', allowed are auto, cuda, triton, torch"
    ):
        ditkernels.use_backend("fast")
    with pytest.raises(ValueError, match="unknown backend 'fast', allowed are auto, cudnn"):
        ditkernels.use_backend(attention="fast")


def test_a_forced_backend_that_cannot_serve_says_what_all_would(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["unpatchify"]
    refusing = registry.Implementation(op.implementations["torch"].call, lambda *args: "it is Sunday")
    monkeypatch.setitem(op.implementations, "cuda", refusing)
    with ditkernels.use_backend("cuda"), pytest.raises(ditkernels.BackendError) as error:
        ditkernels.ops.unpatchify(torch.zeros(1, 4, 4), grid=(2, 2), patch_size=2)
    assert "unpatchify: backend 'cuda' cannot serve (cuda: it is Sunday;" in str(error.value)
    assert "torch: can serve" in str(error.value)


def test_auto_takes_the_first_that_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["unpatchify"]
    arguments = (torch.zeros(1, 4, 4), 2, 2, 2)
    willing = registry.Implementation(op.implementations["torch"].call, lambda *args: None)
    monkeypatch.setitem(op.implementations, "cuda", willing)
    assert op.choose(*arguments) == "cuda"
    monkeypatch.setitem(op.implementations, "cuda", registry.Implementation(willing.call, lambda *args: "no"))
    assert op.choose(*arguments) != "cuda"


def test_import_is_light() -> None:
    code = """
import sys, torch
import ditkernels
assert not torch.cuda.is_initialized()
heavy = {"sklearn", "matplotlib", "flash_attn", "xformers", "diffusers", "torch._inductor", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
