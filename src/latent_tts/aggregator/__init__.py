"""How one answer is picked from many rollouts; one option of the group `aggregator` per module.

An aggregator states its rule once, and `results.statistics` applies it to subsets of every size at once. There are
three kinds of rules, the fastest first:

- `Ranking`: each rollout has a value. The share of right picks is exact for every subset size.
- `Vote`: each rollout adds a weight to its prediction. One table sums the weights of many subsets and questions.
- `Picks`: anything else, such as a pick that compares the members of a subset. It is called with the members of each
  subset.

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
        value_QD: value of each rollout; NaN or -inf if it cannot be picked.
    """

    value_QD: Floats


@dataclass(frozen=True)
class Vote:
    """The pick of a subset is a member with the prediction that has the highest summed weight.

    Rollouts without a readable prediction do not vote. Sums that differ by a relative 1e-12 or less are
    tied; of all voters for tied predictions, the one with the lowest rollout number is picked.

    Attributes:
        log_weight_QD: logarithm of the weight of each rollout. It may be large, since the weights of a subset are
            divided by their maximum. NaN or infinite for a rollout that does not vote.
    """

    log_weight_QD: Floats


@dataclass(frozen=True)
class Picks:
    """The pick of a subset is any function of its members.

    Attributes:
        pick: takes subsets of one size n as ascending rollout numbers (S, n) and returns the picked rollout numbers
            (Q, S), -1 if nothing is picked. A pick may depend only on the question and the subset.
    """

    pick: Callable[[NDArray[np.int64]], NDArray[np.integer]]


Rule: TypeAlias = Ranking | Vote | Picks


class Aggregator(Protocol):
    """Picks one rollout from a subset of the rollouts of a question.

    Attributes:
        name: as shown in tables.
        needs_score: whether it reads `score_QD`, so that a scorer is needed.
    """

    name: ClassVar[str]
    needs_score: ClassVar[bool] = False

    def rule(self, rollouts: RolloutArrays) -> Rule:
        """The rule for these rollouts; it must not read `correct_QD`."""
        ...
