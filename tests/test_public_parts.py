"""The names that the public model has: they agree with it, and what somebody hooks, replaces or changes of them is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkernels import accelerate, models, reference
from ditkernels.reference import patchify, unpatchify
from tests import numerics

SIZES: dict[str, Any] = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
BOTH = [pytest.param(library, id=library.__name__) for library in (reference, models)]
NORMS = ["blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final"]
ADAPTIVE = ["adaln_zero", "adaln"]


def dit(library: Any, **changed: Any) -> reference.DiT:
    torch.manual_seed(0)
    model = library.DiT(**SIZES | changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def answer(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model(torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))


class Louder(nn.Module):
    """In place of a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("library", BOTH)
def test_the_numbers_are_the_public_models(library: Any) -> None:
    ours = dit(library)
    embed, attn = ours.x_embedder, ours.blocks[0].attn
    assert (embed.num_patches, embed.patch_size, embed.grid_size) == (16, (2, 2), (4, 4))
    assert (attn.head_dim, attn.scale, attn.num_heads) == (12, 12**-0.5, 4)
    for path in NORMS:
        norm = ours.get_submodule(path)
        assert (norm.normalized_shape, norm.eps, norm.elementwise_affine) == ((48,), 1e-6, False)
    tokens = torch.randn(2, 16, 2 * 2 * 8)
    assert torch.equal(ours.unpatchify(tokens), unpatchify(tokens, grid=(4, 4), patch_size=2))
    assert torch.equal(patchify(ours.unpatchify(tokens), patch_size=2), tokens)


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize("path", NORMS)
@pytest.mark.parametrize("conditioning", ADAPTIVE)
def test_a_hooked_norm_is_called_and_changes_nothing(library: Any, path: str, conditioning: str) -> None:
    model = dit(library, conditioning=conditioning)
    before, seen = answer(model), []
    with torch.no_grad():
        model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out.mean(-1).abs().max().item()))
        after = answer(model)
    assert len(seen) == 1
    assert seen[0] < 1e-5
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("path", NORMS)
@pytest.mark.parametrize("conditioning", ADAPTIVE)
def test_a_norm_that_was_replaced_is_used(path: str, conditioning: str) -> None:
    answers = []
    for library in (reference, models):
        model = dit(library, conditioning=conditioning)
        before = answer(model)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Louder())
        answers.append(answer(model))
        assert not torch.allclose(answers[-1], before, atol=1e-3)
    torch.testing.assert_close(answers[1], answers[0], rtol=numerics.AGREES_ELSEWHERE, atol=1e-4)


@pytest.mark.parametrize("path", NORMS)
def test_another_eps_is_used(path: str) -> None:
    answers = []
    for library in (reference, models):
        model = dit(library)
        before = answer(model)
        model.get_submodule(path).eps = 1.0
        answers.append(answer(model))
        assert not torch.allclose(answers[-1], before, atol=1e-3)
    torch.testing.assert_close(answers[1], answers[0], rtol=numerics.AGREES_ELSEWHERE, atol=1e-4)


@pytest.mark.parametrize("library", BOTH)
def test_another_unpatchify_is_called(library: Any) -> None:
    class Mirrored(library.DiT):
        def unpatchify(self, x: Tensor) -> Tensor:
            return super().unpatchify(x).flip(-1)

    plain, other = dit(library), Mirrored(**SIZES).eval()
    other.load_state_dict(plain.state_dict())
    expected = answer(plain).flip(-1)
    assert torch.equal(answer(other), expected)
    genuine = plain.unpatchify
    plain.unpatchify = lambda x: genuine(x).flip(-1)  # type: ignore[method-assign]
    assert torch.equal(answer(plain), expected)


@pytest.mark.parametrize("library", BOTH)
def test_another_scale_is_used(library: Any) -> None:
    model = dit(library)
    before = answer(model)
    for block in model.blocks:
        block.attn.scale *= 3
    changed = answer(model)
    assert not torch.allclose(changed, before, atol=1e-4)
    for block in model.blocks:
        block.attn.scale /= 3
        with torch.no_grad():
            block.attn.qkv.weight[:48] *= 3
            block.attn.qkv.bias[:48] *= 3
    torch.testing.assert_close(changed, answer(model), rtol=numerics.AGREES_ELSEWHERE, atol=1e-4)


@pytest.mark.parametrize("library", BOTH)
def test_sizes_that_weights_have_cannot_be_set(library: Any) -> None:
    model = dit(library)
    for path, name in [
        ("x_embedder", "num_patches"),
        ("x_embedder", "patch_size"),
        ("x_embedder", "grid_size"),
        ("blocks.0.attn", "head_dim"),
    ]:
        with pytest.raises(AttributeError, match="set"):
            setattr(model.get_submodule(path), name, 3)
    model.blocks[0].attn.num_heads = 2
    with pytest.raises(RuntimeError, match="unflatten"):
        answer(model)


@pytest.mark.parametrize("library", BOTH)
def test_no_name_of_the_state_dict_is_new(library: Any) -> None:
    for conditioning in ADAPTIVE:
        names = [name for name in dit(library, conditioning=conditioning).state_dict() if "norm" in name]
        assert not names


def test_our_own_model_has_the_public_parts_and_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = dit(models)
    kinds = [type(module) for module in model.modules()]
    accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    assert "0 parts fused, 1 left" in capsys.readouterr().out
