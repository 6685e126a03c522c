"""Budgets that look at rollouts: `ltts run` draws what `ltts replay` would have drawn, and ends where it does."""

import gc
import json
import threading
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scripted
import tiny
from marks import slow
from places import place_of_its_own
from refusal import check_refused

from latent_tts import cli
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.rollout import Engine
from latent_tts.pipeline import models
from latent_tts.results.run_folder import BUDGET_COLUMNS, read_metrics
from latent_tts.sampler.greedy import Greedy

N = 12
# of twelve rollouts most are 42, so that some questions stop early and others do not
TEXTS = {"coconut": ["# 42", "# 7", "# so"], "codi": ["The answer is: 42", "The answer is: 7", "The answer is: so"]}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """By family the start of a command line: a reasoner that writes one of three answers, one of them unreadable."""

    def line(family: str) -> list[str]:
        folder = scripted.make(tmp_path_factory.mktemp("scripted") / "model", family, *TEXTS[family])
        scorer = tiny.write_latent_rm(folder.parent / "rm", folder)
        return [
            f"model={family}", f"model.checkpoint={folder}", "model.latents=2", "task.limit=5", f"n={N}",
            "sampler=gaussian", "sampler.sigma=0.4", "answer.temperature=1", "max_answer_tokens=4",
            "scorer=latent_rm", f"scorer.checkpoint={scorer}",
        ]  # fmt: skip

    return {family: line(family) for family in TEXTS}


@pytest.fixture(scope="module")
def family(lines):
    return lines["coconut"]


@pytest.fixture(scope="module")
def full_of(lines, tmp_path_factory):
    """The folder of a family's run of all rollouts, which no test may change."""

    @cache
    def full(family: str) -> Path:
        folder = tmp_path_factory.mktemp("full")
        with place_of_its_own(folder):
            assert cli.main(["run", *lines[family], "budget=fixed", "hydra.run.dir=full"]) == 0
        return folder / "full"

    return full


@pytest.fixture(scope="module")
def full(full_of):
    return full_of("coconut")


BUDGETS = {
    "lockout": ["budget=adaptive", "budget.round=3"],
    "weighted": ["budget=adaptive", "budget.rule.aggregator=weighted", "scorer.range=[-1000,1000]"],
    "certified": ["budget=adaptive", "budget/rule=certified", "budget.rule.delta=0.9", "budget.round=1"],
    "posterior": ["budget=adaptive", "budget/rule=posterior", "budget.rule.threshold=0.7", "budget.first=2"],
    "confidence": ["budget=adaptive", "budget/rule=confidence", "budget.rule.by=score", "budget.rule.threshold=0.6"],
    "reward": ["budget=adaptive", "budget/rule=reward", "budget.rule.cost=0.01", "budget.round=2"],
    "shared": ["budget=shared", "budget.total=33", "budget.step=0.4"],
    "gflop": ["budget=shared", "budget.total=0.00012", "budget.unit=gflop", "budget.round=2"],
    "best": ["budget=shared", "budget.total=40", "budget.aggregator=best_of_n"],
}


CASES = [(family, name) for family in TEXTS for name in BUDGETS]
QUICK = {("codi", "shared")}


