"""Paired differences A - B of two runs on the same questions, each side one run or several seeds of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from latent_tts.errors import UsageError, require
from latent_tts.results import statistics
from latent_tts.results.completed_run import AggregatorBuilder, CompletedRun
from latent_tts.results.files import spreadsheet_cells, whole_file
from latent_tts.results.run_folder import UNKNOWN, is_complete, name_once, run_folders

Side = dict[str, CompletedRun]  # by seed
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """A figure of A at one n, compared with one of B.

    Attributes:
        a_figure, b_figure: coverage, or the aggregator whose accuracy is compared.
        a_n, b_n: rollouts per question.
        a, b: the figures, means over questions and seeds.
        difference: a - b, with its 95 % interval.
        questions, seeds: how many the figures are means over.
    """

    a_figure: str
    b_figure: str
    a_n: int
    b_n: int
    a: float
    b: float
    difference: float
    ci_low: float
    ci_high: float
    questions: int
    seeds: int


@dataclass(frozen=True)
class Selection:
    """What is compared with what; None is everything that both sides have in common.

    Attributes:
        a_figure, b_figure: coverage or an aggregator; one of them alone stands for both.
        a_n, b_n: rollouts per question; one of them alone is compared with all of the other side.
        shared: whether the questions that both sides have are compared where the sides have different ones.
    """

    a_figure: str | None = None
    b_figure: str | None = None
    a_n: int | None = None
    b_n: int | None = None
    shared: bool = False


def read_side(key: str, path: Path, build_aggregator: AggregatorBuilder) -> Side:
    """The complete runs at or below a folder, by seed.

    Raises:
        UsageError: there are none, one is damaged or cannot be compared, or two have the same seed.
    """
    runs: Side = {}
    for folder in run_folders(path, key):
        if not is_complete(folder):
            which = "the run" if folder == path else str(folder)
            raise UsageError(f"{key}={path}: {which} did not complete; re-run its command")
        run = CompletedRun.read(folder, build_aggregator)
        if not run.all_decoded:
            raise UsageError(
                f"{key}={path}: {folder} has answers only for its picks (answer.decode=winners), "
                "so it cannot be compared"
            )
        if not run.has_gold:
            raise UsageError(f"{key}={path}: the questions of {folder} have no gold answers, so there is no accuracy")
        if run.seed in runs:
            raise UsageError(f"{key}={path}: holds several runs of seed {run.seed}; name one run folder")
        runs[run.seed] = run
    _require_one_curve(f"{key}={path}", list(runs.values()))
    return runs


def _require_one_curve(side: str, runs: Sequence[CompletedRun]) -> None:
    """Raise UsageError unless runs are seeds of each other."""
    curves = name_once(pd.DataFrame([run.curve for run in runs]))
    for name, values in curves.items():
        if values.nunique() > 1:
            one, other = 0, int((values != values[0]).argmax())
            raise UsageError(
                f"{side}: holds runs that are not seeds of each other, name one run folder\n"
                f"{name}: {values[one]} in {runs[one].folder}, {values[other]} in {runs[other].folder}"
            )


def differences(a: Side, b: Side, selection: Selection) -> list[Difference]:
    """The differences of all figures and budgets that are selected.

    Raises:
        UsageError: the sides do not have the same questions and seeds, share no budget, or lack a figure.
    """
    if set(a) != set(b):
        raise UsageError(f"a has the seeds {sorted(a)}, b has {sorted(b)}: both sides need the same seeds")
    pairs, budgets = list(_figures(a, b, selection)), _budgets(a, b, selection)
    found = [_difference(a, b, figures, n, shared=selection.shared) for figures in pairs for n in budgets]
    if not pairs:
        raise UsageError("a and b have no figure in common; name one of each: a_figure=coverage b_figure=majority")
    if not found:
        raise UsageError("a and b report no n in common; run both with budget=ladder, or name them: a_n=64 b_n=1")
    return found


def described_sides(a: Side, b: Side) -> tuple[str, str]:
    """What tells one side from the other, as in `sampler=dropout rate=0.1, `; empty where their settings are equal."""
    both = name_once(pd.DataFrame([next(iter(side.values())).curve for side in (a, b)]))
    curves = [_with_whole_sampler({str(name): value for name, value in row.items()}) for _, row in both.iterrows()]
    names = [name for name in curves[0] if curves[0][name] != curves[1][name] and not name.endswith("_digest")]
    first, second = ("".join(f"{name}={curve[name]}, " for name in names if curve[name]) for curve in curves)
    return first, second


def _with_whole_sampler(curve: Mapping[str, str]) -> dict[str, str]:
    """The columns of a curve, the sampler with its value in one: `gaussian sigma=0.4`."""
    value = f" {curve['sampler_param']}={curve['sampler_value']}" if curve["sampler_value"] else ""
    return {**curve, "sampler": curve["sampler"] + value, "sampler_param": "", "sampler_value": ""}


def write_differences(path: Path, found: Sequence[Difference]) -> None:
    """Write differences as a CSV, a row each."""
    columns = [field.name for field in fields(Difference)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        table = pd.DataFrame([astuple(difference) for difference in found], columns=columns)
        spreadsheet_cells(table).to_csv(partial, index=False, float_format="%.6g")


def _difference(a: Side, b: Side, figures: tuple[str, str], budgets: tuple[int, int], *, shared: bool) -> Difference:
    values_a, values_b, questions = [], [], []
    for seed in sorted(a):
        per_a, per_b = a[seed].per_question(figures[0], budgets[0]), b[seed].per_question(figures[1], budgets[1])
        common = per_a.index[per_a.index.isin(per_b.index)]
        differ = len(common) < max(len(per_a), len(per_b))
        if differ and not (shared and len(common)):
            hint = "; questions=shared compares those" if len(common) else ""
            raise UsageError(
                f"a and b have different questions (seed {seed}): {len(common)} of {len(per_a)} and {len(per_b)} are "
                f"shared{hint}"
            )
        digest_a, digest_b = (side[seed].curve["questions_digest"] for side in (a, b))
        unknown = any(digest.startswith(UNKNOWN) for digest in (digest_a, digest_b))
        gold_a, gold_b = (side[seed].golds for side in (a, b))
        if gold_a and gold_b:  # else one of them is of an earlier version
            equal = all(gold_a[one] == gold_b[one] for one in common)
        else:
            equal = differ or digest_a == digest_b or unknown
        if not equal:
            raise UsageError(f"a and b have different gold answers (seed {seed}); compare runs on the same questions")
        per_a, per_b = per_a[common], per_b[common]
        values_a.append(per_a)
        values_b.append(per_b)
        questions += list(per_a.index)
    clusters = np.unique(questions, return_inverse=True)[1]
    left, right = np.concatenate(values_a), np.concatenate(values_b)
    mean, low, high = statistics.paired_difference(left, right, clusters)
    means = float(left.mean()), float(right.mean())
    return Difference(*figures, *budgets, *means, mean, low, high, len(set(questions)), len(a))


def _figures(a: Side, b: Side, selection: Selection) -> Iterator[tuple[str, str]]:
    """Which figure of A is compared with which of B."""
    in_a, in_b = (_in_all(run.figures for run in side.values()) for side in (a, b))
    if selection.a_figure is None and selection.b_figure is None:
        both = sorted(set(in_a) & set(in_b), key=lambda name: (name != "coverage", name))
        yield from zip(both, both, strict=True)
        return
    figure_a = str(selection.a_figure or selection.b_figure)
    figure_b = str(selection.b_figure or selection.a_figure)
    for key, name, known in (("a_figure", figure_a, in_a), ("b_figure", figure_b, in_b)):
        require(key, name, name in known, f"must be one of {', '.join(known)}")
    yield figure_a, figure_b


def _budgets(a: Side, b: Side, selection: Selection) -> list[tuple[int, int]]:
    """Which n of A is compared with which of B."""
    in_a, in_b = (sorted(_in_all(run.reported for run in side.values())) for side in (a, b))
    if selection.a_n is None and selection.b_n is None:
        return [(n, n) for n in in_a if n in in_b]
    for key, n, known in (("a_n", selection.a_n, in_a), ("b_n", selection.b_n, in_b)):
        allowed = f"must be one of {', '.join(map(str, known))}, which the run reports with every seed, or null"
        require(key, n, n is None or n in known, allowed)
    ns_a = in_a if selection.a_n is None else [selection.a_n]
    ns_b = in_b if selection.b_n is None else [selection.b_n]
    return list(product(ns_a, ns_b))


def _in_all(lists: Iterable[Sequence[T]]) -> list[T]:
    """What all lists have, in the order of the first: seeds may differ in aggregators and in how many were drawn."""
    first, *others = lists
    return [each for each in first if all(each in other for other in others)]
