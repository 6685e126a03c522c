"""`ltts probe` through the command line."""

import numpy as np
import pandas as pd
import pytest
from refusal import check_refused

from latent_tts.pipeline.probing import Probe


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
    assert (questions["sweeps_0"] <= 3).all()  # the prompt's pass makes the first latent
    assert (questions["sweeps_0.3"] <= questions["sweeps_0"]).all()
    assert questions["equal_0"].all()
    relative = pd.read_csv(result.last.parent / "dependencies.csv", index_col=0)
    assert (relative.to_numpy()[np.triu_indices(4)] == 0).all()
    assert relative.to_numpy()[np.tril_indices(4, -1)].min() > 0
    assert (result.last.parent / "dependencies.png").stat().st_size > 5000
    assert f"growth rate {questions['growth'].mean():+.2f}" in result.out
    assert "recommended: schedule=" in result.out


@pytest.mark.slow
def test_what_it_finds_is_the_same_again(probe):
    tables = [pd.read_csv(probe(f"output={name}", "task.limit=3").last) for name in ("one", "other")]
    pd.testing.assert_frame_equal(*tables)


def test_a_model_that_decides_how_many_latents_it_needs(place, ltts):
    result = ltts("probe", "model=demo_colar", "guess=zero", "task.limit=4", "directions=1", "tolerances=[0.1]")
    assert result.code == 0, result.err
    questions = pd.read_csv(result.last)
    assert questions["latents"].nunique() > 1
    assert (questions["critical_path"] <= questions["latents"]).all()


def found(sweeps, equal, growth):
    table = {"latents": 6, "growth": growth, "sweeps_0": 6, "equal_0": True, "sweeps_0.1": sweeps, "equal_0.1": equal}
    return Probe(pd.DataFrame(table, index=range(len(growth))), np.zeros((6, 6)), [0.0, 0.1])


def test_a_tolerance_is_recommended_where_it_pays_and_answers_stay():
    growth = np.arange(4.0)
    assert found(3, True, growth).recommended == 0.1
    assert found(5, True, growth).recommended is None  # 1.2 latents per sweep
    assert found(3, [True, True, True, False], growth).recommended is None


def test_growth_explains_sweeps_where_they_differ():
    growth = np.arange(4.0)
    assert found([1, 2, 3, 4], True, growth).explained(0.1) == pytest.approx(1)
    assert np.isnan(found(3, True, growth).explained(0.1))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tolerances=[-1]"], ["schedule.tolerance=-1", "[0, 1)"]),
        (["tolerances=[]"], ["tolerances=[]"]),
        (["chunk=0"], ["schedule.chunk=0"]),
        (["chunk=9"], ["schedule.chunk=9", "at most model.latents=6"]),
        (["guess=sibling"], ["guess=sibling", "token, zero or draft"]),
        (["guess=draft"], ["schedule.draft=null"]),
        (["threshold=0"], ["threshold=0", "a positive number"]),
        (["directions=0"], ["directions=0", "a positive integer"]),
        (["model.latents=0"], ["no latents"]),
        (["model=demo_pccot"], ["model=demo_pccot", "without sweeps of its own"]),
    ],
)
def test_it_refuses(place, overrides, words):
    check_refused("probe", *overrides, words=words)
