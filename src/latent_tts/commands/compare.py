"""`ltts compare A B`: paired differences A - B of two runs on the same questions, with 95 % intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts import config, metrics, report, stats, store
from latent_tts.errors import UsageError


def main(cfg: DictConfig) -> None:
    """Print a table of differences; several runs on a side are its seeds.

    Raises:
        UsageError: the two sides do not have the same questions and seeds, or share no budget.
    """
    a, b = load_side("a", Path(cfg.a)), load_side("b", Path(cfg.b))
    if set(a) != set(b):
        raise UsageError(f"a has the seeds {sorted(a)}, b has {sorted(b)}: pair runs of equal seeds")
    rows, questions = [], []
    for name in ("coverage", *sorted(set(first(a)["aggregators"]) & set(first(b)["aggregators"]))):
        for n in sorted(set(first(a)["reported"]) & set(first(b)["reported"])):
            values_a, values_b, questions = [], [], []
            for seed in sorted(a):
                ids_a, per_a = per_question(a[seed], name, n)
                ids_b, per_b = per_question(b[seed], name, n)
                if sorted(ids_a) != sorted(ids_b):
                    raise UsageError(f"a and b have other questions (seed {seed}); compare runs on the same ones")
                order = {question: index for index, question in enumerate(ids_b)}
                values_a.append(per_a)
                values_b.append(per_b[[order[question] for question in ids_a]])
                questions += ids_a
            clusters = np.unique(questions, return_inverse=True)[1]
            left, right = np.concatenate(values_a), np.concatenate(values_b)
            mean, low, high = stats.paired_difference(left, right, clusters)
            difference = pd.Series({"value": mean, "ci_low": low, "ci_high": high})
            rows.append([name, n, f"{100 * left.mean():.1f}", f"{100 * right.mean():.1f}", report.percent(difference)])
    if not rows:
        raise UsageError("a and b report no n in common; draw both with budget=ladder")
    title = f"A - B in points: {len(set(questions))} questions, {len(a)} seeds; A {cfg.a}, B {cfg.b}"
    report.print_table(title, ["figure", "n", "A %", "B %", "A - B"], rows)


def first(side: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Any run of a side: budgets and aggregators are the same for all seeds."""
    return side[min(side)]


def load_side(key: str, path: Path) -> dict[str, dict[str, Any]]:
    """The complete runs at or below a folder, by seed.

    Raises:
        UsageError: there are none, or two of the same seed.
    """
    runs: dict[str, dict[str, Any]] = {}
    for folder in store.run_folders(path):
        if not store.is_complete(folder):
            raise UsageError(f"{key}={path}: {folder} did not complete; run it again")
        table = store.read_metrics(folder / store.METRICS)
        record = json.loads((folder / store.RUN_JSON).read_text())
        if record["config"]["answer"]["decode"] == "winners":
            raise UsageError(f"{key}={path}: {folder} decoded its winners alone (answer.decode=winners)")
        aggregators = record["aggregators"].items()
        seed = str(table["seed"].iloc[0])
        if seed in runs:
            raise UsageError(f"{key}={path}: holds several runs of seed {seed}; name one run folder")
        runs[seed] = {
            "rollouts": pd.read_parquet(folder / store.ROLLOUTS),
            "reported": [int(n) for n in table["n"].unique()],
            "aggregators": {name: config.build(f"aggregator.{name}", config.node(spec)) for name, spec in aggregators},
        }
    return runs


def per_question(run: dict[str, Any], name: str, n: int) -> tuple[list[str], np.ndarray]:
    """Question ids and the figure `name` (coverage, or an aggregator's accuracy) of each at n."""
    rollouts = run["rollouts"]
    ids = list(dict.fromkeys(rollouts["question_id"]))
    arrays = metrics.arrays_of(rollouts, len(rollouts) // len(ids))
    if name == "coverage":
        return ids, stats.coverage(arrays.correct_QD, n)
    return ids, stats.picked_accuracy(run["aggregators"][name], arrays, n)
