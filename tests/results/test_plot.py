"""Figures: which lines, colours, dashes and names a metrics table gets."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from refusal import check

from latent_tts.results.plot import scaling_curve
from latent_tts.results.run_folder import RUN_COLUMNS


@pytest.fixture
def drawn(monkeypatch):
    """Draws a table and gives the figure's axes."""
    monkeypatch.setattr("matplotlib.pyplot.close", lambda _: None)

    def draw(rows: list[dict], path, against: str = "n"):
        scaling_curve(pd.DataFrame(rows), path, against)
        return plt.gcf().axes

    yield draw
    monkeypatch.undo()
    plt.close("all")


def drawn_lines(axis) -> list:
    return [line for line in axis.lines if len(line.get_xdata())]  # those without points are the legend's


def curve(axis, color: str) -> list[tuple[float, float]]:
    (line,) = [line for line in drawn_lines(axis) if line.get_color() == color]
    return list(zip(*line.get_data(), strict=True))


def test_a_figure_against_diversity_has_a_point_a_value_of_the_sampler(tmp_path, drawn):
    row = dict.fromkeys(RUN_COLUMNS, "") | {
        "sampler": "gaussian",
        "sampler_param": "sigma",
        "seed": "0",
        "n": 4,
        "drawn": 4,
    }
    rows = [
        row | {"run_id": f"{sigma}{seed}", "sampler_value": sigma, "seed": seed, "metric": metric, "questions": 2}
        | dict.fromkeys(("value", "ci_low", "ci_high"), value)
        for sigma, diversity, coverage in (("0.1", 0.2, 0.5), ("0.9", 0.4, 0.75))
        for seed, shift in (("0", -0.1), ("1", 0.1))
        for metric, value in (("diversity", diversity + shift), ("coverage", coverage))
    ]  # fmt: skip
    coverage, _ = drawn(rows, tmp_path / "figure.svg", "diversity")
    assert curve(coverage, "C0") == [(pytest.approx(0.2), 0.5), (pytest.approx(0.4), 0.75)]
    assert [text.get_text() for text in coverage.get_legend().texts] == ["gaussian"]


def test_a_sampler_keeps_its_colour_and_an_aggregator_its_dash(tmp_path, drawn):
    row = dict.fromkeys(RUN_COLUMNS, "") | {"seed": "0", "drawn": 4, "questions": 2, "metric": "accuracy"}
    rows = [
        row | {"sampler": sampler, "aggregator": aggregator, "n": n, "value": 0.5, "ci_low": 0.5, "ci_high": 0.5}
        for sampler, aggregator in (("gaussian", "weighted"), ("gaussian", "majority"), ("dropout", "weighted"))
        for n in (1, 4)
    ]  # fmt: skip
    _, accuracy = drawn(rows, tmp_path / "figure.svg")
    marks = [(line.get_color(), line.get_linestyle()) for line in drawn_lines(accuracy)]
    assert marks == [("C1", "--"), ("C1", "-"), ("C0", "--")]
    legend = accuracy.get_legend()
    named = {text.get_text(): line for text, line in zip(legend.texts, legend.legend_handles, strict=True)}
    assert {name: (line.get_color(), line.get_linestyle()) for name, line in named.items()} == {
        "gaussian": ("C1", "-"), "dropout": ("C0", "-"), "majority": ("0.3", "-"), "weighted": ("0.3", "--"),
    }  # fmt: skip
    _, accuracy = drawn([row for row in rows if row["aggregator"] == "weighted"], tmp_path / "one.svg")
    assert accuracy.get_title() == "Accuracy (weighted)"


def test_a_table_without_figures_is_named_and_what_there_is_is_drawn(run, ltts, tmp_path):
    table = pd.read_csv(run("budget=ladder").last, dtype=str, keep_default_na=False)
    figures = table["metric"].isin(["coverage", "accuracy"])
    table[~figures].to_csv(tmp_path / "costs.csv", index=False)
    table.assign(value="", ci_low="", ci_high="").to_csv(tmp_path / "empty.csv", index=False)
    for name in ("costs", "empty"):
        check(ltts("plot", f"{name}.csv"), f"runs={name}.csv: nothing to draw", "neither coverage nor accuracy")
        check(ltts("plot", f"{name}.csv", "output=all.png"), f"runs={name}.csv: nothing to draw")
    check(ltts("plot", "costs.csv", "empty.csv", "output=all.png"), "runs=costs.csv,empty.csv")
    table.assign(value=table["value"].where(table["metric"] != "coverage", "")).to_csv(
        tmp_path / "half.csv", index=False
    )
    drawn = ltts("plot", "half.csv", "output=half.svg")
    assert drawn.code == 0, drawn.err
    assert drawn.last.is_file()


def test_more_than_two_models_have_panels_of_their_own(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda _, text, **__: named.append(text))
    row = dict.fromkeys(RUN_COLUMNS, "") | {"sampler": "gaussian", "seed": "0", "n": 4, "drawn": 4, "questions": 2}
    rows = [
        row | {"run_id": model, "model": model, "metric": metric} | dict.fromkeys(("value", "ci_low", "ci_high"), 0.5)
        for model in ("b", "a", "d", "c")
        for metric in ("coverage", "diversity")
        if (model, metric) != ("d", "diversity")
    ]
    for against in ("n", "diversity"):
        scaling_curve(pd.DataFrame(rows), tmp_path / f"{against}.svg", against)
    assert [text for text in named if text] == [*"badc", *"bac"]


@pytest.mark.parametrize(("seeds", "words"), [(None, "means of 95 % intervals"), (3, "3 seeds, 95 % intervals")])
def test_a_table_of_means_over_seeds_has_intervals_of_its_own(tmp_path, drawn, seeds, words):
    row = dict.fromkeys(RUN_COLUMNS, "") | {"sampler": "gaussian", "drawn": 4, "questions": 2, "metric": "coverage"}
    rows = [
        row | {"n": n, "seed": seed, "value": 0.5, "ci_low": 0.4, "ci_high": 0.6}
        for n in (1, 4)
        for seed in (["0", "1", "2"] if seeds is None else ["0,1,2"])
    ]
    axis = drawn([each | ({} if seeds is None else {"seeds": seeds}) for each in rows], tmp_path / "figure.svg")[0]
    assert words in axis.figure.get_suptitle()
    assert "3 seeds" in axis.figure.get_suptitle()


def test_a_label_leaves_out_the_settings_that_all_curves_have(tmp_path, drawn):
    row = dict.fromkeys(RUN_COLUMNS, "") | {"sampler": "dropout", "seed": "0", "drawn": 4, "questions": 2}
    rows = [
        row | {"settings": f"sampler.where=[{where}],task.limit=500", "n": n, "metric": "coverage"}
        | dict.fromkeys(("value", "ci_low", "ci_high"), 0.5)
        for where in ("prompt", "prompt,thoughts")
        for n in (1, 4)
    ]  # fmt: skip
    names = [text.get_text() for text in drawn(rows, tmp_path / "figure.svg")[0].get_legend().texts]
    assert names == ["sampler.where=[prompt]", "sampler.where=[prompt,thoughts]"]
