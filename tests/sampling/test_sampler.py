"""Guided samples: what the public recipe draws, without its waste, and loud about bad labels."""

import copy

import numpy as np
import pytest
import torch

from ditkernels.diffusion import create_diffusion
from ditkernels.models import DiT as FusedDiT
from ditkernels.reference import CONDITIONINGS, DiT
from ditkernels.rng import Stream, normals
from ditkernels.sampling.config import SOLVERS, SampleConfig
from ditkernels.sampling.denoiser import Denoiser
from ditkernels.sampling.drawing import sample, sample_progressive
from tests.numerics import SAMPLE_AGREEMENT, assert_trajectory

LABELS = [0, 2, 1, 2, 3]


def random_model(*, channels=4, class_dropout_prob=0.1, conditioning="adaln_zero", model_class=DiT):
    """A DiT whose zero-initialised layers are random: a fresh one predicts zero, whatever its label."""
    generator = torch.Generator().manual_seed(0)
    model = model_class(
        (4, 6),
        2,
        channels,
        16,
        2,
        2,
        num_classes=3,
        class_dropout_prob=class_dropout_prob,
        conditioning=conditioning,
    )
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


def by_hand(model, diffusion, config, *, indices=None):
    """The trajectory by the public recipe in plain PyTorch, one step of the diffusion at a time; dtype is the model's."""
    labels = torch.tensor(LABELS)
    null = torch.full_like(labels, model.num_classes)
    dtype = model.pos_embed.dtype
    low, high = config.guidance_interval or (0, 999)

    def predict(x, t):
        if config.guidance_scale == 1 or not low <= t[0] <= high:
            return model(x.to(dtype), t, labels)
        out = model.forward_with_cfg(
            torch.cat([x, x]).to(dtype),
            torch.cat([t, t]),
            torch.cat([labels, null]),
            config.guidance_scale,
            config.for_channels(model.in_channels).guided_channels,
        )
        return out.chunk(2)[0]

    def noise(step):
        images = torch.arange(len(LABELS)) if indices is None else indices
        return normals(config.seed, Stream.SAMPLING_NOISE, step, images, shape).to(dtype)

    shape = (model.in_channels, *model.input_size)
    x, previous, states = noise(0), None, []
    for taken, index in enumerate(reversed(range(diffusion.num_timesteps)), start=1):
        t = torch.full((len(LABELS),), index)
        arguments = (predict, x, t, config.clip_denoised)
        with torch.no_grad():
            if config.solver == "ddpm":
                result = diffusion.p_sample(*arguments, noise=noise(taken))
            elif config.solver == "ddim":
                result = diffusion.ddim_sample(*arguments)
            else:
                result = diffusion.dpm_solver_sample(*arguments, previous=previous)
        x, previous = result["sample"], result["pred_xstart"]
        states.append(x)
    return states


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guided_channels", [3, None])
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_guided_trajectories_follow_the_public_recipe(model, diffusion, solver, guided_channels, clip_denoised):
    config = SampleConfig(solver, 2.5, guided_channels, clip_denoised, seed=3)
    states = list(sample_progressive(model, diffusion, LABELS, config, modulation_bytes=0))
    expected = by_hand(model, diffusion, config)
    assert len(states) == diffusion.num_timesteps
    for state, wanted in zip(states, expected, strict=True):
        assert torch.equal(state, wanted)
    assert torch.equal(sample(model, diffusion, LABELS, config, modulation_bytes=0), expected[-1])


