"""`confidence`, `reward` and `shared` over the recorded runs of several seeds: prints rows of seeds.csv.

python experiments/budgets/seeds.py VALID_RUN RUN [RUN ...]

VALID_RUN calibrates `confidence`. The runs have 64 rollouts of the same questions, and each has another seed. Rules
stop at round 1; they are compared with the pick of all 64. `shared T` spends T rollouts per question on average, in
rounds of 4, and is compared with the first T of each question. Intervals are those of `ltts compare`, over questions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from latent_tts.budget import Tally, play
from latent_tts.budget.rule.confidence import Confidence, calibrate
from latent_tts.budget.rule.reward import Reward
from latent_tts.budget.shared import Shared
from latent_tts.results.statistics import paired_difference

QUESTIONS, DRAWN = 500, 64
THRESHOLDS, COSTS, PER_QUESTION = (0.95, 0.99, 0.995), (0.1, 0.03), (6, 8, 16)


class Recorded(NamedTuple):
    """A question's rollouts."""

    id: str
    tally: Tally
    correct_N: np.ndarray


class Part(NamedTuple):
    """What a rule did with the questions of one run: rollouts used, and which picks were right beside the reference."""

    seed: int
    ids: list[str]
    used: np.ndarray
    right: np.ndarray
    reference: np.ndarray


def recorded(run: str) -> dict[str, Any]:
    """The settings of a run."""
    return json.loads((Path(run) / "run.json").read_text())["config"]


def read(run: str, limit: int = QUESTIONS) -> list[Recorded]:
    """The first questions of a run."""
    table = pd.read_parquet(Path(run) / "rollouts.parquet")
    found = []
    for name, rows in table.groupby("question_id", sort=False):
        answers = [answer if isinstance(answer, str) else None for answer in rows["prediction"]]
        scores = rows["score"].to_numpy(dtype=float, na_value=np.nan)
        tally = Tally(DRAWN, answers, np.zeros(DRAWN), rows["answer_logprob"].to_numpy(float), scores)
        found.append(Recorded(str(name), tally, rows["correct"].to_numpy(bool)))
    return found[:limit]


def vote(tally: Tally, used: int) -> int:
    """The rollout that a vote among the first ones picks; -1 for none."""
    votes, last = tally.votes, used - 1
    return int(votes.first_NK[last, votes.leader_N[last]]) if votes.lead_N[last] > 0 else -1


def best(tally: Tally, used: int) -> int:
    """The first ones' rollout with the highest score."""
    return int(np.nanargmax(tally.score_N[:used]))


def right(questions: list[Recorded], pick: Callable[[Tally, int], int], used: np.ndarray) -> np.ndarray:
    """Which questions a pick among so many rollouts answers."""
    picks = [pick(question.tally, int(count)) for question, count in zip(questions, used, strict=True)]
    return np.array([place >= 0 and q.correct_N[place] for place, q in zip(picks, questions, strict=True)], float)


def parts_of(run: str, rules: dict[str, Confidence | Reward]) -> dict[str, Part]:
    """What each rule does with a run."""
    seed = recorded(run)["seed"]
    questions = read(run)
    tallies, ids = [question.tally for question in questions], [question.id for question in questions]
    found = {}

    def add(name: str, pick: Callable[[Tally, int], int], used: np.ndarray, reference: int) -> None:
        compared = right(questions, pick, np.full(len(questions), reference))
        found[name] = Part(seed, ids, used, right(questions, pick, used), compared)

    for name, rule in rules.items():
        if isinstance(rule, Reward) and not np.isfinite(tallies[0].score_N).any():
            continue  # the family has no LatentRM
        stops = [rule.stop(tally) for tally in tallies]
        used = np.array([DRAWN if stop is None else stop.used for stop in stops])
        add(name, best if isinstance(rule, Reward) else vote, used, DRAWN)
    for each in PER_QUESTION:
        budget = Shared(each * len(tallies), first=4, round=4)
        _, stops = play(
            budget, len(tallies), lambda drawn: [t.until(int(n)) for t, n in zip(tallies, drawn, strict=True)]
        )
        add(f"shared {each}", vote, np.array([stop.used for stop in stops]), each)
    return found


def row_of(model: str, rule: str, parts: list[Part]) -> dict[str, Any]:
    """A row of the table: one seed, or all of them."""
    ids = np.concatenate([part.ids for part in parts])
    ours, theirs = (np.concatenate([getattr(part, side) for part in parts]) for side in ("right", "reference"))
    mean, low, high = paired_difference(ours, theirs, np.unique(ids, return_inverse=True)[1])
    share = np.concatenate([part.used for part in parts]).mean() / DRAWN
    figures = {"used": share, "accuracy": ours.mean(), "reference": theirs.mean(), "difference": mean}
    percent = {name: 100 * value for name, value in (figures | {"ci_low": low, "ci_high": high}).items()}
    seed = "all" if len(parts) > 1 else parts[0].seed
    return {"model": model, "rule": rule, "seed": seed, "questions": len(set(ids))} | percent


def main() -> None:
    """Compare the runs that are given."""
    valid, *runs = sys.argv[1:]
    fitted = calibrate([question.tally for question in read(valid)], "likelihood")
    rules: dict[str, Confidence | Reward] = {
        f"confidence {share}": Confidence("valid", share, fitted=fitted) for share in THRESHOLDS
    }
    rules |= {f"reward {cost}": Reward(cost) for cost in COSTS}
    found = [parts_of(run, rules) for run in runs]
    model = recorded(runs[0])["model"]["name"]
    rows = []
    for rule in found[0]:
        parts = [each[rule] for each in found]
        rows += [row_of(model, rule, [part]) for part in parts] + [row_of(model, rule, parts)]
    print(pd.DataFrame(rows).to_csv(index=False, float_format="%.4g"), end="")


if __name__ == "__main__":
    main()
