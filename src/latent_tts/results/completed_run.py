"""Reads the folder of a completed run back, for `ltts compare` and for means over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator
from latent_tts.errors import UsageError
from latent_tts.results import statistics
from latent_tts.results.metrics import answer_codes, rollout_arrays
from latent_tts.results.run_folder import (
    ANSWERS,
    CURVE_COLUMNS,
    ROLLOUTS,
    check_file,
    read_budget,
    read_rollouts,
    read_run_json,
)
from latent_tts.types import RolloutArrays

AggregatorBuilder = Callable[[str, Mapping[str, Any]], Aggregator]


@dataclass(frozen=True)
class CompletedRun:
    """A run as its folder describes it.

    Attributes:
        folder: where it lies.
        metrics: its metrics table.
        rollouts: its rollouts table.
        aggregators: by name, as they were in the run.
        all_decoded: False where only winners were decoded (`answer.decode=winners`).
        budget: where each question ended, if the run's budget looked at its rollouts.
    """

    folder: Path
    metrics: pd.DataFrame
    rollouts: pd.DataFrame
    aggregators: dict[str, Aggregator]
    all_decoded: bool
    budget: pd.DataFrame | None = None

    @classmethod
    def read(cls, folder: Path, metrics: pd.DataFrame, build_aggregator: AggregatorBuilder) -> CompletedRun:
        """Read a run folder.

        Args:
            folder: of a run that completed.
            metrics: its metrics table, see `run_folder.read_run_metrics`.
            build_aggregator: makes an aggregator from its name and its config node.

        Raises:
            UsageError: a file of it is damaged.
        """
        record = read_run_json(folder, {"config.answer.decode": str, "aggregators": dict})
        return cls(
            folder,
            metrics,
            read_rollouts(folder),
            {name: build_aggregator(name, node) for name, node in record["aggregators"].items()},
            record["config"]["answer"]["decode"] != "winners",
            read_budget(folder),
        )

    @property
    def seed(self) -> str:
        """The run's seed, as tables have it."""
        return str(self.metrics["seed"].iloc[0])

    @property
    def curve(self) -> dict[str, str]:
        """What runs that are seeds of each other have in common: `run_folder.CURVE_COLUMNS`."""
        return {name: str(self.metrics[name].iloc[0]) for name in CURVE_COLUMNS}

    @cached_property
    def golds(self) -> dict[str, str | None]:
        """The gold answer of each question, by its id."""
        path = self.folder / ANSWERS
        check_file(self.folder, ANSWERS)
        try:
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return {line["id"]: line.get("gold") for line in lines}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error

    @property
    def has_gold(self) -> bool:
        """Whether its questions have gold answers, so that its rollouts are right or wrong."""
        return bool(self.rollouts["correct"].notna().all())

    @property
    def figures(self) -> list[str]:
        """The figures that each question has: coverage, and the accuracies of aggregators."""
        if self.budget is None:
            return ["coverage", *self.aggregators]
        accuracy = self.metrics[(self.metrics["metric"] == "accuracy") & self.metrics["value"].notna()]
        return accuracy["aggregator"].tolist()

    @property
    def reported(self) -> list[int]:
        """The n in the metrics table."""
        return self.metrics["n"].unique().tolist()

    def per_question(self, figure: str, n: int) -> pd.Series:
        """A figure of each question at n, by question id.

        Args:
            figure: coverage, invalid_rate, agreement, or an aggregator, whose accuracy is meant.
            n: rollouts per question.

        Raises:
            UsageError: questions have unequal numbers of rollouts, or a rollout is missing or there twice.
        """
        if self.budget is not None and figure == "agreement":
            used = self.rollouts["question_id"].map(self.budget.set_index("question_id")["used"])
            answers = self.rollouts[self.rollouts["rollout"] < used].groupby("question_id", sort=False)["prediction"]
            return answers.agg(lambda own: statistics.agreement(answer_codes(own)[None], len(own))[0])
        if self.budget is not None:
            if figure not in self.figures:
                raise UsageError(f"{self.folder}: its budget stopped for {self.figures[0]}; it has no {figure}")
            return pd.Series(self.budget["correct"].to_numpy(dtype=np.float64), index=self.budget["question_id"])
        ids, arrays = self._arrays
        n = min(n, arrays.prediction_QD.shape[1])  # a search keeps fewer rollouts than it grew
        if figure == "invalid_rate":
            values = (arrays.prediction_QD < 0).mean(1)
        elif figure == "agreement":
            values = statistics.agreement(arrays.prediction_QD, n)
        elif figure == "coverage":
            assert arrays.correct_QD is not None, "coverage needs gold answers"
            values = statistics.coverage(arrays.correct_QD, n)
        else:
            (values,) = statistics.picked_accuracies(self.aggregators[figure], arrays, [n])
        return pd.Series(values, index=ids)

    @cached_property
    def _arrays(self) -> tuple[list[str], RolloutArrays]:
        rollouts = self.rollouts.sort_values(["question_index", "rollout"])
        ids = rollouts["question_id"].unique().tolist()
        drawn = len(rollouts) // len(ids)
        if rollouts["rollout"].tolist() != list(range(drawn)) * len(ids):
            raise UsageError(
                f"{self.folder / ROLLOUTS}: its questions do not have the rollouts 0 to {drawn - 1} once each; "
                "draw that run again with ltts run"
            )
        return ids, rollout_arrays(rollouts, drawn)
