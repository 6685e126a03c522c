"""What `ltts ask` shows: votes while rollouts arrive, then a table per question, or a JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from latent_tts.pipeline.running import RunResult
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results import report
from latent_tts.results.cache import NOT_DECODED
from latent_tts.results.trace import UNREADABLE
from latent_tts.text.answer import shared_forms

MAX_TEXT = 60  # characters of a question in a line of votes


class ArrivingVotes:
    """Shows the votes of a question after each batch that has brought some, above the progress bar."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._questions = {spec.row_key(question): question for question in spec.questions}
        self._answers: dict[str, list[str | None]] = {key: [] for key in self._questions}

    def add(self, places: Sequence[tuple[str, int]], answer_ids: Sequence[Sequence[int]]) -> None:
        """Take the answers of a batch, see `RunRequest.on_answers`, and show the votes of its questions."""
        adapter, rule = self._spec.adapter, self._spec.task.rule
        for (key, _), ids in zip(places, answer_ids, strict=True):
            self._answers[key].append(adapter.read_answer(adapter.answer_text(list(ids)), rule))
        for key in dict.fromkeys(key for key, _ in places):
            answers = self._answers[key]
            votes = votes_text(count_votes(shared_forms(answers, rule.equal_by_value)), answers.count(None))
            text = shorten(self._questions[key].text, MAX_TEXT, placeholder="...") if len(self._questions) > 1 else ""
            report.print_status(f"{text} {report.counted(len(answers), 'rollout')}: {votes}".lstrip())


def describe_answers(spec: RunSpec, done: RunResult) -> list[dict[str, Any]]:
    """A line of `answers.jsonl` per question, with votes and costs.

    Returns:
        Lines as of `tables.answer_lines`, with `votes` (how many rollouts gave each answer that can be read, the most
        frequent first), `unreadable` (how many gave none), `agreement` (share of rollouts with the most frequent
        answer; None where only picks were decoded), `rollouts_drawn`, and their `seconds` and `gflops`. Votes count
        those that were used and decoded.
    """
    rollouts = done.tables.rollouts
    seconds = rollouts["seconds"].to_numpy(dtype=float)
    if done.rollouts.winners is not None:
        seconds = seconds + done.rollouts.winners.decoding["seconds"].fillna(0).to_numpy(dtype=float)
    seconds_Q = np.bincount(rollouts["question_index"], seconds, len(spec.questions))
    lines = []
    for line, spent, gflops in zip(done.tables.answers, seconds_Q, done.tables.gflops_Q, strict=True):
        drawn = rollouts[rollouts["question_index"] == line["index"]]
        own = drawn[drawn["rollout"] < line["rollouts"]]
        predictions = own["prediction"][own["stop_reason"] != NOT_DECODED].tolist()
        votes = count_votes(predictions)
        lines.append(
            {
                **line,
                "votes": votes,
                "unreadable": predictions.count(None),
                "agreement": max(votes.values(), default=0) / len(predictions) if spec.decode == "all" else None,
                "rollouts_drawn": len(drawn),
                "seconds": float(spent),
                "gflops": float(gflops),
            }
        )
    return lines


def count_votes(answers: Iterable[str | None]) -> dict[str, int]:
    """How many rollouts gave each answer that can be read, the most frequent first."""
    return dict(Counter(answer for answer in answers if answer is not None).most_common())


def votes_text(votes: dict[str, int], unreadable: int) -> str:
    """Votes as people read them: `8 (12), 9 (3), unreadable (1)`."""
    counts = [f"{answer} ({count})" for answer, count in votes.items()]
    return ", ".join(counts + [f"{UNREADABLE} ({unreadable})"] * bool(unreadable))


def print_answer(line: dict[str, Any]) -> None:
    """Print a table of a question's picks, with votes and costs below it; see `describe_answers`."""
    picks = line["picks"]
    rows = list(picks.values())
    columns = [
        report.Column("answer", [UNREADABLE if pick["answer"] is None else pick["answer"] for pick in rows]),
        report.Column("share or score", [_support(pick) for pick in rows]),
        report.Column("rollouts that agree", ["" if pick["agree"] is None else str(pick["agree"]) for pick in rows]),
    ]
    if "gold" in line:
        columns.append(report.Column("correct", ["yes" if pick["correct"] else "no" for pick in rows]))
    drawn = report.counted(line["rollouts_drawn"], "rollout")
    if line["rollouts"] < line["rollouts_drawn"]:
        drawn += f" ({line['rollouts']} used)"
    notes = [f"right answer: {line['gold']}"] if "gold" in line else []
    if line["agreement"] is not None:
        counts = votes_text(line["votes"], line["unreadable"])
        notes.append(f"votes: {counts}; agreement {100 * line['agreement']:.0f} %")
    if "certificate" in line:
        notes.append(f"certificate: {line['certificate']}")
    notes.append(f"{drawn}: {line['seconds']:.2g} s, {line['gflops']:.3g} GFLOP")
    report.print_columns(line["question"], [report.Column("picked by", list(picks), left=True)], columns, notes)


def _support(pick: dict[str, Any]) -> str:
    """What an answer was picked by: its share of the votes in percent, or its score."""
    if pick.get("share") is not None:
        return f"{100 * pick['share']:.1f} %"
    return "" if pick.get("score") is None else f"{pick['score']:.3g}"