GUIDANCE = {
    "three channels": {},
    "all channels": {"guided_channels": None},
    "interval": {"guidance_interval": (200, 799)},
    "none": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_fast_path_on_fused_ops_draws_what_the_plain_reference_draws(solver, guidance, conditioning):
    config = SampleConfig(solver, **{"guidance_scale": 2.0, "seed": 1, **GUIDANCE[guidance]})
    plain = random_model(conditioning=conditioning)
    fused = random_model(conditioning=conditioning, model_class=FusedDiT)
    diffusion = create_diffusion("logsnr6" if solver == "dpm_solver" else "6")
    for model in (plain, fused):
        for parameter in model.parameters():
            parameter.data *= 0.5
    exact = by_hand(copy.deepcopy(plain).double(), diffusion, config)
    low = by_hand(plain, diffusion, config)
    # room for the rows of two timesteps: chunks are refilled along the way, and the last one is padded
    room = 2 * 6 * 4 * (2 * 6 * 16 + 2 * 16) + 1
    fast = list(sample_progressive(fused, diffusion, LABELS, config, modulation_bytes=room))
    assert_trajectory(fast, low, exact)


def test_modulation_is_computed_ahead_in_chunks_of_one_shape_with_one_null_row(model):
    seen = []
    handle = model.blocks[1].adaLN_modulation.register_forward_hook(lambda _module, args, _out: seen.append(tuple(args[0].shape)))
    width = 2 * 6 * 16 + 2 * 16
    rows = len(LABELS) + 1
    diffusion = create_diffusion("7")
    expected = sample(model, diffusion, LABELS, SampleConfig(), modulation_bytes=0)
    assert seen == [(2 * len(LABELS), 16)] * 7
    seen.clear()
    found = sample(model, diffusion, LABELS, SampleConfig(), modulation_bytes=3 * rows * width * 4)
    assert seen == [(3 * rows, 16)] * 3
    torch.testing.assert_close(found, expected, rtol=SAMPLE_AGREEMENT, atol=SAMPLE_AGREEMENT)
    seen.clear()
    sample(model, diffusion, LABELS, SampleConfig(), modulation_bytes=1)
    assert seen == [(rows, 16)] * 7, "a bound below one timestep's rows still computes one"
    seen.clear()
    sample(model, diffusion, LABELS, SampleConfig(guidance_scale=1.0))
    assert seen == [(7 * len(LABELS), 16)]
    handle.remove()


def test_the_model_is_left_as_it_was(model, diffusion):
    before = {name: id(module) for name, module in model.named_modules()}
    sample(model, diffusion, LABELS, SampleConfig())
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_steps_modulation_does_not_depend_on_how_it_was_reached(model):
    """Cached rows met in any order, or met twice, are the same bytes."""
    timesteps = [0.0, 100.0, 200.0, 300.0, 400.0]
    labels = torch.tensor(LABELS)
    options = {"scale": 2.0, "guided_channels": None, "interval": None}
    width = 2 * 6 * 16 + 2 * 16
    x = torch.randn(len(LABELS), 4, 4, 6)

    def outputs(order):
        denoiser = Denoiser(model, labels, timesteps, **options, modulation_bytes=2 * 6 * width * 4)
        found = {}
        with torch.no_grad():
            for index in order:
                denoiser.move_to(index)
                found[index] = denoiser(x, torch.full((len(LABELS),), timesteps[index]))
        return found

    forwards, shuffled = outputs([4, 3, 2, 1, 0]), outputs([0, 3, 0, 4, 1, 2, 3])
    assert all(torch.equal(forwards[index], shuffled[index]) for index in range(5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_one_runs_the_conditional_half_only(model, diffusion, solver):
    batches = []
    handle = model.x_embedder.register_forward_hook(lambda _module, args, _out: batches.append(len(args[0])))
    config = SampleConfig(solver, guidance_scale=1.0)
    drawn = sample(model, diffusion, LABELS, config, modulation_bytes=0)
    handle.remove()
    assert batches == [len(LABELS)] * diffusion.num_timesteps
    assert torch.equal(drawn, by_hand(model, diffusion, config)[-1])


def test_guidance_runs_inside_its_interval_only_ends_included(model):
    diffusion = create_diffusion("ddim5")
    assert diffusion.timestep_map == [0, 200, 400, 600, 800]
    batches = []
    handle = model.x_embedder.register_forward_hook(lambda _module, args, _out: batches.append(len(args[0])))
    sample(model, diffusion, LABELS, SampleConfig(guidance_interval=(200, 600)))
    handle.remove()
    assert batches == [5, 10, 10, 10, 5]


def test_an_interval_without_a_step_is_named(model):
    with pytest.raises(ValueError, match="guidance_interval: got 201 to 399, which holds no step"):
        sample(model, create_diffusion("ddim5"), LABELS, SampleConfig(guidance_interval=(201, 399)))
    with pytest.raises(ValueError, match="guidance_interval: got 5 to 4, which is empty"):
        SampleConfig(guidance_interval=(5, 4))


def test_an_images_noise_follows_its_index(model, diffusion):
    indices = torch.tensor([7, 3, 2**32 - 1, 0, 11])
    config = SampleConfig(seed=2**63 + 5)
    found = sample(model, diffusion, LABELS, config, indices=indices, modulation_bytes=0)
    assert torch.equal(found, by_hand(model, diffusion, config, indices=indices)[-1])
    assert not torch.equal(found, sample(model, diffusion, LABELS, config, modulation_bytes=0))
    with pytest.raises(ValueError, match=r"indices: got torch.int64 of shape \(2,\)"):
        sample(model, diffusion, LABELS, config, indices=torch.tensor([0, 1]))


def test_every_setting_changes_the_samples(model, diffusion):
    configs = [
        SampleConfig(),
        SampleConfig(solver="ddim"),
        SampleConfig(guidance_scale=2.0),
        SampleConfig(guided_channels=None),
        SampleConfig(clip_denoised=True),
        SampleConfig(seed=1),
        SampleConfig(solver="dpm_solver"),
        SampleConfig(guidance_interval=(0, 500)),
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
    assert torch.equal(sample(model, diffusion, torch.tensor(LABELS, dtype=torch.int32), SampleConfig()), first)


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
        ("seed", 2**64),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
        SampleConfig(**{name: value})


@pytest.mark.parametrize("seed", [1.5, 1.0, True, -1, 2**64, "3", None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"seed: got .*, allowed are the whole numbers 0\.\.18446744073709551615"):
        SampleConfig(seed=seed)


def test_a_seed_of_numpys_is_kept_as_pythons():
    assert type(SampleConfig(seed=np.int64(7)).seed) is int
