"""`ltts run experiment=conformance`: after a greedy run, compare its accuracy with a published or measured figure.

A Hydra callback, so that it judges every job of a sweep and `ltts run` itself knows nothing of it. The figures and
their sources are in `conf/experiment/conformance.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from latent_tts.config.build import from_here
from latent_tts.errors import LatentTTSError, RunError
from latent_tts.results import report
from latent_tts.results.run_folder import METRICS, read_metrics


@dataclass(frozen=True)
class KnownFigure:
    """A known greedy accuracy, published or measured.

    Attributes:
        model, task, split: as the tables call them.
        questions: how many questions the split has here.
        accuracy: in [0, 1].
        tolerance: largest difference that still conforms.
        source: who measured it.
    """

    model: str
    task: str
    split: str
    questions: int
    accuracy: float
    tolerance: float
    source: str

    def __str__(self) -> str:
        return f"{self.model} on {self.task}/{self.split}"

    def conforms(self, accuracy: float) -> bool:
        """Whether an accuracy differs by at most the tolerance."""
        return abs(accuracy - self.accuracy) <= self.tolerance + 1e-9


def find_known(metrics: pd.DataFrame, figures: Sequence[KnownFigure]) -> tuple[pd.Series, KnownFigure]:
    """The row of a run's greedy accuracy in its table, and the known figure for it.

    Raises:
        RunError: the run was not greedy, no figure is known for it, or it had other questions.
    """
    rows = metrics[(metrics["metric"] == "accuracy") & (metrics["n"] == 1)]
    if rows.empty or rows["sampler"].iloc[0] != "greedy":
        raise RunError("conformance: only greedy runs can be compared (sampler=greedy n=1)")
    row = rows.iloc[0]
    found = [f for f in figures if (f.model, f.task, f.split) == (row["model"], row["task"], row["split"])]
    if not found:
        raise RunError(
            f"conformance: no figure is known for {row['model']} on {row['task']}/{row['split']}; known are "
            f"{', '.join(map(str, figures)) or 'none'}"
        )
    if row["questions"] != found[0].questions:
        raise RunError(
            f"conformance: {found[0]} was measured on {found[0].questions} questions, the run had {row['questions']}; "
            "they were not compared"
        )
    return row, found[0]


class Conformance(Callback):
    """Judges each job when it has ended; one that does not conform fails with exit code 1, its tables kept."""

    def __init__(self, known: Sequence[Mapping[str, Any]]) -> None:
        self.known = [KnownFigure(**dict(figure)) for figure in known]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Print expected and found accuracy, then the path of the metrics again: every output ends with it."""
        if job_return.status is not JobStatus.COMPLETED:
            return
        path = from_here(Path(config.hydra.runtime.output_dir)) / METRICS
        try:
            row, known = find_known(read_metrics(path), self.known)
            conforms = known.conforms(row["value"])
            expected, tolerance, found, low, high = (
                f"{100 * share:.2f}"
                for share in (known.accuracy, known.tolerance, row["value"], row["ci_low"], row["ci_high"])
            )
            report.print_table(
                f"conformance: {known}, greedy, {known.questions} questions ({known.source})",
                ["expected %", "tolerance, points", "found %", "95 % interval", "verdict"],
                [[expected, tolerance, found, f"[{low}, {high}]", "conforms" if conforms else "DIFFERS"]],
            )
            print(path)
            if not conforms:
                raise RunError(
                    f"conformance: {known} is at {found} %, expected is {expected} +- {tolerance}\n"
                    f"{known.source}; see docs/conformance.md for possible causes"
                )
        except LatentTTSError as error:  # Hydra lets no callback raise, so the job is marked as failed
            job_return.status = JobStatus.FAILED
            job_return.return_value = error
