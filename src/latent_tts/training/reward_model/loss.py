"""The losses of LatentRM.

Each is a mean over questions, and the part of a question depends on nothing else, so that neither padding nor the
other questions of a batch change its scale.

Shapes: logits r_t (Q, N, T); labels (Q, N, T), NaN where a rollout has no such step (padding is that too); outcomes
(Q, N), whether a rollout's own answer is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latent_tts.errors import bad_value

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("contrastive", "bce", "last_step")


@dataclass(frozen=True)
class RewardLoss:
    """A loss by name.

    - `contrastive`: for each step a softmax over the rollouts of a question that have the step, and the cross-entropy
      -sum_n y log p with the labels as they are, mean over steps, then over questions. The official training is this
      sum too, but divides by padded length times batch.
    - `bce`: for each step of each rollout the binary cross-entropy of sigmoid(r_t) with the soft label; mean over the
      steps and rollouts of a question, then over questions.
    - `last_step`: one softmax over the rollouts of a question of the summed score, which is what picks a rollout,
      with the final outcome (0 or 1) as the label: what is left of `contrastive` without step-wise labels.

    Attributes:
        name: one of the three.
        normalize: divide the labels of a softmax by their sum over the rollouts (a softmax whose labels are all 0
            then counts 0); for `contrastive` and `last_step`.

    Source: You et al. 2025 (arXiv 2510.07745), section 5.2 and its ablations.
    """

    name: str
    normalize: bool

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise bad_value("loss.name", self.name, f"one of {', '.join(LOSSES)}")
        if not isinstance(self.normalize, bool):
            raise bad_value("loss.normalize", self.normalize, "true or false")
        if self.normalize and self.name == "bce":
            raise bad_value("loss.normalize", self.normalize, "loss.name=bce has no softmax; false")

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
        """-sum y log p over axis 1; members that are not present are left out, whatever their logits."""
        import torch

        log_p = logits.masked_fill(~present, torch.finfo(logits.dtype).min).log_softmax(1)
        labels = labels * present
        if self.normalize:
            total = labels.sum(1, keepdim=True)
            labels = torch.where(total > 0, labels / total.clamp(min=torch.finfo(labels.dtype).tiny), 0.0)
        return -(labels * log_p.masked_fill(~present, 0.0)).sum(1)


def rollout_scores(logits_QNT: Tensor, has_step_QNT: Tensor) -> Tensor:
    """Scores (Q, N) of rollouts: the sum of the logits of their steps; -inf without a step, as padding is."""
    score_QN = logits_QNT.masked_fill(~has_step_QNT, 0.0).sum(-1)
    return score_QN.masked_fill(~has_step_QNT.any(-1), -math.inf)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean over axis 1 of the values where `counts` is true; 0 where it never is."""
    return values.masked_fill(~counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
