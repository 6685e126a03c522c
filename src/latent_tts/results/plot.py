"""Figures, most of them from metrics tables. Nothing is recomputed: what is drawn is what the CSV says."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
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

SAMPLER_COLUMNS = ("sampler", "sampler_param", "sampler_value")
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
MAX_STEP, MAX_BARS_WIDTH = 8, 28  # points between such bars, and of all of them
MIN_SWEPT = 3  # values of a parameter that make a sequential palette
MAX_VALUES = 8  # of a sampler that are written at the points of a curve

# Okabe and Ito's colours, which colour-blind readers can tell apart, with violet and grey for yellow and black
COLORS = ("#0072b2", "#d55e00", "#009e73", "#6a3d9a", "#e69f00", "#56b4e9", "#cc79a7", "#555555")
SEQUENTIAL = ("viridis_r", "YlOrBr", "Blues", "Greens", "Purples", "Greys")  # the first where there is one sweep
CYCLES: tuple[dict[str, Any], ...] = (
    {"marker": "o", "linestyle": "-"},
    {"marker": "s", "linestyle": "--"},
    {"marker": "^", "linestyle": ":"},
    {"marker": "D", "linestyle": "-."},
    {"marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)
# every other aggregator has rings around the filled markers of the one before: of equal lines both are seen
RING = {"markerfacecolor": "none", "markersize": 6.5}
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


Look = dict[str, Any]  # how a line is drawn: keyword arguments of `Axes.plot` and `Line2D`


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
    marks = {
        name: CYCLES[index % len(CYCLES)]
        | (RING if index % 2 else {})
        | ({"color": COLORS[(index + 1) % len(COLORS)]} if len(looks) == 1 else {})
        for index, name in enumerate(together if len(together) > 1 else ())
    }
    cells = [(part, panel) for part in parts for panel in panels]
    columns = len(panels) if in_rows or len(panels) < 4 else math.ceil(len(panels) / 2)
    rows = math.ceil(len(cells) / columns)
    with matplotlib.rc_context(STYLE):
        averaged = "seeds" not in metrics and bool(points["seed"].str.contains(",").any())
        handles = _legend(parts, looks, marks, averaged=averaged)
        figure = _figure_with_legend(rows, columns, handles)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axis, (part, panel) in zip(grid.flat, cells, strict=False):
            _draw_panel(axis, part, panel, looks, marks, against)
        for axis in grid.flat[len(cells) :]:
            axis.remove()
        for axis in grid.flat[len(cells) - columns : len(cells)]:
            axis.set_xlabel(AGAINST[against])
        for model, axis in zip(models if in_rows else (), grid[:, 0], strict=False):
            axis.set_title(printable(model + notes.get(model, "")), loc="left", fontsize=9, fontweight="bold")
        for axes in np.split(grid.flat[: len(cells)], len(parts)):  # accuracies of different aggregators have one scale
            scaled = [axis for axis, (metric, _) in zip(axes, panels, strict=True) if metric == "accuracy"]
            limits = [limit for axis in scaled for limit in axis.get_ylim()]
            for axis in scaled:
                axis.set_ylim(min(limits), max(limits))
        figure.suptitle(_title(points, against), fontsize=10)
    return figure


def _panels(points: pd.DataFrame, parts: Sequence[pd.DataFrame]) -> list[tuple[str, Sequence[str]]]:
    """The metric of each panel, and the aggregators in it: all of them where their lines are few."""
    aggregators = [name for name in points["aggregator"].unique() if name]
    accuracy = [part.loc[part["metric"] == "accuracy", ["label", "aggregator"]] for part in parts]
    panels = [(metric, [""]) for metric in ("coverage", "agreement") if (points["metric"] == metric).any()]
    if aggregators and max(len(lines.drop_duplicates()) for lines in accuracy) <= MAX_LINES_TOGETHER:
        return [*panels, ("accuracy", aggregators)]
    return [*panels, *(("accuracy", [name]) for name in aggregators)]


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
    same = ["run_id", "n", "drawn"]
    metric = "rollouts_drawn" if against == "rollouts" else against
    x = metrics[metrics["metric"] == metric].drop_duplicates(same).set_index(same)["value"].rename("x")
    points = metrics[metrics["metric"].isin(figures_drawn(metrics))].dropna(subset="value").join(x, on=same)
    if against in ("n", "rollouts"):  # a budget that draws as many of each question has no mean
        points["x"] = points["x"].astype(float).fillna(points["n"])
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
    columns = [name for name in CURVE_COLUMNS if against != "diversity" or name not in SAMPLER_COLUMNS[1:]]
    if against == "diversity":
        columns.append("n")
    keys = points[columns].fillna("").astype(str)
    curves = keys.drop_duplicates().to_dict("records")
    budgets = [_split_budget(curve["budget"]) for curve in curves]
    facts = pd.DataFrame(
        [curve | budget | _split(curve["settings"]) for curve, budget in zip(curves, budgets, strict=True)]
    )
    facts = facts.drop(columns="settings").fillna("")
    parts = [part for _, part in facts.groupby("model")] if in_rows else [facts]
    varying = [name for name in map(str, facts) if any(part[name].nunique() > 1 for part in parts)]
    of_budget = {name for budget in budgets for name in budget}
    for names in (*([name] for name in DIGEST_COLUMNS), ["checkpoint"], of_budget):  # told where nothing else differs
        others = [other for other in varying if other not in names]
        if others and all(len(part[others].drop_duplicates()) == len(part) for part in parts):
            varying = others
    notes: dict[str, str] = {}
    of_sampler = [name for name in SAMPLER_COLUMNS if name in facts]
    samplers = facts[["model", *of_sampler]].drop_duplicates()
    if in_rows and len(of_sampler) > 1 and not samplers.duplicated(["model", "sampler"]).any():
        of_sampler = ["sampler"]
        for model, rows in samplers[samplers["sampler_value"] != ""].groupby("model"):
            notes[str(model)] = f": {', '.join(sampler_label(row) for _, row in rows.iterrows())}"
    shared = _shared_sampler(points, against)
    labels, attributes = [], {}
    for _, curve in facts.iterrows():
        told = {name: curve[name] for name in varying if name not in SAMPLER_COLUMNS and curve[name]}
        if not told or any(name in of_sampler for name in varying):
            told |= {name: curve[name] for name in of_sampler if curve[name] and name not in shared}
        told = told or {"sampler": curve["sampler"]}
        labels.append(_label(told))
        attributes[labels[-1]] = told
    return points.assign(label=np.array(labels)[keys.groupby(columns, sort=False).ngroup()]), attributes, notes


def _shared_sampler(points: pd.DataFrame, against: str) -> tuple[str, ...]:
    """The column of the sampler's name where the title says it: curves of a model differ in its parameter."""
    one = len(points[["sampler", "sampler_param"]].drop_duplicates()) == 1
    differ = points.groupby("model")["sampler_value"].nunique().max() > 1
    return ("sampler",) if one and differ and against != "diversity" else ()


