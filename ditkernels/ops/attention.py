"""Attention over packed qkv, and cross-attention: a choice among kernels that say when they cannot serve.

    out = softmax(q·kᵀ·scale)·v        q (B, N, heads, head_dim), k and v (B, M, heads, head_dim)

Nothing is copied or padded on the way in: q, k and v are strided views of the packed tensor. The kernels
are those of PyTorch, cuDNN, flash-attention and xformers, called through their public functions, so
autograd, fake tensors and torch.compile are theirs.

The case that matters is head_dim 72 (DiT-XL): no kernel is built for it, several compute it as 80 or 96,
and one of them returned wrong gradients. So a backend refuses what is known to be wrong, and not only what
would crash; the sources stand beside each refusal.

``auto`` picks only among the backends that come with PyTorch: cuDNN on Hopper and data-centre Blackwell,
flash on other GPUs, the memory-efficient kernel for fp32 on a GPU, flash on a CPU, and plain products where
none of these serves. flash-attn and xformers run on request.

The file is long because backends, choice and memory all read one ``Problem``, and what one of them needs to know
of a call the others must look at, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.proxy import TraceError
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.ops.dispatch import ATTENTION_BACKENDS, BackendError
from ditkernels.ops.qkv import carry_bias, split_qkv
from ditkernels.reference import attention_by_products, is_dtensor, same_size, transformed

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


class Problem(NamedTuple):
    """What a backend looks at when it decides whether it can serve.

    Attributes:
        batch, q_len, kv_len, heads, head_dim: B, N, M, heads, head_dim.
        dtype: of q, k and v, after autocast.
        unit_stride: the channels of q, k and v are contiguous.
        aligned: every row of q, k and v starts at a multiple of 16 bytes (looked at on CUDA only).
        needs_grad: a gradient will be asked for.
        deterministic: ``torch.use_deterministic_algorithms(True)`` is on, and not only warning.
        forward_ad: an input carries a forward-mode tangent.
        sharded: the tensors are DTensors.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    unit_stride: bool = True
    aligned: bool = True
    needs_grad: bool = False
    deterministic: bool = False
    forward_ad: bool = False
    sharded: bool = False


def describe(q: Tensor, k: Tensor, v: Tensor) -> Problem:
    """The ``Problem`` of q (B, N, heads, head_dim) against k and v (B, M, heads, head_dim)."""
    tensors = (q, k, v)
    batch, q_len, heads, head_dim = q.shape
    return Problem(
        device=q.device,
        dtype=q.dtype,
        batch=batch,
        q_len=q_len,
        kv_len=k.shape[1],
        heads=heads,
        head_dim=head_dim,
        unit_stride=all(t.stride(-1) == 1 for t in tensors),
        aligned=q.device.type != "cuda" or all(_rows_aligned(t) for t in tensors),
        needs_grad=_needs_grad(*tensors),
        deterministic=torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
        forward_ad=_carries_tangent(*tensors),
        sharded=any(map(is_dtensor, tensors)),
    )


def _rows_aligned(t: Tensor) -> bool:
    steps = (t.storage_offset(), *t.stride()[:-1])
    return all(dispatch.certainly(step * t.element_size() % 16 == 0) for step in steps)


def _carries_tangent(*tensors: Tensor) -> bool:
    try:
        dispatch.refuse_forward_ad("attention", *tensors)
    except NotImplementedError:
        return True
    return False


# ---- Facts about the machine and what is installed: torch.compile bakes them in as they are at compilation -----------


@dispatch.constant_when_traced
def _capability(device_index: int | None) -> int:
    """Compute capability of an NVIDIA GPU, times ten: 90 for Hopper; 0 where torch sees none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@dispatch.constant_when_traced
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


@dispatch.constant_when_traced
def _switched_off(backend: SDPBackend) -> bool:
    """Whether the user has switched a kernel off, as in ``torch.backends.cuda.enable_cudnn_sdp(False)``."""
    enabled = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    }
    return not enabled[backend]()


@dispatch.constant_when_traced
def _flash_implementation() -> str | None:
    """What ``activate_flash_attention_impl`` has put in the place of PyTorch's flash kernel, if anything."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


