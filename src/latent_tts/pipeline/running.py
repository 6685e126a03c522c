"""A run from its specification to its folder: the stages one after another, and the files that the last one writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_tts.errors import UsageError
from latent_tts.pipeline import calibration, environment
from latent_tts.pipeline.rollouts import RunRollouts, draw_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import RunTables, make_tables, schedule_lines
from latent_tts.pipeline.verification import VERIFICATION, Verification, verify
from latent_tts.results import plot
from latent_tts.results.files import locked_folder, whole_file, write_csv
from latent_tts.results.parts import release_memory
from latent_tts.results.run_folder import (
    BUDGET,
    FIGURE,
    LATENTS,
    METRICS,
    RUN_JSON,
    TABLES,
    has_curve,
    write_answers,
    write_metrics,
    write_rollouts,
    write_run_json,
)
from latent_tts.results.timeline import TIMELINE, TIMELINE_FIGURE, describe_timeline, write_timeline

EARLIER = ".earlier"  # where a folder keeps the files of its last run until those of a new one can be made


@dataclass(frozen=True)
class RunResult:
    """What a run has made.

    Attributes:
        rollouts: its rollouts.
        tables: its tables.
        verification: None unless `schedule.verify` asked for it; whether it failed is not checked yet.
    """

    rollouts: RunRollouts
    tables: RunTables
    verification: Verification | None

    def notes(self, spec: RunSpec) -> list[str]:
        """What a person reads below the run's table: what its schedule counted, and of the verification."""
        return [*schedule_lines(spec, self.tables.rollouts), *(self.verification.lines if self.verification else ())]


def complete_run(
    folder: Path, spec: RunSpec, settings: Mapping[str, Any], *, started: float, keep_latents: bool, keep_cache: bool
) -> RunResult:
    """Draw a run, make its tables and write its folder.

    Args:
        folder: where its files go.
        spec: the run.
        settings: see `make_tables`.
        started: when the command began, by `time.perf_counter`.
        keep_latents: whether latents stay in the folder.
        keep_cache: whether the cache outlives the command.

    Raises:
        UsageError: another command uses the folder.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    with locked_folder(folder, "hydra.run.dir"), replacing_run(folder):
        compared = spec.schedule.verify
        rollouts = draw_rollouts(spec, folder / LATENTS if keep_latents or compared else None)
        release_memory()
        tables = make_tables(spec, rollouts, settings)
        release_memory()
        verification = verify(replace(spec, on_answers=None), rollouts, folder) if compared else None
        if not keep_latents:
            (folder / LATENTS).unlink(missing_ok=True)
        write_run_folder(
            folder,
            spec,
            rollouts,
            tables,
            settings,
            started,
            verification=verification,
            **({"cache": str(rollouts.cache.folder.resolve())} if keep_cache else {}),
        )
    return RunResult(rollouts, tables, verification)


@contextmanager
def replacing_run(folder: Path) -> Iterator[None]:
    """Remove what an earlier run left in a folder of the user's choice; if the new one is refused, put it back.

    Raises:
        UsageError: what the new run is refused with.
    """
    aside = folder / EARLIER
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    # first what says that the run is complete; it is put back last
    files = [folder / name for name in (RUN_JSON, *TABLES, FIGURE, VERIFICATION, TIMELINE, TIMELINE_FIGURE)]
    files = [path for path in files if path.is_file()]
    for path in files:
        path.replace(aside / path.name)
    try:
        yield
    except UsageError:
        for path in reversed(files):
            (aside / path.name).replace(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_run_folder(
    folder: Path,
    spec: RunSpec,
    drawn: RunRollouts,
    tables: RunTables,
    settings: Mapping[str, Any],
    started: float,
    *,
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
        started: when the command began, by `time.perf_counter`.
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
    scorer, scores, options = spec.scorer, drawn.scores, spec.config["aggregator"]
    write_run_json(
        folder,
        {
            "config": spec.config,
            "settings": dict(settings) | spec.planned,
            "aggregators": {
                aggregator.name: {"_target_": options[aggregator.name]["_target_"], **vars(aggregator)}
                for aggregator in spec.aggregators
            },
            "checkpoint_digest": spec.adapter.identity,
            "scorer": None
            if scorer is None or scores is None
            else {"name": scorer.name, "digest": scorer.digest, "attention": scores.attention},
            "schedule": calibration.schedule_key(spec.schedule),
            "versions": environment.versions(quantized=spec.engine.quantize is not None),
            "machine": environment.machine(),
            "grading": {"given_up": len(spec.task.rule.guard.given_up)},
            **describe_rollouts(drawn, time.perf_counter() - started),
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
    with whole_file(folder / BUDGET) as path:
        budget.to_parquet(path, index=False)
    return {
        "budget": {
            "used": int(budget["used"].sum()),
            "drawn": int(budget["drawn"].sum()),
            "why": budget["why"].value_counts().to_dict(),
            "certificates": budget["certificate"][budget["certificate"] != ""].value_counts().to_dict(),
        }
    }


def describe_rollouts(drawn: RunRollouts, this_command: float) -> dict[str, Any]:
    """What `run.json` says of a run's rollouts.

    Args:
        drawn: the rollouts.
        this_command: seconds that the command has taken.

    Returns:
        How they were computed (which attention, whose logits, and why not the usual ones), where and in batches of
        which sizes, how many there are, and the seconds that drawing, scoring and decoding took, whichever run that
        was.
    """
    rows, scores, winners = drawn.rows, drawn.scores, drawn.winners
    computation, said = drawn.cache.read_computation(), dict[str, Any]()
    if computation is not None:
        said |= computation.way | ({"computation_reason": computation.reason} if computation.reason else {})
    said |= {"devices": sorted(set(rows["device"])), "rows": sorted({int(value) for value in rows["rows"]})}
    counts = {"total": len(rows), "drawn_now": drawn.drawn_now}
    seconds = {} if scores is None else {"scoring": scores.seconds}
    seconds["drawing" if winners is None else "thinking"] = float(rows["seconds"].sum()) - sum(seconds.values())
    if scores is not None:
        counts["scored_now"] = scores.scored_now
    if winners is not None:
        counts["decoded_now"], seconds["decoding"] = winners.decoded_now, float(winners.decoding["seconds"].sum())
    return said | {"rollouts": counts, "seconds": seconds | {"this_command": this_command}}