@pytest.mark.parametrize(("family", "name"), [case if case in QUICK else slow(*case) for case in CASES])
def test_live_picks_and_drawn_are_those_of_the_replay(ltts, lines, full_of, family, name):
    full, family = full_of(family), lines[family]
    budget = list(BUDGETS[name])
    if name == "confidence":
        assert ltts("run", *family, "budget=fixed", "task.split=valid", "hydra.run.dir=valid").code == 0
        budget.append("budget.rule.calibration=valid")
    live = ltts("run", *family, *budget, "hydra.run.dir=live")
    assert live.code == 0, live.err
    assert live.err.count("rollouts to draw") == live.err.count("INFO rounds: ") == 1
    replayed = ltts("replay", full, *budget, "hydra.run.dir=replayed")
    assert replayed.code == 0, replayed.err
    tables = [pd.read_parquet(result.last.with_name("budget.parquet")) for result in (live, replayed)]
    pd.testing.assert_frame_equal(*tables)
    table = tables[0]
    settings = [read_metrics(result.last)["settings"].unique().tolist() for result in (live, replayed)]
    assert ["scorer.range" in text for [text] in settings] == [name == "weighted"] * 2
    for result in (live, replayed):
        lines_of = pd.read_json(result.last.with_name("answers.jsonl"), lines=True, dtype=False)
        assert lines_of["why"].tolist() == table["why"].tolist()
        certificates = lines_of.get("certificate", table["why"].map(lambda _: None))
        assert certificates.fillna("").tolist() == table["certificate"].tolist()
    assert list(table) == BUDGET_COLUMNS
    assert (table["used"] <= table["drawn"]).all()
    assert table["drawn"].max() <= N

    rows, whole = (pd.read_parquet(folder / "rollouts.parquet") for folder in (Path("live"), full))
    assert rows.groupby("question_id", sort=False).size().tolist() == table["drawn"].tolist()
    same = [name for name in rows if name != "score"]
    prefix = whole.merge(rows[["question_id", "rollout"]], on=["question_id", "rollout"])
    pd.testing.assert_frame_equal(rows[same], prefix[same])

    live_metrics, replay_metrics = read_metrics(live.last), read_metrics(replayed.last)
    assert live_metrics["n"].unique().tolist() == [N]
    keys, stable = ["metric", "aggregator"], {*replay_metrics["metric"]} - {"recorded_seconds"}
    one, other = (each[each["metric"].isin(stable)].set_index(keys)["value"] for each in (live_metrics, replay_metrics))
    pd.testing.assert_series_equal(one, other.reindex(one.index))
    reported = live_metrics[live_metrics["value"].notna() & (live_metrics["metric"] == "accuracy")]
    assert len(reported) == 1
    assert reported["value"].iloc[0] == pytest.approx(table["correct"].mean())
    assert live_metrics.set_index("metric")["value"]["rollouts_drawn"] == pytest.approx(table["drawn"].mean())
    record = json.loads((live.last.parent / "run.json").read_text())
    assert record["budget"]["drawn"] == table["drawn"].sum() == record["rollouts"]["drawn_now"]
    if "scored_now" in record["rollouts"]:
        assert record["rollouts"]["scored_now"] == table["drawn"].sum()


def test_the_vote_of_lockout_is_that_of_all_rollouts_and_costs_fewer(ltts, family, full):
    assert ltts("run", *family, "budget=adaptive", "budget.round=1", "hydra.run.dir=live").code == 0
    table, whole = pd.read_parquet("live/budget.parquet"), pd.read_parquet(full / "rollouts.parquet")
    for question, answer in zip(table["question_id"], table["answer"], strict=True):
        votes = whole[whole["question_id"] == question]["prediction"].dropna().value_counts()
        assert votes[answer] == votes.max()
    assert table["used"].equals(table["drawn"])
    assert table["drawn"].sum() < N * len(table)
    compared = ltts("compare", "live", full)
    assert compared.code == 0, compared.err
    assert "majority" in compared.out
    assert "coverage" not in compared.out
    assert " 0.0 [" in compared.out


def test_rounds_share_an_engine_with_its_recordings_which_goes_with_its_model(ltts, family, monkeypatch):
    opened, alive, load = [], [], CheckpointAdapter.load

    def open_engine(*parts):
        engine = Engine(*parts[:2])
        opened.append(weakref.ref(engine))
        return engine

    def watched_load(adapter, **how):
        gc.collect()
        alive.append([engine() is not None for engine in opened])
        return load(adapter, **how)

    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "open_engine", open_engine)
    monkeypatch.setattr(CheckpointAdapter, "load", watched_load)
    line = ["run", *family, "budget=adaptive", "budget.round=1"]
    for dtype in ("float32", "bfloat16"):
        assert ltts(*line, f"engine.dtype={dtype}", f"hydra.run.dir={dtype}").code == 0
    assert alive == [[], [False]]
    assert len(opened) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_share_a_sampler_and_an_engine_goes_with_its_sampler(monkeypatch, temperature):
    monkeypatch.setattr(models, "_loaded", {})
    one, other = (SimpleNamespace(sampler=Greedy(), answers=AnswerSampling(temperature)) for _ in range(2))
    kept = models.sampler_of(one)
    models._loaded["engine"] = (), None
    assert models.sampler_of(one) is kept
    assert "engine" in models._loaded
    assert models.sampler_of(other) is not kept
    assert "engine" not in models._loaded


def test_rounds_go_on_from_the_cache_and_a_refresh_draws_each_rollout_once(ltts, family):
    line = ["run", *family, "budget=adaptive", "budget.round=3"]
    first = ltts(*line, "hydra.run.dir=one")
    assert first.code == 0, first.err
    again, refreshed = ltts(*line, "hydra.run.dir=two"), ltts(*line, "cache=refresh", "hydra.run.dir=three")
    records = [json.loads((result.last.parent / "run.json").read_text()) for result in (first, again, refreshed)]
    drawn = records[0]["budget"]["drawn"]
    assert [record["rollouts"]["drawn_now"] for record in records] == [drawn, 0, drawn]
    tables = [pd.read_parquet(f"{folder}/budget.parquet") for folder in ("one", "two", "three")]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])


