"""Paired differences A - B of two runs on the same questions, each side one run or several seeds of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from latent_tts.errors import UsageError, require
from latent_tts.results import statistics
from latent_tts.results.completed_run import AggregatorBuilder, CompletedRun
from latent_tts.results.run_folder import (
    DIGEST_COLUMNS,
    is_complete,
    name_once,
    read_run_metrics,
    run_folders,
    sampler_label,
)

Side = dict[str, CompletedRun]  # by seed
T = TypeVar("T")


def read_side(key: str, path: Path, build_aggregator: AggregatorBuilder) -> Side:
    """The complete runs at or below a folder, by seed.

    Raises:
        UsageError: there are none, one is damaged or cannot be compared, or two have the same seed.
    """
    runs: Side = {}
    for folder in run_folders(path, key):
        which = "the run" if folder == path else str(folder)
        require(key, path, is_complete(folder), f"{which} did not complete; re-run its command")
        run = CompletedRun.read(folder, read_run_metrics(folder), build_aggregator)
        only_picks = f"{folder} has answers only for its picks (answer.decode=winners), so it cannot be compared"
        require(key, path, run.all_decoded, only_picks)
        require(key, path, run.has_gold, f"the questions of {folder} have no gold answers, so there is no accuracy")
        require(key, path, run.seed not in runs, f"holds several runs of seed {run.seed}; name one run folder")
        runs[run.seed] = run
    _require_one_curve(f"{key}={path}", list(runs.values()))
    return runs


def _require_one_curve(side: str, runs: Sequence[CompletedRun]) -> None:
    """Raise UsageError unless runs are seeds of each other."""
    for name, values in name_once(pd.DataFrame([run.curve for run in runs])).items():
        if values.nunique() > 1:
            other = int((values != values[0]).argmax())
            raise UsageError(
                f"{side}: holds runs that are not seeds of each other, name one run folder\n"
                f"{name}: {values[0]} in {runs[0].folder}, {values[other]} in {runs[other].folder}"
            )


def differences(
    a: Side, b: Side, figures: tuple[str | None, str | None], ns: tuple[int | None, int | None], *, shared: bool
) -> pd.DataFrame:
    """The differences of all figures and budgets that are selected.

    Args:
        a: one side.
        b: the other.
        figures: coverage or an aggregator of each side; one of them alone stands for both, None is all in common.
        ns: rollouts per question of each side; one of them alone is compared with all of the other side, None is all
            in common.
        shared: whether the questions that both sides have are compared where the sides have different ones.

    Returns:
        A row per comparison: `a_figure`, `b_figure`, `a_n`, `b_n` as above; `a`, `b` (the figures, means over questions
        and seeds); `difference` (a - b) with its 95 % interval `ci_low`, `ci_high`; `questions`, `seeds` (how many the
        figures are means over).

    Raises:
        UsageError: the sides do not have the same questions and seeds, share no budget, or lack a figure.
    """
    if set(a) != set(b):
        raise UsageError(f"a has the seeds {sorted(a)}, b has {sorted(b)}: both sides need the same seeds")
    pairs, budgets = _figures(a, b, *figures), _budgets(a, b, *ns)
    found = [_difference(a, b, pair, n, shared=shared) for pair in pairs for n in budgets]
    if not pairs:
        raise UsageError("a and b have no figure in common; name one of each: a_figure=coverage b_figure=majority")
    if not found:
        raise UsageError("a and b report no n in common; run both with budget=ladder, or name them: a_n=64 b_n=1")
    return pd.DataFrame(found)


def describe_sides(a: Side, b: Side) -> tuple[str, str]:
    """What tells one side from the other, as in `sampler=dropout rate=0.1, `; empty where their settings are equal."""
    both = name_once(pd.DataFrame([next(iter(side.values())).curve for side in (a, b)]))
    both["sampler"] = both.apply(sampler_label, axis=1)  # with its value: `gaussian sigma=0.4`
    both = both.drop(columns=["sampler_param", "sampler_value", *DIGEST_COLUMNS])
    names = [name for name in map(str, both) if both[name].nunique() > 1]
    first, second = ("".join(f"{name}={row[name]}, " for name in names if row[name]) for _, row in both.iterrows())
    return first, second


def _difference(
    a: Side, b: Side, figures: tuple[str, str], budgets: tuple[int, int], *, shared: bool
) -> dict[str, Any]:
    """A row of `differences`."""
    parts = []
    for seed in sorted(a):
        per_a, per_b = a[seed].per_question(figures[0], budgets[0]), b[seed].per_question(figures[1], budgets[1])
        both = pd.concat([per_a, per_b], axis=1, join="inner", keys=["a", "b"])
        if len(both) < max(len(per_a), len(per_b)) and not (shared and len(both)):
            hint = "; questions=shared compares those" if len(both) else ""
            raise UsageError(
                f"a and b have different questions (seed {seed}): {len(both)} of {len(per_a)} and {len(per_b)} are "
                f"shared{hint}"
            )
        if any(a[seed].golds.get(one) != b[seed].golds.get(one) for one in both.index):
            raise UsageError(f"a and b have different gold answers (seed {seed}); compare runs on the same questions")
        parts.append(both)
    both = pd.concat(parts)
    clusters = np.unique(both.index, return_inverse=True)[1]
    mean, low, high = statistics.paired_difference(both["a"].to_numpy(), both["b"].to_numpy(), clusters)
    return {
        "a_figure": figures[0], "b_figure": figures[1], "a_n": budgets[0], "b_n": budgets[1],
        "a": both["a"].mean(), "b": both["b"].mean(), "difference": mean, "ci_low": low, "ci_high": high,
        "questions": both.index.nunique(), "seeds": len(a),
    }  # fmt: skip


def _figures(a: Side, b: Side, of_a: str | None, of_b: str | None) -> list[tuple[str, str]]:
    """Which figure of A is compared with which of B."""
    in_a, in_b = (_in_all(run.figures for run in side.values()) for side in (a, b))
    if of_a is None and of_b is None:
        both = sorted(set(in_a) & set(in_b), key=lambda name: (name != "coverage", name))
        return [(name, name) for name in both]
    chosen = str(of_a or of_b), str(of_b or of_a)
    for key, name, known in zip(("a_figure", "b_figure"), chosen, (in_a, in_b), strict=True):
        require(key, name, name in known, f"must be one of {', '.join(known)}")
    return [chosen]


def _budgets(a: Side, b: Side, of_a: int | None, of_b: int | None) -> list[tuple[int, int]]:
    """Which n of A is compared with which of B."""
    in_a, in_b = (sorted(_in_all(run.reported for run in side.values())) for side in (a, b))
    if of_a is None and of_b is None:
        return [(n, n) for n in in_a if n in in_b]
    for key, n, known in (("a_n", of_a, in_a), ("b_n", of_b, in_b)):
        allowed = f"must be one of {', '.join(map(str, known))}, which the run reports with every seed, or null"
        require(key, n, n is None or n in known, allowed)
    return list(product(in_a if of_a is None else [of_a], in_b if of_b is None else [of_b]))


def _in_all(lists: Iterable[Sequence[T]]) -> list[T]:
    """What all lists have, in the order of the first: seeds may differ in aggregators and in how many were drawn."""
    first, *others = lists
    return [each for each in first if all(each in other for other in others)]
