"""From the tables of a run to the files of its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_tts.pipeline import calibration, environment
from latent_tts.pipeline.rollouts import RunRollouts
from latent_tts.pipeline.spec import COMPUTATION, RunSpec
from latent_tts.pipeline.tables import RunTables
from latent_tts.pipeline.verification import VERIFICATION, Verification
from latent_tts.results import plot
from latent_tts.results.files import set_aside, settings_digest, write_csv
from latent_tts.results.run_folder import (
    FIGURE,
    METRICS,
    RUN_JSON,
    TABLES,
    has_curve,
    write_answers,
    write_budget,
    write_metrics,
    write_rollouts,
    write_run_json,
)
from latent_tts.results.timeline import TIMELINE, TIMELINE_FIGURE, describe_timeline, write_timeline
from latent_tts.types import Computation

log = logging.getLogger(__name__)


def clear_run_folder(folder: Path) -> None:
    """Remove what an earlier run left in a folder of the user's choice; first what says that it is complete."""
    for name in (RUN_JSON, *TABLES, FIGURE, VERIFICATION, TIMELINE, TIMELINE_FIGURE):
        (folder / name).unlink(missing_ok=True)


def write_run_folder(
    folder: Path,
    spec: RunSpec,
    drawn: RunRollouts,
    tables: RunTables,
    settings: Mapping[str, Any],
    *,
    seconds: float,
    verification: Verification | None = None,
    **record: Any,
) -> None:
    """Write a run's files; `run.json` is last, since its presence means that the run is complete.

    Args:
        folder: where they go.
        spec: the run.
        drawn: its rollouts.
        tables: its tables.
        settings: see `make_tables`.
        seconds: that the command has taken.
        verification: also write `verification.csv`.
        **record: what else `run.json` says.
    """
    record |= write_tables(folder, tables)
    if has_curve(tables.metrics):
        plot.scaling_curve(tables.metrics, folder / FIGURE)
    if verification is not None:
        write_csv(folder / VERIFICATION, verification.rows, index=False)
    if drawn.timeline and not spec.executor.in_process:
        write_timeline(folder, drawn.timeline, "rollouts")
        record |= {"executor": {"name": spec.executor.name, **describe_timeline(drawn.timeline)}}
    config = spec.config
    scored_by = {} if spec.scorer is None else {"name": spec.scorer.name, "digest": spec.scorer.digest}
    if drawn.scores is not None:
        scored_by["attention"] = drawn.scores.attention
    write_run_json(
        folder,
        {
            "config": config,
            "settings": dict(settings) | spec.planned,
            "aggregators": {
                aggregator.name: {"_target_": config["aggregator"][aggregator.name]["_target_"], **vars(aggregator)}
                for aggregator in spec.aggregators
            },
            "checkpoint_digest": spec.adapter.identity,
            "scorer": scored_by or None,
            "schedule": calibration.schedule_key(spec.schedule),
            "versions": environment.versions(quantized=spec.engine.quantize is not None),
            "machine": environment.machine(),
            "grading": {"given_up": spec.task.rule.given_up},
            **_computation(drawn.cache.folder),
            **_where_drawn(drawn.rows),
            "rollouts": _counts(drawn),
            "seconds": _seconds(drawn) | {"this_command": seconds},
            **record,
        },
    )


def write_tables(folder: Path, tables: RunTables) -> dict[str, Any]:
    """Write the tables of a run; returns what `run.json` says of its budget: what questions got, and why no more."""
    write_rollouts(folder, tables.rollouts)
    write_answers(folder, tables.answers)
    write_metrics(folder / METRICS, tables.metrics)
    budget = tables.budget
    if budget is None:
        return {}
    write_budget(folder, budget)
    summary = {
        "used": int(budget["used"].sum()),
        "drawn": int(budget["drawn"].sum()),
        "why": budget["why"].value_counts().to_dict(),
        "certificates": budget["certificate"][budget["certificate"] != ""].value_counts().to_dict(),
    }
    return {"budget": summary}


def read_computation(folder: Path) -> Computation | None:
    """How the rollouts of a cache entry were computed; None where that is not known. A damaged file is set aside."""
    path = folder / COMPUTATION
    try:
        said = json.loads(path.read_text())
        digest = said.pop("digest", None)  # earlier versions wrote none
        if digest in (None, settings_digest(said)):
            return Computation(said["attention"], said["logits"], said["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    log.warning("%s is damaged: it is now %s", path, set_aside(path).name)
    return None


def _computation(folder: Path) -> dict[str, str]:
    """How the rollouts were computed: which attention, whose logits, and why not the usual ones."""
    computation = read_computation(folder)
    if computation is None:
        return {}
    return computation.way | ({"computation_reason": computation.reason} if computation.reason else {})


def _where_drawn(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """The devices and batch sizes that rollouts were drawn with; nothing where they come out of a run folder."""
    if "device" not in rows:
        return {}
    return {"devices": sorted(set(rows["device"])), "rows": sorted({int(value) for value in rows["rows"]})}


def _counts(drawn: RunRollouts) -> dict[str, int]:
    counts = {"total": len(drawn.rows), "drawn_now": drawn.drawn_now}
    if drawn.scores is not None:
        counts["scored_now"] = drawn.scores.scored_now
    if drawn.winners is not None:
        counts["decoded_now"] = drawn.winners.decoded_now
    return counts


def _seconds(drawn: RunRollouts) -> dict[str, float]:
    """What drawing, scoring and decoding took, whichever run that was."""
    scoring = {} if drawn.scores is None else {"scoring": drawn.scores.seconds}
    drawing = float(drawn.rows["seconds"].sum()) - sum(scoring.values())
    seconds = {"drawing" if drawn.winners is None else "thinking": drawing} | scoring
    if drawn.winners is not None:
        seconds["decoding"] = float(drawn.winners.decoding["seconds"].sum())
    return seconds
