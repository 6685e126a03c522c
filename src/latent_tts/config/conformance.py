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
    """A greedy accuracy that others measured.

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


@dataclass(frozen=True)
class Verdict:
    """A run's greedy accuracy beside the known one.

    Attributes:
        known: what was expected.
        accuracy, low, high: what the run has, with its 95 % interval.
    """

    known: KnownFigure
    accuracy: float
    low: float
    high: float

    @property
    def conforms(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.accuracy - self.known.accuracy) <= self.known.tolerance + 1e-9


def judge(metrics: pd.DataFrame, figures: Sequence[KnownFigure]) -> Verdict:
    """Compare a run's table with the figure that is known of it.

    Raises:
        RunError: the run was not greedy, no figure is known of it, or it had other questions.
    """
    rows = metrics[(metrics["metric"] == "accuracy") & (metrics["n"] == 1)]
    if rows.empty or rows["sampler"].iloc[0] != "greedy":
        raise RunError("conformance: only greedy runs can be compared (sampler=greedy n=1)")
    row = rows.iloc[0]
    found = [f for f in figures if (f.model, f.task, f.split) == (row["model"], row["task"], row["split"])]
    if not found:
        raise RunError(
            f"conformance: no figure is known of {row['model']} on {row['task']}/{row['split']}; known are "
            f"{', '.join(map(str, figures)) or 'none'}"
        )
    if row["questions"] != found[0].questions:
        raise RunError(
            f"conformance: the figure of {found[0]} is of {found[0].questions} questions, the run had "
            f"{row['questions']}; so they were not compared"
        )
    return Verdict(found[0], float(row["value"]), float(row["ci_low"]), float(row["ci_high"]))


class Conformance(Callback):
    """Judges each job when it has ended; one that does not conform fails with exit code 1, its tables kept."""

    def __init__(self, known: Sequence[Mapping[str, Any]]) -> None:
        self.known = [KnownFigure(**dict(figure)) for figure in known]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Print expected and found accuracy, then the path of the metrics once more, since it ends every output."""
        if job_return.status is not JobStatus.COMPLETED:
            return
        path = from_here(Path(config.hydra.runtime.output_dir)) / METRICS
        try:
            verdict = judge(read_metrics(path), self.known)
            show(verdict)
            print(path)
            if not verdict.conforms:
                raise RunError(
                    f"conformance: {verdict.known} is at {100 * verdict.accuracy:.2f} %, expected is "
                    f"{100 * verdict.known.accuracy:.2f} +- {100 * verdict.known.tolerance:.2f}\n"
                    f"{verdict.known.source}; see docs/conformance.md for possible causes"
                )
        except LatentTTSError as error:  # Hydra lets no callback raise, so the job is marked as failed
            job_return.status = JobStatus.FAILED
            job_return.return_value = error


def show(verdict: Verdict) -> None:
    """The verdict as a table on stdout."""
    known = verdict.known
    report.print_table(
        f"conformance: {known}, greedy, {known.questions} questions ({known.source})",
        ["expected %", "tolerance", "found %", "95 % interval", "verdict"],
        [
            [
                f"{100 * known.accuracy:.2f}",
                f"{100 * known.tolerance:.2f}",
                f"{100 * verdict.accuracy:.2f}",
                f"[{100 * verdict.low:.2f}, {100 * verdict.high:.2f}]",
                "conforms" if verdict.conforms else "DIFFERS",
            ]
        ],
    )
