"""Accuracy of two runs of one rollout on `arith`, by the number of steps of a question, and their paired difference.

python experiments/parallel_in_time/steps.py RUN OTHER_RUN [SPLIT]

Prints, for each number of steps and up to each, both accuracies and RUN minus OTHER_RUN with its 95 % interval
(bootstrap over questions).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.task.arith import Arith

RESAMPLES = 2000


def correct(run: str) -> pd.Series:
    """Whether each question was answered right, by its id."""
    return pd.read_parquet(Path(run) / "rollouts.parquet").set_index("question_id")["correct"].astype(float)


def main() -> None:
    """Compare the runs that are given."""
    ours, theirs, *split = sys.argv[1:]
    both = pd.concat({"ours": correct(ours), "theirs": correct(theirs)}, axis=1).dropna()
    questions = Arith(split=split[0] if split else "test", limit=len(both), seed=0, steps=None).questions()
    both["steps"] = pd.Series({question.id: len(question.steps) for question in questions})
    generator = np.random.default_rng(0)
    found = sorted(both["steps"].unique())
    parts = {f"{steps:.0f}": both["steps"] == steps for steps in found}
    parts |= {f"up to {steps:.0f}": both["steps"] <= steps for steps in found[1:]}
    for name, chosen in parts.items():
        part = both[chosen]
        difference_Q = (part["ours"] - part["theirs"]).to_numpy()
        means = [generator.choice(difference_Q, len(difference_Q)).mean() for _ in range(RESAMPLES)]
        low, high = np.quantile(means, [0.025, 0.975])
        print(
            f"{name} steps ({len(part)}): {100 * part['ours'].mean():.1f} and {100 * part['theirs'].mean():.1f} %, "
            f"{100 * difference_Q.mean():+.1f} [{100 * low:.1f}, {100 * high:.1f}] points"
        )


if __name__ == "__main__":
    main()
