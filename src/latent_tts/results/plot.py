"""Figures, most of them from metrics tables. Nothing is recomputed: what is drawn is what the CSV says."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from latent_tts.errors import UsageError, printable
from latent_tts.results.files import whole_file
from latent_tts.results.run_folder import (
    CURVE_COLUMNS,
    DIGEST_COLUMNS,
    PLAIN_BUDGETS,
    figures_drawn,
    sampler_label,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGAINST = {
    "n": "rollouts per question (n)",
    "rollouts": "rollouts drawn per question (mean)",
    "gflops": "GFLOP per question",
    "seconds": "seconds per question",
    "recorded_seconds": "recorded seconds per question",
    "diversity": "diversity of latents\n(mean pairwise cosine dissimilarity)",
}
FORMATS = ("png", "svg", "pdf")
MAX_MODELS_TOGETHER = 2  # more models get a row of panels each
MAX_LINES_TOGETHER = 8  # in one panel of accuracies; more get a panel per aggregator
MAX_BANDS = 4  # in one panel; more intervals are bars at the curves' ends
NEAR = 0.03  # of the x axis: bars so near to each other are drawn side by side
OCTAVES = 6  # of an axis on which bars are as far apart as they get
MIN_SWEPT = 3  # values of a parameter that make a sequential palette
MAX_VALUES = 8  # of a sampler that are written at the points of a curve

# Okabe and Ito's colours, which colour-blind readers can tell apart, with violet and grey for yellow and black
COLORS = ("#0072b2", "#d55e00", "#009e73", "#6a3d9a", "#e69f00", "#56b4e9", "#cc79a7", "#555555")
SEQUENTIAL = ("viridis_r", "YlOrBr", "Blues", "Greens", "Purples", "Greys")  # the first where there is one sweep
CYCLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1, 1, 1, 1, 1))))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # publishers refuse matplotlib's default, Type 3
    "text.parse_math": False,  # names are no formulas
}
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same table gives the same file
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_LINE = 4.6, 3.3, 0.2  # inches
MIN_COLUMNS = 1.4  # a single panel is so much wider, for its legend
LETTER = 0.066  # inches, of the legend's text


@dataclass(frozen=True)
class Look:
    """How a line is drawn.

    Attributes:
        color, marker, dash: as matplotlib takes them.
    """

    color: Any
    marker: str = "o"
    dash: Any = "-"

    def marks(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Line2D`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash}


def scaling_curve(metrics: pd.DataFrame, path: Path, against: str = "n") -> Path:
    """Draw the figure of a metrics table into a file; see `scaling_figure` and `save_figure`."""
    return save_figure(scaling_figure(metrics, against), [path])[0]


def save_figure(figure: Figure, paths: Sequence[Path]) -> Sequence[Path]:
    """Write a figure into files; the ending of each is its format, one of `FORMATS`."""
    import matplotlib

    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".") or "png"
        style: dict[Any, Any] = STYLE | {"svg.hashsalt": path.name}
        with whole_file(path) as partial, matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name's letters may be missing from the font
            figure.savefig(partial, format=kind, dpi=150, metadata=UNDATED.get(kind))
    return paths


def scaling_figure(metrics: pd.DataFrame, against: str = "n") -> Figure:
    """Coverage and accuracy against n or another figure of the same rows, with 95 % intervals; without gold, agreement.

    A curve has a colour, out of a sequential palette where curves differ in a number; an aggregator has a dash, or a
    panel where there are many lines. More than two models have a row of panels each.

    Args:
        metrics: a metrics table, or one of means over seeds; several runs make several curves. Where one curve has
            several rows at an n, those with the most rollouts drawn count. Runs of a metrics table that differ in the
            seed alone make one curve, of the means of their values and of their bounds.
        against: n, `rollouts` (n, or the mean that a budget in rounds drew), a cost of each n, or `diversity`: then a
            curve is a sampler, with a point for each of its values at the largest n that all of them have.

    Raises:
        UsageError: there is nothing to draw.
    """
    import matplotlib

    points = _points(metrics, against)
    models = list(points["model"].unique())
    in_rows = len(models) > MAX_MODELS_TOGETHER
    points, attributes, notes = _named_curves(points, against, in_rows=in_rows)
    parts = [points[points["model"] == model] for model in models] if in_rows else [points]
    looks, panels = _looks(attributes), _panels(points, parts)
    together = max((names for _, names in panels), key=len)
    marks = {  # a colour of None is the curve's
        name: Look(COLORS[(index + 1) % len(COLORS)] if len(looks) == 1 else None, *CYCLES[index % len(CYCLES)])
        for index, name in enumerate(together if len(together) > 1 else ())
    }
    columns = len(panels) if in_rows or len(panels) < 4 else math.ceil(len(panels) / 2)
    rows = len(parts) if in_rows else math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        averaged = "seeds" not in metrics and bool(points["seed"].str.contains(",").any())
        handles = [*_legend(looks, marks), _interval_handle(parts, marks, averaged=averaged)]
        figure = _figure_with_legend(rows, columns, handles)
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, part in enumerate(parts):
            axes = list(grid[index] if in_rows else grid.flat)
            for axis, panel in zip(axes, panels, strict=False):
                _draw_panel(axis, part, panel, looks, marks, against)
            for axis in axes[len(panels) :]:
                axis.remove()
            _share_scale([axis for axis, (metric, _) in zip(axes, panels, strict=False) if metric == "accuracy"])
            if in_rows:
                title = printable(models[index] + notes[models[index]])
                axes[0].set_title(title, loc="left", fontsize=9, fontweight="bold")
        lowest = rows * columns if in_rows else len(panels)
        for axis in grid.flat[lowest - columns : lowest]:
            axis.set_xlabel(AGAINST[against])
        figure.suptitle(_title(points, against), fontsize=10)
    return figure


def _panels(points: pd.DataFrame, parts: Sequence[pd.DataFrame]) -> list[tuple[str, Sequence[str]]]:
    """The metric of each panel, and the aggregators in it: all of them where their lines are few."""
    aggregators = [name for name in points["aggregator"].unique() if name]
    accuracy = [part.loc[part["metric"] == "accuracy", ["label", "aggregator"]] for part in parts]
    together = max(len(lines.drop_duplicates()) for lines in accuracy) <= MAX_LINES_TOGETHER
    panels: list[tuple[str, Sequence[str]]] = [("coverage", [""]), ("agreement", [""])]
    panels = [panel for panel in panels if (points["metric"] == panel[0]).any()]
    shown = [aggregators] if together and aggregators else [[name] for name in aggregators]
    return [*panels, *(("accuracy", names) for names in shown)]


def _figure_with_legend(rows: int, columns: int, handles: Sequence[Artist]) -> Figure:
    """An empty figure with room for panels and the legend below them."""
    from matplotlib.figure import Figure

    width = max(MIN_COLUMNS, columns) * (PANEL_WIDTH if columns < 3 else 0.8 * PANEL_WIDTH)
    letters = max(len(str(handle.get_label())) for handle in handles)
    ncols = max(1, min(len(handles), int(width / (LETTER * letters + 0.6))))
    height = rows * (PANEL_HEIGHT if rows == 1 else 0.85 * PANEL_HEIGHT)
    height += LEGEND_LINE * math.ceil(len(handles) / ncols) + 0.5
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    return figure


def _points(metrics: pd.DataFrame, against: str) -> pd.DataFrame:
    """The rows to draw, one per point: means over the seeds of a curve, with their place `x`."""
    points = metrics[metrics["metric"].isin(figures_drawn(metrics))].dropna(subset="value")
    points = points.assign(x=points["n"])
    if against != "n":
        same, metric = ["run_id", "n", "drawn"], "rollouts_drawn" if against == "rollouts" else against
        beside = metrics[metrics["metric"] == metric].drop_duplicates(same).set_index(same)["value"].rename("x")
        points = points.drop(columns="x").join(beside, on=same)
        if against == "rollouts":  # a budget that draws as many of each question has no mean
            points["x"] = points["x"].fillna(points["n"].astype(float))
        points = points.dropna(subset="x")
    if points.empty:
        raise UsageError(f"nothing to draw: the table has no coverage, accuracy or agreement with {against} beside it")
    point = [*CURVE_COLUMNS, "aggregator", "n", "metric"]
    points = points.sort_values("drawn", kind="stable").drop_duplicates([*point, "seed"], keep="last").sort_index()
    kept = dict.fromkeys(("x", "value", "ci_low", "ci_high"), "mean")
    points = points.groupby(point, sort=False, dropna=False, as_index=False).agg(
        {**kept, "questions": "first", "seed": lambda seeds: ",".join(dict.fromkeys(seeds))}
    )
    if against == "diversity":
        curve = [name for name in CURVE_COLUMNS if name != "sampler_value"]
        points = pd.concat([_at_common_n(of) for _, of in points.groupby(curve, dropna=False)]).sort_index()
    return points


def _at_common_n(points: pd.DataFrame) -> pd.DataFrame:
    """The points of a sampler at the largest n that all its values have; where they share none, each at its own."""
    by_value = points.groupby("sampler_value", dropna=False)["n"]
    common = set.intersection(*(set(each) for _, each in by_value))
    return points[points["n"] == (max(common) if common else by_value.transform("max"))]


def _named_curves(
    points: pd.DataFrame, against: str, *, in_rows: bool
) -> tuple[pd.DataFrame, dict[str, dict[str, str]], dict[str, str]]:
    """Name the curves by what tells them apart.

    Args:
        points: see `_points`.
        against: the x axis.
        in_rows: each model has panels of its own.

    Returns:
        The points with the `label` of their curve; by label, what the label says, by name; by model, what the title of
        its row adds.
    """
    columns = list(CURVE_COLUMNS)
    if against == "diversity":
        columns = [*(name for name in columns if name not in ("sampler_param", "sampler_value")), "n"]
    keys = points[columns].fillna("").astype(str)
    curves = keys.drop_duplicates()
    parts = [part for _, part in curves.groupby("model")] if in_rows else [curves]
    varying = [name for name in columns if any(part[name].nunique() > 1 for part in parts)]
    for name in (*DIGEST_COLUMNS, "checkpoint", "budget"):  # needed only where nothing else tells curves apart
        others = [other for other in varying if other != name]
        if name in varying and others and all(len(part[others].drop_duplicates()) == len(part) for part in parts):
            varying = others
    of_sampler = [name for name in ("sampler", "sampler_param", "sampler_value") if name in columns]
    notes = dict.fromkeys(curves["model"], "")
    samplers = curves[["model", *of_sampler]].drop_duplicates()
    value_per_model = in_rows and "sampler_value" in columns and not samplers.duplicated(["model", "sampler"]).any()
    if value_per_model and samplers[of_sampler].drop_duplicates().duplicated("sampler").any():
        for model, rows in samplers.groupby("model"):
            values = [sampler_label(row) for _, row in rows.iterrows() if row["sampler_value"]]
            notes[str(model)] = f": {', '.join(values)}" if values else ""
        of_sampler = ["sampler"]
    changed = [_split(text) for text in curves["settings"]]
    common = set.intersection(*(set(each.items()) for each in changed))
    alike = set.intersection(*(set(_split_budget(text).items()) for text in curves["budget"]))
    shared = _shared_sampler(points, against)
    labels, attributes = [], {}
    for (_, curve), settings in zip(curves.iterrows(), changed, strict=True):
        told = {name: curve[name] for name in varying if not name.startswith(("sampler", "settings")) and curve[name]}
        if "settings" in varying:
            told |= {key: value for key, value in settings.items() if (key, value) not in common}
        if "budget" in told:
            del told["budget"]
            told |= {key: value for key, value in _split_budget(curve["budget"]).items() if (key, value) not in alike}
        if not told or any(name in of_sampler for name in varying):
            told |= {name: curve[name] for name in of_sampler if curve[name] and name not in shared}
        told = told or {"sampler": curve["sampler"]}
        labels.append(_label(told))
        attributes[labels[-1]] = told
    named = keys.merge(curves.assign(label=labels), on=columns, how="left")
    return points.assign(label=named["label"].to_numpy()), attributes, notes


def _shared_sampler(points: pd.DataFrame, against: str) -> tuple[str, ...]:
    """The column of the sampler's name where the title says it: curves of a model differ in its parameter."""
    one = len(points[["sampler", "sampler_param"]].drop_duplicates()) == 1
    differ = points.groupby("model")["sampler_value"].nunique().max() > 1
    return ("sampler",) if one and differ and against != "diversity" else ()