@pytest.mark.slow
def test_thresholds_make_a_curve_and_seeds_a_mean(ltts, family, full, no_figures):
    assert ltts("run", *family, "budget=fixed", "seed=1", "hydra.run.dir=other").code == 0
    line = ["budget/rule=posterior", "budget.rule.threshold=0.6,0.9", "budget.round=1", "-m", "hydra.sweep.dir=curve"]
    assert ltts("replay", full, *line).code == 0
    table = read_metrics_of("curve/metrics.csv")
    assert table["budget"].nunique() == 2
    drawn = table[table["metric"] == "rollouts_drawn"].set_index("budget")["value"].sort_index()
    assert drawn.is_monotonic_increasing
    assert "recorded_seconds" in set(table["metric"])

    for seed, drawn in enumerate([full, "other"]):
        assert ltts("replay", drawn, f"hydra.run.dir=replayed/{seed}").code == 0
    assert ltts("collect", "replayed", "output=collected.csv").code == 0
    means = read_metrics_of("collected_over_seeds.csv")
    majority = means[(means["metric"] == "accuracy") & (means["aggregator"] == "majority")].iloc[0]
    assert majority["seeds"] == 2
    assert majority["ci_low"] <= majority["value"] <= majority["ci_high"]
    assert means[(means["metric"] == "coverage")]["value"].isna().all()


def read_metrics_of(path: str) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values={"value": [""], "ci_low": [""], "ci_high": [""]})


REFUSED = {
    "reward without a scorer": (
        ["budget=adaptive", "budget/rule=reward", "aggregator=[majority]"],
        ["budget/rule=reward: needs scores", "no scorer"],
    ),
    "an aggregator that is not reported": (
        ["budget=adaptive", "aggregator=[likelihood]"],
        ["budget/rule=lockout: looks at the pick of majority, which is not reported", "[likelihood]"],
    ),
    "winners": (["budget=adaptive", "answer.decode=winners"], ["answer.decode=winners"]),
    "a beam": (["budget=adaptive", "search=beam", "n=16"], ["budget=adaptive: must be fixed", "search=beam depend on"]),
    "delta of 0": (
        ["budget=adaptive", "budget/rule=certified", "budget.rule.delta=0"],
        ["budget.rule.delta=0", "(0, 1)"],
    ),
    "delta of 1": (
        ["budget=adaptive", "budget/rule=certified", "budget.rule.delta=1"],
        ["budget.rule.delta=1", "(0, 1)"],
    ),
    "a small total": (["budget=shared", "budget.total=5"], ["budget.total=5", "6 questions", "24 rollouts"]),
    "no total": (["budget=shared"], ["budget.total"]),
    "a rule without its budget": (["budget/rule=certified"], ["budget/rule"]),
    "no such rule": (["budget=adaptive", "budget/rule=lucky"], ["budget/rule=lucky", "certified, confidence"]),
    "no such key": (["budget=adaptive", "budget.rule.detla=0.1"], ["budget.rule.detla"]),
    "no calibration": (["budget=adaptive", "budget/rule=confidence"], ["budget.rule.calibration=null", "valid"]),
    "no run to calibrate on": (
        ["budget=adaptive", "budget/rule=confidence", "budget.rule.calibration=nowhere"],
        ["budget.rule.calibration=nowhere", "no run.json"],
    ),
    "a range upside down": (
        ["scorer.range=[2,1]"],
        ["scorer.range=[2,1]", "ascending order"],
    ),
}  # fmt: skip


@pytest.mark.every_other
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_budget_cannot_look_at_is_named(refuse, case):
    overrides, words = REFUSED[case]
    refuse(*overrides, words=words)


def test_a_weighted_lead_without_a_range_is_refused_and_a_score_beyond_it_an_error(ltts, family):
    line = ["run", *family, "budget=adaptive", "budget.rule.aggregator=weighted"]
    check_refused(*line, words=["budget/rule=lockout: bounds", "no declared range", "scorer.range"])
    result = ltts(*line, "scorer.range=[0,1e-9]")
    assert result.code == 1
    assert "scorer.range=[0,1e-09]: a rollout has the score" in result.err
    official = ["scorer.range=[-9,9]", "scorer.positions=official"]
    check_refused(*line, *official, words=["scorer.positions=official", "correct"])


