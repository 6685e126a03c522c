"""A budget applied to the rollouts of a completed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_tts.budget import is_adaptive, play
from latent_tts.errors import RunError, require
from latent_tts.pipeline import rescoring
from latent_tts.pipeline.rollouts import CachedRollouts, entries
from latent_tts.pipeline.rounds import AnswerReader, Outcome, Tallying
from latent_tts.pipeline.running import write_tables
from latent_tts.pipeline.scores import check_range
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import RunTables, make_outcome_tables
from latent_tts.results.cache import MEASURED
from latent_tts.results.run_folder import read_budget, read_rollouts, write_run_json
from latent_tts.types import Floats


def check_spec(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> None:
    """Check that the budget can be applied to a run.

    Raises:
        UsageError: it does not look at rollouts, the questions of the run have unequally many, or the checkpoint has
            changed since.
    """
    require(
        "run",
        source,
        read_budget(source) is None,
        "must be a run with all n rollouts of each question; its budget stopped earlier",
    )
    require(
        "budget",
        spec.budget.name,
        is_adaptive(spec.budget),
        "must be adaptive or shared: those look at rollouts; the run's own table has the figures of the others",
    )
    rescoring.require_same_weights(spec, source, record)


def replay(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> RunTables:
    """The tables of a run as if its rollouts had been drawn in rounds.

    Args:
        spec: the run, with the budget to be applied and the most rollouts that a question may get.
        source: its folder.
        record: its `run.json`.

    Raises:
        UsageError: its rollouts table is damaged, or has no scores.
        RunError: the questions are not those of the run.
    """
    assert is_adaptive(spec.budget)
    rollouts = read_rollouts(source)
    per_question = len(rollouts) // len(spec.questions)  # one, whatever n was, where nothing is random
    if list(rollouts["question_id"]) != [question.id for question in spec.questions for _ in range(per_question)]:
        raise RunError(f"run={source}: the questions of its task have changed since that run")
    rollouts = rollouts[rollouts["rollout"] < spec.n].reset_index(drop=True)
    score = rollouts["score"].to_numpy(dtype=np.float64, na_value=np.nan)
    if spec.budget.needs_score:
        require(
            "budget",
            spec.budget.label,
            not np.isnan(score).all(),
            f"needs scores, and the rollouts of run={source} have none",
        )
        check_range(spec.given_scorer, score)
    tallying, questions = Tallying(spec, AnswerReader(spec).read), len(spec.questions)
    tallying.add(rollouts, score if spec.budget.needs_score else None, [0] * questions, [spec.n] * questions)
    whole = tallying.tallies()
    outcome = Outcome(
        *play(
            spec.budget,
            len(whole),
            lambda drawn_Q: [tally.until(int(count)) for tally, count in zip(whole, drawn_Q, strict=True)],
        )
    )
    drawn = rollouts[rollouts["rollout"] < np.repeat(outcome.counts, spec.n)].reset_index(drop=True)
    spec = replace(spec, counts=outcome.counts)
    drawn = drawn.assign(**dict.fromkeys(MEASURED, np.nan) | {"seconds": recorded_seconds(spec)})
    return make_outcome_tables(spec, drawn, outcome, record["settings"])


def recorded_seconds(spec: RunSpec) -> Floats | float:
    """What each rollout took when it was drawn, in the order of the tables; NaN if the cache does not have all."""
    wanted = spec.wanted()
    for cache in entries(spec):
        cached = CachedRollouts.read(spec, cache, wanted, scored=False)
        if cached.complete:
            return cached.rows.frame()["seconds"].to_numpy(dtype=np.float64)
    return np.nan


def write_folder(
    folder: Path, spec: RunSpec, tables: RunTables, record: Mapping[str, Any], source: Path, seconds: float
) -> None:
    """Write the folder of a replay; what is not of the budget is as in the run's own `run.json`."""
    write_run_json(
        folder,
        {
            **{key: value for key, value in record.items() if key not in ("files", "format")},
            "config": spec.config,
            "replayed": str(source),
            "rollouts": {"total": len(tables.rollouts), "drawn_now": 0},
            "seconds": {"this_command": seconds},
            **write_tables(folder, tables),
        },
    )
