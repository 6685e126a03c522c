"""Step scores by CUDA graphs: see `recording`. Prompts are one graph, and all latents another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from weakref import proxy

import torch
from torch import Tensor

from latent_tts.engine.prompts import pad_prompts
from latent_tts.engine.recording import (
    MIN_LENGTH,
    PROMPT_TOKENS,
    Bucket,
    CudaRecorder,
    Prompts,
    Recordings,
    power_of_two,
)
from latent_tts.engine.scoring import LatentScorer
from latent_tts.engine.state import FixedState
from latent_tts.types import RewardModel


@dataclass(frozen=True)
class StepScores:
    """The pass over all latents."""


ScorePasses: TypeAlias = Prompts | StepScores


class FixedScores(Bucket[ScorePasses, Tensor]):
    """The scores of R rows in tensors that stay where they are, for one batch after another."""

    def __init__(
        self,
        scorer: LatentScorer,
        questions: int,
        length: int,
        latents_RTD: Tensor,
        recorder: CudaRecorder,
    ) -> None:
        """Make the tensors.

        Args:
            scorer: the model.
            questions: Q.
            length: most tokens of a prompt.
            latents_RTD: of a batch, as an example.
            recorder: for these tensors alone.
        """
        super().__init__(recorder, scorer.backbone.dtype)
        self._scorer, device = scorer, scorer.device
        rows, steps, width = latents_RTD.shape
        self._ids_QL = torch.zeros(questions, length, dtype=torch.long, device=device)
        self._lengths_Q = self._ids_QL[:, 0].clone()
        self._latents_RTD = torch.zeros(rows, steps, width, dtype=scorer.backbone.dtype, device=device)
        precise = torch.promote_types(scorer.backbone.dtype, torch.float32)
        self._scores_RT = torch.zeros(rows, steps, dtype=precise, device=device)
        self._state = FixedState(scorer.backbone, rows // questions, steps, questions=questions, length=length)
        self._records_prompts = questions * length <= PROMPT_TOKENS

    def tensors(self) -> list[Tensor]:
        """See `Bucket`."""
        own = [self._ids_QL, self._lengths_Q, self._latents_RTD, self._scores_RT]
        return [*own, *self._state.of_questions(), *self._state.of_rows()]

    def load(self, prompts: list[list[int]], latents_RTD: Tensor) -> None:
        """Begin another batch of the same sizes."""
        ids_QL, lengths_Q = pad_prompts(prompts, torch.device("cpu"))
        self._ids_QL[:, : ids_QL.shape[1]] = ids_QL
        self._lengths_Q.copy_(lengths_Q)
        self._latents_RTD.copy_(latents_RTD)
        if not self._records_prompts:
            self._run_prompts(ids_QL.shape[1])

    def run(self, passes: ScorePasses) -> None:
        """See `Bucket`."""
        if isinstance(passes, Prompts):
            self._run_prompts(self._ids_QL.shape[1])
        else:
            self._state.rewind(0)
            self._scores_RT.copy_(self._scorer.extend(self._state, self._latents_RTD))

    def _run_prompts(self, length: int) -> None:
        self._state.restart()
        embed = self._scorer.backbone.get_input_embeddings()
        self._state.prefill(embed(self._ids_QL[:, :length]), self._lengths_Q)

    def agreement(self, found: Tensor, wanted: Tensor, roundings: float) -> float:
        """Share of rows whose mean difference is at most some roundings of the mean score of all rows.

        Roundings are of the model's dtype, or of float32, if it is wider.
        """
        limit = roundings * max(torch.finfo(each).eps for each in (self._dtype, torch.float32))
        return float(((found - wanted).abs().mean(1) <= limit * wanted.abs().mean()).double().mean())

    def walk(self, run: Callable[[ScorePasses], None]) -> Tensor:
        """Run all passes of the batch; returns its scores."""
        if self._records_prompts:
            run(Prompts())
        run(StepScores())
        return self._scores_RT.clone()


class GraphScorer(LatentScorer):
    """A scorer that replays recordings where batches of the same sizes come again."""

    def __init__(self, model: RewardModel, recordings: Recordings) -> None:
        """Record nothing yet.

        Args:
            model: the scorer's.
            recordings: where they are kept.

        Raises:
            RunError: graphs are needed, and the model is computed in a way that cannot be recorded.
        """
        super().__init__(model)
        self._recordings = recordings
        self._usable = recordings.usable(model.computation)

    @torch.inference_mode()
    def _score(self, prompts: list[list[int]], latents_RTD: Tensor, position_offset_Q: Tensor | None) -> Tensor:
        """See `LatentScorer`."""

        def usual() -> Tensor:
            return LatentScorer._score(self, prompts, latents_RTD, position_offset_Q)

        if not self._usable or position_offset_Q is not None:
            return usual()
        length = power_of_two(max(map(len, prompts)), MIN_LENGTH)

        def fixed(known: FixedScores | None) -> tuple[FixedScores, Tensor]:
            bucket = known or FixedScores(
                proxy(self), len(prompts), length, latents_RTD, self._recordings.new_recorder()
            )
            return bucket, bucket.record_or_replay(partial(bucket.load, prompts, latents_RTD), bucket.walk)

        key = "scores", len(prompts), *latents_RTD.shape[:2], length
        return self._recordings.compute(key, usual, fixed)
