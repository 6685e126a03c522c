"""`ltts probe` through the command line."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from refusal import check_refused

from latent_tts.errors import UsageError
from latent_tts.pipeline import probing
from latent_tts.pipeline.probe_spec import chosen_guesses
from latent_tts.pipeline.probing import Probe, label
from latent_tts.schedule.speculative import Speculative


@pytest.fixture
def probe(ltts, checkpoint):
    line = f"model.checkpoint={checkpoint}", "model.latents=4", "task.limit=5", "max_answer_tokens=4"
    return lambda *more: ltts("probe", *line, *more)


def test_it_writes_what_it_finds(probe, tmp_path):
    result = probe("tolerances=[0,0.3]", "directions=2", "output=found")
    assert result.code == 0, result.err
    questions = pd.read_csv(result.last)
    assert len(questions) == 5
    assert (questions["latents"] == 4).all()
    assert questions["critical_path"].between(1, 4).all()
    np.testing.assert_allclose(questions["potential"], 4 / questions["critical_path"], rtol=1e-5)
    assert (questions["sweeps_token_0"] <= 3).all()  # the prompt's pass makes the first latent
    assert (questions["sweeps_token_0.3"] <= questions["sweeps_token_0"]).all()
    assert questions["equal_zero_0"].all()
    relative = pd.read_csv(result.last.parent / "dependencies.csv", index_col=0)
    assert (relative.to_numpy()[np.triu_indices(4)] == 0).all()
    assert relative.to_numpy()[np.tril_indices(4, -1)].min() > 0
    assert (result.last.parent / "dependencies.png").stat().st_size > 5000
    assert f"growth rate {questions['growth'].mean():+.2f}" in result.out
    assert "recommended: schedule=" in result.out


def test_a_latent_per_sweep_is_one_commit_per_sweep():
    found = Probe(pd.DataFrame({"latents": [4, 2], "sweeps_token_0": [3, 1]}), np.zeros((4, 4)), [])
    assert found.commits_per_sweep(Speculative()) == 1


def test_the_best_schedule_is_tried_in_chunks_too(probe, monkeypatch):
    monkeypatch.setattr(probing, "MIN_EQUAL", 0)
    monkeypatch.setattr(probing, "MIN_COMMITS_PER_SWEEP", 0)
    result = probe("tolerances=[0.9]", "guesses=[zero]", "chunks=[3]", "directions=1", "max_answer_tokens=1")
    assert result.code == 0, result.err
    questions = pd.read_csv(result.last)
    assert (questions["conflicts_zero_0.9_3"] <= questions["conflicts_zero_0.9"]).all()
    plan = json.loads((result.last.parent / "plan.json").read_text())
    assert (plan["max_rows"] == 0) == (plan["schedule"] is None)


@pytest.mark.slow
def test_what_it_finds_is_the_same_again(probe):
    tables = [pd.read_csv(probe(f"output={name}", "task.limit=3").last) for name in ("one", "other")]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.slow  # `ltts trace` measures the same of such a model
def test_a_model_that_decides_how_many_latents_it_needs(place, ltts):
    result = ltts("probe", "model=demo_colar", "task.limit=4", "directions=1", "tolerances=[0.1]")
    assert result.code == 0, result.err
    questions = pd.read_csv(result.last)
    assert questions["latents"].nunique() > 1
    assert (questions["critical_path"] <= questions["latents"]).all()


def test_by_default_every_guess_is_tried_that_the_model_can_make():
    class NoToken:
        @property
        def latent_id(self):
            raise UsageError("none")

    assert chosen_guesses(None, None, NoToken()) == ["zero"]
    assert chosen_guesses(None, "head.safetensors", NoToken()) == ["zero", "draft"]


def found(**outcomes):
    """A probe of four questions of 6 latents: sweeps and equal answers of each schedule, by GUESS_TENTHS."""
    table: dict = {"latents": 6, "growth": np.arange(4.0)}
    schedules = []
    for name, (sweeps, equal) in outcomes.items():
        guess, tenths = name.split("_")
        schedules.append(Speculative(None, int(tenths) / 10, guess))
        table |= {f"sweeps_{label(schedules[-1])}": sweeps, f"equal_{label(schedules[-1])}": equal}
    return Probe(pd.DataFrame(table, index=range(4)), np.zeros((6, 6)), schedules)


def test_a_tolerance_is_recommended_where_it_pays_and_answers_stay():
    assert found(token_0=(6, True), token_1=(3, True)).recommended == Speculative(None, 0.1, "token")
    assert found(token_0=(6, True), token_1=(5, True)).recommended is None  # 1.2 latents per sweep
    assert found(token_0=(6, True), token_1=(3, [True, True, True, False])).recommended is None


def test_the_guess_with_the_fewest_sweeps_is_recommended_and_the_smallest_tolerance_of_equal_ones():
    assert found(token_1=(3, True), zero_1=(2, True)).recommended == Speculative(None, 0.1, "zero")
    assert found(token_3=(3, True), token_1=(3, True)).recommended == Speculative(None, 0.1, "token")
    assert found(token_1=(3, True), zero_1=(2, False)).recommended == Speculative(None, 0.1, "token")


@pytest.mark.parametrize(
    ("sweeps", "equal", "chunk"),
    [([3, 3], True, 2), ([3, 3.1], True, 2), ([3, 3.5], True, 3), ([3.5, 3.5], True, None), ([3, 3], False, None)],
)
def test_the_smallest_chunk_that_takes_hardly_more_sweeps_is_recommended(sweeps, equal, chunk):
    made = found(zero_1=(3, True))
    chunked = [Speculative(3, 0.1, "zero"), Speculative(2, 0.1, "zero")]
    made.questions[[f"sweeps_{label(each)}" for each in chunked]] = sweeps
    made.questions[[f"equal_{label(each)}" for each in chunked]] = equal
    assert replace(made, chunked=chunked).recommended == Speculative(chunk, 0.1, "zero")


def test_growth_explains_sweeps_where_they_differ():
    schedule = Speculative(None, 0.1, "token")
    assert found(token_1=([1, 2, 3, 4], True)).explained(schedule) == pytest.approx(1)
    assert np.isnan(found(token_1=(3, True)).explained(schedule))


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tolerances=[-1]"], ["schedule.tolerance=-1", "[0, 1)"]),
        (["tolerances=[]"], ["tolerances=[]"]),
        (["chunks=[0]"], ["schedule.chunk=0"]),
        (["chunks=[9]"], ["schedule.chunk=9", "at most model.latents=6"]),
        (["guesses=[token,sibling]"], ["guesses=[token,sibling]", "token, zero, draft"]),
        (["guesses=[]"], ["guesses=[]", "token, zero, draft"]),
        (["guesses=[draft]"], ["schedule.draft=null"]),
        (["guesses=[zero]", "draft=head.safetensors"], ["draft=head.safetensors", "guesses"]),
        (["threshold=0"], ["threshold=0", "a positive number"]),
        (["directions=0"], ["directions=0", "a positive integer"]),
        (["model.latents=0"], ["model=", "has no latents to probe"]),
        (["model=demo_pccot"], ["model=demo_pccot", "without sweeps of its own"]),
    ],
)
def test_it_refuses(place, overrides, words):
    check_refused("probe", *overrides, words=words)
