"""What questions have after some of their rollouts, and the figures of a run whose budget looked at that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget import Stop, Tally, is_adaptive
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED_SUMS
from latent_tts.results.metrics import Figures, answer_codes, measured_figures
from latent_tts.results.statistics import agreement, supported_picks
from latent_tts.text.answer import shared_forms
from latent_tts.types import Float64, Floats, Int64, RolloutArrays


class AnswerReader:
    """Reads answers, equal ones once, in a thread: those of a batch while the next one is drawn."""

    def __init__(self, spec: RunSpec) -> None:
        adapter, rule = spec.adapter, spec.task.rule
        self._read = cache(lambda ids: adapter.read_answer(adapter.answer_text(list(ids)), rule))
        self._thread = ThreadPoolExecutor(1, "answer reader")
        self._one_at_a_time = Lock()  # grading may share a process of its own

    def __enter__(self) -> AnswerReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, places: Sequence[tuple[str, int]], answer_ids: Sequence[Sequence[int]]) -> None:
        """Take the answers of a batch; see `RunRequest.on_answers`."""
        self._thread.submit(list, map(self.read, [tuple(ids) for ids in answer_ids]))  # `read` raises its error again

    def read(self, ids: tuple[int, ...]) -> str | None:
        """The answer in some ids; None if it cannot be read."""
        with self._one_at_a_time:
            return self._read(ids)


class Tallying:
    """The tallies of a run's questions; rollouts are added as they come, and each answer is read once."""

    def __init__(self, spec: RunSpec, read: Callable[[tuple[int, ...]], str | None]) -> None:
        """Begin without rollouts; `read` is `AnswerReader.read`."""
        self.spec, self._read = spec, read
        self._drawn = [
            defaultdict[str, list[Any]](list) for _ in spec.questions
        ]  # of each question's rollouts, in order
        rule = spec.task.rule
        self._equal = rule.equal_by_value and cache(rule.equal_by_value)

    def add(self, rows: pd.DataFrame, score: Floats | None, before: Sequence[int], counts: Sequence[int]) -> None:
        """Add the next rollouts of each question.

        Args:
            rows: `answer_ids`, `answer_logprob`, `latent_steps` and `conflicts` of each, question-major.
            score: of each; None where they have none.
            before: how many each question had.
            counts: how many it has now.
        """
        tokens = [tuple(int(token) for token in ids) for ids in rows["answer_ids"]]
        columns: dict[str, list[Any]] = {
            "answers": list(map(self._read, tokens)),
            "tokens": list(map(len, tokens)),
            "logprob": rows["answer_logprob"].tolist(),
            "steps": rows["latent_steps"].tolist(),
            "conflicts": rows["conflicts"].tolist(),
            # as in `rollouts.parquet`, so that equal scores there are equal here
            "score": [np.nan] * len(rows) if score is None else score.astype(np.float32).tolist(),
        }
        start = 0
        for drawn, was, now in zip(self._drawn, before, counts, strict=True):
            part = slice(start, start := start + now - was)
            for name, values in columns.items():
                drawn[name] += values[part]

    def tallies(self) -> list[Tally]:
        """What each question has."""
        tallies = []
        for question, drawn in zip(self.spec.questions, self._drawn, strict=True):
            score_N = np.array(drawn["score"], dtype=np.float64)
            log_weight_N, most = self._log_weights(score_N)
            counts = (np.array(drawn[name], dtype=np.int64) for name in ("steps", "tokens", "conflicts"))
            once, each_N = self.spec.rollout_gflop(question, *counts)
            tallies.append(
                Tally(
                    n=self.spec.n,
                    answers=list(drawn["answers"]),
                    log_weight_N=log_weight_N,
                    logprob_N=np.array(drawn["logprob"], dtype=np.float64),
                    score_N=score_N,
                    max_log_weight=most,
                    equal=self._equal,
                    prompt_gflop=once,
                    gflop_N=each_N,
                )
            )
        return tallies

    def _log_weights(self, score_N: Float64) -> tuple[Float64, float | None]:
        """Logarithms of the weights of votes, and the largest possible one."""
        spec = self.spec
        assert is_adaptive(spec.budget)
        if spec.budget.aggregator != "weighted":
            return np.zeros(len(score_N)), 0.0
        weighted = next(each for each in spec.aggregators if isinstance(each, Weighted))
        bounds = spec.given_scorer.range
        return weighted.log_weights(score_N), None if bounds is None else weighted.log_weights(bounds[1])


