"""A complete run folder, read again: what `compare` pairs and what is averaged over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator
from latent_tts.config import build as config
from latent_tts.results import metrics
from latent_tts.results import statistics as stats
from latent_tts.results.run_folder import METRICS, read_metrics, read_rollouts, read_run_json
from latent_tts.types import RolloutArrays


@dataclass(frozen=True)
class Finished:
    """A run.

    Attributes:
        metrics: its metrics table.
        rollouts: its rollouts table.
        aggregators: by name, as they were in the run.
        all_decoded: False where winners alone were (`answer.decode=winners`).
    """

    metrics: pd.DataFrame
    rollouts: pd.DataFrame
    aggregators: dict[str, Aggregator]
    all_decoded: bool

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """Read a run folder.

        Raises:
            UsageError: a file of it is damaged.
        """
        record = read_run_json(folder, {"config.answer.decode": str, "aggregators": dict})
        return cls(
            read_metrics(folder / METRICS),
            read_rollouts(folder),
            {
                name: config.build(f"aggregator.{name}", config.node(spec))
                for name, spec in record["aggregators"].items()
            },
            record["config"]["answer"]["decode"] != "winners",
        )

    @property
    def seed(self) -> str:
        """The run's seed, as tables have it."""
        return str(self.metrics["seed"].iloc[0])

    @property
    def reported(self) -> list[int]:
        """The budgets n in the metrics table."""
        return [int(n) for n in self.metrics["n"].unique()]

    def per_question(self, figure: str, n: int) -> pd.Series:
        """A figure (coverage, invalid_rate, or an aggregator's accuracy) of each question at n, by question id."""
        ids, arrays = self._arrays
        n = min(n, arrays.correct_QD.shape[1])  # a search leaves fewer rollouts than it grew
        values: np.ndarray
        if figure == "coverage":
            values = stats.coverage(arrays.correct_QD, n)
        elif figure == "invalid_rate":
            values = (arrays.prediction_QD < 0).mean(1)
        else:
            values = stats.picked_accuracy(self.aggregators[figure], arrays, n)
        return pd.Series(values, index=ids)

    @cached_property
    def _arrays(self) -> tuple[list[str], RolloutArrays]:
        ids = list(dict.fromkeys(self.rollouts["question_id"]))
        return ids, metrics.arrays_of(self.rollouts, len(self.rollouts) // len(ids))
