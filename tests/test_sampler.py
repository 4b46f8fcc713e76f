"""Guided samples: what the public recipe draws, without its waste, and loud about bad labels."""

import pytest
import torch

from ditkernels.diffusion import create_diffusion
from ditkernels.reference import DiT
from ditkernels.sampler import SampleConfig, sample, sample_progressive

LABELS = [0, 2, 1, 2, 3]


def random_model(*, channels=4, class_dropout_prob=0.1):
    """A DiT whose zero-initialised layers are random: a fresh one predicts zero, whatever its label."""
    generator = torch.Generator().manual_seed(0)
    model = DiT((4, 6), 2, channels, 16, 2, 2, num_classes=3, class_dropout_prob=class_dropout_prob)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def diffusion():
    return create_diffusion("6")


def by_hand(model, diffusion, config, *, doubled):
    """The trajectory by the public recipe, one `p_sample` or `ddim_sample` at a time."""
    generator = torch.Generator().manual_seed(config.seed)
    labels = torch.tensor(LABELS)
    null = torch.full_like(labels, model.num_classes)

    def predict(x, t):
        if not doubled:
            return model(x, t, labels)
        out = model.forward_with_cfg(
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([labels, null]),
            config.guidance_scale,
            config.guided_channels,
        )
        return out.chunk(2)[0]

    x = torch.randn(len(LABELS), model.in_channels, *model.input_size, generator=generator)
    step = {"ddpm": diffusion.p_sample, "ddim": diffusion.ddim_sample}[config.solver]
    states = []
    for index in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(LABELS),), index)
        noise = {"generator": generator} if config.solver == "ddpm" else {}
        with torch.no_grad():
            x = step(predict, x, t, clip_denoised=config.clip_denoised, **noise)["sample"]
        states.append(x)
    return states


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("guided_channels", [3, None])
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_guided_trajectories_follow_the_public_recipe(
    model, diffusion, solver, guided_channels, clip_denoised
):
    config = SampleConfig(solver, 2.5, guided_channels, clip_denoised, seed=3)
    states = list(sample_progressive(model, diffusion, LABELS, config))
    expected = by_hand(model, diffusion, config, doubled=True)
    assert len(states) == diffusion.num_timesteps
    for state, wanted in zip(states, expected, strict=True):
        assert torch.equal(state, wanted)
    assert torch.equal(sample(model, diffusion, LABELS, config), expected[-1])


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_scale_one_runs_the_conditional_half_only(model, diffusion, solver):
    batches = []
    handle = model.x_embedder.register_forward_hook(lambda _module, args, _out: batches.append(len(args[0])))
    config = SampleConfig(solver, guidance_scale=1.0)
    drawn = sample(model, diffusion, LABELS, config)
    handle.remove()
    assert batches == [len(LABELS)] * diffusion.num_timesteps
    assert torch.equal(drawn, by_hand(model, diffusion, config, doubled=False)[-1])


def test_every_setting_changes_the_samples(model, diffusion):
    configs = [
        SampleConfig(),
        SampleConfig(solver="ddim"),
        SampleConfig(guidance_scale=2.0),
        SampleConfig(guided_channels=None),
        SampleConfig(clip_denoised=True),
        SampleConfig(seed=1),
    ]
    drawn = [sample(model, diffusion, LABELS, config) for config in configs]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not torch.equal(first, second)


def test_scale_zero_ignores_the_labels(model, diffusion):
    config = SampleConfig(guidance_scale=0.0, guided_channels=None, solver="ddim")
    # DDIM does not read the variance channels, which keep the label's own prediction.
    assert torch.equal(sample(model, diffusion, [0, 1], config), sample(model, diffusion, [2, 0], config))
    guided = SampleConfig(guidance_scale=2.0, guided_channels=None, solver="ddim")
    assert not torch.equal(sample(model, diffusion, [0, 1], guided), sample(model, diffusion, [2, 0], guided))


def test_same_seed_same_samples_whatever_the_callers_random_state(model, diffusion):
    torch.manual_seed(1)
    first = sample(model, diffusion, LABELS, SampleConfig())
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), after), "sampling drew from the caller's generator"
    assert torch.equal(
        sample(model, diffusion, torch.tensor(LABELS, dtype=torch.int32), SampleConfig()), first
    )


def test_no_gradient_is_recorded(model, diffusion):
    drawn = sample(model, diffusion, LABELS, SampleConfig())
    assert not drawn.requires_grad
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_label_out_of_range_is_named(model, diffusion, label):
    with pytest.raises(ValueError, match=rf"labels: got {label}, allowed are 0\.\.3"):
        sample(model, diffusion, [0, label], SampleConfig())


@pytest.mark.parametrize("labels", [[], [[0, 1]], 3])
def test_labels_of_another_shape_are_refused(model, diffusion, labels):
    with pytest.raises(ValueError, match="labels: got shape"):
        sample(model, diffusion, labels, SampleConfig())


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False]])
def test_labels_that_are_no_integers_are_refused(model, diffusion, labels):
    with pytest.raises(TypeError, match="labels: got torch"):
        sample(model, diffusion, labels, SampleConfig())


def test_a_model_in_train_mode_is_refused(diffusion):
    with pytest.raises(ValueError, match="train mode"):
        sample(random_model().train(), diffusion, LABELS, SampleConfig())


def test_a_model_without_a_null_class_samples_unguided_only(diffusion):
    model = random_model(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="no null class"):
        sample(model, diffusion, [0, 1], SampleConfig())
    with pytest.raises(ValueError, match=r"labels: got 3, allowed are 0\.\.2"):
        sample(model, diffusion, [0, 3], SampleConfig(guidance_scale=1.0))
    assert sample(model, diffusion, [0, 2], SampleConfig(guidance_scale=1.0)).shape == (2, 4, 4, 6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("solver", "euler"),
        ("guidance_scale", -1.0),
        ("guidance_scale", float("inf")),
        ("guided_channels", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
        SampleConfig(**{name: value})
