"""`ltts compare A B`: paired differences A - B of two runs on the same questions, with 95 % intervals."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts.config import build as config
from latent_tts.errors import UsageError
from latent_tts.pipeline.completed import Finished
from latent_tts.results import report
from latent_tts.results import statistics as stats
from latent_tts.results.files import whole_file
from latent_tts.results.run_folder import is_complete, run_folders

COLUMNS = ["a_figure", "b_figure", "a_n", "b_n", "a", "b", "difference", "ci_low", "ci_high", "questions", "seeds"]


def main(cfg: DictConfig) -> None:
    """Print a table of differences; several runs on a side are its seeds.

    Raises:
        UsageError: the two sides do not have the same questions and seeds, or share no budget, or lack a figure.
    """
    a, b = load_side("a", Path(cfg.a)), load_side("b", Path(cfg.b))
    if set(a) != set(b):
        raise UsageError(f"a has the seeds {sorted(a)}, b has {sorted(b)}: pair runs of equal seeds")
    rows, table, questions = [], [], []
    for name_a, name_b in figures(cfg, first(a), first(b)):
        for n_a, n_b in budgets(cfg, first(a), first(b)):
            values_a, values_b, questions = [], [], []
            for seed in sorted(a):
                per_a, per_b = a[seed].per_question(name_a, n_a), b[seed].per_question(name_b, n_b)
                if set(per_a.index) != set(per_b.index):
                    raise UsageError(f"a and b have other questions (seed {seed}); compare runs on the same ones")
                values_a.append(per_a)
                values_b.append(per_b[per_a.index])
                questions += list(per_a.index)
            clusters = np.unique(questions, return_inverse=True)[1]
            left, right = np.concatenate(values_a), np.concatenate(values_b)
            mean, low, high = stats.paired_difference(left, right, clusters)
            difference = pd.Series({"value": mean, "ci_low": low, "ci_high": high})
            shown = name_a if name_a == name_b else f"{name_a} - {name_b}"
            at = n_a if n_a == n_b else f"{n_a} - {n_b}"
            means = [left.mean(), right.mean()]
            rows.append([shown, at, *(f"{100 * value:.1f}" for value in means), report.percent(difference)])
            table.append([name_a, name_b, n_a, n_b, *means, mean, low, high, len(set(questions)), len(a)])
    if not rows:
        raise UsageError("a and b report no n in common; draw both with budget=ladder, or name them: a_n=64 b_n=1")
    title = f"A - B in points: {len(set(questions))} questions, {len(a)} seeds; A {cfg.a}, B {cfg.b}"
    report.print_table(title, ["figure", "n", "A %", "B %", "A - B"], rows)
    if cfg.output is not None:
        output = Path(cfg.output).expanduser()
        with whole_file(output) as partial:
            pd.DataFrame(table, columns=COLUMNS).to_csv(partial, index=False, float_format="%.6g")
        print(output)


def figures(cfg: DictConfig, a: Finished, b: Finished) -> list[tuple[str, str]]:
    """Which figure of A is held against which of B: the named ones, or each that both have against itself.

    Raises:
        UsageError: a side does not have the figure named for it.
    """
    if cfg.a_figure is None and cfg.b_figure is None:
        return [
            ("coverage", "coverage"),
            *((name, name) for name in sorted(set(a.aggregators) & set(b.aggregators))),
        ]
    named = str(cfg.a_figure or cfg.b_figure), str(cfg.b_figure or cfg.a_figure)
    for key, name, side in zip(("a_figure", "b_figure"), named, (a, b), strict=True):
        known = ["coverage", *side.aggregators]
        config.require(key, name, name in known, f"one of {', '.join(known)}")
    return [named]


def budgets(cfg: DictConfig, a: Finished, b: Finished) -> list[tuple[int, int]]:
    """Which n of A is held against which of B: those named, against all of the other side, or all that both have.

    Raises:
        UsageError: a side does not report the n named for it.
    """
    if cfg.a_n is None and cfg.b_n is None:
        return [(n, n) for n in sorted(set(a.reported) & set(b.reported))]
    for key, n, side in (("a_n", cfg.a_n, a), ("b_n", cfg.b_n, b)):
        known = ", ".join(map(str, sorted(side.reported)))
        config.require(key, n, n is None or n in side.reported, f"one of {known}, which the run reports, or null")
    of_a, of_b = (sorted(side.reported) if n is None else [n] for n, side in ((cfg.a_n, a), (cfg.b_n, b)))
    return list(product(of_a, of_b))


def first(side: dict[str, Finished]) -> Finished:
    """Any run of a side: budgets and aggregators are the same for all seeds."""
    return side[min(side)]


def load_side(key: str, path: Path) -> dict[str, Finished]:
    """The complete runs at or below a folder, by seed.

    Raises:
        UsageError: there are none, one is damaged, or two have the same seed.
    """
    runs: dict[str, Finished] = {}
    for folder in run_folders(path, key):
        if not is_complete(folder):
            raise UsageError(f"{key}={path}: {folder} did not complete; run it again")
        run = Finished.read(folder)
        if not run.all_decoded:
            raise UsageError(f"{key}={path}: {folder} decoded its winners alone (answer.decode=winners)")
        if run.seed in runs:
            raise UsageError(f"{key}={path}: holds several runs of seed {run.seed}; name one run folder")
        runs[run.seed] = run
    return runs
