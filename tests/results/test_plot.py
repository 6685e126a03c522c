"""Figures by their elements: panels, lines, colours, dashes, intervals, legend, axes, title."""

import itertools
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from marks import slow
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from refusal import check, check_refused

from latent_tts.commands.plot import find_tables
from latent_tts.errors import UsageError
from latent_tts.results.plot import COLORS, MAX_BANDS, save_figure, scaling_figure
from latent_tts.results.run_folder import RUN_COLUMNS, read_metrics

AGGREGATORS = ("majority", "likelihood", "best_of_n", "weighted")
ROW = dict.fromkeys(RUN_COLUMNS, "") | {
    "model": "m", "task": "t", "split": "test", "sampler": "gaussian", "seed": "0", "drawn": 16, "questions": 100,
}  # fmt: skip


def rows(ns=(1, 2, 4, 16), aggregators=("majority",), value=0.5, **columns) -> list[dict]:
    """The coverage and the accuracies of a run."""
    named = [("coverage", ""), *(("accuracy", name) for name in aggregators)]
    return [
        ROW
        | {"n": n, "metric": metric, "aggregator": name, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        | columns
        for n in ns
        for metric, name in named
    ]


def sweep(count: int, **columns) -> list[dict]:
    """Runs of `count` values of sigma, in an order that is not theirs."""
    values = [f"{0.1 * (place + 1):g}" for place in range(count)]
    return [
        row
        for place, value in enumerate(values[1::2] + values[::2])
        for row in rows(sampler_param="sigma", sampler_value=value, value=0.3 + 0.01 * place, **columns)
    ]


def checkpoints(count: int, **columns) -> list[dict]:
    """Runs that differ in a name."""
    return [row for place in range(count) for row in rows(checkpoint=f"c{place:02d}", **columns)]


def figure_of(table: list[dict], against: str = "n") -> Figure:
    return scaling_figure(pd.DataFrame(table), against)


def entries(figure: Figure) -> list[str]:
    """The texts of the legend."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.texts]


def handles(figure: Figure) -> dict:
    (legend,) = figure.legends
    return dict(zip(entries(figure), legend.legend_handles, strict=True))


def lines(axis) -> list:
    """The curves of a panel: what has points, bars left out."""
    return [line for line in axis.lines if len(line.get_xdata()) > 1 and line.get_marker() not in ("_", "None", "")]


def bands(axis) -> int:
    return sum(isinstance(each, PolyCollection) for each in axis.collections)


def bars(axis) -> int:
    return len(axis.containers)


def texts(axis) -> list[str]:
    """The texts of the x axis' ticks that are in view."""
    axis.figure.draw_without_rendering()
    low, high = axis.get_xlim()
    ticks = axis.xaxis.get_major_ticks()
    return [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]


@pytest.mark.every_other
@pytest.mark.parametrize("count", [1, 3, 8, 20])
@pytest.mark.parametrize("table", [sweep, checkpoints])
def test_every_curve_has_a_look_and_a_legend_entry_of_its_own(count, table):
    figure = figure_of(table(count))
    assert [axis.get_ylabel() for axis in figure.axes] == ["coverage", "accuracy (majority)"]
    assert len(set(entries(figure))) == count + 1
    for axis in figure.axes:
        looks = {(to_rgba(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines(axis)}
        assert len(looks) == len(lines(axis)) == count
        few = count <= MAX_BANDS
        assert (bands(axis), bars(axis)) == ((count, 0) if few else (0, count))
        for line, label in zip(lines(axis), entries(figure), strict=False):
            assert same_color(line.get_color(), handles(figure)[label].get_color())
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, "the legend is cut"
    assert box.y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes), "the legend lies over a panel"


def test_a_swept_number_has_a_sequential_palette_in_its_order():
    figure = figure_of(sweep(12))
    assert entries(figure)[:12] == [f"sigma={0.1 * (place + 1):g}" for place in range(12)]
    assert figure.get_suptitle() == "m on t/test, gaussian, 100 questions, seed 0"
    brightness = [sum(line.get_color()[:3]) for line in lines(figure.axes[0])]
    assert brightness == sorted(brightness, reverse=True)
    two = figure_of(sweep(3) + [row | {"sampler": "dropout", "sampler_param": "rate"} for row in sweep(3)])
    colors = [line.get_color() for line in lines(two.axes[0])]
    assert same_color(colors[2], colormaps["YlOrBr"](1.0))
    assert same_color(colors[5], colormaps["Blues"](1.0))
    temperatures = [row for t in ("0.5", "0.7", "1.0") for row in rows(settings=f"answer.temperature={t},task.limit=9")]
    swept = figure_of(temperatures)
    assert entries(swept)[:3] == [f"answer.temperature={t}" for t in ("0.5", "0.7", "1.0")]
    assert not same_color(lines(swept.axes[0])[0].get_color(), COLORS[0])


def test_names_have_distinct_colours_a_colour_blind_reader_can_tell_apart():
    figure = figure_of(checkpoints(10))
    looks = [(line.get_color(), line.get_marker()) for line in lines(figure.axes[0])]
    assert looks == [*((color, "o") for color in COLORS), (COLORS[0], "s"), (COLORS[1], "s")]


def test_equal_lines_of_two_aggregators_are_both_seen():
    figure = figure_of(rows(aggregators=AGGREGATORS))
    _, accuracy = figure.axes
    best, weighted = lines(accuracy)[2:]
    assert list(best.get_ydata()) == list(weighted.get_ydata())
    assert not same_color(best.get_color(), weighted.get_color())
    assert weighted.get_markerfacecolor() == "none"
    assert weighted.get_markersize() > best.get_markersize()
    assert bands(accuracy) == 1
    assert entries(figure) == ["gaussian", *AGGREGATORS, "95% interval (accuracy: of majority)"]


def test_two_curves_have_a_colour_each_and_aggregators_a_dash_each():
    table = rows(aggregators=AGGREGATORS) + rows(aggregators=("weighted",), sampler="dropout")
    figure = figure_of(table)
    marks = [(line.get_color(), line.get_linestyle()) for line in lines(figure.axes[1])]
    assert marks == [(COLORS[0], dash) for dash in ("-", "--", ":", "-.")] + [(COLORS[1], "-.")]
    legend = {name: handle.get_color() for name, handle in list(handles(figure).items())[:-1]}
    assert legend == {"gaussian": COLORS[0], "dropout": COLORS[1]} | dict.fromkeys(AGGREGATORS, "0.3")


def test_many_curves_have_a_panel_per_aggregator_on_one_scale():
    figure = figure_of(sweep(3, aggregators=AGGREGATORS))
    assert [axis.get_ylabel() for axis in figure.axes] == ["coverage", *(f"accuracy ({a})" for a in AGGREGATORS)]
    assert len({axis.get_ylim() for axis in figure.axes[1:]}) == 1
    assert [axis.get_xlabel() != "" for axis in figure.axes] == [False, False, True, True, True]
    assert all(len(lines(axis)) == bands(axis) == 3 for axis in figure.axes)


def test_single_points_have_error_bars_side_by_side():
    figure = figure_of(rows(ns=(16,)) + rows(ns=(16,), sampler="dropout") + rows(ns=(1, 16), sampler="native"))
    axis = figure.axes[0]
    assert (bars(axis), bands(axis)) == (2, 1)
    left, right = places_of_bars(axis)
    assert left < 16 < right
    (segment,) = axis.containers[0].lines[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([0.4, 0.6])
    assert entries(figure_of(rows(ns=(16,))))[-1] == "95% interval"


def test_ticks_are_those_that_people_write():
    assert texts(figure_of(rows(ns=(1, 2, 4, 8, 16, 32, 64))).axes[0]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert texts(figure_of(rows(ns=(1, 3, 10, 1000))).axes[0]) == ["1", "3", "10", "1,000"]
    many = [int(text) for text in texts(figure_of(rows(ns=range(1, 65))).axes[0])]
    assert len(many) < 12
    assert many[-1] == 64
    costs = [row | {"run_id": "a"} for row in rows(ns=(1, 2, 4))]
    costs += [
        row | {"metric": "gflops", "aggregator": "", "value": {1: 0.08, 2: 0.7, 4: 3.0}[row["n"]]} for row in costs[::2]
    ]
    figure = figure_of(costs, "gflops")
    assert texts(figure.axes[0]) == ["0.1", "0.2", "0.5", "1", "2"]
    assert figure.axes[0].get_xlabel() == "GFLOP per question"
    assert figure.axes[0].yaxis.get_major_formatter()(0.555, 0) == "55.5%"
    assert figure.axes[0].yaxis.get_major_formatter()(0.6, 0) == "60%"


def test_a_figure_against_diversity_has_the_largest_n_and_a_point_per_value_of_the_sampler():
    table = [
        {**row, "run_id": f"{sigma}{seed}", "seed": seed, "sampler_param": "sigma", "sampler_value": sigma}
        | {"metric": metric, "aggregator": "", "value": value + n / 100}
        for sigma, diversity, coverage in (("0.9", 0.4, 0.75), ("0.1", 0.2, 0.5))
        for seed, shift in (("0", -0.1), ("1", 0.1))
        for n in (2, 4)
        for metric, value in (("diversity", diversity + shift), ("coverage", coverage))
        for row in rows(ns=(n,), aggregators=())
    ]
    figure = figure_of(table, "diversity")
    (axis,) = figure.axes
    (line,) = lines(axis)
    assert line.get_xdata() == pytest.approx([0.24, 0.44])
    assert line.get_ydata() == pytest.approx([0.54, 0.79])
    assert entries(figure) == ["gaussian", "mean of the seeds' 95% intervals"]
    assert figure.get_suptitle().endswith("means over seeds 0, 1, n = 4")
    assert axis.get_xscale() == "linear"
    assert [text.get_text() for text in axis.texts] == ["0.1", "0.9"]
    assert [text.xy for text in axis.texts] == [pytest.approx((0.24, 0.54)), pytest.approx((0.44, 0.79))]
    shorter = [row for row in table if (row["sampler_value"], row["n"]) != ("0.1", 4)]
    (line,) = lines(figure_of(shorter, "diversity").axes[0])
    assert line.get_xdata() == pytest.approx([0.22, 0.42])  # both at n = 2


def with_figure(table: list[dict], metric: str, value: float) -> list[dict]:
    """Rows of a table, each run with a figure beside them."""
    named = [row | {"run_id": f"{row['checkpoint']}{row['sampler_value']}"} for row in table]
    return named + [row | {"metric": metric, "aggregator": "", "value": value} for row in named]


@pytest.mark.every_other
@pytest.mark.parametrize("against", ["n", "gflops", "seconds", "diversity"])
@pytest.mark.parametrize("aggregators", [("majority",), AGGREGATORS])
def test_no_text_is_cut_and_no_text_covers_another(against, aggregators):
    names = [rows(aggregators=aggregators, checkpoint=name) for name in "abc"]
    table = [row for place, each in enumerate(names) for row in with_figure(each, against, 0.1 + 0.1 * place)]
    figure = figure_of(table, against)
    figure.draw_without_rendering()
    elements = [figure._suptitle, *figure.legends]
    for axis in figure.axes:
        elements += [text for text in (axis.xaxis.label, axis.yaxis.label) if text.get_text()]
        for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            elements += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [element.get_window_extent().padded(-1) for element in elements]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (elements[boxes.index(box)], elements[boxes.index(other)])
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, elements[boxes.index(box)]
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, elements[boxes.index(box)]


@pytest.mark.parametrize("diversity", [0.0, 0.08])
def test_bars_of_a_single_point_are_apart(diversity):
    table = with_figure(rows(ns=(16,), aggregators=AGGREGATORS, checkpoint="c"), "diversity", diversity)
    axis = figure_of(table, "diversity").axes[1]
    axis.figure.draw_without_rendering()
    places = sorted(axis.transData.transform((x, 0.5))[0] for x in places_of_bars(axis))
    assert min(right - left for left, right in itertools.pairwise(places)) > 6


def test_more_than_two_models_have_a_row_of_panels_each():
    table = [row for model in "badc" for row in rows(model=model) + rows(model=model, sampler="dropout")]
    figure = figure_of(table)
    assert [axis.get_title(loc="left") for axis in figure.axes[::2]] == list("badc")
    assert entries(figure) == ["gaussian", "dropout", "95% interval"]
    assert figure.get_suptitle() == "4 models on t/test, 100 questions, seed 0"
    of_each = [row | {"sampler_param": "p", "sampler_value": str(ord(row["model"]))} for row in table]
    figure = figure_of(of_each)
    assert figure.axes[0].get_title(loc="left") == "b: gaussian p=98, dropout p=98"
    assert entries(figure)[:2] == ["gaussian", "dropout"]


TITLES = [
    ({}, "m on t/test, 100 questions, seed 0"),
    ({"seed": "1"}, "m on t/test, 100 questions, different seeds"),
    ({"seed": "0,1"}, "m on t/test, 100 questions, means over 1 to 2 seeds"),
    ({"questions": 50}, "m on t/test, 50 to 100 questions, seed 0"),
    ({"questions_digest": "b" * 16, "questions": 50}, "m on t/test, 2 different sets of 50 to 100 questions, seed 0"),
    ({"task": "other"}, "m on t/test, other/test, 100 questions, seed 0"),
    ({"task": "file", "split": ""}, "m on t/test, file, 100 questions, seed 0"),
    ({"model": "other"}, "2 models on t/test, 100 questions, seed 0"),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("columns", "title"), TITLES)
def test_the_title_says_what_is_in_the_figure(columns, title):
    same = rows(questions_digest="a" * 16, sampler="gaussian")
    other = rows(**({"questions_digest": "a" * 16, "sampler": "dropout"} | columns))
    assert figure_of(same + other).get_suptitle() == title


def test_seeds_of_a_curve_are_averaged_and_those_of_a_table_of_means_have_intervals_of_their_own():
    seeds = [row for seed in "012" for row in rows(seed=seed, value=0.4 + 0.1 * int(seed))]
    figure = figure_of(seeds)
    assert list(lines(figure.axes[0])[0].get_ydata()) == pytest.approx([0.5] * 4)
    assert figure.get_suptitle().endswith("means over seeds 0, 1, 2")
    assert entries(figure)[-1] == "mean of the seeds' 95% intervals"
    figure = figure_of([row | {"seeds": 3} for row in rows(seed="0,1,2")])
    assert figure.get_suptitle().endswith("means over seeds 0, 1, 2")
    assert entries(figure)[-1] == "95% interval"


def stopped(threshold: float, drawn: float, rule="posterior") -> list[dict]:
    """A run whose budget drew so many rollouts on average."""
    accuracy = rows(ns=(16,), budget=f"{rule} threshold={threshold} round=1", run_id=f"{rule}{threshold}")[1:]
    mean = accuracy[0] | {"metric": "rollouts_drawn", "aggregator": "", "value": drawn}
    return [*accuracy, mean]


def test_thresholds_of_a_budget_have_a_sequential_palette_at_the_rollouts_that_they_drew():
    swept = [row for threshold, drawn in ((0.8, 4.0), (0.9, 5.5), (0.95, 7.0)) for row in stopped(threshold, drawn)]
    figure = figure_of(swept, "rollouts")
    assert entries(figure)[:3] == ["threshold=0.8", "threshold=0.9", "threshold=0.95"]
    assert same_color(handles(figure)["threshold=0.95"].get_color(), colormaps["viridis_r"](1.0))
    assert figure.get_suptitle() == "m on t/test, budget=posterior, 100 questions, seed 0"
    assert sorted(places_of_bars(figure.axes[0])) == pytest.approx([4.0, 5.5, 7.0])
    beside = figure_of(swept + rows(budget="ladder", run_id="whole"), "rollouts")
    assert entries(beside)[0] == "budget=posterior, threshold=0.8, round=1"
    whole = next(line for line in beside.axes[1].lines if len(line.get_xdata()) == 4)
    assert list(whole.get_xdata()) == [1, 2, 4, 16]
    assert "budget" not in beside.get_suptitle()


def test_a_label_says_what_differs_and_no_more():
    table = [row for where in ("[prompt]", "[prompt,thoughts]") for row in rows(
        settings=f"sampler.where={where},task.limit=500", budget="ladder")]  # fmt: skip
    assert entries(figure_of(table))[:2] == ["sampler.where=[prompt]", "sampler.where=[prompt,thoughts]"]
    budgets = rows(budget="ladder") + rows(budget="fixed")
    assert entries(figure_of(budgets))[:2] == ["budget=ladder", "budget=fixed"]
    weights = rows(weights_digest="a" * 16) + rows(weights_digest="b" * 16)
    assert entries(figure_of(weights))[:2] == ["weights aaaaaaaa", "weights bbbbbbbb"]
    named = rows(weights_digest="a" * 16, model="a") + rows(weights_digest="b" * 16, model="b")
    assert entries(figure_of(named))[:2] == ["a", "b"]


def test_the_row_with_most_rollouts_drawn_counts():
    figure = figure_of(rows(ns=(1, 16), value=0.7) + rows(ns=(1,), drawn=1, value=0.2))
    assert list(lines(figure.axes[0])[0].get_ydata()) == [0.7, 0.7]


@pytest.mark.parametrize(("kind", "begin"), [slow("png", b"\x89PNG"), ("svg", b"<?xml"), slow("pdf", b"%PDF")])
def test_the_same_table_gives_the_same_file_in_every_format(tmp_path, kind, begin):
    first, second = (tmp_path / number / f"f.{kind}" for number in "12")
    for path in (first, second):
        save_figure(figure_of(rows(model=r"$\alpha$ is no formula")), [path])
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(begin)
    assert b"/Type3" not in first.read_bytes()


def test_nothing_to_draw_is_an_error():
    for table, against in ((rows(value=float("nan")), "n"), (rows(), "gflops")):
        with pytest.raises(UsageError, match="nothing to draw"):
            figure_of(table, against)


def test_a_table_without_figures_is_named_and_what_there_is_is_drawn(completed, ltts, tmp_path):
    table = pd.read_csv(completed / "metrics.csv", dtype=str, keep_default_na=False)
    figures = table["metric"].isin(["coverage", "accuracy", "agreement"])
    table[~figures].to_csv(tmp_path / "costs.csv", index=False)
    table.assign(value="", ci_low="", ci_high="").to_csv(tmp_path / "empty.csv", index=False)
    for name in ("costs", "empty"):
        words = [f"runs={name}.csv: nothing to draw", "no coverage, accuracy or agreement"]
        check_refused("plot", f"runs=[{name}.csv]", words=words)
        check_refused("plot", f"runs=[{name}.csv]", "output=all.png", words=words[:1])
    check_refused("plot", "runs=[costs.csv,empty.csv]", "output=all.png", words=["runs=costs.csv,empty.csv"])
    table.assign(value=table["value"].where(table["metric"] != "coverage", "")).to_csv(
        tmp_path / "half.csv", index=False
    )
    drawn = ltts("plot", "half.csv", "output=half.svg")
    assert drawn.code == 0, drawn.err
    assert drawn.last.is_file()


def test_make_plots_draws_every_figure_that_ltts_plot_made():
    root = Path(__file__).parents[2]
    recipe = re.search(r"^plots:.*\n((\t.*\n)+)", (root / "Makefile").read_text(), re.M)
    assert recipe is not None
    folders = [word for line in re.findall(r"ltts plot (.*)", recipe[1]) for word in line.split() if "=" not in word]
    tables = [table for folder in folders for table in find_tables(root / folder)]
    assert all(len(read_metrics(table)) for table in tables)
    drawn = {
        table.with_name(table.name.replace("results", "figure").replace(".csv", ".svg"))
        for table in (root / "experiments").rglob("results*.csv")
    }
    made_elsewhere = {root / "experiments" / "budgets" / "figure.svg"}
    assert {figure for figure in drawn if figure.exists()} - made_elsewhere == {
        table.with_name(table.name.replace("results", "figure").replace(".csv", ".svg")) for table in tables
    }


@pytest.mark.slow
def test_plot_alone_draws_the_last_run_or_sweep(completed, run, ltts, tmp_path):
    check(ltts("plot"), "no run in the folders outputs and multirun")
    shutil.copytree(completed, "outputs/run/first")

    def drawn(*arguments):
        drawn = ltts("plot", *arguments)
        assert drawn.code == 0, drawn.err
        return {path.resolve() for path in map(tmp_path.joinpath, drawn.out.split())}

    assert drawn("format=svg") == {tmp_path.resolve() / "outputs/run/first/scaling.svg"}
    done = run("n=2", "seed=0,1", "-m")
    assert drawn() == {done.last.resolve().with_name(f"scaling.{kind}") for kind in ("png", "svg")}
    means = (done.last.parent / "scaling.svg").read_text()
    assert "mean of the seeds" not in means, "drawn from the table without intervals over seeds"
    assert ltts("plot", "against=gflops", "format=pdf").last.name == "scaling_by_gflops.pdf"


def places_of_bars(axis) -> list[float]:
    """Where bars stand on the x axis as it is drawn."""
    axis.figure.draw_without_rendering()
    bars = [bar.lines[2][0] for bar in axis.containers]
    drawn = [bar.get_transform().transform(bar.get_segments()[0][0]) for bar in bars]
    return [float(axis.transData.inverted().transform(place)[0]) for place in drawn]


def test_bars_at_one_place_stand_side_by_side_on_every_axis():
    costs = [
        row | {"run_id": row["checkpoint"]}
        for name in checkpoints(8)
        for row in (name, name | {"metric": "gflops", "aggregator": "", "value": 0.1 * name["n"]})
    ]
    for against in ("n", "gflops"):
        axis = figure_of(costs, against).axes[0]
        assert len(set(places_of_bars(axis))) == 8, against
        assert min(places_of_bars(axis)) > (16 if against == "n" else 1.6)
    point = [
        row | {"run_id": "r", "sampler_value": "0.1"}
        for name in rows(ns=(16,), aggregators=AGGREGATORS)
        for row in (name, name | {"metric": "diversity", "aggregator": "", "value": 0.08})
    ]
    axis = figure_of(point, "diversity").axes[1]
    assert len(set(places_of_bars(axis))) == 4
    low, high = axis.get_xlim()
    assert low < min(places_of_bars(axis)) < 0.08 < max(places_of_bars(axis)) < high


def test_bars_leave_most_of_a_short_axis_to_the_curves():
    axis = figure_of(checkpoints(20, ns=(2, 4, 8))).axes[0]
    low, high = axis.get_xlim()
    assert math.log2(8 / 2) > 0.6 * math.log2(high / low)


def test_bars_of_curves_that_end_at_different_n_stay_there():
    long = [row | {"checkpoint": row["checkpoint"] + "x"} for row in checkpoints(3)]
    places = sorted(places_of_bars(figure_of(checkpoints(3, ns=(1, 2)) + long).axes[0]))
    assert places[2] < 3
    assert places[3] > 16