def _split(settings: str) -> dict[str, str]:
    """Settings as tables have them, `key=value` by commas, by key."""
    return {
        key: value for key, _, value in (each.partition("=") for each in re.split(r",(?=[\w.]+=)", settings)) if key
    }


def _split_budget(label: str) -> dict[str, str]:
    """A budget as tables have it, `posterior threshold=0.9 round=1`, by key; what has no key is under `budget`."""
    parts = [word.partition("=") for word in label.split()]
    name = " ".join(word for word, equals, _ in parts if not equals)
    return {"budget": name} | {key: value for key, equals, value in parts if equals}


def _label(told: Mapping[str, str]) -> str:
    """What tells a curve from others, as a legend says it: `gaussian sigma=0.4, float32`."""
    parts = [sampler_label(told)] if "sampler" in told or "sampler_value" in told else []
    for name, value in told.items():
        if name in DIGEST_COLUMNS:
            parts.append(f"{name.removesuffix('_digest')} {'+'.join(part[:8] for part in value.split('+'))}")
        elif name not in CURVE_COLUMNS or name == "budget":
            parts.append(f"{name}={value}" if value else name)
        elif not name.startswith("sampler"):
            parts.append(value)
    return printable(", ".join(parts))


def _looks(attributes: dict[str, dict[str, str]]) -> dict[str, Look]:
    """The look of each curve, in the legend's order: sequential colours along a swept number, else distinct ones."""
    sweep = _sweep(attributes)
    if sweep is None:
        count = len(COLORS)
        return {
            label: Look(COLORS[index % count], *CYCLES[index // count % len(CYCLES)])
            for index, label in enumerate(attributes)
        }
    from matplotlib import colormaps

    looks = {}
    for index, group in enumerate(sweep):
        palette = colormaps[SEQUENTIAL[index + (len(sweep) > 1)]]
        marker, dash = CYCLES[index % len(CYCLES)]
        for place, label in zip(np.linspace(0.35, 1, len(group)) if len(group) > 1 else [0.9], group, strict=True):
            looks[label] = Look(palette(place), marker, dash)
    return looks


def _sweep(attributes: dict[str, dict[str, str]]) -> list[list[str]] | None:
    """The labels of curves that differ in one number only, ascending, in a list per kind of curve; None without any."""
    best: list[list[str]] = []
    for name in dict.fromkeys(name for told in attributes.values() for name in told):
        groups: dict[tuple, list[tuple[float, str]]] = {}
        for label, told in attributes.items():
            rest = tuple(sorted((key, value) for key, value in told.items() if key != name))
            groups.setdefault(rest, []).append((pd.to_numeric(told.get(name, ""), errors="coerce"), label))
        ordered = [sorted(group) for group in groups.values()]
        numeric = all(len(group) == 1 or not math.isnan(group[0][0] + group[-1][0]) for group in ordered)
        fits = len(ordered) < len(SEQUENTIAL)
        if numeric and fits and max(map(len, ordered)) > max([MIN_SWEPT - 1, *map(len, best)]):
            best = [[label for _, label in group] for group in ordered]
    return best or None


def _draw_panel(
    axis: Axes,
    part: pd.DataFrame,
    panel: tuple[str, Sequence[str]],
    looks: dict[str, Look],
    marks: dict[str, Look],
    against: str,
) -> None:
    """Draw the lines of a metric and its aggregators, with the intervals of the first aggregator."""
    metric, aggregators = panel
    part = part[part["metric"] == metric]
    axis.set_ylabel(f"{metric} ({aggregators[0]})" if metric == "accuracy" and len(aggregators) == 1 else metric)
    labels = [label for label in looks if label in set(part["label"])]
    singles = [label for label in labels if part.loc[part["label"] == label, "x"].nunique() == 1]
    ends = part.groupby("label")["x"].max()
    places = np.log(ends) if _is_logarithmic(part, against) else ends
    near = NEAR * (places.max() - places.min())
    neighbours = {label: [other for other in labels if abs(places[other] - places[label]) <= near] for label in labels}
    beside = partial(_beside, part=part, against=against)
    thin: dict[str, Any] = {"linewidth": 1, "markersize": 3} if len(labels) > MAX_BANDS else {}
    for label in labels:
        for index, aggregator in enumerate(aggregators):
            line = part[(part["label"] == label) & (part["aggregator"].fillna("") == aggregator)].sort_values("x")
            own = marks.get(aggregator, looks[label])
            look = replace(own, color=own.color or looks[label].color)
            style: dict[str, Any] = look.marks() | thin | _ring(index)
            if label in singles:
                others = [other for other in neighbours[label] if other in singles]
                bars = len(others) * len(aggregators)
                place = others.index(label) * len(aggregators) + index - (bars - 1) / 2
                _draw_bars(axis, beside(line["x"], place, bars), line, style)
                continue
            axis.plot(line["x"], line["value"], **style)
            if index == 0 and against == "diversity":
                _write_values(axis, line, look, below=labels.index(label) % 2 == 1)
            if index == 0 and not thin:
                alpha = 0.15 if len(labels) <= 2 else 0.1
                axis.fill_between(
                    line["x"], line["ci_low"], line["ci_high"], color=look.color, alpha=alpha, linewidth=0
                )
            elif index == 0:
                end, others = line.tail(1), neighbours[label]
                _draw_bars(axis, beside(end["x"], others.index(label) + 1, len(others)), end, style | {"marker": ""})
    _set_ticks(axis, part, against)


def _ring(index: int) -> dict[str, Any]:
    """Every other aggregator has rings around the filled markers of the one before: of equal lines both are seen."""
    return {"markerfacecolor": "none", "markersize": 6.5} if index % 2 else {}


def _draw_bars(axis: Axes, x: pd.Series, line: pd.DataFrame, style: Mapping[str, Any]) -> None:
    """Draw points with error bars."""
    reach = np.abs(line[["ci_low", "ci_high"]].to_numpy().T - line["value"].to_numpy())
    axis.errorbar(x, line["value"], reach, capsize=2, elinewidth=0.9, **style)


def _write_values(axis: Axes, line: pd.DataFrame, look: Look, *, below: bool) -> None:
    """Write the sampler's value above or below the points of a curve; not at each where there are many."""
    for point in line.iloc[:: math.ceil(len(line) / MAX_VALUES)].itertuples():
        axis.annotate(
            str(point.sampler_value), (point.x, point.value), (0, -5 if below else 5), textcoords="offset points",
            ha="center", va="top" if below else "bottom", fontsize=7, color=look.color,
        )  # fmt: skip


def _beside(x: pd.Series, place: float, count: int, *, part: pd.DataFrame, against: str) -> pd.Series:
    """Where bars that share a place on the x axis are drawn: side by side, within a seventh or a tenth of the axis."""
    if _is_logarithmic(part, against):
        octaves = math.log2(part["x"].max() / part["x"].min()) or OCTAVES
        return x * 2 ** (place * min(0.12, 0.9 / count) * min(1, octaves / OCTAVES))
    width = part["x"].max() - part["x"].min()
    return x + place * (width * min(0.012, 0.1 / count) or 2 * _margin(x.max()) * min(0.05, 0.5 / count))


def _margin(x: float) -> float:
    """What an axis has on either side of its only place."""
    return 0.2 * abs(x) or 0.1


def _is_logarithmic(part: pd.DataFrame, against: str) -> bool:
    """Whether the x axis is: that of n, and those of costs that differ much."""
    return against == "n" or (against != "diversity" and part["x"].max() > 3 * part["x"].min() > 0)


def _set_ticks(axis: Axes, part: pd.DataFrame, against: str) -> None:
    """Ticks as people write them: the n that were drawn, 1-2-5 steps of costs, percent."""
    from matplotlib import ticker

    steps, low, high = [1, 2, 5, 10], part["x"].min(), part["x"].max()
    if against == "n":
        axis.set_xscale("log", base=2)
        margin = 0.25 + 0.02 * math.log2(high / low)
        left, right = axis.dataLim.intervalx
        axis.set_xlim(min(left, low) / 2**margin, max(right, high) * 2**margin)
        axis.xaxis.set_major_locator(ticker.FixedLocator(_spaced(sorted(part["n"].unique()))))
    elif _is_logarithmic(part, against):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20))
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(7, steps=steps))
    if low == high and against != "n":
        axis.set_xlim(low - _margin(low), high + _margin(low))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))
    axis.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=steps))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, -0.02), min(top, 1.02))
    axis.grid(alpha=0.25, linewidth=0.6)


