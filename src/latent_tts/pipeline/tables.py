"""From the rollouts of a run to its tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator, Vote
from latent_tts.budget import Stop, is_adaptive
from latent_tts.engine.cost import Shape
from latent_tts.pipeline.rollouts import RunRollouts, Winners
from latent_tts.pipeline.rounds import Outcome, adaptive_figures, budget_table
from latent_tts.pipeline.scores import Scores
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results import statistics
from latent_tts.results.cache import MEASURED, MEASURED_SUMS, NOT_DECODED
from latent_tts.results.files import settings_digest
from latent_tts.results.metrics import Figures, measured_figures, metric_rows, rollout_arrays, rollout_figures
from latent_tts.results.parts import release_memory
from latent_tts.results.run_folder import COUNT_COLUMNS
from latent_tts.task import has_gold
from latent_tts.text.answer import AnswerRule, shared_forms
from latent_tts.types import Float32, Floats, Question, RolloutArrays

log = logging.getLogger(__name__)
MAX_USELESS = 0.95  # share of answers
NAMES = ("checkpoint", "scorer", "task", "split")  # not in a run's identity: digests say whose weights, which questions


@dataclass
class RunTables:
    """The tables of a run.

    Attributes:
        rollouts: `rollouts.parquet`, a row per rollout, with `cache.MEASURED` beside its columns.
        answers: `answers.jsonl`, see `answer_lines`.
        metrics: `metrics.csv`, a row per figure.
        gflops_Q: of each question, at the largest reported n.
        budget: a row per question where the budget looked at its rollouts: see `rounds.budget_table`.
    """

    rollouts: pd.DataFrame
    answers: list[dict[str, Any]]
    metrics: pd.DataFrame
    gflops_Q: Floats
    budget: pd.DataFrame | None = None


def make_tables(spec: RunSpec, drawn: RunRollouts, settings: Mapping[str, Any]) -> RunTables:
    """The tables of a run.

    Args:
        spec: the run.
        drawn: its rollouts.
        settings: keys that differ from their defaults and have no column of their own.
    """
    outcome = drawn.outcome
    if outcome is not None:
        spec = replace(spec, counts=outcome.counts)
    rollouts = rollout_table(spec, drawn)
    release_memory()
    _warn_of_useless_answers(rollouts)
    if outcome is not None:
        return make_outcome_tables(spec, rollouts, outcome, settings)
    if drawn.winners is not None:
        figures = winner_figures(spec, drawn, drawn.winners, rollouts)
    else:
        figures = rollout_figures(
            rollouts,
            drawn=spec.kept,
            reported=spec.budget.reported(spec.n),
            aggregators=spec.aggregators,
            diversity_Q=diversities(drawn.dissimilarity_RT, spec.kept, spec.kept),
            gflops=gflops(spec, rollouts, drawn.scores),
        )
    release_memory()
    return RunTables(
        rollouts,
        answers=answer_lines(spec, rollouts),
        metrics=metric_rows(figures, run_columns(spec, settings)),
        gflops_Q=figures[-1].per_question["gflops", ""],
    )


def make_outcome_tables(
    spec: RunSpec, rollouts: pd.DataFrame, outcome: Outcome, settings: Mapping[str, Any]
) -> RunTables:
    """The tables of a run whose budget stopped questions; see `make_tables`."""
    budget = budget_table(spec, outcome, rollouts)
    figures = adaptive_figures(spec, outcome, rollouts, budget)
    return RunTables(
        rollouts,
        answers=answer_lines(spec, rollouts, outcome.stops),
        metrics=metric_rows(figures, run_columns(spec, settings)),
        gflops_Q=figures[-1].per_question["gflops", ""],
        budget=budget,
    )


def rollout_table(spec: RunSpec, drawn: RunRollouts) -> pd.DataFrame:
    """The rollouts table: cached rows with their scores, and answers read by the model's and the task's rules."""
    adapter, rule, rows, counts = spec.adapter, spec.task.rule, drawn.rows, spec.table_counts
    # many rollouts give the same answer: each is read once
    text_of = cache(lambda ids: adapter.answer_text(list(map(int, ids))))
    answer_of = cache(lambda stop, text: None if stop == NOT_DECODED else adapter.read_answer(text, rule))
    is_right = cache(lambda answer, gold: None not in (answer, gold) and rule.is_right(answer, gold))

    def column(values: Iterable[object], dtype: type = object) -> np.ndarray:
        return np.fromiter(values, dtype, len(rows))  # lists of a million rows beside each other would be large

    def of_questions(values: Iterable[object]) -> np.ndarray:
        return np.array([*values], dtype=object).repeat(counts)

    texts = column(text_of(tuple(ids)) for ids in rows["answer_ids"])
    answers = column(map(answer_of, rows["stop_reason"], texts))
    right = column(map(is_right, answers, of_questions(question.answer for question in spec.questions)), bool)
    for start, end in pairwise([0, *accumulate(counts)]):
        # equal answers of a question get one form, so that they are one vote
        answers[start:end] = shared_forms(answers[start:end].tolist(), rule.equal_by_value)
    ids = of_questions(question.id for question in spec.questions)
    return pd.DataFrame(
        {
            "question_index": np.arange(len(spec.questions), dtype="int32").repeat(counts),
            "question_id": pd.Series(ids, dtype=object),  # pandas' own strings would take one object per row
            "rollout": rows["rollout"].astype("int32"),
            "prediction": pd.Series(answers, dtype=object),
            "correct": right if has_gold(spec.questions) else pd.array([None] * len(rows), "boolean"),
            "score": pd.array(np.full(len(rows), np.nan) if drawn.scores is None else drawn.scores.score, "Float32"),
            "answer_logprob": rows["answer_logprob"],
            "answer_margin": rows["answer_margin"],
            "stop_reason": rows["stop_reason"],
            "answer_text": pd.Series(texts, dtype=object),
            "answer_ids": rows["answer_ids"],
            "answer_tokens": rows["answer_ids"].map(len),
            "latent_steps": rows["latent_steps"].astype("int32"),
            **{name: rows[name].astype("int32") for name in COUNT_COLUMNS},
            **{name: rows[name] for name in MEASURED},
        },
        copy=False,
    )


def answer_lines(spec: RunSpec, rollouts: pd.DataFrame, stops: Sequence[Stop] | None = None) -> list[dict[str, Any]]:
    """What each question was answered.

    Args:
        spec: the run.
        rollouts: its rollouts table.
        stops: from how many of its rollouts each question's answer is picked, if the budget said so; None: from all.

    Returns:
        For each question `index` (from 0), `id`, `question`, `gold` if it is known, `rollouts` (their number) and
        `picks`: by aggregator the `answer` (None if it cannot be read, or nothing is picked), the number of the
        `rollout`, the `share` of the votes or the `score` it was picked by, how many rollouts `agree` with it (None
        where only picks were decoded), and whether it is `correct` (None without gold). With `stops` also `why` there
        are no more, and a `certificate` if there is one.
    """
    used_Q = np.array(spec.table_counts if stops is None else [stop.used for stop in stops])
    if (used_Q < spec.table_counts).any():  # without need, no copy of all rows
        rollouts = rollouts[rollouts["rollout"].to_numpy() < np.repeat(used_Q, spec.table_counts)]
    lines: list[dict[str, Any]] = [
        {"index": index, "id": question.id, "question": question.text}
        | ({} if question.answer is None else {"gold": question.answer})
        | {"rollouts": int(used_Q[index]), "picks": {}}
        for index, question in enumerate(spec.questions)
    ]
    reported = spec.aggregators
    if is_adaptive(spec.budget):  # where to stop depends on the data, so the pick of another aggregator would be biased
        reported = [each for each in reported if each.name == spec.budget.aggregator]
    for number in np.unique(used_Q):  # budgets may give unequally many
        chosen_Q = used_Q == number
        alike = rollouts if chosen_Q.all() else rollouts[np.repeat(chosen_Q, used_Q)]
        arrays = rollout_arrays(alike, int(number))
        predictions = alike["prediction"].to_numpy(dtype=object).reshape(-1, number)
        for aggregator in reported:
            picked = _picked(aggregator, arrays, predictions, all_decoded=spec.decode == "all")
            for index, pick in zip(np.flatnonzero(chosen_Q), picked, strict=True):
                lines[index]["picks"][aggregator.name] = pick
    for line, stop in zip(lines, stops or (), strict=stops is not None):
        line |= {"why": stop.why} | ({"certificate": stop.certificate} if stop.certificate else {})
    return lines


def _picked(
    aggregator: Aggregator, arrays: RolloutArrays, predictions: np.ndarray, *, all_decoded: bool
) -> Iterator[dict[str, Any]]:
    """What an aggregator picks for each question, see `answer_lines`; predictions (Q, D) are texts."""
    reason = "share" if isinstance(aggregator.rule(arrays), Vote) else "score"
    for question, (pick, support) in enumerate(zip(*statistics.supported_picks(aggregator, arrays), strict=True)):
        code_N, known = arrays.prediction_QD[question], arrays.correct_QD
        code = code_N[pick] if pick >= 0 else -1
        yield {
            "answer": predictions[question, pick] if code >= 0 else None,
            "rollout": int(pick) if pick >= 0 else None,
            reason: None if np.isnan(support) else float(support),
            "agree": (int((code_N == code).sum()) if code >= 0 else 0) if all_decoded else None,
            "correct": None if known is None else bool(pick >= 0 and known[question, pick]),
        }


def _warn_of_useless_answers(rollouts: pd.DataFrame) -> None:
    """Warn where nearly no answer can be read, or nearly all are cut off: then accuracies say nothing of the model."""
    decoded = rollouts["stop_reason"] != NOT_DECODED
    for useless, what in (
        (decoded & rollouts["prediction"].isna(), "cannot be read by the task's rule"),
        (rollouts["stop_reason"] == "length", "are cut off at max_answer_tokens"),
    ):
        if decoded.any() and useless.sum() >= MAX_USELESS * decoded.sum():
            log.warning(
                "%.0f %% of the answers %s, as in %r",
                100 * useless.sum() / decoded.sum(), what, rollouts["answer_text"].iloc[useless.argmax()][-80:],
            )  # fmt: skip


def winner_figures(spec: RunSpec, drawn: RunRollouts, winners: Winners, rollouts: pd.DataFrame) -> list[Figures]:
    """The figures of each reported n where only its picks were decoded, each n as if it were the only one."""
    n = spec.n
    steps_QN, conflicts_QN = (rollouts[name].to_numpy().reshape(-1, n) for name in ("latent_steps", "conflicts"))
    figures = []
    for budget, pick_Q in winners.picks.items():
        places = np.arange(len(pick_Q)) * n + pick_Q
        picked = rollouts.iloc[places]
        gflops_Q = []
        for place, (question, pick) in enumerate(zip(spec.questions, pick_Q, strict=True)):
            steps_N, conflicts_N, own = steps_QN[place, :budget], conflicts_QN[place, :budget], slice(pick, pick + 1)
            tokens_1 = picked["answer_tokens"].to_numpy()[place : place + 1]
            thinking = spec.rollout_gflop(question, steps_N, None, conflicts_N)
            decoding = spec.rollout_gflop(question, steps_N[own], tokens_1, conflicts_N[own], scored=False)
            gflops_Q.append(sum(shared + each_N.sum() for shared, each_N in (thinking, decoding)))
        diversity_Q = diversities(drawn.dissimilarity_RT, n, budget)
        sums = pd.concat([rollouts[list(MEASURED_SUMS)], winners.decoding.iloc[places]])
        measured = measured_figures(sums, rollouts, len(pick_Q), budget) if budget == max(winners.picks) else {}
        figures.append(
            Figures.of(
                budget, budget, measured,
                # a question none of whose rollouts has a score has no pick
                accuracy={
                    "best_of_n": picked["correct"].where(picked["score"].notna(), other=False).to_numpy(np.float64)
                }
                if has_gold(spec.questions)
                else None,
                invalid_rate=np.array(picked["prediction"].isna(), dtype=np.float64),
                diversity=None if None in diversity_Q else np.array(diversity_Q, dtype=np.float64),
                latent_steps=steps_QN[:, :budget].sum(1).astype(np.float64),
                answer_tokens=picked["answer_tokens"].to_numpy(dtype=np.float64),
                gflops=np.array(gflops_Q),
            )
        )  # fmt: skip
    return figures


def gflops(spec: RunSpec, rollouts: pd.DataFrame, scores: Scores | None) -> list[tuple[float, float]]:
    """For each question, the GFLOP that its rollouts share, and the GFLOP that each of them adds on average."""
    columns = [
        rollouts[name].to_numpy().reshape(-1, spec.kept) for name in ("latent_steps", "answer_tokens", "conflicts")
    ]
    pairs = []
    for place, question in enumerate(spec.questions):
        shared, each_N = spec.rollout_gflop(question, *(column_QN[place] for column_QN in columns))
        each = float(each_N.mean())
        if spec.kept < spec.n:  # a search: n think, those kept answer
            _, grown_N = spec.rollout_gflop(question, columns[0][place], None)
            each = float(grown_N.mean()) + (each - float(grown_N.mean())) * spec.kept / spec.n
        if scores is not None and spec.scorer is not None:
            # official positions need a prefill for each length of text: a cost of the rollouts, not of the question
            prefill = Shape.from_config(spec.scorer.sizes).pass_flops(len(spec.prompts[question.id]))
            each += (scores.prefills[place] - 1) * float(prefill) / 1e9 / spec.n
        pairs.append((shared, each))
    return pairs


def schedule_lines(spec: RunSpec, rollouts: pd.DataFrame) -> list[str]:
    """What a schedule has counted that does not compute all latents one after another, per rollout on average."""
    if spec.schedule.exit is not None:
        steps, most = rollouts["latent_steps"], spec.adapter.latents
        return [
            f"schedule.exit={spec.schedule.exit:g}, per rollout: {steps.mean():.2f} of at most {most} "
            f"latents; {100 * (steps < most).mean():.0f} % have fewer"
        ]
    if spec.schedule.stepwise:
        return []
    counts = [f"{rollouts[name].mean():.2f} {name}" for name in COUNT_COLUMNS if rollouts[name].any()]
    return [f"schedule={spec.schedule.name}, per rollout: {', '.join(counts)}"]


def run_columns(spec: RunSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say which run a metrics row belongs to."""
    sampler, scorer = spec.sampler, spec.scorer
    shown = {key: value for key, value in settings.items() if key != f"sampler.{sampler.param}"} | spec.planned
    columns = {
        "model": spec.adapter.name,
        "checkpoint": spec.adapter.checkpoint,
        "task": spec.task.name,
        "split": spec.task.split or "",
        "sampler": sampler.name,
        "sampler_param": sampler.param or "",
        "sampler_value": "" if sampler.value is None else str(sampler.value),
        "settings": ",".join(f"{key}={value}" for key, value in sorted(shown.items())),
        "schedule": spec.schedule.name,
        "search": "" if spec.search.name == "independent" else spec.search.name,
        "budget": spec.budget.label if is_adaptive(spec.budget) else spec.budget.name,
        "scorer": "" if scorer is None else scorer.name,
        "seed": str(spec.seed),
        "dtype": spec.engine.dtype,
        "questions_digest": questions_digest(spec.questions, spec.task.rule),
        "weights_digest": "+".join(
            [spec.adapter.identity, *(each.digest for each in (scorer, spec.draft) if each is not None)]
        ),
    }
    identity = {name: value for name, value in columns.items() if name not in NAMES} | {"n": spec.n}
    return {"run_id": settings_digest(identity)[:12], **columns}


def questions_digest(questions: Sequence[Question], rule: AnswerRule) -> str:
    """What identifies a question set and how its answers are read, whatever its name, its file and its order."""
    content: dict[str, Any] = {"questions": sorted([question.id, question.answer] for question in questions)}
    if rule != AnswerRule("decimal"):
        content["rule"] = [rule.name, rule.tolerance]
    return settings_digest(content)


def diversities(dissimilarity_RT: Float32, n: int, first: int) -> list[float | None]:
    """The diversity of the first rollouts of each question, out of n of each."""
    groups_QNT = dissimilarity_RT.reshape(len(dissimilarity_RT) // n, n, dissimilarity_RT.shape[1])
    return [statistics.diversity(group[:first]) for group in groups_QNT]
