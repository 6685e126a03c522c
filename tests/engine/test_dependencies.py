"""Derivatives of the latents against finite differences of the model, and the graph that is made of them."""

import math

import pytest
import tiny
import torch
from against_oracle import greedy_latents

from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.dependencies import Dependencies, PlainRecurrence, find_dependencies

T, PROMPT = 5, 6
STEP = 1e-6


def recurrence(family, **more):
    reasoner = tiny.reasoner(family, **more)
    latents_TD = greedy_latents(reasoner, tiny.plan(T), tiny.prompts([PROMPT]))[0].clone()
    plain = tiny.reasoner(family, **more)
    use_own_attention(plain.lm, "eager")
    return PlainRecurrence(plain, tiny.prompts([PROMPT])[0]), latents_TD


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_at_a_rollouts_latents_the_recurrence_gives_them_again(family):
    plain, latents_TD = recurrence(family)
    # the eager attention of Llama and Qwen has a softmax in float32
    torch.testing.assert_close(plain(latents_TD[None])[0], latents_TD, rtol=0, atol=1e-9 if family == "gpt2" else 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_directional_derivatives_equal_finite_differences(family):
    plain, latents_TD = recurrence(family)
    tangents = torch.randn(3, T, tiny.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step, close = (STEP, 1e-6) if family == "gpt2" else (1e-3, 1e-3)
    wanted = (plain(latents_TD + step * tangents) - plain(latents_TD - step * tangents)) / (2 * step)
    pushed = plain.push(latents_TD, tangents)
    assert (pushed - wanted).norm() <= close * wanted.norm()
    assert (pushed[:, 1:].norm(dim=-1) > 0.1).all()


def test_a_latent_depends_on_those_before_it_alone():
    plain, latents_TD = recurrence("gpt2")
    relative_TT = find_dependencies(plain, latents_TD, 3).relative_TT
    assert (relative_TT.triu() == 0).all()
    assert (relative_TT[1:].amax(1) > 0.01).all()
    # one direction, by hand
    alone = find_dependencies(plain, latents_TD, 1).relative_TT
    unit = torch.randn(1, T, tiny.WIDTH, generator=torch.Generator().manual_seed(0))[0, 1].double()
    change = torch.zeros_like(latents_TD)
    change[1] = unit / unit.norm() * latents_TD[1].norm()
    there = (plain((latents_TD + STEP * change)[None]) - plain((latents_TD - STEP * change)[None]))[0] / (2 * STEP)
    torch.testing.assert_close(alone[:, 1], there.norm(dim=1) / latents_TD.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_growth_is_that_of_a_perturbation_that_later_latents_pass_on():
    plain, latents_TD = recurrence("gpt2")
    unit = torch.nn.functional.normalize(
        torch.randn(1, T, tiny.WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1
    )[0, 0].double()

    def rollout(first):
        out = torch.zeros_like(latents_TD)
        out[0] = first
        for step in range(1, T):
            out[step] = plain(out[None])[0, step]
        return out

    step = STEP * latents_TD[0].norm()
    change = (rollout(latents_TD[0] + step * unit) - rollout(latents_TD[0] - step * unit))[-1].norm() / (2 * STEP)
    wanted = math.log(change / latents_TD[-1].norm()) / (T - 1)
    assert find_dependencies(plain, latents_TD, 1).growth == pytest.approx(wanted, abs=1e-4)


def test_latents_that_are_constants_depend_on_nothing():
    plain, latents_TD = recurrence("gpt2", next_latent=lambda hidden: 0 * hidden + 1)
    found = find_dependencies(plain, latents_TD, 2)
    assert not found.relative_TT.any()
    assert found.critical_path(0.1) == [0]
    assert found.growth == -math.inf


@pytest.mark.parametrize(
    ("edges", "path"),
    [
        ([], [0]),
        ([(1, 0), (2, 1), (3, 2)], [0, 1, 2, 3]),
        ([(1, 0), (3, 2)], [0, 1]),
        ([(3, 0)], [0, 3]),
        ([(2, 0), (3, 2), (3, 1)], [0, 2, 3]),
    ],
)
def test_the_critical_path_is_the_longest_chain(edges, path):
    relative_TT = torch.zeros(4, 4)
    for later, earlier in edges:
        relative_TT[later, earlier] = 0.5
    assert Dependencies(relative_TT, 0.0).critical_path(0.5) == path
    assert Dependencies(relative_TT, 0.0).critical_path(0.51) == [0]
