"""Parallel sweeps against the sequential oracle and against an iteration by hand, and through the command line."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from against_oracle import MASKS, NOISE, TOLERANCE, assert_rows_equal, base_passes, check_against_oracle, name, roll
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from refusal import check_refused

from latent_tts.engine.cost import RolloutCost, Shape
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.rollout import Engine
from latent_tts.errors import UsageError
from latent_tts.random.draw import Draw
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.jacobi import Jacobi

LATENT_ID = 59
IN_THOUGHTS = Dropout(0.2, "residual_embedding", ["thoughts"], "fresh")
SAMPLERS = [
    Greedy(),
    NOISE,
    Gaussian(0.3, True),
    MASKS,
    IN_THOUGHTS,
    Dropout(0.2, "ffn", ["answer"], "fresh"),
    Dropout(0.2, "residual", ["thoughts", "answer"], "locked"),
    Control("repeat"),
    Control("shuffle"),
    AnswerSampling(1.5).over(IN_THOUGHTS),
]
FAMILIES = [("llama", 3, 2), ("qwen3", 3, 0), ("qwen3", 1, 0)]


def plan(latents, schedule, **more):
    return tiny.plan(latents, **more, schedule=schedule, latent_id=LATENT_ID)


# --- enough sweeps give the sequential latents


CASES = [
    *(("gpt2", 4, 0, sampler) for sampler in SAMPLERS),
    *((family, latents, extra, sampler) for family, latents, extra in FAMILIES for sampler in (NOISE, MASKS)),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("family", "latents", "extra", "sampler"), CASES, ids=name)
def test_as_many_sweeps_as_latents_equal_the_sequential_oracle(family, latents, extra, sampler):
    rollouts = 1 if sampler.deterministic else 2
    jacobi = plan(latents, Jacobi(latents + extra, None, "token"), eos_id=tiny.EOS_IDS[family], answer=3)
    check_against_oracle(family, sampler, [1, 9], rollouts, jacobi)


@pytest.mark.every_other
@pytest.mark.parametrize(("chunk", "sampler"), [(1, NOISE), (2, IN_THOUGHTS), (3, NOISE), (3, IN_THOUGHTS)], ids=name)
def test_as_many_sweeps_as_a_chunk_has_latents_equal_the_sequential_oracle(chunk, sampler):
    jacobi = plan(5, Jacobi(chunk, chunk, "zero"), eos_id=tiny.EOS_IDS["qwen3"], answer=3, end=0)
    check_against_oracle("qwen3", sampler, [4, 1], 2, jacobi)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    st.sampled_from(["gpt2", "llama"]), st.sampled_from([NOISE, IN_THOUGHTS]), st.integers(1, 6), st.integers(1, 7),
    st.none() | st.integers(1, 6), st.sampled_from(["token", "zero"]), st.booleans(),
)  # fmt: skip
def test_after_k_sweeps_the_first_k_latents_are_the_sequential_ones(
    family, sampler, latents, sweeps, chunk, guess, known_first
):
    reasoner, prompts = REASONERS[family], tiny.prompts([5, 2])
    jacobi = Jacobi(sweeps, chunk, guess, known_first=known_first)
    sequential, parallel = (
        roll(Engine(reasoner, here), prompts, range(2), sampler)
        for here in (tiny.plan(latents, answer=1), plan(latents, jacobi, answer=1))
    )
    exact = latents if sweeps >= (chunk or latents) else min(sweeps + known_first, latents)
    torch.testing.assert_close(parallel.latents_RTD[:, :exact], sequential.latents_RTD[:, :exact], **TOLERANCE)
    if exact == latents:
        assert parallel.answer_ids == sequential.answer_ids


REASONERS = {family: tiny.reasoner(family) for family in ("gpt2", "llama")}


# --- fewer sweeps are what they say


def by_hand(family, prompt, sampler, latents, jacobi, draw):
    """The iteration as its docstring has it: every sweep runs prompt and latents whole, chunk after chunk."""
    reasoner = tiny.reasoner(family)
    lm = tiny.plain_copy(reasoner.lm)
    embed = lm.get_input_embeddings()
    h_TD = torch.zeros(latents, tiny.WIDTH, dtype=torch.float64)
    draw.history_RTD = h_TD[None]
    chunk = jacobi.chunk or latents
    for start in range(0, latents, chunk):
        stop = min(start + chunk, latents)
        h_TD[start:stop] = embed(torch.tensor(LATENT_ID)) if jacobi.guess == "token" else 0
        for _ in range(jacobi.sweeps):
            inputs = torch.cat([embed(torch.tensor(prompt)), h_TD])[None]
            hidden = lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
            for step in range(start, stop):
                made = reasoner.next_latent(hidden[None, len(prompt) - 1 + step])
                h_TD[step] = sampler.latent(made, draw, step)[0]
    return h_TD


@pytest.mark.every_other
@pytest.mark.parametrize("sampler", [Greedy(), NOISE], ids=name)
@pytest.mark.parametrize(("sweeps", "chunk", "guess"), [(1, None, "token"), (2, None, "zero"), (2, 3, "token")])
@pytest.mark.parametrize("family", ["qwen3"])
def test_fewer_sweeps_equal_an_iteration_by_hand(family, sweeps, chunk, guess, sampler):
    jacobi, prompts = Jacobi(sweeps, chunk, guess), tiny.prompts([7, 2])
    reasoner, here = tiny.reasoner(family), plan(5, jacobi, eos_id=tiny.EOS_IDS[family], answer=3)
    result = roll(Engine(reasoner, here), prompts, range(2), sampler)
    oracle = Oracle(reasoner, here)
    for row in range(4):
        question, number = prompts[row // 2], row % 2
        draw = tiny.draw([f"{len(question)}-{sum(question)}"], range(number, number + 1))
        with torch.inference_mode():
            wanted = by_hand(family, question, sampler, 5, jacobi, draw)
        torch.testing.assert_close(result.latents_RTD[row], wanted, **TOLERANCE)
        given = oracle.roll(question, Replay(wanted), question_id="", rollout=0)  # the answer reads these latents
        assert result.answer_ids[row] == given.answer_ids
        assert float(result.answer_logprob_R[row]) == pytest.approx(given.logprob, abs=1e-5)


class Replay(Greedy):
    """Latents that are given."""

    def __init__(self, latents_TD):
        object.__setattr__(self, "given", latents_TD)

    def latent(self, h_RD, draw, step):
        return self.given[step].expand_as(h_RD)


def test_too_few_sweeps_give_other_latents():
    prompts = tiny.prompts([5])
    engines = [Engine(tiny.reasoner("gpt2"), here) for here in (tiny.plan(4), plan(4, Jacobi(2)))]
    one, other = (roll(engine, prompts, range(1), Greedy()).latents_RTD for engine in engines)
    assert (one[:, 2:] - other[:, 2:]).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [NOISE, IN_THOUGHTS], ids=name)
def test_what_sweeps_give_does_not_depend_on_the_batch(sampler):
    prompts, engine = tiny.prompts([9, 1, 4]), Engine(tiny.reasoner("gpt2"), plan(4, Jacobi(2)))
    whole = roll(engine, prompts, range(3), sampler)
    alone = roll(engine, prompts[1:2], range(2, 3), sampler)
    assert_rows_equal(alone, 0, whole, 5)


# --- what it costs


@pytest.mark.parametrize(
    ("jacobi", "sampler", "thinking"),
    [
        # the prompt's pass makes h_1; the answer's pass takes the end token and what has not been run as it is now
        (Jacobi(4), NOISE, [3, 3, 2, 1]),
        (Jacobi(4), IN_THOUGHTS, [4, 3, 2, 1]),
        (Jacobi(2), NOISE, [3, 3]),
        (Jacobi(2, 2), NOISE, [1, 1, 2, 1]),
        (Jacobi(1, 2), NOISE, [1, 3]),
        (Jacobi(3, known_first=True), NOISE, [3, 2, 1]),
        (Jacobi(2, known_first=True), NOISE, [3, 2]),
        (Jacobi(2, known_first=True), IN_THOUGHTS, [1, 3, 2]),
        (Jacobi(1, 2, known_first=True), NOISE, [2, 2]),
    ],
    ids=str,
)
def test_a_sweep_is_one_pass_that_leaves_out_what_is_final(jacobi, sampler, thinking):
    reasoner = tiny.reasoner("gpt2")
    shapes = base_passes(reasoner.lm)
    roll(Engine(reasoner, plan(4, jacobi, answer=1)), tiny.prompts([7]), range(2), sampler)
    fed = [tokens for rows, tokens in shapes[1:] if rows == 2]
    assert fed[: len(thinking)] == thinking
    own = 1 if sampler is IN_THOUGHTS else 0
    assert sum(fed) == own + 4 + 1 + 1 + sum(tokens for tokens, _ in jacobi.repeated_passes(4))


def test_repeated_passes_cost_by_their_context():
    shape = Shape(layers=2, width=8, vocabulary=10, attention=8, keys=8, block_weights=100)
    assert Jacobi(4).repeated_passes(4) == [(3, 0), (2, 1), (1, 2)]
    assert Jacobi(2, 2).repeated_passes(4) == [(1, 0), (1, 2)]
    assert Jacobi(9, 1).repeated_passes(4) == []
    wanted = shape.pass_flops(3, 7) + shape.pass_flops(2, 8) + shape.pass_flops(1, 9)
    sequential = RolloutCost(shape, 4, forced=0)
    jacobi = replace(sequential, repeated=Jacobi(4).repeated_passes(4))
    assert jacobi.thinking_flops(7, 4) - sequential.thinking_flops(7, 4) == wanted


# --- runs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sweeps", v) for v in (0, -1, 1.5, "2", None, True)),
        ("chunk", 0),
        ("chunk", "2"),
        ("guess", "mean"),
        ("known_first", 1),
    ],
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(UsageError, match=rf"\Aschedule\.{key}="):
        Jacobi(**{"sweeps": 2, key: value})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule=zigzag"], ["schedule=zigzag", "jacobi, sequential"]),
        (
            ["schedule=jacobi", "schedule.sweeps=2", "model.latents=0", "sampler=greedy"],
            ["schedule=jacobi", "no latents"],
        ),
        (
            ["schedule=jacobi", "schedule.sweeps=2", "schedule.guess=sibling", "model.latents=4"],
            ["schedule.guess=sibling", "schedule.sweeps=4 or more"],
        ),
        (
            ["schedule=jacobi", "schedule.sweeps=2", "schedule.chunk=5", "model.latents=4"],
            ["schedule.chunk=5", "at most model.latents=4"],
        ),
        (
            ["schedule=jacobi", "schedule.sweeps=2", "model=demo_colar", "model.checkpoint=shipped:colar_arith"],
            ["schedule=jacobi", "sequential or speculative", "decides after each latent"],
        ),
    ],
)
def test_a_run_refuses(refuse, overrides, words):
    refuse(*overrides, words=words)


def test_sweeps_and_steps_make_the_same_tables_and_the_columns_say_which(run):
    tables, costs, drawn = [], [], []
    for schedule in ("sequential", "jacobi"):
        result = run(f"schedule={schedule}", "model.latents=3", "n=2")
        assert result.code == 0, result.err
        metrics = pd.read_csv(result.last)
        assert set(metrics["schedule"]) == {schedule}
        tables.append(pd.read_parquet(result.last.parent / "rollouts.parquet"))
        drawn.append(json.loads((result.last.parent / "run.json").read_text())["rollouts"]["drawn_now"])
        costs.append(metrics.set_index("metric").loc["gflops", "value"])
    columns = ["prediction", "answer_text", "latent_steps"]
    pd.testing.assert_frame_equal(tables[0][columns], tables[1][columns])
    assert drawn == [12, 12]  # each schedule has a cache of its own
    assert (costs[1] > costs[0]).all()


def test_annotate_refuses_parallel_sweeps(place, checkpoint):
    line = "annotate", f"model.checkpoint={checkpoint}", "output=labels", "schedule=jacobi"
    check_refused(*line, words=["schedule=jacobi", "prefix"])


def test_sweeps_draw_a_latents_noise_once(monkeypatch):
    drawn, draw = [], Draw._draw

    def counted(self, steps, width):
        drawn.extend(steps)
        return draw(self, steps, width)

    monkeypatch.setattr(Draw, "_draw", counted)
    roll(Engine(tiny.reasoner("gpt2"), plan(4, Jacobi(3))), tiny.prompts([5, 2]), range(2), NOISE)
    assert sorted(drawn) == [0, 1, 2, 3]
