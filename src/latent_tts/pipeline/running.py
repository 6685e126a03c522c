"""A run from its specification to its folder: the stages one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_tts.pipeline.rollouts import RunRollouts, draw_rollouts
from latent_tts.pipeline.run_output import clear_run_folder, write_run_folder
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import RunTables, make_tables, schedule_lines
from latent_tts.pipeline.verification import Verification, verify
from latent_tts.results.files import locked_folder
from latent_tts.results.parts import release_memory
from latent_tts.results.run_folder import LATENTS


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
    with locked_folder(folder, "hydra.run.dir"):
        clear_run_folder(folder)
        compared = spec.schedule.verify
        rollouts = draw_rollouts(spec, folder / LATENTS if keep_latents or compared else None)
        release_memory()
        tables = make_tables(spec, rollouts, settings)
        release_memory()
        verification = verify(replace(spec, on_answers=None), rollouts, folder) if compared else None
        if not keep_latents:
            (folder / LATENTS).unlink(missing_ok=True)
        seconds = time.perf_counter() - started
        kept = {"cache": str(rollouts.cache.folder.resolve())} if keep_cache else {}
        write_run_folder(folder, spec, rollouts, tables, settings, seconds=seconds, verification=verification, **kept)
    return RunResult(rollouts, tables, verification)
