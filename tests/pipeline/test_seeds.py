"""Means over seeds: by hand on tables made up, and through sweeps and `ltts collect`."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_tts.aggregator.majority import Majority
from latent_tts.pipeline.sweep import means_over_seeds
from latent_tts.results import metrics, report
from latent_tts.results import statistics as stats
from latent_tts.results.cache import MEASURED
from latent_tts.results.completed_run import CompletedRun
from latent_tts.results.run_folder import RUN_COLUMNS, read_metrics, write_metrics

QUESTIONS, DRAWN = 12, 4


def finished(seed, *, sampler="gaussian", all_decoded=True, order=slice(None)):
    """A run of made-up rollouts."""
    generator = np.random.default_rng([seed, len(sampler)])
    predictions = generator.choice(["1", "2", None], (QUESTIONS, DRAWN), p=[0.5, 0.3, 0.2])
    size = QUESTIONS * DRAWN
    rollouts = pd.DataFrame(
        {
            "question_index": np.repeat(np.arange(QUESTIONS), DRAWN),
            "question_id": np.repeat(np.array([f"q{i}" for i in range(QUESTIONS)])[order], DRAWN),
            "rollout": np.tile(np.arange(DRAWN), QUESTIONS),
            "prediction": pd.array(predictions[order].ravel(), dtype=object),
            "correct": predictions[order].ravel() == "1",
            "answer_logprob": generator.normal(size=size),
            "score": pd.array([None] * size, dtype="Float32"),
            **dict.fromkeys(("latent_steps", "answer_tokens"), 2),
            **dict.fromkeys(MEASURED, 1.0 + seed),
        }
    )
    run = dict.fromkeys(RUN_COLUMNS, "x") | {"run_id": f"{sampler}{seed}", "seed": str(seed), "sampler": sampler}
    figures = metrics.rollout_figures(
        rollouts, drawn=DRAWN, reported=[1, 2, DRAWN], aggregators=[Majority()],
        diversity_Q=[0.1 * (1 + seed)] * QUESTIONS, gflops=[(1.0, 2.0)] * QUESTIONS,
    )  # fmt: skip
    table = metrics.metric_rows(figures, run)
    return CompletedRun(Path("run"), table, rollouts, {"majority": Majority()}, all_decoded)


def row_of(table, metric, n, sampler="gaussian"):
    (row,) = table[(table["metric"] == metric) & (table["n"] == n) & (table["sampler"] == sampler)].to_dict("records")
    return row


@pytest.mark.every_other
@pytest.mark.parametrize("metric", ["accuracy", "coverage", "invalid_rate"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_row_has_mean_and_spread_of_seeds_and_an_interval_over_questions_with_all_their_seeds(metric, n):
    runs = [finished(0), finished(1), finished(2, order=slice(None, None, -1))]  # questions in another order
    row = row_of(means_over_seeds(runs), metric, n)
    values = [row_of(run.metrics, metric, n)["value"] for run in runs]
    assert (row["value"], row["seed_sd"]) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert (row["seed"], row["seeds"], row["questions"]) == ("0,1,2", 3, QUESTIONS)
    figure = "majority" if metric == "accuracy" else metric
    everything = pd.concat([run.per_question(figure, n) for run in runs])
    clusters = np.array([int(question.removeprefix("q")) for question in everything.index])
    interval = stats.interval(everything.to_numpy(), clusters)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval)


def test_what_has_no_figure_of_each_question_has_mean_and_spread_alone():
    table = means_over_seeds([finished(0), finished(1)])
    for metric, mean in (("diversity", 0.15), ("seconds", 6.0), ("gflops", 9.0)):
        row = row_of(table, metric, 4)
        assert row["value"] == pytest.approx(mean)
        assert np.isnan(row["ci_low"])
    assert row_of(table, "gflops", 4)["seed_sd"] == 0
    winners = means_over_seeds([finished(0, all_decoded=False), finished(1, all_decoded=False)])
    assert np.isnan(row_of(winners, "accuracy", 4)["ci_low"])


def test_settings_stay_apart_and_one_seed_stays_as_it_is():
    single = finished(5, sampler="dropout")
    table = means_over_seeds([finished(0), single, finished(1), finished(1)])
    assert row_of(table, "coverage", 2)["seed"] == "0,1"
    own, kept = (row_of(t, "coverage", 2, "dropout") for t in (single.metrics, table))
    assert {name: kept[name] for name in own} == own
    assert kept["seeds"] == 1
    assert np.isnan(kept["seed_sd"])


def test_a_table_of_means_is_read_as_it_was_written_and_shown(tmp_path, capsys):
    table = means_over_seeds([finished(0), finished(1), finished(5, sampler="dropout")])
    write_metrics(tmp_path / "means.csv", table)
    read = read_metrics(tmp_path / "means.csv")
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-9)
    report.print_metrics(read)
    shown = capsys.readouterr().out
    assert "sampler=dropout seed=5" in shown
    assert "sampler=gaussian seed=0,1" in shown or "seed=0,1" in shown
    report.print_metrics(read[read["seeds"] > 1])
    assert "mean ± sd of seeds 0,1" in capsys.readouterr().out


def test_a_sweep_over_seeds_shows_and_writes_their_means(run, ltts, tmp_path, no_figures):
    swept = run("seed=0,1", "budget=ladder", "n=2", "sampler.rate=0.5", "-m")
    assert swept.code == 0, swept.err
    folder = swept.last.parent
    means = read_metrics(folder / "metrics_over_seeds.csv")
    assert set(means["seed"]) == {"0,1"}
    assert set(means["n"]) == {1, 2}
    assert "mean ± sd of seeds 0,1" in swept.out
    assert [line.rpartition("/")[2] for line in swept.out.splitlines()[-3:]] == [
        "metrics_over_seeds.csv", "scaling.png", "metrics.csv",
    ]  # fmt: skip
    figure = ltts("plot", folder / "metrics_over_seeds.csv", "output=means.svg")
    assert figure.code == 0, figure.err
    collected = ltts("collect", folder, "output=all.csv")
    assert collected.out.split() == ["all_over_seeds.csv", "all.csv"]
    pd.testing.assert_frame_equal(read_metrics(tmp_path / "all_over_seeds.csv"), means)


@pytest.mark.slow
def test_where_there_is_one_seed_there_are_no_means(run):
    swept = run("hydra.sweep.dir=mine", "seed=0,1", "-m")
    assert (swept.last.parent / "metrics_over_seeds.csv").is_file()
    again = run("hydra.sweep.dir=mine", "seed=1", "n=1,2", "-m")
    assert "± sd" not in again.out
    assert not (again.last.parent / "metrics_over_seeds.csv").exists()