# Public functions of optional packages by (module, function), or a sentence that says why one cannot be had.
_loaded: dict[tuple[str, str], Callable[..., Any] | str] = {}


@dispatch.constant_when_traced
def _package_reason(module: str, function: str) -> str | None:
    """Why an optional package's function cannot be called, or None once it is loaded."""
    if (module, function) not in _loaded:
        # A package built for another torch raises any of these, with the missing symbol in the message.
        try:
            _loaded[module, function] = getattr(importlib.import_module(module), function)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            _loaded[module, function] = f"{module}.{function} cannot be imported ({error})"
    loaded = _loaded[module, function]
    return loaded if isinstance(loaded, str) else None


def _package_function(module: str, function: str) -> Callable[..., Any]:
    reason = _package_reason(module, function)
    if reason is not None:
        raise BackendError(f"attention: {reason}")
    return cast(Callable[..., Any], _loaded[module, function])


# ---- Backends --------------------------------------------------------------------------------------------------------


class Backend:
    """One way to compute attention.

    Attributes:
        name: as given to ``attention(backend=...)``.
        deterministic_backward: whether two backward passes over the same inputs give the same bits once
            ``torch.use_deterministic_algorithms(True)`` is on. Where this is False, the backend refuses then.
        status: what has been tried, for ``ditkernels info``.
    """

    name: str
    deterministic_backward: bool
    status: str

    def refuse(self, problem: Problem) -> str | None:
        """Why this backend cannot serve, or None if it can."""
        if problem.forward_ad:
            return "it has no forward-mode derivative"
        if problem.deterministic and problem.needs_grad and not self.deterministic_backward:
            return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
        if not problem.unit_stride:
            return "the last axis of q, k and v must have stride 1"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(B, N, heads, head_dim) from q (B, N, heads, head_dim) and k, v (B, M, heads, head_dim)."""
        raise NotImplementedError

    def run_packed(self, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """(B, N, heads, head_dim) from qkv (B, N, 3, heads, head_dim), and a bias in it that takes its gradient here."""
        q, k, v = _split(qkv, bias)
        return self.run(q, k, v, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _split(packed: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return packed.unbind(2) if bias is None else split_qkv(packed, bias)


class Plain(Backend):
    """The products written out, in fp32 for half precision: any device, dtype, derivative; O(N·M) memory."""

    name = "plain"
    deterministic_backward = True
    status = "tested"

    def refuse(self, problem: Problem) -> str | None:
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with dispatch.without_autocast(q):
            return attention_by_products(q, k, v, scale)


class TorchBackend(Backend):
    """A kernel of ``torch.nn.functional.scaled_dot_product_attention``."""

    deterministic_backward = True
    kernel: SDPBackend

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if dispatch.compiled_alone():
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return self.kernel_of_torch(q, k, v, scale).transpose(1, 2)
        with sdpa_kernel(self.kernel):
            return _attend(q, k, v, scale)

    def kernel_of_torch(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What ``scaled_dot_product_attention`` runs for (B, heads, N, head_dim) once it has taken this kernel.

        A graph names it itself: the switch that makes torch take it would keep the graph out of the compiler's cache on disk.
        """
        raise NotImplementedError

    def refuse(self, problem: Problem) -> str | None:
        if _switched_off(self.kernel):
            return "it is switched off in torch.backends.cuda"
        return super().refuse(problem)


# What PyTorch's CUDA kernels take is in its aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.


