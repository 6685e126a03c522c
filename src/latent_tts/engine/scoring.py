"""Scores of latents: a LatentRM over the same layout as rollouts, one prefix a question and a short suffix a rollout.

A step score is the classifier's output at a latent's position. It depends on the prompt and on the latents up to that
one alone, never on the answer, on other rows or on how many latents come in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_tts.engine.attention import AttentionState
from latent_tts.engine.backbone import padded, prepare, run
from latent_tts.types import RewardModel


class LatentScorer:
    """Scores the latents of one loaded LatentRM's reasoner."""

    def __init__(self, model: RewardModel) -> None:
        self.model, self.backbone = model, model.backbone
        prepare(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    @torch.inference_mode()
    def open(
        self, prompts: list[list[int]], rollouts: int, capacity: int, *, shifts_Q: Tensor | None = None
    ) -> AttentionState:
        """Run Q prompts; what comes back takes the latents of `rollouts` rows a question.

        Args:
            prompts: Q lists of token ids, none empty; the start token is their last.
            rollouts: N.
            capacity: most latents a row will have.
            shifts_Q: what is added to the position ids of each question's tokens and latents; None adds nothing.
        """
        ids_QL, lengths = padded(prompts, self.device)
        state = AttentionState(lengths, rollouts, capacity)
        positions = torch.arange(ids_QL.shape[1], device=self.device)[None].expand(len(prompts), -1)
        if shifts_Q is not None:
            last = shifts_Q[:, None] + lengths[:, None] - 1
            positions = torch.minimum(positions + shifts_Q[:, None], last)  # padding stays where there are positions
        run(self.backbone, self.backbone.get_input_embeddings()(ids_QL), positions, state)
        state.reads_prefix = True
        return state

    @torch.inference_mode()
    def extend(self, state: AttentionState, latents_RSD: Tensor, *, shifts_Q: Tensor | None = None) -> Tensor:
        """Append S latents to every row.

        Args:
            state: from `open`, with all latents so far.
            latents_RSD: as they were fed back to the reasoner.
            shifts_Q: as given to `open`.

        Returns:
            Step scores (R, S), float32 (float64 for a model in float64).
        """
        steps = latents_RSD.shape[1]
        positions = state.positions(steps)
        if shifts_Q is not None:
            positions = positions + shifts_Q.repeat_interleave(state.rollouts)[:, None]
        hidden_RSD = run(self.backbone, latents_RSD.to(self.device, self.backbone.dtype), positions, state)
        state.used += steps
        return self.model.classifier(hidden_RSD)

    def score(
        self,
        prompts: list[list[int]],
        latents_RTD: Tensor,
        *,
        steps_R: Tensor | None = None,
        shifts_Q: Tensor | None = None,
    ) -> Tensor:
        """Step scores of finished rollouts, N of each of Q prompts, question-major.

        Args:
            prompts: Q lists of token ids.
            latents_RTD: the latents of R = Q*N rows.
            steps_R: how many latents each row has; None means T.
            shifts_Q: see `open`.

        Returns:
            (R, T) as of `extend`; NaN beyond a row's own latents.
        """
        rows, steps = latents_RTD.shape[:2]
        state = self.open(prompts, rows // len(prompts), steps, shifts_Q=shifts_Q)
        scores_RT = self.extend(state, latents_RTD, shifts_Q=shifts_Q)
        if steps_R is None:
            return scores_RT
        beyond_RT = torch.arange(steps, device=scores_RT.device) >= steps_R.to(scores_RT.device)[:, None]
        return scores_RT.masked_fill(beyond_RT, float("nan"))


def official_shifts(text_tokens_QN: list[list[int]]) -> list[list[int]]:
    """What left padding to the longest text of a group adds to each row's positions.

    The official script reads the rollouts of a batch as left-padded texts without position ids, so that every row is
    moved to the right by its padding.

    Args:
        text_tokens_QN: tokens of each row's whole text (prompt, latents, end of thinking, answer), a list a group.

    Source: ModalityDance/LatentTTS at 6657f20, src/infer_gpt2_rm.py.
    """
    return [[max(row) - own for own in row] for row in text_tokens_QN]
