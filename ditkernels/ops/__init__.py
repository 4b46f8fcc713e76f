"""The fused ops. Each folder tells one family's whole story; ``ditkernels.reference`` says what each op means."""

from ditkernels.ops.attention import attention
from ditkernels.ops.exported import decompositions  # noqa: F401 (no op, but of use with ops)
from ditkernels.ops.gelu import *
from ditkernels.ops.gelu import __all__ as _gelu
from ditkernels.ops.image import *
from ditkernels.ops.image import __all__ as _image
from ditkernels.ops.mlp import *
from ditkernels.ops.mlp import __all__ as _mlp
from ditkernels.ops.norm import *
from ditkernels.ops.norm import __all__ as _norm
from ditkernels.ops.optimizer import *
from ditkernels.ops.optimizer import __all__ as _optimizer
from ditkernels.ops.qkv import *
from ditkernels.ops.qkv import __all__ as _qkv
from ditkernels.ops.settings import remembered  # noqa: F401 (as above)

__all__ = ["attention", *_gelu, *_image, *_mlp, *_norm, *_optimizer, *_qkv]
