"""Accuracy of runs of one rollout on `arith`, by the number of steps of a question, and their paired difference.

python experiments/parallel_in_time/steps.py RUN OTHER_RUN [RUN OTHER_RUN ...]

Each pair is one training seed. Prints, for each number of steps and up to each, both accuracies and RUN minus OTHER_RUN
with the interval of `ltts compare`, over questions. Runs are of split `test`, or of the split in SPLIT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.results.statistics import paired_difference
from latent_tts.task.arith import Arith


def correct(run: str) -> pd.Series:
    """Whether each question was answered right, by its id."""
    return pd.read_parquet(Path(run) / "rollouts.parquet").set_index("question_id")["correct"].astype(float)


def main() -> None:
    """Compare the runs that are given."""
    pairs = [
        pd.concat({"ours": correct(ours), "theirs": correct(theirs)}, axis=1).dropna()
        for ours, theirs in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    ]
    questions = Arith(split=os.environ.get("SPLIT", "test"), limit=len(pairs[0]), seed=0, steps=None).questions()
    steps = pd.Series({question.id: len(question.steps) for question in questions})
    both = pd.concat(pairs)
    both["steps"] = steps.loc[both.index].to_numpy()
    found = sorted(both["steps"].unique())
    parts = {f"{count}": both["steps"] == count for count in found}
    parts |= {f"up to {count}": both["steps"] <= count for count in found[1:]}
    for name, chosen in parts.items():
        part = both[chosen]
        clusters = np.unique(part.index, return_inverse=True)[1]
        mean, low, high = paired_difference(part["ours"].to_numpy(), part["theirs"].to_numpy(), clusters)
        print(
            f"{name} steps ({clusters.max() + 1}): {100 * part['ours'].mean():.1f} and "
            f"{100 * part['theirs'].mean():.1f} %, {100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}] points"
        )


if __name__ == "__main__":
    main()