def test_a_scorer_that_a_budget_does_not_read_is_not_warned_of(ltts):
    refused = "run", "sampler=gaussian", "max_answer_tokens=0"  # after the scorer was checked
    assert "scores gaussian" in ltts(*refused).err
    assert "scores gaussian" in ltts(*refused, "budget=adaptive", "budget/rule=reward").err
    assert "scores gaussian" not in ltts(*refused, "budget=adaptive").err


def test_certified_refuses_answers_that_are_compared_by_value(place, family, tmp_path):
    (tmp_path / "task.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    line = ["task=jsonl", f"task.path={tmp_path / 'task.jsonl'}", "task.answer=latex", "budget=adaptive"]
    words = ["budget/rule=certified", "equal as strings"]
    check_refused("run", *family, *line, "budget/rule=certified", words=words)


def test_a_calibration_on_the_questions_of_the_run_is_refused(place, family, full):
    line = ["budget=adaptive", "budget/rule=confidence", f"budget.rule.calibration={full}"]
    check_refused("run", *family, *line, words=[f"budget.rule.calibration={full}", "5 of the questions"])
    words = [f"budget.rule.calibration={full}", "another sampler"]
    check_refused("run", *family, "sampler.sigma=0.3", *line, words=words)


def test_a_run_without_randomness_has_one_rollout_to_replay(ltts, family):
    greedy = "sampler=greedy", "answer.temperature=0", "budget=fixed", "hydra.run.dir=greedy"
    line = [each for each in family if not each.startswith(("sampler", "answer.temperature"))]
    assert ltts("run", *line, *greedy).code == 0
    result = ltts("replay", "greedy", "budget=adaptive")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_calibration_on_other_rollouts_or_scores_is_refused(ltts, family):
    valid = ["task.split=valid", "budget=fixed"]
    assert ltts("run", *family, *valid, "hydra.run.dir=valid").code == 0
    assert ltts("run", *family, "task.split=valid", "budget=adaptive", "hydra.run.dir=adaptive").code == 0
    line = ["run", *family, "budget=adaptive", "budget/rule=confidence"]
    check_refused(*line, "budget.rule.calibration=adaptive", words=["its budget stopped questions early"])
    line.append("budget.rule.calibration=valid")
    for other, group in [
        ("model.latents=3", "model"), ("answer.temperature=0.5", "answer"), ("max_answer_tokens=3", "max_answer_tokens")
    ]:  # fmt: skip
        check_refused(*line, other, words=["budget.rule.calibration=valid", f"another {group}, or other settings"])
    check_refused(*line, "budget.rule.by=score", "scorer.reduce=last", words=["another scorer, or other settings"])
    line.append("budget.rule.by=score")
    assert ltts(*line).code == 0
    words = ["the schedule sequential; calibrate on one of jacobi sweeps=1"]
    check_refused(*line, "schedule=jacobi", "schedule.sweeps=1", words=words)
    assert ltts(*line, "schedule=speculative").code == 0  # the same latents
    other = ltts(*line, "engine.dtype=bfloat16")
    assert other.code == 0, other.err
    assert "that run used engine.dtype=float32, this one uses bfloat16" in other.err


def test_a_replay_names_what_it_cannot_replay(ltts, family, full):
    assert ltts("run", *family, "budget=adaptive", "hydra.run.dir=live").code == 0
    check_refused("replay", "run=nowhere", words=["run=nowhere", "run.json"])
    check_refused("replay", "run=live", words=["run=live", "all n rollouts"])
    check_refused("replay", f"run={full}", "budget=fixed", words=["budget=fixed", "adaptive or shared"])
    check_refused("replay", f"run={full}", "n=13", words=["n=13", "1 to 12"])
    check_refused("rescore", "run=live", "scorer=latent_rm", family[-1], words=["run=live", "budget=adaptive"])
    half = ltts("replay", full, "n=6", "hydra.run.dir=half")
    assert half.code == 0
    assert pd.read_parquet("half/budget.parquet")["drawn"].max() <= 6
    assert np.isfinite(read_metrics(half.last)["n"]).all()


def test_answers_are_read_while_the_next_batch_is_drawn(ltts, family, monkeypatch):
    readers, read = [], CheckpointAdapter.read_answer

    def remember(self, *arguments):
        readers.append(threading.current_thread().name)
        return read(self, *arguments)

    monkeypatch.setattr(CheckpointAdapter, "read_answer", remember)
    result = ltts("run", *family, *BUDGETS["lockout"], "engine.rows=3", "hydra.run.dir=ahead")
    assert result.code == 0, result.err
    assert "answer reader_0" in readers
    assert readers.count("answer reader_0") < N * 5  # equal ones are read once
