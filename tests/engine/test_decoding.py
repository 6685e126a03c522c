"""Answer tokens that are drawn: their distribution, what they depend on, and what a run makes of them."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from against_oracle import NOISE, assert_rows_equal, check_against_oracle, roll
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import check

from latent_tts.engine.decoding import AnswerSampling, in_nucleus
from latent_tts.engine.rollout import Engine
from latent_tts.errors import UsageError
from latent_tts.random.draw import Draw
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0, -30.0, 1.0, 0.0, -2.0, 2.5, 1.5, -0.5])
MANY = 100_000


def draws(rows):
    return Draw.of(0, ["q"], torch.arange(rows)[None], 8)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf, "1", None, True])
def test_a_bad_temperature_is_named(temperature):
    with pytest.raises(UsageError, match=r"\Aanswer\.temperature="):
        AnswerSampling(temperature)


@pytest.mark.parametrize("top_p", [0, -1, 1.1, math.nan, "1", None, True])
def test_a_bad_top_p_is_named(top_p):
    with pytest.raises(UsageError, match=r"\Aanswer\.top_p="):
        AnswerSampling(1.0, top_p)


def test_top_p_without_sampling_is_named():
    with pytest.raises(UsageError, match=r"\Aanswer\.top_p=0\.9: must be 1 with answer\.temperature=0"):
        AnswerSampling(0, 0.9)


@pytest.mark.every_other
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_frequencies_are_those_of_the_softmax_cut_to_its_nucleus(temperature, top_p):
    sampler = AnswerSampling(temperature, top_p).over(Greedy())
    ids = sampler.token(LOGITS.expand(MANY, -1), draws(MANY), 3)
    share = (LOGITS.double() / temperature).softmax(-1).numpy()
    order = np.argsort(-share, kind="stable")
    kept = order[: int(np.searchsorted(share[order].cumsum(), top_p)) + 1] if top_p < 1 else order
    wanted = np.zeros_like(share)
    wanted[kept] = share[kept] / share[kept].sum()
    found = np.bincount(ids.numpy(), minlength=len(share)) / MANY
    assert not found[wanted == 0].any()
    assert (np.abs(found - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / MANY) + 1 / MANY).all()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9).filter(sum), st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest_set_that_reaches_its_share(weights, top_p):
    weight_RV = torch.tensor([weights])
    kept = in_nucleus(weight_RV, top_p)[0]
    shares = weight_RV[0].double() / weight_RV.double().sum()
    assert kept.any()
    assert shares[kept].min() >= (shares[~kept].max() if (~kept).any() else 0)
    assert shares[kept].sum() >= top_p - 1e-9
    assert shares[kept].sum() - shares[kept].min() < top_p + 1e-9


@pytest.mark.parametrize(
    "sampling", [AnswerSampling(1e-30), AnswerSampling(1e-320), AnswerSampling(1.0, 1e-9)], ids=str
)
def test_the_limits_are_the_most_probable_token(sampling):
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampling.over(Greedy()).token(logits, draws(50), 0), logits.argmax(-1))


def test_a_row_draws_by_its_own_number_in_any_batch():
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    sampler = AnswerSampling(1.0, 0.9).over(Greedy())
    whole = sampler.token(logits, draws(40), 2)
    order = torch.tensor([7, 3, 39])
    assert torch.equal(sampler.token(logits[order], draws(40).rows(order), 2), whole[order])
    with pytest.raises(AssertionError):
        sampler.token(logits[:3], draws(40), 2)


def test_uniform_numbers_are_philox_words_of_the_token_stream():
    draw = Draw.of(5, ["a", "b"], torch.tensor([[0, 9], [0, 9]]), 8)
    wanted = []
    for question in "ab":
        for rollout in (0, 9):
            high, low, _, _ = philox((0, 4, rollout, int(Stream.TOKEN)), key_of(5, question))
            wanted.append((high * 2**20 + low // 2**12) / 2**52)
    assert draw.uniform(4).tolist() == wanted
    assert draws(MANY).uniform(1).mean().item() == pytest.approx(0.5, abs=0.004)
    assert abs(np.corrcoef(draws(MANY).uniform(1), draws(MANY).uniform(2))[0, 1]) < 0.015


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "sampler", "latents"),
    [
        ("gpt2", Greedy(), 3),
        ("llama", NOISE, 2),
        ("qwen3", Dropout(0.3, "residual", ["prompt", "thoughts", "answer"], "fresh"), 2),
        ("gpt2", Control("shuffle"), 2),
        ("llama_tied", Greedy(), 0),
    ],
    ids=str,
)
def test_the_engine_draws_what_the_oracle_draws(family, sampler, latents):
    plan = tiny.plan(latents, end=bool(latents), eos_id=tiny.EOS_IDS[family], answer=6)
    sampled = AnswerSampling(2.0, 0.8).over(sampler)
    result = check_against_oracle(family, sampled, [1, 9, 4], 3, plan)
    assert len({tuple(ids) for ids in result.answer_ids}) > 3


def test_what_is_drawn_depends_neither_on_the_batch_nor_on_n():
    prompts, sampler = tiny.prompts([1, 9, 4]), AnswerSampling(1.5).over(Gaussian(0.5, False))
    engine = Engine(tiny.reasoner("gpt2"), tiny.plan(2, eos_id=tiny.EOS_IDS["gpt2"]))
    many = roll(engine, prompts, range(6), sampler)
    few = roll(engine, prompts[1:], range(2), sampler)
    for question, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert_rows_equal(few, question * 2 + number, many, (question + 1) * 6 + number)


# --- runs


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["answer.temperature=-1"], ["answer.temperature=-1", "a finite number, 0 or more"]),
        (["answer.temperature=hot"], ["answer.temperature=hot", "float"]),
        (["answer.temperature=1", "answer.top_p=0"], ["answer.top_p=0", "(0, 1]"]),
        (["answer.top_p=0.9"], ["answer.top_p=0.9", "answer.temperature=0"]),
    ],
)
def test_a_run_names_bad_values(run, overrides, words):
    check(run(*overrides), *words)


def rollouts_of(result):
    assert result.code == 0, result.err
    return pd.read_parquet(result.last.parent / "rollouts.parquet")


def test_greedy_latents_with_drawn_answers_make_n_rollouts(run):
    line = ["sampler=greedy", "answer.temperature=1.5", "answer.top_p=0.9"]
    result = run(*line)
    rows = rollouts_of(result)
    assert len(rows) == 6 * 4
    assert rows.groupby("question_id")["answer_text"].nunique().max() > 1
    columns = pd.read_csv(result.last).iloc[0]
    assert "answer.temperature=1.5,answer.top_p=0.9" in columns["settings"]
    plain = rollouts_of(run("sampler=greedy", "n=1"))  # a cache entry of its own
    assert (plain["answer_logprob"].to_numpy() != rows.loc[rows["rollout"] == 0, "answer_logprob"].to_numpy()).any()
