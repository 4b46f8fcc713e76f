"""The fused forwards that more than one family of models shares: norms, gates and residuals, attention, MLP, patch embedding."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkernels import ops, reference
from ditkernels.accelerate import proof
from ditkernels.accelerate.refusals import Refused, attempted, eps_of, keeps_eps, require_plain
from ditkernels.accelerate.swap import CALLED, Fused
from ditkernels.models import Stream, carries_stream, closed, gelu_of, mlp_product, product_with_bias, takes_patches, watched
from ditkernels.ops import dispatch
from ditkernels.ops.attention import BACKENDS, choose, describe

T = TypeVar("T", bound=Fused)

# ---- Norms and residuals ---------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a norm was found to compute, "layernorm" or "rmsnorm", and the class of which that was found.

    Attributes:
        eps: what was measured, for a norm that keeps none as an attribute.
    """

    norm: str
    found_on: type[nn.Module]
    eps: float | None = None


def kind_of_norm(name: str, norm: nn.Module, width: int) -> Kind:
    """Which norm of the ops a module is, told by what it computes. Raises Refused if none."""
    parameters = dict(norm.named_parameters())
    if not parameters.keys() <= {"weight", "bias"} or any(p.shape != (width,) for p in parameters.values()):
        raise Refused(f"{name} is {type(norm).__name__} with parameters the ops do not know")
    kept = keeps_eps(norm)
    failing = f"{name} is {type(norm).__name__} and does not run"
    eps = eps_of(name, norm) if kept else attempted(failing, lambda: _measured_eps(name, norm, width))
    trial = proof.duplicate(norm).double()
    proof.randomise(trial)
    x = proof.Draw(torch.float64, proof.device_of(norm)).rows(2, 5, width)
    want = attempted(failing, lambda: trial(x))
    affine = {key: getattr(trial, key, None) for key in ("weight", "bias")}
    for kind in reference.NORMS:
        error = (reference.normalize(x, **affine, norm=kind, eps=eps) - want).abs().max()
        if error <= proof.WIDE_TOLERANCE[torch.float64] * want.abs().max():
            return Kind(kind, type(norm), None if kept else eps)
    raise Refused(f"{name} is {type(norm).__name__}, neither layer norm nor RMS norm")


