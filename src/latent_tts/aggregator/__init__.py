"""Many rollouts to one answer; one option of the group `aggregator` per module. Pure arrays.

An aggregator states its rule once for all subsets of the rollouts; `results.statistics` applies it to subsets of every
size at once. There are three kinds of rule, the quickest first:

- `Ranking`: each rollout has a value of its own. Shares of right picks are exact for every subset size.
- `Vote`: each rollout adds a weight of its own to its prediction. Weights are summed along nested subsets.
- `Picks`: anything else, such as a pick that compares the members of a subset. Called with the members of each subset.

To add one, write a module with a dataclass that follows `Aggregator`, and a file in `conf/aggregator/` that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from latent_tts.types import Floats, RolloutArrays


@dataclass(frozen=True)
class Ranking:
    """The pick of a subset is the member with the highest value; a tie goes to the lowest rollout number.

    Attributes:
        value_QD: value of each rollout; NaN or -inf for one that cannot be picked.
    """

    value_QD: Floats


@dataclass(frozen=True)
class Vote:
    """The pick of a subset is a member with the prediction of the highest summed weight.

    Rollouts without a readable prediction do not vote. Sums within a relative 1e-12 are a tie; of all voters for the
    tied predictions, the one with the lowest rollout number is picked.

    Attributes:
        log_weight_QD: logarithm of the weight of each rollout, of any size, since weights are scaled by the largest one
            of each subset; NaN or infinite for one that does not vote.
    """

    log_weight_QD: Floats


@dataclass(frozen=True)
class Picks:
    """The pick of a subset is any function of its members.

    Attributes:
        pick: takes subsets of one size n as ascending rollout numbers (S, n) and returns the picked rollout numbers
            (Q, S), -1 where nothing is picked. The pick of a question and a subset depends on these two alone.
    """

    pick: Callable[[NDArray[np.int64]], NDArray[np.integer]]


Rule: TypeAlias = Ranking | Vote | Picks


class Aggregator(Protocol):
    """Picks one rollout's prediction out of a subset of a question's rollouts.

    Attributes:
        name: as tables show it.
        needs_score: whether it reads `score_QD`, so that it takes a scorer.
    """

    name: ClassVar[str]
    needs_score: ClassVar[bool]

    def rule(self, rollouts: RolloutArrays) -> Rule:
        """How a pick is made among these rollouts; `correct_QD` must not decide it."""
        ...
