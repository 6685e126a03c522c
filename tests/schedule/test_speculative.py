"""Speculative latents against the sequential oracle, what they promise at a tolerance, and through the command line."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from against_oracle import MASKS, NOISE, TOLERANCE, assert_rows_equal, check_against_oracle, name, roll
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from refusal import check_refused

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.errors import UsageError
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.speculative import Speculative
from latent_tts.types import Computation

LATENT_ID = 59
IN_THOUGHTS = Dropout(0.2, "residual_embedding", ["thoughts"], "fresh")
SAMPLERS = [
    Greedy(),
    NOISE,
    Gaussian(0.3, True),
    MASKS,
    IN_THOUGHTS,
    Dropout(0.2, "residual", ["thoughts", "answer"], "locked"),
    Control("repeat"),
    Control("shuffle"),
    AnswerSampling(1.5).over(IN_THOUGHTS),
]
STOP_IDS = {"gpt2": 11, "llama": 6, "qwen3": 37}
REASONERS = {family: tiny.reasoner(family) for family in ("gpt2", "llama", "qwen3")}


def plan(latents, schedule, **more):
    return tiny.plan(latents, **more, schedule=schedule, latent_id=LATENT_ID)


# --- at tolerance 0 the latents are the sequential ones


@pytest.mark.every_other
@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
@pytest.mark.parametrize(("family", "chunk", "guess"), [("gpt2", None, "token"), ("llama", 2, "greedy")])
def test_speculative_latents_equal_the_sequential_oracle(family, chunk, guess, sampler):
    here = plan(4, Speculative(chunk, 0.0, guess), eos_id=tiny.EOS_IDS[family], answer=3)
    result = check_against_oracle(family, sampler, [1, 9], 1 if sampler.deterministic else 2, here)
    assert (result.sweeps_R <= 4).all()
    assert (result.commits_R == 4).all()


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    st.sampled_from(sorted(REASONERS)), st.sampled_from([Greedy(), NOISE, IN_THOUGHTS, MASKS]), st.integers(1, 6),
    st.none() | st.integers(1, 6), st.sampled_from(["token", "zero", "greedy", "sibling"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True), st.booleans(),
)  # fmt: skip
def test_whatever_is_guessed_the_latents_are_the_sequential_ones(
    family, sampler, latents, chunk, guess, lengths, stops
):
    prompts, more = tiny.prompts(lengths), {"stop_id": STOP_IDS[family] if stops else None, "answer": 2}
    speculative = plan(latents, Speculative(chunk, 0.0, guess), **more)
    there = roll(Engine(REASONERS[family], tiny.plan(latents, **more)), prompts, range(2), sampler)
    here = roll(Engine(REASONERS[family], speculative), prompts, range(2), sampler)
    torch.testing.assert_close(here.latents_RTD, there.latents_RTD, **TOLERANCE)
    assert here.steps_R.tolist() == there.steps_R.tolist() == here.commits_R.tolist()
    assert here.answer_ids == there.answer_ids
    torch.testing.assert_close(here.answer_logprob_R, there.answer_logprob_R, rtol=0, atol=1e-5)
    assert (here.sweeps_R <= latents).all()
    assert (here.conflicts_R <= here.sweeps_R * (chunk or latents)).all()


@pytest.mark.every_other
@pytest.mark.parametrize("guess", ["token", "greedy"])
@pytest.mark.parametrize("family", [slow(name) if "llama" in name else name for name in sorted(STOP_IDS)])
def test_commits_end_at_the_stop_token(family, guess):
    here = plan(6, Speculative(4, 0.0, guess), eos_id=tiny.EOS_IDS[family], answer=3, stop_id=STOP_IDS[family])
    for sampler in (NOISE, MASKS):
        result = check_against_oracle(family, sampler, [1, 9, 14], 4, here, check_every=3)
        assert len(set(result.steps_R.tolist())) > 1, "nothing to tell a fixed number of latents from"


def test_rows_that_stop_keep_their_past_in_caches_of_transformers_too():
    reasoner = replace(tiny.reasoner("gpt2"), computation=Computation("transformers"))
    prompts, more = tiny.prompts([1, 9, 14]), {"stop_id": STOP_IDS["gpt2"], "answer": 3}
    there = roll(Engine(reasoner, tiny.plan(6, **more)), prompts, range(4), NOISE)
    here = roll(Engine(reasoner, plan(6, Speculative(3), **more)), prompts, range(4), NOISE)
    assert len(set(there.steps_R.tolist())) > 1
    for row in range(12):
        assert_rows_equal(here, row, there, row)


# --- commits, conflicts and the tolerance


def shrinking(scale):
    """A recurrence whose latents hardly depend on each other: hidden states times a small number, plus a constant."""
    return tiny.reasoner("gpt2", next_latent=lambda hidden: scale * hidden + torch.linspace(-1, 1, tiny.WIDTH))


def test_guesses_that_turn_out_right_are_committed_together():
    result = roll(Engine(shrinking(0.0), plan(6, Speculative())), tiny.prompts([5]), range(2), Greedy())
    # h_1 is the prompt's; the first sweep finds that the guesses were wrong, the second one that nothing changes
    assert result.sweeps_R.tolist() == [2, 2]
    assert result.conflicts_R.tolist() == [4, 4]
    window = roll(Engine(shrinking(0.0), plan(6, Speculative(2))), tiny.prompts([5]), range(1), NOISE)
    # in a window of two, a latent that was not guessed before is wrong once: h_2, h_3 and h_4, h_5, h_6
    assert int(window.sweeps_R) == 4


def test_latents_that_depend_on_each_other_commit_one_by_one():
    result = roll(Engine(tiny.reasoner("gpt2"), plan(5, Speculative())), tiny.prompts([5]), range(2), IN_THOUGHTS)
    assert result.sweeps_R.tolist() == [5, 5]
    assert result.conflicts_R.tolist() == [4 + 3 + 2 + 1] * 2


@pytest.mark.every_other
@pytest.mark.parametrize("sampler", [Greedy(), NOISE, IN_THOUGHTS], ids=name)
@pytest.mark.parametrize("tolerance", [1e-3, 0.1])
def test_a_committed_latent_is_within_the_tolerance_of_what_those_before_it_make(sampler, tolerance):
    engine = Engine(shrinking(0.05), plan(6, Speculative(None, tolerance, "zero")))
    prompts = tiny.prompts([7, 2])
    result = roll(engine, prompts, range(2), sampler)
    assert (result.sweeps_R < 6).all()

    class GivenLatents(Speculative):
        def run(self, latents):
            latents.latents_RTD.copy_(result.latents_RTD)
            self.made.append(latents.compute(0, 6)[0])
            latents.latents_RTD.copy_(result.latents_RTD)
            latents.commit(6)

    given_latents = GivenLatents()
    object.__setattr__(given_latents, "made", [])
    roll(Engine(engine.reasoner, plan(6, given_latents)), prompts, range(2), sampler)
    made_RTD = given_latents.made[0]
    difference = (made_RTD - result.latents_RTD).square().mean(-1).sqrt()
    size = made_RTD.square().mean(-1).sqrt()
    assert (difference <= tolerance * size * (1 + 1e-6) + 1e-12).all()
    assert difference.max() > 0  # the tolerance was made use of
    exact = roll(Engine(engine.reasoner, tiny.plan(6)), prompts, range(2), sampler)
    assert (result.latents_RTD - exact.latents_RTD).abs().max() > 1e-12


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_what_a_row_commits_does_not_depend_on_its_batch(tolerance):
    prompts, engine = tiny.prompts([9, 1, 4]), Engine(shrinking(0.05), plan(6, Speculative(3, tolerance, "greedy")))
    whole = roll(engine, prompts, range(3), NOISE)
    alone = roll(engine, prompts[1:2], range(2, 3), NOISE)
    assert_rows_equal(alone, 0, whole, 5)
    assert int(alone.sweeps_R) == int(whole.sweeps_R[5])


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    st.sampled_from(sorted(REASONERS)), st.sampled_from([Greedy(), IN_THOUGHTS]), st.none() | st.integers(1, 5),
    st.sampled_from([0.0, 0.1]), st.booleans(),
)  # fmt: skip
def test_the_timeline_adds_up_to_what_is_counted(family, sampler, chunk, tolerance, stops):
    engine = Engine(
        REASONERS[family], plan(5, Speculative(chunk, tolerance), stop_id=STOP_IDS[family] if stops else None)
    )
    prompts = tiny.prompts([1, 9])
    told = roll(engine, prompts, range(2), sampler)
    before_R, sweeps_R, conflicts_R = torch.zeros(3, 4, dtype=torch.long)
    for number, sweep in enumerate(told.timeline):
        computed_R = sweep.stop_R - sweep.first_R
        assert (sweep.final_R >= before_R).all()
        assert stops or (sweep.final_R[computed_R > 0] > before_R[computed_R > 0]).all()
        assert (sweep.first_R[computed_R > 0] == before_R[computed_R > 0]).all()
        free = number == 0 and sampler == Greedy()  # the prompt's pass makes the first latent
        sweeps_R += (computed_R > 0) & (not free)
        conflicts_R += computed_R - (sweep.final_R - before_R)
        before_R = torch.where(computed_R > 0, sweep.final_R, before_R)
    assert sweeps_R.tolist() == told.sweeps_R.tolist()
    assert before_R.tolist() == told.steps_R.tolist()
    if not stops:  # else what was committed beyond the stop is in neither
        assert conflicts_R.tolist() == told.conflicts_R.tolist()


# --- errors in a sweep


@pytest.fixture
def planted(monkeypatch):
    """Plant an error in what sweeps compute: `planted(row, step, sweep)`."""

    def plant(row, step, sweep):
        compute, calls = RolloutState.compute, [0]

        def wrong(self, first, stop):
            made, stops = compute(self, first, stop)
            calls[0] += 1
            if calls[0] == sweep and first <= step < stop:
                made[row, step - first] += 0.5
            return made, stops

        monkeypatch.setattr(RolloutState, "compute", wrong)
        return calls

    return plant


def test_an_error_in_a_latent_that_ran_ahead_is_computed_again(planted):
    prompts, reasoner = tiny.prompts([5, 3]), tiny.reasoner("gpt2")
    there = roll(Engine(reasoner, tiny.plan(5)), prompts, range(2), IN_THOUGHTS)
    calls = planted(row=1, step=3, sweep=2)
    here = roll(Engine(reasoner, plan(5, Speculative())), prompts, range(2), IN_THOUGHTS)
    assert calls[0] == 5
    torch.testing.assert_close(here.latents_RTD, there.latents_RTD, **TOLERANCE)


def test_an_error_in_a_latent_that_is_committed_is_found_by_verify(run, planted):
    calls = planted(row=1, step=1, sweep=2)
    line = "schedule=speculative", "schedule.verify=true", "model.latents=4", "sampler=gaussian", "n=2"
    result = run(*line)
    assert calls[0] >= 3
    assert result.code == 1
    assert "schedule.verify: " in result.err
    assert "schedule=sequential" in result.err
    assert "Traceback" not in result.err
    table = pd.read_csv(result.last.parent / "verification.csv")
    assert (table["deviation"] > 0.01).sum() == 1


def test_verify_compares_with_the_sequential_run(run):
    result = run("schedule=speculative", "schedule.verify=true", "model.latents=4", "sampler=gaussian", "n=2")
    assert result.code == 0, result.err
    assert "12 rollouts, largest deviation" in result.out
    assert "0 changed answers" in result.out
    folder = result.last.parent
    table, rollouts = pd.read_csv(folder / "verification.csv"), pd.read_parquet(folder / "rollouts.parquet")
    assert table["deviation"].between(0, 1e-5).all()
    assert not table["changed"].any()
    assert (rollouts["sweeps"] == 3).all()  # the prompt's pass makes the first of 4
    sequential = run("model.latents=4", "sampler=gaussian", "n=2")
    assert (pd.read_parquet(sequential.last.parent / "rollouts.parquet")["sweeps"] == 3).all()
    assert (rollouts["commits"] == 4).all()
    assert (rollouts["conflicts"] == 2 + 1).all()
    assert f"{rollouts['conflicts'].mean():.2f} conflicts" in result.out
    unverified = run("schedule=speculative", "model.latents=4", "sampler=gaussian", "n=2")
    record = json.loads((unverified.last.parent / "run.json").read_text())
    assert record["rollouts"] == {"total": 12, "drawn_now": 0}


def test_a_sweep_says_of_each_job_what_verify_found(run, no_figures):
    line = "schedule=speculative", "schedule.verify=true", "model.latents=3", "sampler=gaussian", "n=2", "task.limit=2"
    result = run(*line, "schedule.chunk=1,3", "-m")
    assert result.code == 0, result.err
    first, second = result.err.split("job 1: ")
    for job in (first, second):
        assert "INFO schedule=speculative, per rollout: 2.00 sweeps" in job
        assert "INFO verified against schedule=sequential: 4 rollouts, largest deviation" in job


def test_a_tolerance_is_stated_in_the_tables_and_its_changed_answers_are_named(place, ltts):
    line = "schedule=speculative", "schedule.tolerance=0.9", "schedule.verify=true", "task.limit=20", "scorer=none"
    result = ltts("run", *line, "n=2", "budget=fixed")
    assert result.code == 0, result.err  # a tolerance promises no equality
    table = pd.read_csv(result.last.parent / "verification.csv")
    assert table["changed"].any()
    assert f"{table['changed'].sum()} changed answers" in result.out
    changed = table[table["changed"]]
    for place, row in enumerate(changed.itertuples()):
        assert (f"question {row.question_id}, rollout {row.rollout}: " in result.out) == (place < 10)
    assert len(changed) > 10
    assert f"and {len(changed) - 10} more, in verification.csv" in result.out
    assert pd.read_csv(result.last)["settings"].str.contains("schedule.tolerance=0.9").all()
    assert "schedule.tolerance=0.9" in result.out


# --- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("chunk", value) for value in (0, -1, 1.5, "2", True)),
        *(("tolerance", value) for value in (-0.1, 1, "much", None, float("nan"))),
        ("guess", "mean"),
        ("verify", "maybe"),
    ],
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(UsageError, match=rf"\Aschedule\.{key}="):
        Speculative(**{key: value})


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.latents=3", "schedule.chunk=4"], ["schedule.chunk=4", "at most model.latents=3"]),
        (["schedule.chunk=0"], ["schedule.chunk=0", "positive integer"]),
        (["schedule.tolerance=-1"], ["schedule.tolerance=-1", "[0, 1)"]),
        (["schedule.guess=sibling", "schedule.tolerance=0.1"], ["schedule.guess=sibling", "schedule.tolerance=0"]),
        (["model.latents=0", "sampler=greedy"], ["schedule=speculative", "no latents"]),
        (["model=demo_pccot", "model.checkpoint=shipped:pccot_arith"], ["schedule=speculative", "own"]),
    ],
)
def test_a_run_refuses(refuse, overrides, words):
    refuse("schedule=speculative", *overrides, words=words)


def test_annotate_refuses_latents_that_run_ahead(place, checkpoint):
    line = "annotate", f"model.checkpoint={checkpoint}", "output=labels", "schedule=speculative"
    check_refused(*line, words=["schedule=speculative", "prefix"])


@pytest.mark.slow
def test_a_run_of_a_model_that_decides_how_many_latents_it_needs(place, ltts):
    line = "run", "budget=fixed", "model=demo_colar", "task.limit=8", "n=2", "sampler=gaussian", "schedule=speculative"
    result = ltts(*line, "schedule.guess=zero", "schedule.chunk=4", "schedule.verify=true")
    assert result.code == 0, result.err
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert rollouts["latent_steps"].nunique() > 1
    assert "0 changed answers" in result.out
