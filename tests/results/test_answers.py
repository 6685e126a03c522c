"""`answers.jsonl`, and runs on questions without gold answers."""

import json
import math
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from refusal import check
from tables import picked_accuracy, rollout_lists

from latent_tts.aggregator import Picks
from latent_tts.aggregator.best_of_n import BestOfN
from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.aggregator.majority import Majority
from latent_tts.aggregator.weighted import Weighted
from latent_tts.errors import UsageError
from latent_tts.pipeline.temperature import choose_temperature
from latent_tts.results import statistics
from latent_tts.results.plot import scaling_figure
from latent_tts.results.run_folder import read_metrics
from latent_tts.task.arith import Arith
from latent_tts.task.jsonl import Jsonl
from latent_tts.types import Question, RolloutArrays

TEXT = "Gina has 21 books. How many books does Gina have?"
VALUES = [-2.0, 0.0, 0.5, 3.0, math.nan]


class Last:
    """Picks the rollout with the highest number, if it has an answer."""

    name, needs_score = "last", False

    def rule(self, rollouts):
        readable_QD = rollouts.prediction_QD >= 0
        return Picks(lambda members_SN: np.where(readable_QD[:, members_SN[:, -1]], members_SN[:, -1], -1))


def arrays_of(predictions, values):
    prediction_QD, value_QD = np.array(predictions), np.array(values)
    return RolloutArrays(prediction_QD, prediction_QD == 0, np.nan_to_num(value_QD, nan=-9.0), value_QD)


@pytest.mark.parametrize(
    "aggregator", [Majority(), Likelihood(), BestOfN(), Weighted(0.5), Last()], ids=lambda a: a.name
)
@given(rollout_lists(VALUES))
def test_picks_are_those_that_accuracy_counts(aggregator, drawn):
    arrays = arrays_of(*drawn)
    pick_Q, _ = statistics.supported_picks(aggregator, arrays)
    right_Q = [pick >= 0 and arrays.correct_QD[question, pick] for question, pick in enumerate(pick_Q)]
    n = arrays.prediction_QD.shape[1]
    np.testing.assert_array_equal(right_Q, picked_accuracy(aggregator, arrays, n))


def test_the_support_of_a_pick_does_not_depend_on_the_other_questions():
    generator = np.random.default_rng(0)
    arrays = arrays_of(generator.integers(0, 3, (20, 33)), generator.normal(size=(20, 33)))
    _, support_Q = statistics.supported_picks(Weighted(1.0), arrays)
    alone = [statistics.supported_picks(Weighted(1.0), arrays.questions(slice(q, q + 1)))[1][0] for q in range(20)]
    assert support_Q.tolist() == alone


@given(rollout_lists(VALUES))
def test_shares_and_values_are_those_of_the_definitions(drawn):
    arrays = arrays_of(*drawn)
    rows = list(zip(arrays.prediction_QD.tolist(), arrays.score_QD.tolist(), strict=True))
    for question, (predictions, scores) in enumerate(rows):
        counts = Counter(value for value in predictions if value >= 0)
        most = max(counts.values(), default=0)
        assert statistics.agreement(arrays.prediction_QD, len(predictions))[question] == most / len(predictions)
        for n in range(1, len(predictions)):
            among = [Counter(value for value in subset if value >= 0) for subset in combinations(predictions, n)]
            wanted = np.mean([max(count.values(), default=0) / n for count in among])
            assert statistics.agreement(arrays.prediction_QD, n)[question] == pytest.approx(wanted)
        pick, share = (values[question] for values in statistics.supported_picks(Majority(), arrays))
        assert (pick < 0) == (most == 0) == np.isnan(share)
        assert pick < 0 or share == pytest.approx(most / sum(counts.values()))
        weights = {place: math.exp(score / 0.5) for place, score in enumerate(scores) if not math.isnan(score)}
        weights = {place: weight for place, weight in weights.items() if predictions[place] >= 0}
        pick, share = (values[question] for values in statistics.supported_picks(Weighted(0.5), arrays))
        mine = sum(weight for place, weight in weights.items() if predictions[place] == predictions[pick])
        assert (pick < 0) == (not weights) == np.isnan(share)
        assert pick < 0 or share == pytest.approx(mine / sum(weights.values()))
        known = [score for score in scores if not math.isnan(score)]
        pick, score = (values[question] for values in statistics.supported_picks(BestOfN(), arrays))
        assert (pick < 0) == (not known) == np.isnan(score)
        assert pick < 0 or score == max(known) == scores[pick]


