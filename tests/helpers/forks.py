"""A small DiT of the public structure, without timm: two blocks, sixteen tokens of 24 channels. And random forks of it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 24, 2, 2, 8, 4, 10


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


def modulation(vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, vectors * WIDTH))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_size = (SIDE, SIDE)
        self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].to(self.mlp[0].weight.dtype) * torch.exp(-torch.arange(4.0, device=t.device))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train:
            labels = torch.where(torch.rand(labels.shape[0], device=labels.device) < 0.1, CLASSES, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(0.0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.adaLN_modulation = modulation(6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = norm()
        self.linear = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)
        self.adaLN_modulation = modulation(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, final: type[nn.Module] = FinalLayer) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(), TimestepEmbedder(), LabelEmbedder()
        self.pos_embed = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.final_layer = final()

    def unpatchify(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        patches = tokens.unflatten(1, (side, side)).unflatten(-1, (PATCH, PATCH, CHANNELS))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, CHANNELS, side * PATCH, side * PATCH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with parameters that all count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module.eval()


# ---- Random forks ----------------------------------------------------------------------------------------------------

_BLOCK = """
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.{one}, self.act, self.{two} = nn.Linear(WIDTH, 2 * WIDTH), {act}, nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.{two}(self.act(self.{one}(x)))


class ForkedBlock(forks.Block):
    def __init__(self):
        super().__init__()
        {mlp}
        {tree}
        self.unused, self.flag, self.input_scale, self.limit = "for nothing", False, 1.0, None
        self.{counter} = 0

    def modulate(self, x, shift, scale):
        return {modulated}

    def forward(self, {x}, {c}{parameters}):
        x, c = {x}, {c}
        {before}
        {chunks} = self.adaLN_modulation(c).chunk(6, dim={dim})
        x = x + {gate1} * self.attn(self.modulate(self.norm1(x), shift1, scale1))
        {between}
        x = x + {gate2} * self.mlp(self.modulate(self.norm2(x), shift2, scale2))
        return {returned}


class ForkedDiT(forks.DiT):
    def __init__(self):
        super().__init__(ForkedBlock)
        self.skipped, self.{embedder} = (), nn.Identity()

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, {training})
        {setup}
        for index, block in enumerate({blocks}):
            if index in self.skipped:
                continue
            x = block({call}){unpacked}
            {behind}
        return self.unpatchify(self.final_layer(x, c))
