"""`confidence` over many orders of a run's rollouts: prints orders.csv.

python experiments/budgets/orders.py VALID_RUN RUN

VALID_RUN calibrates the rule. The 64 rollouts of each question of RUN are put into 64 seeded orders; in each the rule
stops at round 1 and is compared with the vote of all 64. A question counts with its means over the orders; intervals
are over questions.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from seeds import DRAWN, Recorded, read, vote

from latent_tts.budget import Tally
from latent_tts.budget.rule.confidence import Confidence, calibrate
from latent_tts.results.statistics import paired_difference

ORDERS, QUESTIONS, THRESHOLDS = 64, 1000, (0.99, 0.995)


def reordered(tally: Tally, order_N: np.ndarray) -> Tally:
    """The same rollouts in another order."""
    answers = [tally.answers[place] for place in order_N]
    return Tally(DRAWN, answers, tally.log_weight_N[order_N], tally.logprob_N[order_N], tally.score_N[order_N])


def figures(question: Recorded, rules: list[Confidence], orders_ON: np.ndarray) -> list[tuple[float, float, float]]:
    """By rule, of a question: share of the rollouts used, and how often its pick and the vote of all are right."""
    found_OCV = []
    for order_N in orders_ON:
        tally, correct_N = reordered(question.tally, order_N), question.correct_N[order_N]
        stops = [rule.stop(tally) for rule in rules]
        used = [DRAWN if stop is None else stop.used for stop in stops]
        picks = [vote(tally, count) for count in [*used, DRAWN]]
        *right, full = [pick >= 0 and correct_N[pick] for pick in picks]
        found_OCV.append([(count / DRAWN, each, full) for count, each in zip(used, right, strict=True)])
    return [tuple(row) for row in np.mean(found_OCV, axis=0, dtype=float)]


def main() -> None:
    """Compare the run that is given."""
    valid, run = sys.argv[1:]
    fitted = calibrate([question.tally for question in read(valid)], "likelihood")
    rules = [Confidence("valid", threshold, fitted=fitted) for threshold in THRESHOLDS]
    orders_ON = np.stack([np.random.default_rng(seed).permutation(DRAWN) for seed in range(ORDERS)])
    by_rule_CQV = np.array([figures(question, rules, orders_ON) for question in read(run, QUESTIONS)]).swapaxes(0, 1)
    rows = []
    for threshold, found_QV in zip(THRESHOLDS, by_rule_CQV, strict=True):
        used, ours, theirs = found_QV.T
        difference, low, high = paired_difference(ours, theirs, np.arange(len(ours)))
        means = {"used": used.mean(), "accuracy": ours.mean(), "at_64": theirs.mean(), "difference": difference}
        percent = {name: 100 * value for name, value in (means | {"ci_low": low, "ci_high": high}).items()}
        rows.append({"threshold": threshold, "orders": ORDERS, "questions": len(ours)} | percent)
    print(pd.DataFrame(rows).to_csv(index=False, float_format="%.4g"), end="")


if __name__ == "__main__":
    main()