def lines_of(result):
    assert result.code == 0, result.err
    text = (result.last.parent / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_each_question_has_a_line_with_the_pick_of_every_aggregator(run, checkpoint, tmp_path):
    latent_rm = tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    result = run("scorer=latent_rm", f"scorer.checkpoint={latent_rm}", "sampler.rate=0.5")
    lines, metrics = lines_of(result), read_metrics(result.last)
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    questions = Arith("test", 6, None, 0).questions()
    kept = [(line["index"], line["id"], line["question"], line["gold"], line["rollouts"]) for line in lines]
    assert kept == [(i, q.id, q.text, q.answer, 4) for i, q in enumerate(questions)]
    assert rollouts["question_index"].tolist() == [index for index in range(6) for _ in range(4)]
    by = {"majority": "share", "likelihood": "score", "best_of_n": "score", "weighted": "share"}
    assert all(set(line["picks"]) == set(by) for line in lines)
    for line in lines:
        own = rollouts[rollouts["question_index"] == line["index"]].set_index("rollout")
        for name, pick in line["picks"].items():
            assert set(pick) == {"answer", "rollout", by[name], "agree", "correct"}
            assert pick["answer"] == own.loc[pick["rollout"], "prediction"]
            assert pick["correct"] == own.loc[pick["rollout"], "correct"]
            assert pick["agree"] == (own["prediction"] == pick["answer"]).sum()
        assert line["picks"]["best_of_n"]["score"] == own["score"].max()
        assert line["picks"]["likelihood"]["score"] == pytest.approx(own["answer_logprob"].max())
    at_4 = metrics[metrics["n"] == 4].set_index(["metric", "aggregator"])["value"]
    for name in by:
        assert at_4["accuracy", name] == pytest.approx(np.mean([line["picks"][name]["correct"] for line in lines]))
    shares = [
        max(Counter(group["prediction"].dropna()).values(), default=0) / 4
        for _, group in rollouts.groupby("question_index")
    ]
    assert at_4["agreement", ""] == pytest.approx(np.mean(shares))


# Questions without gold answers


@pytest.fixture
def bare(tmp_path):
    path = tmp_path / "bare.jsonl"
    questions = Arith("test", 6, None, 0).questions()
    path.write_text("".join(json.dumps({"question": question.text}) + "\n" for question in questions))
    return ["task=jsonl", f"task.path={path}"]


def test_questions_without_gold_give_answers_agreement_and_costs(run, ltts, bare, checkpoint, tmp_path):
    with_gold, result = run(), run(*bare)
    expected, lines = lines_of(with_gold), lines_of(result)
    assert result.err.count("no gold answers") == 1
    assert "no gold answers" in result.out
    for line, other in zip(lines, expected, strict=True):
        assert "gold" not in line
        for name, pick in line["picks"].items():
            assert pick == other["picks"][name] | {"correct": None}
    rollouts, metrics = pd.read_parquet(result.last.parent / "rollouts.parquet"), read_metrics(result.last)
    assert rollouts["correct"].isna().all()
    assert set(metrics["n"]) == {4}  # as chosen
    assert {"agreement", "gflops", "invalid_rate"} <= set(metrics["metric"])
    assert not {"accuracy", "coverage"} & set(metrics["metric"])
    both = ["agreement", "gflops", "latent_steps"]
    golden = read_metrics(with_gold.last)
    values = [table[table["n"] == 4].set_index("metric")["value"][both] for table in (metrics, golden)]
    pd.testing.assert_series_equal(*values)
    # scored later, the same
    latent_rm = tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    rescored = ltts("rescore", result.last.parent, "scorer=latent_rm", f"scorer.checkpoint={latent_rm}")
    assert {
        name: pick["correct"] for line in lines_of(rescored) for name, pick in line["picks"].items()
    } == dict.fromkeys(("majority", "likelihood", "best_of_n", "weighted"))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [[], ["budget=adaptive", "budget.round=1"]])