def _split(settings: str) -> dict[str, str]:
    """Settings as tables have them, `key=value` by commas, by key; a word without a value has itself as one."""
    parts = [part.partition("=") for part in re.split(r",(?=[\w.]+=)", settings) if part]
    return {key: value or key for key, _, value in parts}


def _split_budget(label: str) -> dict[str, str]:
    """A budget as tables have it, `posterior threshold=0.9 round=1`, by key; what has no key is under `budget`."""
    parts = [word.partition("=") for word in label.split()]
    name = " ".join(word for word, equals, _ in parts if not equals)
    return {"budget": name} | {key: value for key, equals, value in parts if equals}


def _label(told: Mapping[str, str]) -> str:
    """What tells a curve from others, as a legend says it: `gaussian sigma=0.4, float32`."""
    parts = [sampler_label(told)]
    for name, value in told.items():
        if name in DIGEST_COLUMNS:
            parts.append(f"{name.removesuffix('_digest')} {'+'.join(part[:8] for part in value.split('+'))}")
        elif name not in CURVE_COLUMNS or name == "budget":
            parts.append(name if value == name else f"{name}={value}")
        elif name not in SAMPLER_COLUMNS:
            parts.append(value)
    return printable(", ".join(filter(None, parts)))


def _looks(attributes: dict[str, dict[str, str]]) -> dict[str, Look]:
    """The look of each curve, in the legend's order: sequential colours along a swept number, else distinct ones."""
    from matplotlib import colormaps

    looks: dict[str, Look] = {}
    sweep = _sweep(attributes)
    for index, group in enumerate(sweep):
        palette = colormaps[SEQUENTIAL[index + (len(sweep) > 1)]]
        for place, label in zip(np.linspace(0.35, 1, len(group)) if len(group) > 1 else [0.9], group, strict=True):
            looks[label] = {"color": palette(place)} | CYCLES[index % len(CYCLES)]
    return looks or {
        label: {"color": COLORS[index % len(COLORS)]} | CYCLES[index // len(COLORS) % len(CYCLES)]
        for index, label in enumerate(attributes)
    }


def _sweep(attributes: dict[str, dict[str, str]]) -> list[list[str]]:
    """The labels of curves that differ in one number only, ascending, in a list per kind of curve; none without any."""
    best: list[list[str]] = []
    facts = pd.DataFrame.from_dict(attributes, orient="index").fillna("")
    for name in facts:
        rest = pd.Series(list(map(tuple, facts.drop(columns=name).to_numpy())), facts.index)
        values = pd.to_numeric(facts[name], errors="coerce").sort_values()
        groups = [group for _, group in values.groupby(rest, sort=False)]
        numeric = all(len(group) == 1 or group.notna().all() for group in groups)
        if numeric and len(groups) < len(SEQUENTIAL) and max(map(len, groups)) > max([MIN_SWEPT - 1, *map(len, best)]):
            best = [list(group.index) for group in groups]
    return best


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
    ends = part.groupby("label")["x"].max()
    single = part.groupby("label")["x"].nunique() == 1
    places = np.log(ends) if _is_logarithmic(part, against) else ends
    near = NEAR * (places.max() - places.min())
    crowded = len(labels) > MAX_BANDS
    thin: Look = {"linewidth": 1, "markersize": 3} if crowded else {}
    for label, (index, aggregator) in product(labels, enumerate(aggregators)):
        line = part[(part["label"] == label) & (part["aggregator"].fillna("") == aggregator)].sort_values("x")
        style: Look = looks[label] | thin | marks.get(aggregator, {})
        if not single[label]:
            axis.plot(line["x"], line["value"], **style)
        if single[label] or (crowded and index == 0):  # bars, side by side
            near_by = [other for other in labels if abs(places[other] - places[label]) <= near]
            beside = [other for other in near_by if single[other] == single[label]]
            per_curve = len(aggregators) if single[label] else 1
            bars = len(beside) * per_curve
            place = beside.index(label) * per_curve + index + 1  # right of the end of a curve
            if single[label]:  # around a point
                place -= (bars + 1) / 2
            look: Look = style if single[label] else style | {"marker": ""}
            _draw_bar(axis, line.tail(1), look, place * min(MAX_STEP, MAX_BARS_WIDTH / bars))
        elif index == 0:
            alpha = 0.15 if len(labels) <= 2 else 0.1
            axis.fill_between(
                line["x"], line["ci_low"], line["ci_high"], color=style["color"], alpha=alpha, linewidth=0
            )
        if index == 0 and against == "diversity" and not single[label]:
            _write_values(axis, line, style["color"], below=labels.index(label) % 2 == 1)
    axis.margins(x=0.12 if crowded else 0.05)
    _set_ticks(axis, part, against, margin=0.12 if crowded else 0.02)


def _draw_bar(axis: Axes, end: pd.DataFrame, look: Look, shift: float) -> None:
    """Draw the interval of one row, so many points beside its place."""
    from matplotlib.transforms import ScaledTranslation

    # matplotlib leaves what is moved out of the limits
    axis.update_datalim([(x, y) for x, *ys in end[["x", "value", "ci_low", "ci_high"]].to_numpy() for y in ys])
    reach = np.abs(end[["ci_low", "ci_high"]].to_numpy().T - end["value"].to_numpy())
    moved = axis.transData + ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans)
    axis.errorbar(end["x"], end["value"], reach, capsize=2, elinewidth=0.9, transform=moved, **look)