def _spaced(numbers: Sequence[int]) -> list[int]:
    """Numbers of a logarithmic axis whose texts do not touch: the last, and those far enough from the one above."""
    distance = math.log2(numbers[-1] / numbers[0]) / 10
    kept = [numbers[-1]]
    for number in reversed(numbers[:-1]):
        if math.log2(kept[-1] / number) >= distance:
            kept.append(number)
    return kept[::-1]


def _share_scale(axes: Sequence[Axes]) -> None:
    """Give the accuracies of different aggregators one scale."""
    limits = [limit for axis in axes for limit in axis.get_ylim()]
    for axis in axes:
        axis.set_ylim(min(limits), max(limits))


def _legend(looks: dict[str, Look], marks: dict[str, Look]) -> list[Artist]:
    """The legend's entries: curves, then aggregators that share a panel."""
    from matplotlib.lines import Line2D

    curves = {label: look.marks() for label, look in looks.items()}
    shared = {
        name: look.marks() | {"color": look.color or "0.3"} | _ring(index)
        for index, (name, look) in enumerate(marks.items())
    }
    return [Line2D([], [], label=name, **style) for name, style in [*curves.items(), *shared.items()]]


def _interval_handle(parts: Sequence[pd.DataFrame], marks: dict[str, Look], *, averaged: bool) -> Artist:
    """The legend's entry for bands, or for bars where there is no band."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    label = "mean of the seeds' 95% intervals" if averaged else "95% interval"
    crowded = all(part["label"].nunique() > MAX_BANDS for part in parts)
    single = all((part.groupby("label")["x"].nunique() == 1).all() for part in parts)
    if not single:
        label += " at the end" * crowded + (f" (accuracy: of {next(iter(marks))})" if marks else "")
    if single or crowded:
        return Line2D([], [], color="0.5", marker="|", markersize=10, linestyle="", label=label)
    return Patch(color="0.5", alpha=0.3, linewidth=0, label=label)


def _title(points: pd.DataFrame, against: str) -> str:
    """What the figure is of: models, tasks, questions, seeds; said of all curves, or that they differ."""
    models, tasks = points["model"].unique(), (points["task"] + "/" + points["split"]).str.rstrip("/").unique()
    named = [str(models[0]) if len(models) == 1 else f"{len(models)} models"]
    named.append(f"on {', '.join(tasks) if len(tasks) <= 3 else f'{len(tasks)} tasks'}")
    sampler = [str(points["sampler"].iloc[0])] if _shared_sampler(points, against) else []
    digests = points["questions_digest"].unique()
    questions = f"{_range(points['questions'])} questions"
    if len(digests) > len(tasks):
        questions = f"{len(digests)} different sets of {questions}"
    budgets = {_split_budget(str(text))["budget"] for text in points["budget"].fillna("").unique()}
    rounds = [f"budget={name}" for name in budgets if len(budgets) == 1 and name not in ("", *PLAIN_BUDGETS)]
    parts = [" ".join(named), *sampler, *rounds, questions]
    seeds = points["seed"].unique()
    counts = pd.Series([len(text.split(",")) for text in seeds])
    one, several = f"seed {seeds[0]}", f"means over seeds {seeds[0].replace(',', ', ')}"
    if len(seeds) > 1:
        one, several = "different seeds", f"means over {_range(counts)} seeds"
    parts.append(one if counts.max() == 1 else several)
    if against == "diversity" and points["n"].nunique() == 1:
        parts.append(f"n = {points['n'].iloc[0]}")
    return printable(", ".join(parts))


def _range(counts: pd.Series) -> str:
    """A number, or the lowest and the highest of several."""
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def draw_dependencies(relative_TT: np.ndarray, title: str, path: Path) -> None:
    """Draw relative dependencies as a grid, a row per latent; NaN stays white.

    Args:
        relative_TT: row t, column s: how much latent t depends on latent s.
        title: above the grid.
        path: of the figure; its ending is the format.
    """
    from matplotlib.figure import Figure

    total = len(relative_TT)
    side = 0.45 * max(total, 6)
    figure = Figure(figsize=(1.5 + side, 1.2 + side), layout="constrained")
    axes = figure.subplots()
    lower = np.where(np.tri(total, k=-1, dtype=bool), relative_TT, np.nan)
    image = axes.imshow(lower, cmap="viridis", vmin=0)
    for (row, column), value in np.ndenumerate(lower):
        if np.isfinite(value):
            shade = "white" if value < 0.6 * np.nanmax(lower) else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(total), [str(s + 1) for s in range(total)])
    axes.set_yticks(range(total), [str(t + 1) for t in range(total)])
    axes.set_xlabel("latent that is changed")
    axes.set_ylabel("latent that is made from it")
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    figure.colorbar(image, label="relative change per relative change", shrink=0.8)
    save_figure(figure, [path])