def test_a_sweep_over_questions_without_gold_has_a_curve_of_agreement(run, bare, budget):
    result = run(*bare, *budget, "seed=0,1", "n=2,4", "-m")
    assert result.code == 0, result.err
    assert set(read_metrics(result.last)["metric"]) >= {"agreement", "gflops"}
    means = read_metrics(result.last.parent / "metrics_over_seeds.csv")
    agreement = means[means["metric"] == "agreement"]
    assert agreement["ci_low"].notna().all()
    assert (result.last.parent / "scaling.png").exists()


def test_a_ladder_over_questions_without_gold_has_costs_and_agreement_at_every_n(run, bare):
    done = run(*bare, "budget=ladder")
    metrics = read_metrics(done.last)
    assert set(metrics[metrics["metric"] == "gflops"]["n"]) == {1, 2, 4}
    agreement = metrics[metrics["metric"] == "agreement"].set_index("n")["value"]
    assert set(agreement.index) == {1, 2, 4}
    assert agreement[1] >= agreement[2] >= agreement[4]  # it is that of the n rollouts alone
    figure = scaling_figure(metrics)
    assert [axis.get_ylabel() for axis in figure.axes] == ["agreement"]
    assert (done.last.parent / "scaling.png").exists()


def test_a_budget_needs_no_gold(run, ltts, bare):
    """Rules look at answers, so they stop and pick where they would with gold answers."""
    budget = ["budget=adaptive", "budget.round=1"]
    with_gold, whole = run(*budget), run(*bare)
    for result in (run(*bare, *budget), ltts("replay", whole.last.parent, *budget)):
        assert result.code == 0, result.err
        assert "agreement %" in result.out
        tables = [pd.read_parquet(each.last.parent / "budget.parquet") for each in (with_gold, result)]
        pd.testing.assert_frame_equal(*(table.drop(columns="correct") for table in tables))
        assert tables[1]["correct"].isna().all()
        metrics = read_metrics(result.last)
        assert not {"accuracy", "coverage"} & set(metrics["metric"])
        both = [
            table.set_index("metric")["value"][["agreement", "gflops"]]
            for table in (read_metrics(with_gold.last), metrics)
        ]
        pd.testing.assert_series_equal(*both)


def test_what_needs_gold_answers_refuses_questions_without(run, ltts, bare, checkpoint):
    completed = run(*bare).last.parent
    check(ltts("compare", completed, completed), f"a={completed}", "no gold answers")
    line = [f"model.checkpoint={checkpoint}", *bare, "n=2", "max_answer_tokens=4", "output=labels"]
    check(ltts("annotate", *line), "task=bare", "no gold answers")
    spec = SimpleNamespace(scorer=object(), task=SimpleNamespace(name="bare"), questions=[Question("a", "b", None)])
    with pytest.raises(UsageError, match=r"task=bare: .* no gold answers"):
        choose_temperature(spec, ())  # type: ignore[arg-type]


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"answer": 1}, {"answer": 2}, {}], "line 3 has no answer, the rows before it have one"),
        ([{}, {"answer": None}, {"answer": 2}], "line 3 has an answer, the rows before it have none"),
        ([{"anwser": 1}], "line 1 has no answer; did you mean answer by 'anwser'"),
        ([{"Answer": 1}], "line 1 has no answer; did you mean answer by 'Answer'"),
        ([{"answer": " ", "answers": 1}], "line 1 has no answer; did you mean answer by 'answers'"),
    ],
)
def test_rows_have_gold_or_none(refuse, tmp_path, rows, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": TEXT} | row) + "\n" for row in rows))
    refuse("task=jsonl", f"task.path={path}", words=[str(path), words])
    if len(rows) > 1:
        assert len(Jsonl(str(path), None, 1, None).questions()) == 1
    else:
        refuse("task=jsonl", f"task.path={path}", "task.limit=1", words=[str(path), words])