class CuDNN(TorchBackend):
    """cuDNN's fused attention."""

    name = "cudnn"
    kernel = SDPBackend.CUDNN_ATTENTION
    # PyTorch never asks cuDNN for its deterministic backward and refuses the kernel in that mode instead.
    deterministic_backward = False
    status = "its refusals are tested; its numbers never, the GPU tests have not run yet"

    def refuse(self, problem: Problem) -> str | None:
        reason = _cuda_reason(problem, HALF, multiple=8, largest=128) or super().refuse(problem)
        if reason is not None:
            return reason
        if problem.deterministic:
            return "PyTorch does not run cuDNN attention under torch.use_deterministic_algorithms"
        if _cudnn_version() <= 91500:
            return "cuDNN before 9.15.1 is faulty at lengths that are no multiple of 128 (pytorch#169849)"
        if dispatch.certainly(problem.batch > 65535) or problem.heads > 65535:
            return "it takes at most 65535 samples and heads"
        if dispatch.certainly(problem.kv_len == 1):
            return "it does not take a single key"
        known = dispatch.certainly(problem.q_len % 128 == 0) and dispatch.certainly(problem.kv_len % 128 == 0)
        if problem.needs_grad and not known:
            return "cuDNN's backward has returned NaN at lengths that are no multiple of 128 (pytorch#196678, cudnn-frontend#1072)"
        return None

    def kernel_of_torch(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_cudnn_attention.default
        return kernel(q, k, v, None, _needs_grad(q, k, v), scale=scale)[0]  # type: ignore[no-any-return]


class TorchFlash(TorchBackend):
    """The flash-attention 2 that is built into PyTorch on CUDA devices, and its own flash kernel on CPUs."""

    name = "torch_flash"
    kernel = SDPBackend.FLASH_ATTENTION
    status = "tested on CPU; on a GPU never, the GPU tests have not run yet"

    def refuse(self, problem: Problem) -> str | None:
        if problem.device.type == "cpu":
            return super().refuse(problem) or _no_sharding_reason(problem)
        # Where head_dim is no multiple of 8, PyTorch makes padded, hence aligned, copies itself.
        odd = problem.head_dim % 8 != 0
        reason = _cuda_reason(problem._replace(aligned=problem.aligned or odd), HALF, multiple=1, largest=256)
        reason = reason or super().refuse(problem) or _consumer_backward_reason(problem)
        return reason or (_flash_4_backward_reason(problem) if _flash_implementation() == "FA4" else None)

    def kernel_of_torch(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if not q.is_cpu:
            return _flash_on_gpu(q, k, v, scale)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return kernel(q, k, v, scale=scale)[0]  # type: ignore[no-any-return]


def _flash_on_gpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """With zeros behind each row up to a head_dim that is a multiple of 8, as ``scaled_dot_product_attention`` does it."""
    head_dim = q.shape[-1]
    if head_dim % 8:
        q, k, v = (F.pad(t, (0, -head_dim % 8)) for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0]
    return out[..., :head_dim] if head_dim % 8 else out


class TorchEfficient(TorchBackend):
    """The memory-efficient CUTLASS kernels built into PyTorch; the only fused ones that take fp32."""

    name = "torch_efficient"
    kernel = SDPBackend.EFFICIENT_ATTENTION
    status = "its refusals are tested; its numbers never, the GPU tests have not run yet"

    def refuse(self, problem: Problem) -> str | None:
        multiple = 4 if problem.dtype == torch.float32 else 8
        reason = _cuda_reason(problem, (*HALF, torch.float32), multiple=multiple, largest=65536)
        return reason or super().refuse(problem)

    def kernel_of_torch(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
        return kernel(q, k, v, None, _needs_grad(q, k, v), scale=scale)[0]  # type: ignore[no-any-return]


class PackageBackend(Backend):
    """A kernel of an optional package, whose public function takes (B, N, heads, head_dim)."""

    deterministic_backward = True
    status = "untested: run against stand-ins with its documented signature only"
    module: str
    function: str

    def refuse(self, problem: Problem) -> str | None:
        reason = _cuda_device_reason(problem) or _package_reason(self.module, self.function)
        return reason or super().refuse(problem) or _no_sharding_reason(problem)

    def call(self, function: str, *tensors: Tensor, **options: Any) -> Tensor:
        """The result of a function of the package; some versions return the log-sum-exp along with it."""
        out = _package_function(self.module, function)(*tensors, **options)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


class FlashAttention(PackageBackend):
    """A generation of flash-attention, whose functions have one signature."""

    function = "flash_attn_func"

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.call(self.function, q, k, v, softmax_scale=scale, deterministic=_determinism())


class PackedFlashAttention(FlashAttention):
    """One whose packed function writes dq, dk and dv into one tensor, where a split would have to stack them."""

    def run_packed(self, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        qkv = qkv if bias is None else carry_bias(qkv, bias)
        return self.call("flash_attn_qkvpacked_func", qkv, softmax_scale=scale, deterministic=_determinism())


class FlashAttention2(PackedFlashAttention):
    """``flash_attn.flash_attn_func`` (flash-attn 2.4.1 or newer)."""

    name = "flash_attn_2"
    module = "flash_attn"

    def refuse(self, problem: Problem) -> str | None:
        # flash-attn pads a head_dim that is no multiple of 8 in Python, which copies q, k and v.
        reason = super().refuse(problem) or _cuda_reason(problem, HALF, multiple=8, largest=256)
        return reason or _consumer_backward_reason(problem)


class FlashAttention3(PackedFlashAttention):
    """``flash_attn_interface.flash_attn_func`` (flash-attention 3, Hopper)."""

    name = "flash_attn_3"
    module = "flash_attn_interface"

    def refuse(self, problem: Problem) -> str | None:
        reason = super().refuse(problem) or _cuda_reason(problem, HALF, multiple=8, largest=256)
        return reason or _architecture_reason(problem, (9,))


class FlashAttention4(FlashAttention):
    """``flash_attn.cute.flash_attn_func`` (flash-attn-4, CuTe DSL, Hopper and Blackwell)."""

    name = "flash_attn_4"
    module = "flash_attn.cute"

    def refuse(self, problem: Problem) -> str | None:
        reason = super().refuse(problem) or _cuda_reason(problem, HALF, multiple=8, largest=128)
        return reason or _architecture_reason(problem, (9, 10)) or _flash_4_backward_reason(problem)


class Xformers(PackageBackend):
    """``xformers.ops.memory_efficient_attention``."""

    name = "xformers"
    module = "xformers.ops"
    function = "memory_efficient_attention"
    # Which kernel runs is xformers' choice, and its flash backward declares itself not deterministic.
    deterministic_backward = False

    def refuse(self, problem: Problem) -> str | None:
        return super().refuse(problem) or _cuda_reason(problem, HALF, multiple=8, largest=256)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.call(self.function, q, k, v, scale=scale)


def _determinism() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _no_sharding_reason(problem: Problem) -> str | None:
    return "torch has no sharding rule of it for DTensors" if problem.sharded else None


def _cuda_device_reason(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"it needs a CUDA device, and the tensors are on {problem.device.type}"
    if _capability(problem.device.index) == 0:
        return "torch sees no NVIDIA GPU here"
    return None


def _cuda_reason(problem: Problem, dtypes: tuple[torch.dtype, ...], *, multiple: int, largest: int) -> str | None:
    """What every fused CUDA kernel asks of the GPU, the dtype, head_dim and the alignment of rows."""
    reason = _cuda_device_reason(problem)
    if reason is not None:
        return reason
    capability = _capability(problem.device.index)
    if capability < 80:
        return f"it needs compute capability 8.0 or newer, and this GPU has {capability / 10}"
    if problem.dtype not in dtypes:
        return f"it takes {', '.join(map(str, dtypes))}, and q, k and v are {problem.dtype}"
    if problem.head_dim % multiple or problem.head_dim > largest:
        allowed = f"up to {largest}" if multiple == 1 else f"in multiples of {multiple} up to {largest}"
        return f"it takes head_dim {allowed}, and this is {problem.head_dim}"
    if not problem.aligned:
        return "rows of q, k and v must start at multiples of 16 bytes"
    return None


def _architecture_reason(problem: Problem, majors: tuple[int, ...]) -> str | None:
    capability = _capability(problem.device.index)
    if capability // 10 not in majors:
        allowed = " and ".join(f"{major}.x" for major in majors)
        return f"it is made for compute capability {allowed}, and this GPU has {capability / 10}"
    return None


def _consumer_backward_reason(problem: Problem) -> str | None:
    """flash-attention 2's backward at large head_dims outgrows the shared memory of 8.6, 8.9 and 12.x."""
    capability = _capability(problem.device.index)
    small = 86 <= capability <= 89 or capability // 10 == 12
    if small and problem.needs_grad and problem.head_dim > 192:
        return f"on this GPU its backward takes head_dim up to 192, and this is {problem.head_dim}"
    return None


def _flash_4_backward_reason(problem: Problem) -> str | None:
    """Wrong on Hopper up to 4.0.0b36 at least (flash-attention#2896), on Blackwell earlier (#2698)."""
    if problem.needs_grad and problem.head_dim % 32:
        return (
            "flash-attention 4 returns wrong gradients, silently, where head_dim is no multiple of 32 "
            f"(flash-attention#2896), and this is {problem.head_dim}"
        )
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CuDNN(),
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        Xformers(),
        TorchFlash(),
        TorchEfficient(),
        Plain(),
    )
}


# ---- Choice ----------------------------------------------------------------------------------------------------------


def _auto_order(problem: Problem) -> tuple[str, ...]:
    if problem.device.type == "cpu":
        return ("torch_flash", "plain")
    if problem.device.type != "cuda":
        return ("plain",)
    if _capability(problem.device.index) // 10 in (9, 10):
        return ("cudnn", "torch_flash", "torch_efficient", "plain")
    return ("torch_flash", "torch_efficient", "plain")


def choose(problem: Problem, backend: str | None = None) -> str:
    """The backend that serves ``problem``: the forced one, or the first of the automatic order that can.

    Where there is nothing to compute (B or N is 0) it is "plain", whatever is asked for: no kernel runs. It is "plain" under
    transforms of ``torch.func`` too, which know the products and no kernel.

    Args:
        backend: a name of ``ATTENTION_BACKENDS`` or "auto"; None takes ``use_backend(attention=...)``, then
            the environment variable DITKERNELS_ATTENTION_BACKEND, then "auto".

    Raises:
        ValueError: an unknown name.
        BackendError: the forced backend cannot serve; the message says why, and what the others say.
    """
    forced = dispatch.attention_setting() if backend is None else backend
    if forced not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend: got {forced!r}, allowed are auto, {', '.join(ATTENTION_BACKENDS)}")
    if dispatch.certainly(problem.batch == 0) or dispatch.certainly(problem.q_len == 0):
        return "plain"
    if torch.compiler.is_compiling():
        # Of sizes that the compiler does not know: torch's kernel for CPUs divides by zero where there is nothing to compute.
        torch._check(problem.batch > 0)
        torch._check(problem.q_len > 0)
    if transformed() and forced in (None, "auto"):
        return "plain"
    if forced is None or forced == "auto":
        return next(name for name in _auto_order(problem) if BACKENDS[name].refuse(problem) is None)
    reason = BACKENDS[forced].refuse(problem)
    if reason is not None:
        rest = (f"{name}: {why or 'can serve'}" for name, why in explain_problem(problem) if name != forced)
        raise BackendError(f"attention: backend {forced!r} cannot serve: {reason}. The others: {'; '.join(rest)}")
    return "plain" if transformed() else forced


def explain_problem(problem: Problem) -> list[tuple[str, str | None]]:
    """For every backend, its name and why it cannot serve ``problem``, or None if it can."""
    return [(name, backend.refuse(problem)) for name, backend in BACKENDS.items()]


def explain(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[str, str | None]]:
    """For every backend, its name and why it cannot serve these tensors, or None if it can.

    Args:
        q: (B, N, heads, head_dim).
        k, v: (B, M, heads, head_dim).
    """
    return explain_problem(describe(q, k, v))


# ---- What an eager call remembers ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a call is served.

    Attributes:
        backend: the one that serves.
        scale: head_dim^-1/2.
        unasked: torch takes the backend's kernel without being told to, so that SDPA is called directly, and autocasts itself.
    """

    backend: Backend
    scale: float
    unasked: bool = False


_memory: dict[Any, Plan] = {}
_MEMORY = 1024  # calls remembered
# The newest call and its plan: a comparison costs less than a hash, and a model's calls are alike.
_newest: list[tuple[Any, Plan]] = [((), Plan(BACKENDS["plain"], 0.0))]


def _on_gpu(q: Tensor, kv: Tensor | None) -> tuple[Any, ...]:
    """What choices read on a GPU and not on a CPU: switches of torch, autocast's dtype, and where rows start in a storage."""
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        tuple(torch._C._get_sdp_priority_order()),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _flash_implementation(),
        dispatch.autocast_dtype(q),
        *(None if t is None else t.storage_offset() * t.element_size() % 16 for t in (q, kv)),
    )


def _recalled(key: Any, q: Tensor, kv: Tensor | None, bias: Tensor | None, backend: str | None) -> Plan:
    """The plan of a call, remembered unless a subclass of tensors is in it. ``q`` is packed qkv where there is no ``kv``."""
    if not all(t is None or dispatch.is_plain(t) for t in (q, kv)):
        return _plan(q, kv, bias, backend)
    plan = _memory.get(key)
    if plan is None:
        plan = _unasked(_plan(q, kv, bias, backend), q, kv, bias)
        if len(_memory) >= _MEMORY:
            _memory.clear()
        _memory[key] = plan
    _newest[0] = key, plan
    return plan


def _plan(q: Tensor, kv: Tensor | None, bias: Tensor | None, backend: str | None) -> Plan:
    """Checks the arguments and chooses; ``split_qkv`` checks the bias."""
    dispatch.refuse_kinds("attention", q, kv, bias)
    q, kv = _autocast(q, kv)
    _check(q, kv)
    problem = describe(*(q.unbind(2) if kv is None else (q, *kv.unbind(2))))
    problem = problem._replace(needs_grad=_needs_grad(q, kv, bias))
    return Plan(BACKENDS[choose(problem, backend)], problem.head_dim**-0.5)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _unasked(plan: Plan, q: Tensor, kv: Tensor | None, bias: Tensor | None) -> Plan:
    """The plan with what can be left out of the call."""
    if not isinstance(plan.backend, TorchBackend):
        return plan
    needs_grad = _needs_grad(q, kv, bias)
    q, kv = _autocast(q, kv)
    parts = q.unbind(2) if kv is None else (q, *kv.unbind(2))
    query, key, value = (t.detach().transpose(1, 2).requires_grad_(needs_grad) for t in parts)
    return plan._replace(unasked=torch._fused_sdp_choice(query, key, value) == plan.backend.kernel.value)


# ---- Public function -------------------------------------------------------------------------------------------------


def attention(
    qkv_or_q: Tensor,
    kv: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale)·v per head (Vaswani et al. 2017), without mask or dropout.

    Args:
        qkv_or_q: packed qkv (B, N, 3, heads, head_dim); or q (B, N, heads, head_dim) if ``kv`` is given. Any
            strides. fp16, bf16, fp32 or fp64; under autocast it is computed in autocast's dtype.
        kv: packed k and v (B, M, 2, heads, head_dim) for cross-attention.
        bias: (3·heads·head_dim,), or (2·heads·head_dim,) if ``kv`` is given: of the linear that made qkv, or kv, and that has added
            it detached. Its gradient comes from here, in the pass that stacks those of q, k and v; see ``split_qkv``.
        scale: head_dim^-1/2 by default.
        backend: a name of ``ATTENTION_BACKENDS`` or "auto"; see ``choose``.

    Returns:
        (B, N, heads·head_dim), in the dtype computed in.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or kinds of tensors that do not fit; an unknown backend.
        BackendError: the backend asked for cannot serve; the message says why, and what the others say.
        NotImplementedError: given a bias, forward-mode differentiation and second derivatives.
    """
    q, autocast = qkv_or_q, torch._C._is_any_autocast_enabled()
    # Only Dynamo runs this file with tensors that look plain and are not, and under no mode.
    if torch.compiler.is_dynamo_compiling() or dispatch.watched_by_torch():
        plan = _plan(q, kv, bias, backend)
        if dispatch.exporting_to_onnx():
            return reference.attention(q, kv, scale=scale)
    else:
        try:
            differentiable = q.requires_grad or (kv is not None and kv.requires_grad)
            differentiable = differentiable or (bias is not None and bias.requires_grad)
            # All that checks and choice read, classes first: sizes of a subclass may be symbols, which must not be compared.
            key = (
                q.__class__,
                None if kv is None else (kv.__class__, kv.shape, kv.stride(), kv.dtype, kv.device),
                q.shape,
                q.stride(),
                q.dtype,
                q.is_cpu or (q.device, _on_gpu(q, kv)),
                differentiable and torch.is_grad_enabled(),
                bias is None,
                backend,
                dispatch.attention_setting(),
                autocast,
                torch._C._get_flash_sdp_enabled(),
            )
            newest, plan = _newest[0]
            is_new = newest != key
        except (RuntimeError, TraceError):  # some kinds of tensors have no shape, or no truth
            dispatch.refuse_kinds("attention", q, kv, bias)
            raise
        if is_new:
            plan = _recalled(key, q, kv, bias, backend)
    chosen, default, unasked = plan
    if scale is None:
        scale = default
    if not unasked:
        if autocast:
            q, kv = _autocast(q, kv)
        return _run(chosen, q, kv, bias, scale).flatten(2)
    q, k, v = _split(q, bias) if kv is None else (q, *_split(kv, bias))
    return _attend(q, k, v, scale).flatten(2)


def _run(backend: Backend, q: Tensor, kv: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    if kv is None:
        return backend.run_packed(q, bias, scale)
    return backend.run(q, *_split(kv, bias), scale)  # type: ignore[call-arg, arg-type]


def _autocast(q: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tensors as autocast would hand them to a matrix product: fp64 and integers are left alone."""
    return _autocast_one(q), None if kv is None else _autocast_one(kv)


def _autocast_one(t: Tensor) -> Tensor:
    dtype = dispatch.autocast_dtype(t)
    return t.to(dtype) if dtype is not None and t.dtype in FLOATS else t


def _check(qkv_or_q: Tensor, kv: Tensor | None) -> None:
    if kv is None:
        _check_tensor("qkv", qkv_or_q, "(B, N, 3, heads, head_dim)", 3)
        return
    _check_tensor("q", qkv_or_q, "(B, N, heads, head_dim)", None)
    _check_tensor("kv", kv, "(B, M, 2, heads, head_dim)", 2)
    q = qkv_or_q
    if not same_size(kv.shape[0], q.shape[0]) or kv.shape[3:] != q.shape[2:]:
        raise ValueError(f"kv: got shape {tuple(kv.shape)}, but q is {tuple(q.shape)}; batch, heads and head_dim must agree")
    if dispatch.certainly(kv.shape[1] == 0):
        raise ValueError(f"kv: got shape {tuple(kv.shape)}; attention over no keys is undefined")
    if kv.dtype != q.dtype:
        raise TypeError(f"kv: got dtype {kv.dtype}, but q is {q.dtype}")
    if kv.device != q.device:
        raise ValueError(f"kv: got device {kv.device}, but q is on {q.device}")


def _check_tensor(name: str, t: Tensor, layout: str, packed: int | None) -> None:
    expected = 4 if packed is None else 5
    if t.ndim != expected or (packed is not None and t.shape[2] != packed) or 0 in t.shape[2:]:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {layout} with heads and head_dim at least 1")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {t.dtype}, allowed are {', '.join(map(str, FLOATS))}")
