import numpy as np
import pandas as pd
import pytest

from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.aggregator.majority import Majority
from latent_tts.results import metrics
from latent_tts.results.run_folder import METRIC_COLUMNS

RUN = {"run_id": "abc", "model": "coconut", "seed": 0, "budget": "ladder"}
ALWAYS = {"coverage", "invalid_rate", "latent_steps", "answer_tokens", "gflops"}
MEASURED = {"seconds", "floor_seconds", "gbytes", "rollouts_per_second", "peak_memory_bytes"}


def rollout_table(**columns):
    """Two questions with two rollouts each: the first has its first rollout right, the second its second."""
    table = {
        "question_id": ["q0", "q0", "q1", "q1"],
        "rollout": [0, 1, 0, 1],
        "prediction": ["1", "2", None, "3"],
        "correct": [True, False, False, True],
        "answer_logprob": [-1.0, -0.5, -0.1, -2.0],
        "score": pd.array([None] * 4, dtype="Float32"),
        "latent_steps": [6, 6, 4, 6],
        "answer_tokens": [1, 3, 2, 2],
        "seconds": [0.5, 0.5, 1.0, 2.0],
        "floor_seconds": [0.1, 0.2, 0.3, 0.4],
        "bytes": [1e9, 2e9, 3e9, 4e9],
        "peak_memory_bytes": [10, 10, 30, 30],
    }
    return pd.DataFrame(table | columns)


def rows_of(rollouts, *, drawn=2, reported=(1, 2), diversity_Q=(0.2, 0.4), gflops=((10.0, 1.0), (20.0, 3.0))):
    figures = metrics.rollout_figures(
        rollouts,
        drawn=drawn,
        reported=reported,
        aggregators=[Majority(), Likelihood()],
        diversity_Q=diversity_Q,
        gflops=gflops,
    )
    return metrics.metric_rows(figures, RUN)


@pytest.fixture(scope="module")
def table():
    return rows_of(rollout_table())


def cell(table, n, metric, aggregator="", column="value"):
    found = table[(table["n"] == n) & (table["metric"] == metric) & (table["aggregator"] == aggregator)]
    assert len(found) == 1
    return found[column].item()


def test_columns_are_those_of_the_metrics_table(table):
    assert list(table.columns) == METRIC_COLUMNS


def test_each_budget_has_its_rows_and_no_others(table):
    def rows(n):
        part = table[table["n"] == n]
        return sorted(zip(part["metric"], part["aggregator"], strict=True))

    picks = [("accuracy", "likelihood"), ("accuracy", "majority")]
    assert rows(1) == sorted(picks + [(metric, "") for metric in ALWAYS])
    assert rows(2) == sorted(picks + [(metric, "") for metric in ALWAYS | MEASURED | {"agreement", "diversity"}])
    assert set(table["n"]) == {1, 2}


@pytest.mark.parametrize(
    ("n", "metric", "aggregator", "expected"),
    [
        (2, "accuracy", "majority", 1.0),  # a tie goes to rollout 0, and None does not vote
        (2, "accuracy", "likelihood", 0.0),  # a wrong one and an unreadable one are the most probable
        (1, "accuracy", "majority", 0.5),
        (1, "accuracy", "likelihood", 0.5),
        (1, "coverage", "", 0.5),
        (2, "coverage", "", 1.0),
        (1, "invalid_rate", "", 0.25),
        (2, "invalid_rate", "", 0.25),
        (1, "latent_steps", "", 5.5),
        (2, "latent_steps", "", 11.0),
        (1, "answer_tokens", "", 2.0),
        (2, "answer_tokens", "", 4.0),
        (1, "gflops", "", 17.0),
        (2, "gflops", "", 19.0),
        (2, "diversity", "", 0.3),
        (2, "seconds", "", 2.0),
        (2, "floor_seconds", "", 0.5),
        (2, "gbytes", "", 5.0),
        (2, "rollouts_per_second", "", 1.0),
        (2, "peak_memory_bytes", "", 30.0),
    ],
)
def test_hand_worked_values(table, n, metric, aggregator, expected):
    assert cell(table, n, metric, aggregator) == pytest.approx(expected)


def test_every_row_says_which_run_and_how_much_is_behind_it(table):
    assert (table["questions"] == 2).all()
    assert (table["drawn"] == 2).all()
    for name, value in RUN.items():
        assert (table[name] == value).all()


def test_columns_without_a_figure_are_empty(table):
    assert table["scorer"].isna().all()
    assert table["task"].isna().all()


def test_rates_have_intervals_and_costs_have_none(table):
    with_interval = table["metric"].isin({"accuracy", "agreement", "coverage", "invalid_rate", "diversity"})
    assert table.loc[with_interval, ["ci_low", "ci_high"]].notna().all(axis=None)
    assert table.loc[~with_interval, ["ci_low", "ci_high"]].isna().all(axis=None)
    found = [cell(table, 2, "invalid_rate", column=name) for name in ("ci_low", "ci_high")]
    assert 0 < found[0] < 0.25 < 0.5 < found[1] < 1
    wilson = [1 / (1 + 1.96**2 / 2), 1]  # of two questions that are both right
    assert [cell(table, 2, "coverage", column=name) for name in ("ci_low", "ci_high")] == pytest.approx(
        wilson, abs=1e-4
    )


def test_measured_costs_are_given_for_everything_drawn_alone(table):
    assert MEASURED.isdisjoint(table.loc[table["n"] == 1, "metric"])
    assert MEASURED.isdisjoint(rows_of(rollout_table(), reported=[1])["metric"])


def test_one_rollout_has_no_diversity():
    first = rollout_table().iloc[[0, 2]]
    table = rows_of(first, drawn=1, reported=[1], diversity_Q=[None, None])
    assert set(table["metric"]) == ALWAYS | MEASURED | {"accuracy", "agreement"}


def test_diversity_is_left_out_where_a_question_has_none():
    assert "diversity" not in set(rows_of(rollout_table(), diversity_Q=[0.2, None])["metric"])


def test_memory_that_was_not_measured_is_empty_and_not_zero():
    table = rows_of(rollout_table(peak_memory_bytes=[np.nan] * 4))
    assert np.isnan(cell(table, 2, "peak_memory_bytes"))


def test_predictions_of_questions_are_numbered_where_they_are_equal():
    predictions = ["5", None, "5", "-1", np.nan, "7", "7", "5"]
    rollouts = pd.DataFrame(
        {
            "prediction": pd.Series(predictions, dtype=object),
            "correct": [True] * 8,
            "answer_logprob": np.arange(8.0),
            "score": pd.array([0.5, None, *[2.0] * 6], dtype="Float32"),
        }
    )
    arrays = metrics.rollout_arrays(rollouts, 4)
    assert arrays.prediction_QD.tolist() == [[0, -1, 0, 1], [-1, 0, 0, 1]]
    assert arrays.answer_logprob_QD.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    np.testing.assert_array_equal(arrays.score_QD, [[0.5, np.nan, 2, 2], [2] * 4])
    assert arrays.correct_QD.all()


def test_predictions_read_from_parquet_are_the_same(tmp_path):
    rollouts = rollout_table()
    rollouts.to_parquet(tmp_path / "rollouts.parquet")
    read = pd.read_parquet(tmp_path / "rollouts.parquet")
    np.testing.assert_array_equal(metrics.rollout_arrays(read, 2).prediction_QD, [[0, 1], [-1, 0]])
