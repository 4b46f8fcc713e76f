"""The ops as a kernel of the hub: written from this tree, loaded by the package ``kernels``, used by a model of diffusers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ditkernels import ops as packaged
from ditkernels import use_backend
from tools import hub_kernel

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub_kernel.write(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(repository: Path) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found: ModuleType = kernels.get_local_kernel(repository, backend="cpu")
    return found


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def gradients(outputs: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, tensors, [torch.cos(output.detach()) for output in outputs])]


def digest_of(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def test_it_has_the_layout_of_a_universal_kernel(repository: Path) -> None:
    assert sorted(folder.name for folder in (repository / "build").iterdir()) == ["torch-cpu", "torch-cuda", "torch-rocm"]
    names = set()
    for folder in (repository / "build").iterdir():
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        names.add(metadata["id"])
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": folder.name.removeprefix("torch-")}
        # Loading checks no digest of a local folder.
        files = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"} - {folder / "metadata.json"}
        found = {path.relative_to(folder).as_posix(): digest_of(path) for path in files}
        assert metadata["digest"] == {"algorithm": "sha256", "files": found}
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        assert "from ditkernels" not in text
        assert '"ditkernels.' not in text  # the name of a module
        assert "torch.ops.ditkernels" not in text
    assert len(names) == 3


def test_its_ops_are_those_of_the_package(loaded: ModuleType) -> None:
    assert loaded.ops.modulate_norm is not packaged.modulate_norm
    assert set(loaded.ops.__all__) == set(packaged.__all__)
    tensors = inputs((3, 17, 96), (3, 17, 96), (3, 96), (3, 96), (3, 96))
    for name, args in (("gated_residual_norm", tensors), ("modulate_norm", [tensors[0], *tensors[3:]]), ("bias_gelu", tensors[:1])):
        with use_backend("torch"):
            expected = gradients(getattr(packaged, name)(*args), args)
        found = gradients(getattr(loaded.ops, name)(*args), args)
        assert all(map(torch.equal, found, expected)), name


def test_it_compiles_whole(loaded: ModuleType) -> None:
    args = inputs((2, 5, 32), (2, 32), (2, 32))
    compiled = torch.compile(loaded.ops.modulate_norm, fullgraph=True)
    assert torch.allclose(compiled(*args), loaded.ops.modulate_norm(*args), atol=1e-6)


def test_it_needs_no_package_of_ours(repository: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['ditkernels'] = None\n"
        "import torch, kernels, pathlib\n"
        f"ops = kernels.get_local_kernel(pathlib.Path({str(repository)!r}), backend='cpu').ops\n"
        "x = torch.randn(2, 5, 32, requires_grad=True)\n"
        "ops.modulate_norm(x, torch.randn(2, 32), torch.randn(2, 32)).sum().backward()\n"
        "print('ran')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.stdout, done.returncode) == ("ran\n", 0), done.stderr


@pytest.fixture
def mapped(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' layers that a kernel may take the place of, and the mapping to ours; put back afterwards."""
    from diffusers.models import normalization

    names = ("AdaLayerNormContinuous", "AdaLayerNormZeroSingle")
    for name in names:
        layer = getattr(normalization, name)
        for attribute in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.setattr(layer, attribute, None, raising=False)
        kernels.replace_kernel_forward_from_hub(layer, name)
    return {name: {"cpu": kernels.LocalLayerRepository(repo_path=repository, layer_name=name)} for name in names}


def test_a_model_of_diffusers_takes_its_layers(mapped: Any) -> None:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden, text, pooled = inputs((3, 6, 4), (3, 5, 8), (3, 8))
    ids = (torch.zeros(6, 3), torch.zeros(5, 3))

    def run() -> list[torch.Tensor]:
        out = model(hidden, text, pooled, torch.tensor([0.1, 0.5, 0.9]), *ids, return_dict=False)[0]
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)]

    expected = run()
    with kernels.use_kernel_mapping(mapped, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    taken = [type(module).__name__ for module in model.modules() if module.forward.__module__.startswith("_ditkernels_")]
    found = run()
    assert sorted(taken) == ["AdaLayerNormContinuous", "AdaLayerNormZeroSingle"]
    for here, there in zip(found, expected):
        assert torch.allclose(here, there, rtol=1e-4, atol=1e-5 * there.detach().abs().max().item() + 1e-7)