def _write_values(axis: Axes, line: pd.DataFrame, color: Any, *, below: bool) -> None:
    """Write the sampler's value above or below the points of a curve; not at each where there are many."""
    for point in line.iloc[:: math.ceil(len(line) / MAX_VALUES)].itertuples():
        axis.annotate(
            str(point.sampler_value), (point.x, point.value), (0, -5 if below else 5), textcoords="offset points",
            ha="center", va="top" if below else "bottom", fontsize=7, color=color,
        )  # fmt: skip


def _is_logarithmic(part: pd.DataFrame, against: str) -> bool:
    """Whether the x axis is: that of n, and those of costs that differ much."""
    return against == "n" or (against != "diversity" and part["x"].max() > 3 * part["x"].min() > 0)


def _set_ticks(axis: Axes, part: pd.DataFrame, against: str, *, margin: float) -> None:
    """Ticks as people write them: the n that were drawn, 1-2-5 steps of costs, percent.

    Args:
        axis: of the panel.
        part: its rows.
        against: the x axis.
        margin: octaves at the sides of an axis of n, for each octave on it.
    """
    from matplotlib import ticker

    low, high = part["x"].min(), part["x"].max()
    steps = [1, 2, 5, 10]
    locator: ticker.Locator = ticker.MaxNLocator(7, steps=steps)
    if against == "n":
        sides = 2 ** (0.25 + margin * math.log2(high / low))
        axis.set_xscale("log", base=2)
        axis.set_xlim(low / sides, high * sides)
        locator = ticker.FixedLocator(_spaced(sorted(part["n"].unique())))
    elif _is_logarithmic(part, against):
        axis.set_xscale("log")
        locator = ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20)
    axis.xaxis.set(
        major_locator=locator,
        minor_locator=ticker.NullLocator(),
        major_formatter=ticker.StrMethodFormatter("{x:,.10g}"),
    )
    axis.yaxis.set(
        major_locator=ticker.MaxNLocator(7, steps=steps),
        major_formatter=ticker.FuncFormatter(lambda share, _: f"{100 * share:.6g}%"),
    )
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


