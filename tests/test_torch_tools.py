"""What torch's own tools do with a model works with ours and with accelerated ones: the compiler's cache on disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from ditkernels import accelerate, models
from tests.helpers.native_cpu import needs_compiler

TINY = {"input_size": 4, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomised(model: nn.Module) -> nn.Module:
    """A fresh DiT returns exactly zero, which any kernel reproduces: make every trained parameter count."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = 0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def own() -> nn.Module:
    return randomised(models.DiT(**TINY)).eval()


def accelerated() -> nn.Module:
    pytest.importorskip("timm")
    from tests.stand_ins import public

    model = randomised(public.DiT(**TINY)).eval()
    accelerate(model, file=io.StringIO())
    return model


MODELS = {"own": own, "accelerated": accelerated}


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, 4, 4, generator=generator)
    t = torch.randint(0, 1000, (size,), generator=generator)
    return x, t, torch.randint(0, 6, (size,), generator=generator)


# ---- The compiler's cache on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_of_a_model_may_enter_the_compilers_cache(kind: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        check_cacheable(graph)
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    out = torch.compile(MODELS[kind](), fullgraph=True, backend=keep)(*batch())
    assert out.requires_grad
    assert len(graphs) == 1


PROCESS = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests import test_torch_tools

torch.set_num_threads(1)
model = test_torch_tools.MODELS[sys.argv[1]]()
torch.compile(model, fullgraph=True)(*test_torch_tools.batch()).square().mean().backward()
print(json.dumps([counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass")]))
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", MODELS)
def test_a_second_process_finds_the_training_step_compiled(kind: str, tmp_path: Path) -> None:
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", PROCESS, kind]
    found = []
    for _ in range(2):
        ran = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE)
        found.append(json.loads(ran.stdout))
    assert found == [[1, 0, 0], [0, 1, 0]]
