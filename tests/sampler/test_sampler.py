"""The samplers by themselves: what they refuse, and what they add, mask and replace."""

import math

import pytest
import torch

from latent_tts.errors import UsageError
from latent_tts.random.draw import Draw
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Forward

ROWS, WIDTH = 200, 64
SITES = ("embedding", "attention", "ffn")
EVERYWHERE = ["prompt", "thoughts", "answer"]
FORWARDS = {"prompt": Forward("prompt", 0, 5), "thoughts": Forward("thoughts", 0, 1), "answer": Forward("answer", 6, 2)}


def draw():
    return Draw.of(0, ["a", "b"], torch.arange(ROWS // 2).repeat(2, 1), WIDTH)


def dropout(*, rate=0.2, site="residual_embedding", where=EVERYWHERE, mask="fresh"):
    return Dropout(rate, site, where, mask)


def factors(sampler, site, layer, forward):
    factors = sampler.factors(site, layer, draw(), forward)
    assert factors is not None
    return factors


@pytest.mark.parametrize("sigma", [-1, math.nan, math.inf, "abc", "0.5", None, True])
def test_a_bad_sigma_is_named(sigma):
    with pytest.raises(UsageError, match=r"\Asampler\.sigma="):
        Gaussian(sigma, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rate", rate) for rate in (1, 1.5, -0.1, math.nan, "0.2", None, False)),
        *(("site", site) for site in ("nosuch", "embedding", "", None)),
        *(("where", where) for where in ([], ["x"], ["thoughts", "x"], "thoughts", "", None, 3)),
        *(("mask", mask) for mask in ("x", "", None)),
    ],
)
def test_a_bad_value_of_dropout_is_named(key, value):
    with pytest.raises(UsageError, match=rf"\Asampler\.{key}="):
        dropout(**{key: value})


@pytest.mark.parametrize("mode", ["x", "", None])
def test_a_bad_mode_of_control_is_named(mode):
    with pytest.raises(UsageError, match=r"\Asampler\.mode="):
        Control(mode)


def test_greedy_changes_nothing():
    latent = torch.randn(ROWS, WIDTH)
    assert Greedy().latent(latent, draw(), 0) is latent
    assert all(Greedy().factors(site, 0, draw(), forward) is None for site in SITES for forward in FORWARDS.values())


@pytest.mark.parametrize("step", [0, 5])
def test_gaussian_adds_sigma_times_the_normals_of_its_step(step):
    latent = torch.randn(ROWS, WIDTH)
    noisy = Gaussian(0.3, False).latent(latent, draw(), step)
    torch.testing.assert_close(noisy - latent, 0.3 * draw().normal(step, WIDTH))
    assert (noisy - latent).std().item() == pytest.approx(0.3, rel=0.05)


def test_relative_noise_is_in_units_of_each_latents_root_mean_square():
    latent = torch.randn(ROWS, WIDTH) * torch.linspace(0.1, 10, ROWS)[:, None]
    noise = Gaussian(0.3, True).latent(latent, draw(), 2) - latent
    rms = latent.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(noise, 0.3 * rms * draw().normal(2, WIDTH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noise_keeps_the_dtype_of_the_latents(dtype):
    latent = torch.randn(ROWS, WIDTH).to(dtype)
    noisy = Gaussian(0.3, False).latent(latent, draw(), 0)
    assert noisy.dtype == dtype
    assert torch.equal(noisy, (latent.float() + 0.3 * draw().normal(0, WIDTH)).to(dtype))


def test_sigma_zero_gives_the_latent_itself():
    latent = torch.randn(ROWS, WIDTH)
    assert Gaussian(0, True).latent(latent, draw(), 0) is latent


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("mask", ["fresh", "locked"])
def test_dropout_factors_are_zero_or_one_over_the_kept_share(rate, mask):
    values = factors(dropout(rate=rate, mask=mask), "ffn", 1, FORWARDS["prompt"])
    kept = values[values != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-4, atol=0)
    deviation = math.sqrt(rate * (1 - rate) / values.numel())
    assert abs((values == 0).double().mean() - rate) < 4 * deviation


def test_rate_zero_masks_nothing():
    sampler = dropout(rate=0)
    assert not sampler.random_phases
    assert all(sampler.factors(site, 0, draw(), forward) is None for site in SITES for forward in FORWARDS.values())


@pytest.mark.parametrize(
    ("site", "masked"),
    [("ffn", {"ffn"}), ("residual", {"attention", "ffn"}), ("residual_embedding", {"embedding", "attention", "ffn"})],
)
def test_only_the_places_of_a_site_are_masked(site, masked):
    sampler = dropout(site=site)
    assert masked == {place for place in SITES if sampler.factors(place, 0, draw(), FORWARDS["thoughts"]) is not None}


@pytest.mark.parametrize("where", [["prompt"], ["thoughts"], ["answer"], ["answer", "thoughts"], tuple(EVERYWHERE)])
def test_only_the_phases_of_where_are_masked(where):
    sampler = dropout(where=where)
    assert sampler.random_phases == set(where)
    assert set(where) == {
        phase for phase, forward in FORWARDS.items() if sampler.factors("ffn", 0, draw(), forward) is not None
    }


def share_equal(some, others):
    return (some != 0).eq(others != 0).double().mean().item()


BY_CHANCE = pytest.approx(0.2**2 + 0.8**2, abs=0.03)  # two independent masks agree this often


@pytest.mark.parametrize(
    ("site", "layer", "forward"),
    [
        ("ffn", 1, Forward("thoughts", 1, 1)),
        ("ffn", 1, Forward("answer", 6, 1)),
        ("ffn", 1, Forward("prompt", 0, 1)),
        ("ffn", 2, Forward("thoughts", 0, 1)),
        ("attention", 1, Forward("thoughts", 0, 1)),
        ("embedding", 2, Forward("thoughts", 0, 1)),
    ],
)
def test_fresh_masks_of_different_passes_and_places_are_independent(site, layer, forward):
    here = factors(dropout(), "ffn", 1, FORWARDS["thoughts"])
    assert share_equal(here, factors(dropout(), site, layer, forward)) == BY_CHANCE


@pytest.mark.parametrize("mask", ["fresh", "locked"])
def test_no_two_places_of_a_pass_share_a_mask(mask):
    masks = [
        factors(dropout(mask=mask), site, layer, FORWARDS["thoughts"]).flatten() for site in SITES for layer in range(4)
    ]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_fresh_masks_of_the_tokens_of_a_pass_are_independent():
    tokens = factors(dropout(), "ffn", 1, FORWARDS["prompt"])
    assert tokens.shape == (ROWS, 5, WIDTH)
    assert share_equal(tokens[:, 0], tokens[:, 1]) == BY_CHANCE


def test_a_tokens_mask_does_not_depend_on_the_padding_of_its_batch():
    long = factors(dropout(), "ffn", 1, Forward("prompt", 0, 9))
    assert torch.equal(long[:, :5], factors(dropout(), "ffn", 1, FORWARDS["prompt"]))


def test_a_locked_mask_is_one_for_all_passes_and_tokens_of_a_rollout():
    masks = [factors(dropout(mask="locked"), "ffn", 1, forward) for forward in FORWARDS.values()]
    assert masks[0].shape == (ROWS, 1, WIDTH)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_locked_masks_of_rollouts_and_places_are_independent():
    here = factors(dropout(mask="locked"), "ffn", 1, FORWARDS["thoughts"])
    assert share_equal(here[1:], here[:-1]) == BY_CHANCE
    for site, layer in (("ffn", 2), ("attention", 1), ("embedding", 0)):
        assert share_equal(here, factors(dropout(mask="locked"), site, layer, FORWARDS["thoughts"])) == BY_CHANCE


def test_zero_replaces_every_latent_by_zeros():
    assert not Control("zero").latent(torch.ones(ROWS, WIDTH), draw(), 3).any()


def test_repeat_gives_the_first_latent_at_every_step():
    latents, history = torch.randn(ROWS, 3, WIDTH), draw()
    history.history_RTD = latents
    assert torch.equal(Control("repeat").latent(latents[:, 0], history, 0), latents[:, 0])
    assert torch.equal(Control("repeat").latent(latents[:, 2], history, 2), latents[:, 0])


def test_shuffle_gives_the_donors_latent_of_the_same_step():
    latents, donors = torch.randn(ROWS, 3, WIDTH), draw()
    donors.donor_RTD = latents
    assert Control("shuffle").needs_donor
    assert not Control("repeat").needs_donor
    assert torch.equal(Control("shuffle").latent(torch.zeros(ROWS, WIDTH), donors, 2), latents[:, 2])


@pytest.mark.parametrize(
    ("sampler", "name", "param", "value", "deterministic"),
    [
        (Greedy(), "greedy", None, None, True),
        (Gaussian(0.5, False), "gaussian", "sigma", 0.5, False),
        (Gaussian(0.0, False), "gaussian", "sigma", 0.0, True),
        (dropout(rate=0.0), "dropout", "rate", 0.0, True),
        (dropout(where=["answer"]), "dropout", "rate", 0.2, False),
        (dropout(), "dropout", "rate", 0.2, False),
        (Control("zero"), "control", "mode", "zero", True),
    ],
)
def test_tables_show_a_sampler_by_name_parameter_and_value(sampler, name, param, value, deterministic):
    shown = (sampler.name, sampler.param, sampler.value, sampler.deterministic)
    assert shown == (name, param, value, deterministic)
