"""`ltts trace` through the command line: what it shows is what the engine computes, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from marks import slow
from refusal import check, check_refused
from safetensors.numpy import load_file

from latent_tts.model.coconut import Coconut

QUESTION = "Ann has 5 apples. She buys 3 more. How many apples does Ann have?"
OTHER = "Ben has 40 pens. He loses 12. How many pens does Ben have?"
SMALL = ("max_answer_tokens=4", "n=4")


@pytest.fixture
def trace(ltts, checkpoint):
    """`ltts trace` on the tiny reasoner."""
    return lambda *arguments: ltts("trace", *arguments, f"model.checkpoint={checkpoint}", *SMALL)


def page(result) -> str:
    assert result.code == 0, result.err
    assert result.last.name == "trace.html"
    return result.last.read_text(encoding="utf-8")


def data_of(result) -> dict:
    [found] = re.findall(r'<script type="application/json" id="trace-data">(.*?)</script>', page(result), re.S)
    return json.loads(found)


def test_maps_tokens_and_scores_are_the_engines_own(ltts, tmp_path):
    result = ltts(
        "trace", "--example", "n=4", "keep_latents=true", "hydra.run.dir=traced", "beside=null", "directions=1"
    )
    data = data_of(result)
    [question] = data["questions"]
    own = question["samplers"][0]
    assert own["name"] == "dropout 0.05"
    latents_NTD = load_file("traced/latents.safetensors")["latents_RTD"]
    assert latents_NTD.shape[:2] == (4, 6)

    adapter = Coconut(name="", checkpoint="shipped:coconut_arith", latents=6, recommended={})
    lm = adapter.load(device="cpu", dtype="float32").lm
    logits = torch.from_numpy(latents_NTD) @ lm.get_output_embeddings().weight.T
    np.testing.assert_array_equal(np.array(own["tokens"])[..., 0], logits.argmax(-1))
    probability = logits.softmax(-1).sort(-1, descending=True).values[..., :5]
    np.testing.assert_allclose(own["probabilities"], probability.detach(), rtol=1e-3, atol=1e-6)
    for place, (_, text) in enumerate(question["results"]):
        [token] = [int(token) for token, shown in data["vocabulary"].items() if shown == text]
        rank = (logits > logits[..., token, None]).sum(-1)
        np.testing.assert_array_equal(np.array(own["ranks"])[..., place], rank)

    there = np.array(question["maps"][0]["points"][0], dtype=float)
    deterministic = np.array(question["maps"][0]["points"][1], dtype=float)
    both = np.concatenate([there.reshape(-1, 2), deterministic.reshape(-1, 2)])
    np.testing.assert_allclose(both.mean(0), 0, atol=1e-4)
    flat = latents_NTD.reshape(-1, latents_NTD.shape[-1]).astype(float)
    ratio = np.linalg.norm(there.reshape(-1, 2)[1:] - there.reshape(-1, 2)[0], axis=1) / np.linalg.norm(
        flat[1:] - flat[0], axis=1
    )
    assert (ratio <= 1.0001).all()
    assert ratio.mean() > 0.5

    rescored = ltts("rescore", "traced", "scorer=latent_rm", "scorer.checkpoint=shipped:coconut_arith_rm")
    assert rescored.code == 0, rescored.err
    scores = pd.read_parquet(rescored.last.with_name("scores.parquet"))
    np.testing.assert_allclose(own["stepScores"], np.stack(scores["step_scores"]), rtol=1e-4)
    np.testing.assert_allclose(own["scores"], scores["score"], rtol=1e-4)
    table = pd.read_parquet("traced/rollouts.parquet")
    assert own["predictions"] == table["prediction"].tolist()
    assert own["correct"] == table["correct"].tolist()


@pytest.mark.slow  # tests/results/test_trace.py has the axes
def test_the_first_map_is_the_plane_of_largest_variance(trace):
    data = data_of(trace(QUESTION, "keep_latents=true", "hydra.run.dir=traced", "beside=null", "sampler=gaussian"))
    points = data["questions"][0]["maps"]
    for drawn in points:
        step = slice(None) if drawn["step"] is None else slice(drawn["step"], drawn["step"] + 1)
        latents = load_file("traced/latents.safetensors")["latents_RTD"][:, step].astype(float)
        there = np.array(drawn["points"][0], dtype=float)
        spread = [np.square(each - each.mean((0, 1))).sum() for each in (latents, there)]
        assert 0 < spread[1] <= spread[0] * 1.001
        assert sum(drawn["explained"]) <= 1.001


def test_several_questions_stand_side_by_side_with_a_row_each(trace):
    result = trace(QUESTION, OTHER, "scorer=none", "beside=gaussian:0.3", "directions=0")
    data = data_of(result)
    assert len(data["questions"]) == 2
    assert [each["name"] for each in data["questions"][1]["samplers"]] == ["dropout 0.05", "gaussian 0.3", "greedy"]
    assert [len(each["predictions"]) for each in data["questions"][1]["samplers"]] == [4, 4, 1]
    assert data["questions"][0]["graph"] is None
    assert QUESTION in page(result)
    assert "No scorer, so no scores." in page(result)
    shown = result.out
    assert "\x1b" not in shown  # it is no terminal
    assert shown.index(QUESTION) < shown.index(OTHER) < shown.index("side by side")
    assert "no dependency graph: left out by directions=0" in shown
    assert "score" not in shown.replace("scorer", "")


def test_a_question_of_a_run_has_the_answers_of_the_run(run, ltts):
    folder = run("scorer=none", "sampler=gaussian", "seed=3").last.parent
    table = pd.read_parquet(folder / "rollouts.parquet")
    ids = list(dict.fromkeys(table["question_id"]))
    result = ltts("trace", ids[2], ids[4][:7], f"run={folder}")
    data = data_of(result)
    for name, question in zip((ids[2], ids[4]), data["questions"], strict=True):
        own = table[table["question_id"] == name]
        assert [each or None for each in question["samplers"][0]["predictions"]] == own["prediction"].tolist()
        assert question["samplers"][0]["correct"] == own["correct"].tolist()
    assert [each["name"] for each in data["questions"][0]["samplers"]] == ["gaussian 0.4", "dropout 0.05", "greedy"]
    assert not [line for line in result.err.splitlines() if "drawn again" in line]
    fewer = data_of(ltts("trace", ids[2], f"run={folder}", "n=2", "beside=null", "directions=0"))
    assert fewer["questions"][0]["samplers"][0]["predictions"] == data["questions"][0]["samplers"][0]["predictions"][:2]
    first = page(ltts("trace", f"run={folder}", "beside=null", "directions=0"))
    assert f"question {ids[0]}" in first


def test_a_run_whose_rollouts_are_gone_is_drawn_again(own_copy, ltts, tmp_path):
    result = ltts("trace", f"run={own_copy}", f"paths.cache={tmp_path / 'empty'}", "directions=0")
    [question] = data_of(result)["questions"]
    table = pd.read_parquet(own_copy / "rollouts.parquet")
    own = table[table["question_id"] == table["question_id"].iloc[0]]
    assert [each or None for each in question["samplers"][0]["predictions"]] == own["prediction"].tolist()


@pytest.mark.parametrize(
    ("schedule", "conflicts"), [("speculative", True), slow("jacobi", False), slow("sequential", False)]
)
def test_the_timeline_adds_up_to_what_the_schedule_counts(trace, schedule, conflicts):
    more = ["schedule.sweeps=3", "schedule.chunk=4"] if schedule == "jacobi" else []
    own = data_of(trace(QUESTION, f"schedule={schedule}", *more, "beside=null", "directions=0"))["questions"][0][
        "samplers"
    ][0]
    first, stop, final = (np.array(own["sweeps"][name]) for name in ("first", "stop", "final"))
    assert (final[:, -1] == 6).all()
    assert (np.diff(final, axis=1) >= 0).all()
    computed = stop - first
    assert (computed > 0).sum(1).tolist() == own["counts"]["sweeps"]
    if schedule == "jacobi":
        assert final[0].tolist() == [1, 2, 4, 5, 6]
        return
    committed = np.diff(final, axis=1, prepend=0)
    assert committed.sum(1).tolist() == own["counts"]["commits"]
    assert (computed - committed).sum(1).tolist() == own["counts"]["conflicts"]
    assert (np.array(own["counts"]["conflicts"]) > 0).all() == conflicts


@pytest.mark.slow
def test_a_model_that_decides_how_many_latents_it_needs(ltts):
    result = ltts("trace", "task=arith", "task.limit=4", "model=demo_colar", "n=2", "directions=1", "beside=null")
    data = data_of(result)
    steps = [steps for question in data["questions"] for steps in question["samplers"][0]["steps"]]
    assert len(set(steps)) > 1
    for question in data["questions"]:
        own = question["samplers"][0]
        for rollout, count in enumerate(own["steps"]):
            points = question["maps"][0]["points"][0][rollout]
            assert [point[0] is not None for point in points] == [step < count for step in range(len(points))]
            assert [row[0] >= 0 for row in own["tokens"][rollout]] == [step < count for step in range(len(points))]
        greedy = question["samplers"][-1]["steps"][0]
        assert len(question["graph"]["relative"]) == greedy


@pytest.mark.slow
def test_every_answer_is_shown_where_a_run_decodes_only_its_picks(ltts):
    line = ["--example", "n=4", "answer.decode=winners", "beside=null", "directions=0", "hydra.run.dir=traced"]
    drawn = data_of(ltts("trace", *line))["questions"][0]["samplers"][0]
    assert None not in drawn["predictions"]
    assert (pd.read_parquet("traced/rollouts.parquet")["stop_reason"] == "not_decoded").sum() == 3
    again = data_of(ltts("trace", "run=traced", "beside=null", "directions=0"))["questions"][0]["samplers"][0]
    assert again == drawn


@pytest.mark.slow
def test_a_budget_that_looks_at_rollouts_has_one_pick_and_its_own_counts(ltts):
    line = [
        "task=arith",
        "task.limit=3",
        "n=16",
        "budget=adaptive",
        "budget/rule=posterior",
        "budget.rule.threshold=0.7",
        "budget.round=8",
        "beside=null",
        "directions=0",
        "hydra.run.dir=traced",
    ]
    result = ltts("trace", *line)
    table, budget = pd.read_parquet("traced/rollouts.parquet"), pd.read_parquet("traced/budget.parquet")
    counts = budget["used"].tolist()
    assert sum(counts) < len(table)
    answers = [json.loads(line) for line in Path("traced/answers.jsonl").read_text().splitlines()]
    for answer, own in zip(answers, data_of(result)["questions"], strict=True):
        assert (
            own["samplers"][0]["predictions"][answer["picks"]["majority"]["rollout"]]
            == answer["picks"]["majority"]["answer"]
        )
    assert [len(each["samplers"][0]["steps"]) for each in data_of(result)["questions"]] == counts
    assert "majority" in result.out
    assert "best_of_n" not in result.out
    again = ltts("trace", *table["question_id"].unique(), "run=traced", "beside=null", "directions=0")
    assert data_of(again)["questions"] == data_of(result)["questions"]


def test_a_model_with_sweeps_of_its_own_has_a_timeline_and_no_graph(ltts):
    result = ltts("trace", "--example", "model=demo_pccot", "n=2", "beside=null", "scorer=none")
    [question] = data_of(result)["questions"]
    assert question["graph"] is None
    assert "sweeps of its own" in page(result)
    assert "sweeps of rollout 0" in result.out


def test_words_for_latents_of_the_built_in_reasoner(ltts):
    shown = ltts("trace", "--example", "n=2", "beside=null", "directions=0").out
    assert re.search(r"1 +38 +9\d +38 of step 1: 100 %", shown)
    assert re.search(r"greedy +7 +yes +-[0-9.]+ +38 7 7 7 7 7", shown)


def test_it_refuses_questions_that_are_none(ltts):
    check(ltts("trace"), "no question", "ltts trace --example")
    check(ltts("trace", ""), "question=''", "is empty")
    check(ltts("trace", QUESTION, "--example"), "has questions of its own")


ASKED = f"question=['{QUESTION}']"


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=arith", "task.limit=9"], ["task.limit=9", "at most 8 questions"]),
        (["task=arith", "task.limit=1", "model=demo_cot", "sampler=greedy"], ["model.latents=0", "shows latents"]),
        ([ASKED, "maps=[umap]"], ["maps=[umap]", "pca and tsne"]),
        ([ASKED, "maps=[]"], ["maps=[]"]),
        ([ASKED, "top=0"], ["top=0", "1 to 20"]),
        ([ASKED, "threshold=0"], ["threshold=0", "a positive number"]),
        ([ASKED, "directions=-1"], ["directions=-1"]),
        ([ASKED, "beside=nosuch"], ["beside=nosuch", "dropout, gaussian, greedy"]),
        ([ASKED, "beside='gaussian:much'"], ["sampler.sigma=much"]),
        ([ASKED, "beside='gaussian:-1'"], ["sigma=-1"]),
        ([ASKED, "beside='greedy:1'"], ["beside=greedy:1", "no parameter"]),
        ([ASKED, "beside=native"], ["sampler=native", "predicts no spread"]),
        ([ASKED, "beside='control:shuffle'"], ["beside=control", "has no place"]),
        ([ASKED, "n=0"], ["n=0"]),
        (["run=nowhere"], ["run=nowhere", "a completed run"]),
    ],
)
def test_it_refuses(place, overrides, words):
    check_refused("trace", *overrides, words=words)


def test_it_refuses_what_a_run_does_not_have(completed, ltts, monkeypatch):
    def loading(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("latent_tts.checkpoint.loading.load_causal_lm", loading)
    check(
        ltts("trace", "0123456789abcdef", f"run={completed}"), "question=0123456789abcdef", "answers.jsonl", "such as"
    )
    check(ltts("trace", f"run={completed}", "n=9"), "n=9", "must be 1 to 4")
    check(ltts("trace", f"run={completed}", "sampler=gaussian"), "sampler=gaussian: run=", "has its own")
    check(ltts("trace", f"run={completed}", "seed=1"), "seed=1", "has its own")
    check(ltts("trace", f"run={completed}", "question=[a,'']"), "question=a", "no question of this run")
    check(ltts("trace", completed), f"question={completed}: is a run's folder; ltts trace run={completed} shows")


def test_tsne_without_scikit_learn_is_refused_by_its_extra(ltts, monkeypatch):
    monkeypatch.setattr("latent_tts.pipeline.trace_spec.find_spec", lambda name: None)
    check(ltts("trace", QUESTION, "maps=[pca,tsne]"), "maps=[pca,tsne]", "pip install '.[trace]'")


@pytest.mark.slow
def test_both_maps_are_drawn_where_scikit_learn_is_there(trace):
    pytest.importorskip("sklearn")
    maps = data_of(trace(QUESTION, "maps=[pca,tsne]", "directions=0"))["questions"][0]["maps"]
    assert [(each["method"], each["step"]) for each in maps] == [
        (name, step) for name in ("pca", "tsne") for step in (None, *range(6))
    ]
    assert all(each["explained"] is None for each in maps if each["method"] == "tsne")
