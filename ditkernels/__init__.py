"""Fused kernels, a drop-in DiT, a trainer and a guided sampler for Diffusion Transformers.

>>> model = ditkernels.DiT_models["DiT-XL/2"](input_size=32)        # same constructor and state dict as the public DiT
>>> with ditkernels.use_backend("torch"): model(x, t, y)            # force a backend; by default each op chooses
>>> h = ditkernels.ops.modulate_norm(x, shift, scale)               # or call one op
>>> ditkernels.accelerate(model)                                    # or speed up the DiT you have, in place
"""

from ditkernels import _script  # noqa: F401 (before all others)

# isort: split
from ditkernels import diffusion, ops, reference
from ditkernels._version import __version__
from ditkernels.accelerate import accelerate, restore
from ditkernels.diffusion import create_diffusion
from ditkernels.models import DiT, DiT_models
from ditkernels.ops.dispatch import BackendError, set_backend, use_backend

DiT_XL_2, DiT_XL_4, DiT_XL_8 = (DiT_models[f"DiT-XL/{p}"] for p in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (DiT_models[f"DiT-L/{p}"] for p in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (DiT_models[f"DiT-B/{p}"] for p in (2, 4, 8))
DiT_S_2, DiT_S_4, DiT_S_8 = (DiT_models[f"DiT-S/{p}"] for p in (2, 4, 8))

__all__ = [
    "BackendError",
    "DiT",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "DiT_models",
    "__version__",
    "accelerate",
    "create_diffusion",
    "diffusion",
    "ops",
    "reference",
    "restore",
    "set_backend",
    "use_backend",
]