def _measured_eps(name: str, norm: nn.Module, width: int) -> float:
    """The eps of a norm that keeps it in its code: x / sqrt(x² + eps) of small rows without a mean tells it."""
    size = 1e-3
    found = []
    for dtype in (torch.float64, torch.float32):
        trial = proof.duplicate(norm).to(dtype)
        for key, parameter in trial.named_parameters():
            parameter.data.fill_(float(key == "weight"))
        row = torch.zeros(width, dtype=dtype, device=proof.device_of(norm))
        row[: width // 2 * 2] = size * torch.tensor([1.0, -1.0]).repeat(width // 2)
        root = size / trial(row.expand(1, 1, width)).flatten()[0].item()
        found.append(root**2 - row.square().mean().item())
    # Rounding leaves half a percent of an eps of 1e-8, a dtype's own eps is another power of two.
    if not found[0] > 0 or abs(found[1] / found[0] - 1) > 0.1:
        raise Refused(f"{name} is {type(norm).__name__} without an eps that is the same for every dtype")
    return float(f"{found[0]:.2g}")


def eps_now(norm: nn.Module, kind: Kind) -> float:
    """The eps of a norm: as it keeps it now, or as it was measured."""
    return eps_of("norm", norm) if kind.eps is None else kind.eps


def norm_arguments(norm: nn.Module, kind: Kind) -> dict[str, Any]:
    """A norm as the ops take it: its parameters and eps as they are now, so that both can still be changed."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return {"weight": weight, "bias": bias, "norm": kind.norm, "eps": eps_now(norm, kind)}


def normed(stream: Stream, norm: nn.Module, kind: Kind, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Closes the open residual of ``stream``; returns the new x and its modulated norm."""
    if watched(norm, kind.found_on.forward):
        whole = plain(stream)
        return whole, reference.modulate(norm(whole), shift, scale)
    arguments = norm_arguments(norm, kind)
    x, branch, gate, bias = promoted(stream)
    out_dtype = dispatch.autocast_dtype(x) or _promoted_dtype(x, shift, scale, arguments["weight"])
    if branch is None:
        return x, ops.modulate_norm(x, shift, scale, **arguments, out_dtype=out_dtype)
    return ops.gated_residual_norm(x, branch, gate, shift, scale, branch_bias=bias, **arguments, out_dtype=out_dtype)


def promoted(stream: Stream) -> Stream:
    """``stream`` with x in the dtype that plain PyTorch would give the sum."""
    dtype = _promoted_dtype(stream.x, stream.branch, stream.gate)
    return stream if dtype == stream.x.dtype else stream._replace(x=stream.x.to(dtype))


def _promoted_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = x.dtype
    for tensor in others:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def plain(stream: Stream) -> Tensor:
    """The residual stream with nothing left to add."""
    return closed(promoted(stream))


def fits(x: Any, c: Any) -> bool:
    """Whether the ops take a modulation of x by c: (B, N, D) and (B, D)."""
    if not isinstance(c, Tensor) or x.dim() != 3 or c.dim() != 2:
        return False
    return reference.same_size(c.shape[0], x.shape[0])


def through(block: nn.Module, stream: Stream, *args: Any, **kwargs: Any) -> Stream:
    """One block on an open stream; a block that was left as it was, or that somebody watches, gets and gives tensors."""
    if carries_stream(block):
        return block(stream, *args, **kwargs)  # type: ignore[no-any-return]
    return Stream(block(plain(stream), *args, **kwargs))


def takes_apart(module: nn.Module, mixin: type[T]) -> TypeGuard[T]:
    """Whether a module was rewired by ``mixin`` and nobody would miss its call, so that its parts may run in its place."""
    return isinstance(module, mixin) and not watched(module, type(module).rewired)


# ---- Attention -------------------------------------------------------------------------------------------------------


def given(*options: Any) -> bool:
    """Whether a caller has set any of the optional arguments."""
    return any(option is not None and option is not False for option in options)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear or a convolution gives for x."""
    return dispatch.autocast_dtype(x) or x.dtype


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of separate q, k and v (B, N, heads, head_dim), by the kernel that ``ops.attention`` would choose: (B, N, D)."""
    dtype = compute_dtype(q)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    problem = describe(q, k, v)
    return BACKENDS[choose(problem)].run(q, k, v, problem.head_dim**-0.5).flatten(2)


class PackedAttention(Fused):
    """timm's self-attention: ``qkv``, ``proj``. A call with a mask takes the original's way."""

    called = ("qkv", "proj")
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int

    def forward(self, *args: Any, **options: Any) -> Tensor:
        proven = self.proven_arguments(args, options)
        if proven is None or proven[0].dim() != 3 or not self.unchanged():
            return self.as_written(*args, **options)
        (x,) = proven
        qkv, bias = product_with_bias(self.qkv, x)
        return self.proj(ops.attention(qkv.unflatten(-1, (3, self.num_heads, -1)), bias=bias))


class NormedAttention(Fused):
    """As ``PackedAttention``, with norms of q and k, and, as in LightningDiT, rotary positions given in the call."""

    called = ("qkv", "q_norm", "k_norm", "proj")
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear
    num_heads: int

    def forward(self, *args: Any, **options: Any) -> Tensor:
        proven = self.proven_arguments(args, options)
        if proven is None or proven[0].dim() != 3 or None in proven[1:] or not self.unchanged():
            return self.as_written(*args, **options)
        x, rope = (*proven, None)[:2]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(attend(*(t.to(v.dtype).transpose(1, 2) for t in (q, k, v))))


def check_attention(attn: Any) -> bool:
    """Whether an attention with ``qkv`` and ``proj`` norms q and k. Raises Refused if it has options that the op does not know."""
    for name in ("qkv", "proj"):
        require_plain(name, getattr(attn, name, nn.Identity()), nn.Linear)
    if not isinstance(getattr(attn, "num_heads", None), int):
        raise Refused(f"{type(attn).__name__} has no num_heads")
    for name, option in attn.named_children():
        known = name in ("qkv", "proj", "q_norm", "k_norm")
        if not known and not isinstance(option, (nn.Identity, nn.Dropout)):
            raise Refused(f"it has {name}, a {type(option).__name__}, which the op does not know")
    norms = [getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm")]
    return not all(isinstance(norm, nn.Identity) for norm in norms)


# ---- MLP -------------------------------------------------------------------------------------------------------------


class Mlp(Fused):
    """Two linears, whatever their names, with tanh-GELU between them."""

    def forward(self, *args: Any, **options: Any) -> Any:
        proven = self.proven_arguments(args, options)
        if proven is None or not self.as_proven(*proven):
            return self.as_written(*args, **options)
        first, last = self.linears()
        return last(gelu_of(first, *proven))

    def as_proven(self, x: Tensor) -> bool:
        """Whether x is (B, N, D), and all in here is as it was besides the linears, which may be anything."""
        return x.dim() == 3 and self.unchanged()

    def linears(self) -> list[nn.Module]:
        """The two, in the order they run."""
        return [self.get_submodule(path) for path in self._ditkernels[CALLED]]


def transformed(mlp: nn.Module, x: Tensor, h: Tensor, gate: Tensor | None) -> Stream:
    """The stream x with the MLP of h still to be added, and the bias of its last linear where the kernel behind takes it over."""
    if takes_apart(mlp, Mlp) and mlp.as_proven(h):
        first, last = mlp.linears()
        branch, bias = mlp_product(first, last, h)
        return Stream(x, branch, gate, bias)
    return Stream(x, mlp(h), gate)


def check_mlp(mlp: nn.Module) -> dict[str, nn.Linear]:
    """The two linears of an MLP, by their paths. Raises Refused if there is anything but them and tanh-GELU."""
    inner = {path: module for path, module in mlp.named_modules() if path}
    linears = {path: module for path, module in inner.items() if hasattr(module, "in_features")}
    for path, linear in linears.items():
        require_plain(path, linear, nn.Linear)
    if len(linears) != 2:
        raise Refused(f"it is {described(mlp)}; the op takes two linears with tanh-GELU between them")
    (one, first), (two, last) = linears.items()
    if first.out_features != last.in_features:
        gives = f"{one} gives {first.out_features} channels and {two} takes {last.in_features}"
        raise Refused(f"it is {described(mlp)}, where {gives}; no op covers a gated one")
    others = {path: module for path, module in inner.items() if path not in linears}
    for path, module in others.items():
        if not any(module.children()) and not isinstance(module, (nn.Identity, nn.Dropout)) and not _is_tanh_gelu(module):
            raise Refused(f"{path} is {described(module)}; the op computes GELU(approximate='tanh')")
    return linears


def _is_tanh_gelu(activation: nn.Module) -> bool:
    """Told by what it computes."""
    x = torch.linspace(-4, 4, 64, dtype=torch.float64)
    with proof.isolated(activation):
        trial = proof.duplicate(activation)
        got = attempted(f"{described(activation)} fails", lambda: trial(x.clone()))
    return isinstance(got, Tensor) and torch.allclose(got, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


def described(module: nn.Module) -> str:
    """A module in one line: a layer with its settings, a tree of layers by the names of their classes."""
    children = [type(child).__name__ for child in module.children()]
    return f"{type(module).__name__}({', '.join(children)})" if children else " ".join(str(module).split())


# ---- Patches ---------------------------------------------------------------------------------------------------------


class PatchEmbed(Fused):
    """timm's patch embedding, with the positions if they are given. Other image sizes than its own go the original's way."""

    read = ("proj",)
    proj: nn.Conv2d
    img_size: tuple[int, int] | None

    def forward(self, *args: Any, ditkernels_positions: Tensor | None = None, **options: Any) -> Tensor:
        proven = self.proven_arguments(args, options)
        if proven is None or not self._fits(*proven) or not readable(self.proj) or not self.unchanged():
            tokens = self.as_written(*args, **options)
            return tokens if ditkernels_positions is None else tokens + ditkernels_positions
        return ops.patch_embed(proven[0], self.proj.weight, self.proj.bias, ditkernels_positions)

    def _fits(self, x: Tensor) -> bool:
        size = self.img_size
        return x.dim() == 4 and size is not None and tuple(x.shape[2:]) == tuple(size)


def readable(conv: nn.Conv2d) -> bool:
    """Whether a convolution over patches is still the one that was proven, and nobody would miss its call."""
    return not watched(conv, nn.Conv2d.forward) and takes_patches(conv)


def check_patch_embed(embed: Any) -> None:
    """Raises Refused unless ``embed`` has a convolution whose stride is its square kernel, and nothing after it."""
    conv: Any = getattr(embed, "proj", nn.Identity())
    require_plain("proj", conv, nn.Conv2d)
    if not takes_patches(conv):
        raise Refused(f"proj is {described(conv)}, no convolution over square patches side by side")
    for name, option in embed.named_children():
        if name != "proj" and not isinstance(option, nn.Identity):
            raise Refused(f"it has {name}, a {type(option).__name__}, which the op does not know")


def finished(
    stream: Stream,
    shift: Tensor,
    scale: Tensor,
    linear: nn.Linear,
    grid: tuple[int, int],
    patch_size: int,
    norm: nn.Module,
    kind: Kind,
) -> Tensor:
    """The end of a DiT in one op: the last residual, norm, modulation, linear, unpatchify."""
    if watched(linear, nn.Linear.forward) or watched(norm, kind.found_on.forward):
        _, h = normed(stream, norm, kind, shift, scale)
        return ops.unpatchify(linear(h), grid=grid, patch_size=patch_size)
    x, branch, gate, bias = promoted(stream)
    affine = {"norm_weight": getattr(norm, "weight", None), "norm_bias": getattr(norm, "bias", None)}
    return ops.final_layer(
        x,
        shift,
        scale,
        linear.weight,
        linear.bias,
        grid=grid,
        patch_size=patch_size,
        branch=branch,
        gate=gate,
        branch_bias=bias,
        **affine,
        norm=kind.norm,
        eps=eps_now(norm, kind),
    )