@dataclass(frozen=True)
class Outcome:
    """Where the questions of a run ended, in its order.

    Attributes:
        tallies: what each had drawn.
        stops: how much of it was used, and why no more.
    """

    tallies: list[Tally]
    stops: list[Stop]

    @property
    def counts(self) -> list[int]:
        """Rollouts that were drawn."""
        return [tally.drawn for tally in self.tallies]


def budget_table(spec: RunSpec, outcome: Outcome, rollouts: pd.DataFrame) -> pd.DataFrame:
    """A row per question: what was used and drawn, why no more, what is known of the error, and the pick."""
    used = [stop.used for stop in outcome.stops]
    starts = np.cumsum([0, *outcome.counts[:-1]])
    pick_Q = _picks(spec, outcome)
    places = np.where(pick_Q >= 0, starts + pick_Q, 0)
    answers = rollouts["prediction"].to_numpy(dtype=object)[places]
    return pd.DataFrame(
        {
            "question_id": [question.id for question in spec.questions],
            "used": np.array(used, dtype=np.int32),
            "drawn": np.array(outcome.counts, dtype=np.int32),
            "why": [stop.why for stop in outcome.stops],
            "certificate": [stop.certificate for stop in outcome.stops],
            "pick": pick_Q.astype(np.int32),
            "answer": pd.array(np.where(pick_Q >= 0, answers, None), dtype=object),
            "correct": np.full(len(pick_Q), None, dtype=object)  # without gold answers
            if rollouts["correct"].isna().any()
            else rollouts["correct"].to_numpy(dtype=bool)[places] & (pick_Q >= 0),
        }
    )


def _picks(spec: RunSpec, outcome: Outcome) -> Int64:
    """The pick of each question among the rollouts that it used; -1 for none. Rollouts it lacks are masked."""
    assert is_adaptive(spec.budget)
    widest = max(stop.used for stop in outcome.stops)
    shape = len(outcome.stops), widest
    prediction_QD = np.full(shape, -1, dtype=np.int64)
    logprob_QD, score_QD = np.full(shape, np.nan), np.full(shape, np.nan)
    for place, (tally, stop) in enumerate(zip(outcome.tallies, outcome.stops, strict=True)):
        own = slice(stop.used)
        prediction_QD[place, own] = _used_answers(tally, stop)
        logprob_QD[place, own], score_QD[place, own] = tally.logprob_N[own], tally.score_N[own]
    chosen = next(each for each in spec.aggregators if each.name == spec.budget.aggregator)
    return supported_picks(chosen, RolloutArrays(prediction_QD, None, logprob_QD, score_QD))[0]


def _used_answers(tally: Tally, stop: Stop) -> Int64:
    """The answers of the rollouts that a question used, see `answer_codes`."""
    return answer_codes(shared_forms(tally.answers[: stop.used], tally.equal))


def adaptive_figures(spec: RunSpec, outcome: Outcome, rollouts: pd.DataFrame, table: pd.DataFrame) -> list[Figures]:
    """The figures at n, the most that a question may get; null where they would need rollouts that were not drawn."""
    assert is_adaptive(spec.budget)
    questions, counts = len(spec.questions), np.array(outcome.counts)
    owner = np.repeat(np.arange(questions), counts)
    used = zip(outcome.tallies, outcome.stops, strict=True)

    def summed(column: str) -> Float64:
        return np.bincount(owner, rollouts[column].to_numpy(dtype=np.float64), questions).astype(np.float64)

    unknown, judged = np.full(questions, np.nan), table["correct"].notna().all()
    right = table["correct"].to_numpy(dtype=np.float64) if judged else unknown
    if rollouts[list(MEASURED_SUMS)].notna().all().all():
        measured = measured_figures(rollouts[list(MEASURED_SUMS)], rollouts, questions, float(counts.mean()))
    elif rollouts["seconds"].notna().all():  # a replay: they were drawn in the batches of another run
        measured = {"recorded_seconds": float(rollouts["seconds"].sum()) / questions}
    else:
        measured = {}
    figures = Figures.of(
        spec.n, spec.n, measured,
        accuracy={
            each.name: right if each.name == spec.budget.aggregator else unknown for each in spec.aggregators if judged
        },
        coverage=unknown if judged else None,
        agreement=np.array([agreement(_used_answers(*each)[None], each[1].used)[0] for each in used]),
        rollouts_used=table["used"].to_numpy(dtype=np.float64),
        rollouts_drawn=counts.astype(np.float64),
        latent_steps=summed("latent_steps"),
        answer_tokens=summed("answer_tokens"),
        gflops=np.array([tally.gflop for tally in outcome.tallies]),
    )  # fmt: skip
    return [figures]
