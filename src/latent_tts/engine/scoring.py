"""Scores of latents by a LatentRM, on one prefix per question and a short suffix per rollout.

A step score is the classifier's output at a latent's position. It depends on the prompt and on the latents up to that
one alone, never on the answer, on other rows or on how many latents come in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.prompts import pad_prompts
from latent_tts.engine.state import State, open_state
from latent_tts.types import RewardModel


class LatentScorer:
    """Scores latents with one loaded LatentRM."""

    def __init__(self, model: RewardModel) -> None:
        self.model, self.backbone = model, model.backbone
        prepare_backbone(self.backbone, model.computation)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    @torch.inference_mode()
    def open(
        self, prompts: list[list[int]], rollouts: int, capacity: int, *, position_offset_Q: Tensor | None = None
    ) -> State:
        """Run Q prompts; returns a state to which the latents of `rollouts` rows per question are appended.

        Args:
            prompts: Q lists of token ids, none empty; the start token is their last.
            rollouts: N.
            capacity: most latents of a row.
            position_offset_Q: added to the position ids of each question's tokens and latents; None adds nothing.
        """
        ids_QL, lengths_Q = pad_prompts(prompts, self.device)
        state = open_state(
            self.backbone, self.model.computation, rollouts, capacity, position_offset_Q=position_offset_Q
        )
        state.prefill(self.backbone.get_input_embeddings()(ids_QL), lengths_Q)
        return state

    @torch.inference_mode()
    def extend(self, state: State, latents_RSD: Tensor) -> Tensor:
        """Append S latents to every row.

        Args:
            state: from `open`, with all latents so far.
            latents_RSD: as they were fed back to the reasoner.

        Returns:
            Step scores (R, S), float32 (float64 for a model in float64).
        """
        return self.model.classifier(state.append(latents_RSD.to(self.device, self.backbone.dtype)))

    def score(
        self,
        prompts: list[list[int]],
        latents_RTD: Tensor,
        *,
        steps_R: Tensor | None = None,
        position_offset_Q: Tensor | None = None,
    ) -> Tensor:
        """Step scores of finished rollouts, N of each of Q prompts, question-major.

        Args:
            prompts: Q lists of token ids.
            latents_RTD: the latents of R = Q*N rows.
            steps_R: how many latents each row has; None means T.
            position_offset_Q: see `open`.

        Returns:
            (R, T) as of `extend`; NaN beyond a row's own latents.
        """
        scores_RT = self._score(prompts, latents_RTD, position_offset_Q)
        if steps_R is None:
            return scores_RT
        steps = torch.arange(latents_RTD.shape[1], device=scores_RT.device)
        return scores_RT.masked_fill(steps >= steps_R.to(scores_RT.device)[:, None], float("nan"))

    def _score(self, prompts: list[list[int]], latents_RTD: Tensor, position_offset_Q: Tensor | None) -> Tensor:
        """Step scores (R, T), also beyond a row's own latents."""
        rows, steps = latents_RTD.shape[:2]
        state = self.open(prompts, rows // len(prompts), steps, position_offset_Q=position_offset_Q)
        return self.extend(state, latents_RTD)
