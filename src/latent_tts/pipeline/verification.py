"""`schedule.verify=true`: the same rollouts one latent after another, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from latent_tts.errors import RunError
from latent_tts.pipeline.rollouts import RunRollouts, draw_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import rollout_table
from latent_tts.results.run_folder import LATENTS, open_latents
from latent_tts.schedule.sequential import Sequential

VERIFICATION = "verification.csv"
MAX_DEVIATION = 1e-5  # relative RMS of latents in float32, where the schedule promises equality
ROWS_AT_ONCE = 1 << 12
MAX_CHANGED = 10  # answers that are printed
MIN_MARGIN = 1e-3  # below it rounding may change an answer


@dataclass(frozen=True)
class Verification:
    """How rollouts differ from those of `schedule=sequential`.

    Attributes:
        rows: one per rollout: `question_id`, `rollout`, `deviation` (the largest relative RMS difference of its
            latents; infinite where it has another number of them), `prediction`, `sequential`, `margin` (the smaller
            `answer_margin` of the two), `changed`.
        exact: whether the schedule promises equality.
    """

    rows: pd.DataFrame
    exact: bool

    @property
    def lines(self) -> list[str]:
        """What a person reads: the largest deviation, and the first changed answers."""
        rows, changed = self.rows, self.rows[self.rows["changed"]]
        largest = rows.iloc[int(rows["deviation"].to_numpy().argmax())]
        left = len(changed) - MAX_CHANGED
        return [
            f"verified against schedule=sequential: {len(rows)} rollouts, largest deviation of a latent "
            f"{largest['deviation']:.2g} (question {largest['question_id']}, rollout {largest['rollout']}), "
            f"{len(changed)} changed answers, {(changed['margin'] < MIN_MARGIN).sum()} of them with a margin below "
            f"{MIN_MARGIN:g}",
            *(
                f"question {row.question_id}, rollout {row.rollout}: {row.prediction} instead of {row.sequential} "
                f"(margin {row.margin:.2g})"
                for row in changed.head(MAX_CHANGED).itertuples()
            ),
            *([f"and {left} more, in {VERIFICATION}"] if left > 0 else []),
        ]

    def check(self) -> None:
        """Raise RunError if the schedule promises equality and rounding cannot explain a difference."""
        broken = self.rows[self.rows["changed"] & (self.rows["margin"] >= MIN_MARGIN)]
        if self.exact and len(broken):
            row = broken.iloc[0]
            raise RunError(
                f"schedule.verify: {len(broken)} answers differ from those of schedule=sequential, first question "
                f"{row['question_id']}, rollout {row['rollout']}: {row['prediction']} instead of {row['sequential']}"
            )
        if self.exact and (largest := self.rows["deviation"].max()) > MAX_DEVIATION:
            raise RunError(
                f"schedule.verify: latents deviate from those of schedule=sequential by {largest:.2g} relative RMS, "
                f"more than {MAX_DEVIATION:g}"
            )


def verify(spec: RunSpec, drawn: RunRollouts, folder: Path) -> Verification:
    """Compare rollouts with those of `schedule=sequential`, which are drawn where the cache lacks them.

    Args:
        spec: the run, whose answers are all decoded.
        drawn: its rollouts.
        folder: where their latents are, in `latents.safetensors`.

    Raises:
        RunError: a failure while drawing.
    """
    sequential = replace(spec, schedule=Sequential(), draft=None, scorer=None)
    with TemporaryDirectory(prefix="latent_tts_") as elsewhere:
        other = draw_rollouts(sequential, Path(elsewhere) / LATENTS)
        kept = [open_latents(each, len(drawn.rows)) for each in (folder, Path(elsewhere))]
        deviation = np.concatenate(
            [_deviations(*(latents_RTD[row : row + ROWS_AT_ONCE].double().numpy() for latents_RTD in kept))
             for row in range(0, len(drawn.rows), ROWS_AT_ONCE)]
        )  # fmt: skip
    deviation[(drawn.rows["latent_steps"] != other.rows["latent_steps"]).to_numpy()] = np.inf
    here, there = rollout_table(spec, drawn), rollout_table(sequential, other)
    prediction, wanted = here["prediction"], there["prediction"]
    table = here[["question_id", "rollout", "prediction"]].assign(
        sequential=wanted,
        deviation=deviation,
        margin=np.minimum(here["answer_margin"], there["answer_margin"]),
        changed=(prediction != wanted) & ~(prediction.isna() & wanted.isna()),
    )
    return Verification(table, exact=spec.schedule.exact and spec.engine.dtype == "float32")


def _deviations(latents_RTD: np.ndarray, wanted_RTD: np.ndarray) -> np.ndarray:
    """The largest relative RMS difference of each rollout's latents, which are zeros where it has none."""
    size_RT = np.maximum(np.square(wanted_RTD).sum(2), np.finfo(np.float64).tiny)
    return np.sqrt(np.square(latents_RTD - wanted_RTD).sum(2) / size_RT).max(1, initial=0.0)