def _legend(
    parts: Sequence[pd.DataFrame], looks: dict[str, Look], marks: dict[str, Look], *, averaged: bool
) -> list[Artist]:
    """The legend's entries: curves, aggregators that share a panel, and bands, or bars where there is no band."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shared = {name: {"color": "0.3"} | look for name, look in marks.items()}
    lines = [Line2D([], [], label=name, **look) for name, look in [*looks.items(), *shared.items()]]
    label = "mean of the seeds' 95% intervals" if averaged else "95% interval"
    crowded = all(part["label"].nunique() > MAX_BANDS for part in parts)
    single = all((part.groupby("label")["x"].nunique() == 1).all() for part in parts)
    if not single:
        label += " at the end" * crowded + (f" (accuracy: of {next(iter(marks))})" if marks else "")
    if single or crowded:
        return [*lines, Line2D([], [], color="0.5", marker="|", markersize=10, linestyle="", label=label)]
    return [*lines, Patch(color="0.5", alpha=0.3, linewidth=0, label=label)]


def _title(points: pd.DataFrame, against: str) -> str:
    """What the figure is of: models, tasks, questions, seeds; said of all curves, or that they differ."""
    models = points["model"].unique()
    tasks = (points["task"] + "/" + points["split"]).str.rstrip("/").unique()
    model = models[0] if len(models) == 1 else f"{len(models)} models"
    parts = [f"{model} on {', '.join(tasks) if len(tasks) <= 3 else f'{len(tasks)} tasks'}"]
    if _shared_sampler(points, against):
        parts.append(points["sampler"].iloc[0])
    budgets = {_split_budget(text)["budget"] for text in points["budget"].fillna("").unique()}
    parts += [f"budget={name}" for name in budgets if len(budgets) == 1 and name not in ("", *PLAIN_BUDGETS)]
    sets = points["questions_digest"].nunique()
    parts.append(f"{f'{sets} different sets of ' if sets > len(tasks) else ''}{_range(points['questions'])} questions")
    seeds = points["seed"].str.count(",") + 1
    if points["seed"].nunique() == 1:
        parts.append(
            f"{'seed' if seeds.max() == 1 else 'means over seeds'} {points['seed'].iloc[0].replace(',', ', ')}"
        )
    else:
        parts.append("different seeds" if seeds.max() == 1 else f"means over {_range(seeds)} seeds")
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
    image = axes.imshow(lower, cmap="viridis", vmin=0, extent=(0.5, total + 0.5, total + 0.5, 0.5))
    for (row, column), value in np.ndenumerate(lower):
        if np.isfinite(value):
            shade = "white" if value < 0.6 * np.nanmax(lower) else "black"
            axes.text(column + 1, row + 1, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set(xlabel="latent that is changed", ylabel="latent that is made from it")
    axes.set(xticks=range(1, total + 1), yticks=range(1, total + 1))
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    figure.colorbar(image, label="relative change per relative change", shrink=0.8)
    save_figure(figure, [path])
