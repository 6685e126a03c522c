"""The losses of LatentRM.

Each is a mean over questions. The term of a question depends only on that question, so that neither padding nor other
questions of the batch change its scale.

Shapes: logits r_t (Q, N, T); labels (Q, N, T), NaN for steps that a rollout does not have and for padding; outcomes
(Q, N), whether the rollout's own answer is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latent_tts.errors import check_fields, require

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("contrastive", "bce", "last_step")


@dataclass(frozen=True)
class RewardLoss:
    """A loss, chosen by its name.

    - `contrastive`: per step, a softmax over the rollouts of a question that have the step, and the cross-entropy
      -sum_n y log p with the unnormalized labels; mean over steps, then over questions. The official training has the
      same sum, but divides it by padded length times batch.
    - `bce`: per step and rollout, the binary cross-entropy of sigmoid(r_t) with the soft label; mean over the steps
      and rollouts of a question, then over questions.
    - `last_step`: a softmax over the rollouts of a question of their scores (sums over steps, by which a rollout is
      picked), with the outcome (0 or 1) as the label: `contrastive` without step labels.

    Attributes:
        name: `contrastive`, `bce` or `last_step`.
        normalize: divide the labels of a softmax by their sum over the rollouts (the loss is 0 if all labels are 0);
            only for `contrastive` and `last_step`.

    Source: You et al. 2025 (arXiv 2510.07745), section 5.2 and its ablations.
    """

    name: str
    normalize: bool

    def __post_init__(self) -> None:
        check_fields("loss", self, name=LOSSES, normalize="true or false")
        softmax = not self.normalize or self.name != "bce"
        require("loss.normalize", self.normalize, softmax, "must be false: loss.name=bce has no softmax")

    def __call__(self, logits_QNT: Tensor, labels_QNT: Tensor, correct_QN: Tensor) -> Tensor:
        """The loss, a scalar (imports torch)."""
        from torch.nn import functional as F

        has_step_QNT = ~labels_QNT.isnan()
        labels_QNT = labels_QNT.nan_to_num(0.0).to(logits_QNT.dtype)
        if self.name == "contrastive":
            losses_QT = self._softmax_loss(logits_QNT, labels_QNT, has_step_QNT)
            return _mean(losses_QT, has_step_QNT.any(1)).mean()
        if self.name == "bce":
            losses_QNT = F.binary_cross_entropy_with_logits(logits_QNT, labels_QNT, reduction="none")
            return _mean(losses_QNT.flatten(1), has_step_QNT.flatten(1)).mean()
        score_QN = rollout_scores(logits_QNT, has_step_QNT)
        return self._softmax_loss(score_QN, correct_QN.to(score_QN.dtype), has_step_QNT.any(-1)).mean()

    def _softmax_loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """-sum y log p over axis 1 of the members that are present."""
        import torch

        log_p = logits.masked_fill(~present, torch.finfo(logits.dtype).min).log_softmax(1)
        labels = labels * present
        if self.normalize:
            total = labels.sum(1, keepdim=True)
            labels = torch.where(total > 0, labels / total.clamp(min=torch.finfo(labels.dtype).tiny), 0.0)
        return -(labels * log_p.masked_fill(~present, 0.0)).sum(1)


def rollout_scores(logits_QNT: Tensor, has_step_QNT: Tensor) -> Tensor:
    """Scores (Q, N) of rollouts: the sum of the logits of their steps; -inf for a rollout without steps (padding)."""
    score_QN = logits_QNT.masked_fill(~has_step_QNT, 0.0).sum(-1)
    return score_QN.masked_fill(~has_step_QNT.any(-1), -math.inf)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean over axis 1 of the values where `counts` is true; 0 if there are none."""
    return values.masked_fill(~counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
