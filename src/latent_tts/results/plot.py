"""Metrics tables to figures. Nothing is recomputed: what is drawn is what the CSV says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pandas as pd

from latent_tts.errors import UsageError, printable
from latent_tts.results.files import whole_file
from latent_tts.results.run_folder import CURVE_COLUMNS, DIGEST_COLUMNS, digest_label

PANELS = (("coverage", "Coverage"), ("accuracy", "Accuracy"))
MOST_TOGETHER = 2  # models in one pair of panels; more get a pair each
MOST_INSIDE = 6  # names that stand inside a panel; more stand below it
DASHES = ("-", "--", ":", "-.")
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same table gives the same file

AGAINST = {
    "n": "rollouts per question (n)",
    "gflops": "GFLOP per question",
    "seconds": "seconds per question",
    "diversity": "diversity of latents (mean pairwise cosine dissimilarity)",
}


def scaling_curve(metrics: pd.DataFrame, path: Path, against: str = "n") -> Path:
    """Coverage and accuracy against n or another figure of the same rows, with 95 % bands.

    A curve has a colour (a sampler's, where no pair of panels has two curves of one), an aggregator a dash.

    More than two models are drawn below each other.

    Args:
        metrics: a metrics table, or one of means over seeds; several runs make several curves. Where one curve has
            several rows at an n, those with the most rollouts drawn count. Runs of a metrics table that differ in the
            seed alone make one curve, of the means of their values and of their bounds.
        path: of the figure; its ending is the format.
        against: n, a cost of each n, or `diversity`: then a curve is a sampler, with a point for each of its values.

    Raises:
        UsageError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    # names are no formulas
    metrics = metrics.map(lambda cell: printable(cell).replace("$", r"\$") if isinstance(cell, str) else cell)
    shown = metrics[metrics["metric"].isin([name for name, _ in PANELS])].dropna(subset="value")
    shown = shown.assign(x=shown["n"])
    if against != "n":
        same = ["run_id", "n", "drawn"]
        figures = metrics[metrics["metric"] == against].drop_duplicates(same).set_index(same)["value"].rename("other")
        shown = shown.join(figures, on=same)
        shown = shown.assign(x=shown["other"]).dropna(subset="x")
    if shown.empty:
        raise UsageError(f"nothing to draw: the table has neither coverage nor accuracy with {against} beside it")
    point = [*CURVE_COLUMNS, "aggregator", "n", "metric"]
    shown = shown.sort_values("drawn").drop_duplicates([*point, "seed"], keep="last")
    seeds = shown.groupby(CURVE_COLUMNS, dropna=False)["seed"].nunique()
    bounds = "means of 95 % intervals" if seeds.max() > 1 else "95 % intervals"
    if "seeds" in shown:
        seeds = shown["seeds"]
    means = {"x": "mean", "value": "mean", "ci_low": "mean", "ci_high": "mean", "questions": "first"}
    shown = shown.groupby(point, sort=False, dropna=False, as_index=False).agg(means)
    shown["settings"] = _without_common(shown["settings"])
    kinds = [name for name in CURVE_COLUMNS if against != "diversity" or name != "sampler_value"]
    models = metrics.loc[metrics["model"].isin(shown["model"]), "model"].unique()
    parts = [shown] if len(models) <= MOST_TOGETHER else [shown[shown["model"] == model] for model in models]
    varying = [name for name in kinds if any(part[name].nunique(dropna=False) > 1 for part in parts)]
    if shown.groupby("model", dropna=False)["checkpoint"].nunique().max() == 1:
        varying = [name for name in varying if name != "checkpoint"]  # the model's name says it
    for name in DIGEST_COLUMNS:
        others = [other for other in varying if other not in DIGEST_COLUMNS] or ["metric"]
        if name in varying and shown.groupby(others, dropna=False)[name].nunique().max() == 1:
            varying.remove(name)  # names say it
    size = (10, 4.2 if len(parts) == 1 else 2.8 * len(parts))
    figure, grid = plt.subplots(
        len(parts), 2, figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained"
    )
    aggregators = sorted(name for name in shown["aggregator"].unique() if name)
    dashes = {name: DASHES[index % len(DASHES)] for index, name in enumerate(aggregators)}
    samplers = sorted(shown["sampler"].unique())
    one_each = not any(part.drop_duplicates(kinds)["sampler"].duplicated().any() for part in parts)
    for axes, part in zip(grid, parts, strict=True):
        named = next(axis for axis, (metric, _) in zip(axes, PANELS, strict=True) if metric in set(part["metric"]))
        for index, (values, rows) in enumerate(part.groupby(kinds, sort=len(parts) > 1, dropna=False)):
            curve = dict(zip(kinds, values, strict=True))
            color = f"C{samplers.index(curve['sampler']) if one_each else index}"
            named.plot([], [], "-", marker="o", markersize=3.5, color=color, label=_label(curve, varying))
            for axis, (metric, _) in zip(axes, PANELS, strict=True):
                for aggregator, line in rows[rows["metric"] == metric].groupby("aggregator", sort=False):
                    line = line.sort_values("x")
                    dash = dashes.get(aggregator, "-")
                    axis.plot(line["x"], line["value"], dash, marker="o", markersize=3.5, color=color)
                    axis.fill_between(line["x"], line["ci_low"], line["ci_high"], color=color, alpha=0.12, linewidth=0)
        for aggregator, dash in dashes.items() if len(dashes) > 1 else ():
            axes[-1].plot([], [], dash, color="0.3", label=aggregator)
        for axis in axes:
            names = len(axis.get_legend_handles_labels()[1])
            below = {"loc": "upper left", "bbox_to_anchor": (0, -0.2), "ncols": 2} if names > MOST_INSIDE else {}
            if names:
                axis.legend(fontsize=8, frameon=False, **below)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}" if against == "n" else "{x:.2g}"))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.grid(alpha=0.25)
    for top, bottom, (metric, title) in zip(grid[0], grid[-1], PANELS, strict=True):
        top.set_title(f"{title} ({aggregators[0]})" if metric == "accuracy" and len(aggregators) == 1 else title)
        bottom.set_xlabel(AGAINST[against])
    for axis, name in zip(grid[:, 0], ["questions"] if len(parts) == 1 else models, strict=True):
        axis.set_ylabel(name)
    first = shown.iloc[0]
    subject = f"{first['model']} on " if len(models) == 1 else ""
    where = "" if {"task", "split"} & set(varying) else f"{subject}{first['task']}/{first['split']}"
    over = f"{_range(shown['questions'])} questions" + (f", {_range(seeds)} seeds" if seeds.max() > 1 else "")
    figure.suptitle(", ".join(part for part in (where, over, bounds) if part), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".") or "png"
    with whole_file(path) as partial, plt.rc_context({"svg.hashsalt": path.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name's letters may be missing from the font
        figure.savefig(partial, format=kind, dpi=150, metadata=UNDATED.get(kind))
    plt.close(figure)
    return path


def _range(counts: pd.Series) -> str:
    """A number, or the lowest and the highest of several."""
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _without_common(settings: pd.Series) -> pd.Series:
    """Settings (`key=value` by commas) without those that all have: they tell no curve from another."""
    parts = [re.split(r",(?=[\w.]+=)", text) for text in settings]
    common = set.intersection(*map(set, parts))
    return pd.Series([",".join(one for one in part if one not in common) for part in parts], index=settings.index)


def _label(curve: dict, varying: list[str]) -> str:
    """What differs between the curves, by its value; the sampler where nothing else does."""
    sampler = curve["sampler"]
    if curve["sampler_param"] and "sampler_value" in curve:
        sampler += f" {curve['sampler_param']}={curve['sampler_value']}"
    hidden = ("sampler", "budget", *DIGEST_COLUMNS)
    others = [curve[name] for name in varying if not name.startswith(hidden)]
    others += [digest_label(name, curve[name]) for name in varying if name in DIGEST_COLUMNS]
    sampler_varies = any(name.startswith("sampler") for name in varying)
    return ", ".join([sampler] * (sampler_varies or not any(others)) + [str(value) for value in others if value])