"""

_CHUNKS = ["shift1", "scale1", "gate1", "shift2", "scale2", "gate2"]
_MODULATED = (
    "forks.modulate(x, shift, scale)",
    "x * (1 + scale[:, None]) + shift[:, None]",
    "torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))",
    "torch.lerp(x, 2 * x, scale[:, None]) + shift[:, None]",
)
_MLPS = ("", "self.mlp = Mlp()", "self.mlp = nn.Sequential(Mlp())")
_TREES = (
    "",
    "self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH)))",
    "self.adaLN_modulation = nn.Sequential(nn.Sequential(nn.SiLU()), nn.Identity(), nn.Linear(WIDTH, 6 * WIDTH))",
)
_UNUSED = (("", ""), (", mask=None", ""), (", mask=None", ", None"), (", mask=None, causal=False", ", mask=None"))
_GATES = ("{0}.unsqueeze(1)", "{0}[:, None]", "{0}.view(-1, 1, WIDTH)")

_RANDOM = ("torch.rand(())", "np.random.rand()", "random.random()")
_MATTERING = (
    "chunks",
    "no one",
    "random",
    "random in the model",
    "tuple",
    "given more",
    "none given",
    "attributes",
    "early exit",
    "writes",
    "between blocks",
    "order",
    "few tokens",
    "one sample",
    "half",
    "skipped",
    "other class",
)

Change = Callable[[nn.Module], None]


class Fork(NamedTuple):
    """A model that somebody might have written.

    Attributes:
        kind: what of it matters; "" where nothing does.
        changes: what somebody does to it after a while, each undone by the one behind it.
    """

    source: str
    model: nn.Module
    kind: str
    changes: tuple[Change, ...] = ()


def fork(seed: int) -> Fork:
    """The fork of this number. Every second one changes nothing that matters."""
    draw = random.Random(seed)
    kind = draw.choice(_MATTERING) if seed % 2 else ""
    pieces = _harmless(draw)
    changes = _matter(kind, pieces, draw)
    source = _BLOCK.format(**pieces)
    space: dict[str, Any] = {"nn": nn, "torch": torch, "np": np, "random": random, "WIDTH": WIDTH, "forks": sys.modules[__name__]}
    exec(source, space)
    torch.manual_seed(seed)
    return Fork(source, randomised(space["ForkedDiT"](), seed), kind, changes)


def _harmless(draw: random.Random) -> dict[str, str]:
    x, c = draw.choice((("x", "c"), ("hidden", "cond")))
    parameters, given = draw.choice(_UNUSED)
    one, two = draw.choice((("fc1", "fc2"), ("w1", "w2"), ("expand", "shrink")))
    gate = draw.choice(_GATES)
    return {
        **{"x": x, "c": c, "one": one, "two": two, "parameters": parameters},
        **{"gate1": gate.format("gate1"), "gate2": gate.format("gate2"), "chunks": ", ".join(_CHUNKS)},
        "act": 'nn.GELU(approximate="tanh")',
        "mlp": draw.choice(_MLPS),
        "tree": draw.choice(_TREES),
        "counter": draw.choice(("calls", "helper_state")),
        "modulated": draw.choice(_MODULATED),
        "dim": draw.choice(("1", "-1")),
        "before": draw.choice(("", "if self.flag: x = 2 * x", "assert x.dim() == 3", "n, d = x.shape[1:]")),
        "between": "",
        "returned": "x",
        "embedder": draw.choice(("extra", "spare_embedder")),
        "training": draw.choice(("self.training", "train=self.training")),
        "setup": draw.choice(("", "count = len(self.blocks)")),
        "blocks": draw.choice(("self.blocks", "list(self.blocks)", "self.blocks[:]")),
        "call": draw.choice(("x, c", f"{x}=x, {c}=c") if not given else ("x, c" + given,)),
        "unpacked": "",
        "behind": "",
    }


def _matter(kind: str, pieces: dict[str, str], draw: random.Random) -> tuple[Change, ...]:
    """Changes what matters; returns what is done to the model later."""
    chance = draw.choice(_RANDOM)
    if kind == "chunks":
        pieces["chunks"] = ", ".join(draw.sample(_CHUNKS, 6))
    elif kind == "no one":
        pieces["modulated"] = "x * scale[:, None] + shift[:, None]"
    elif kind == "random":
        pieces["before"] = f"if self.training and {chance} < {draw.choice((0.02, 0.5))}: return x"
    elif kind == "random in the model":
        pieces["behind"] = f"if self.training and {chance} < {draw.choice((0.02, 0.5))}: break"
    elif kind == "tuple":
        pieces["returned"], pieces["unpacked"] = draw.choice(
            (("x, None", "[0]"), ("x, []", "[0]"), ("[x]", "[0]"), ('{"x": x}', '["x"]'))
        )
    elif kind == "given more":
        pieces["parameters"], pieces["before"] = ", mask=None", "x = x if mask is None else x * mask"
        pieces["call"] = draw.choice(("x, c, 0.5", "x, c, mask=0.5", "x, c, mask=x.new_ones(x.shape[1], 1) * 0.5"))
    elif kind == "none given":
        pieces["parameters"], pieces["before"] = ", mask=0.5", "x = x if mask is None else x * mask"
        pieces["call"] = draw.choice(("x, c, None", "x, c, mask=None"))
    elif kind == "attributes":
        pieces["before"] = draw.choice(("x = x * self.input_scale", 'x = x * getattr(self, "input_" + "scale")'))
        return _set("input_scale", 0.5, 1.0, draw.randrange(2))
    elif kind == "early exit":
        pieces["before"] = draw.choice(("if self.flag: return x", 'if getattr(self, "flag"): return 2 * x'))
        return _set("flag", True, False, draw.randrange(2))
    elif kind == "writes":
        pieces["before"] = f"self.{pieces['counter']} += 1"
    elif kind == "between blocks":
        pieces["behind"] = draw.choice(("x = x + 0.1 * self.pos_embed", "x = x.clone() if index else x * 0.5", "c = c * 0.5"))
    elif kind == "order":
        pieces["blocks"] = draw.choice(("reversed(self.blocks)", "[*self.blocks, self.blocks[0]]", "self.blocks[:1]"))
    elif kind == "few tokens":
        pieces["between"] = draw.choice(("x = torch.cat([x[:, :12], 2 * x[:, 12:]], 1)", "x = x * (1 if x.shape[1] < 16 else 2)"))
    elif kind == "one sample":
        pieces["before"] = draw.choice(("if len(x) == 1: x = 2 * x", "x = x.squeeze(0)[None] * 2 if len(x) == 1 else x"))
    elif kind == "half":
        pieces["returned"] = "x.half().float()"
    elif kind == "skipped":
        return _skip(draw.randrange(2))
    elif kind == "other class":
        pieces["act"], pieces["mlp"] = "nn.SiLU()", "self.mlp = Mlp()"
        pieces["modulated"] = "x * (1 + torch.tanh(scale)[:, None]) + shift[:, None]"
    return ()


def _set(name: str, value: object, back: object, index: int) -> tuple[Change, ...]:
    return tuple(lambda model, v=v: setattr(model.blocks[index], name, v) for v in (value, back))  # type: ignore[misc]


def _skip(index: int) -> tuple[Change, ...]:
    return tuple(lambda model, v=v: setattr(model, "skipped", v) for v in ((index,), ()))  # type: ignore[misc]
