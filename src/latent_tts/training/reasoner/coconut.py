"""COCONUT's objective: the last hidden state is the next latent, and gradients flow through the latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.head import ModelLogits
from latent_tts.training.reasoner.batch import (
    Sequences,
    TokenBatch,
    check_computation,
    encode_batch,
    step_results_loss,
    token_loss,
)
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import load_trainable_lm
from latent_tts.types import Question


class CoconutObjective:
    """Next-token prediction after the latents of a stage.

    Attributes:
        lm: the causal LM in training.
        own: empty, since COCONUT adds no modules.
        next_latent: turns a final hidden state into the next latent.
    """

    def __init__(self, adapter: CheckpointAdapter, step_loss: float) -> None:
        self.adapter, self.step_loss = adapter, step_loss
        self.lm = load_trainable_lm(adapter.folder)
        check_computation(self.lm)
        self.own = nn.ModuleDict()
        self.next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def think(self, rows: Sequences, hidden_Q1D: Tensor, latents: int) -> tuple[Tensor, Tensor]:
        """Compute the latents.

        Args:
            rows: the prompts; all latents except the last are appended.
            hidden_Q1D: final hidden state of each prompt's last token, from which the first latent is made.
            latents: T.

        Returns:
            The latents (Q, S, D) that were not appended, here the last one (S = 1), and the hidden states (Q, T, D)
            from which all latents were made.
        """
        thoughts = [hidden_Q1D]
        for _ in range(latents - 1):
            thoughts.append(rows.feed(self.next_latent(thoughts[-1])).last_hidden_state)
        return self.next_latent(thoughts[-1]), torch.cat(thoughts, dim=1)

    def logits(self, batch: TokenBatch, latents: int) -> tuple[Tensor, Tensor, Sequences]:
        """Logits (Q, A, V) of the written tokens that are not forced, and what each latent was made of.

        That is hidden states (Q, T, D), and the rows as they were after the prompts where results have several tokens.
        Gradients flow through the latents.

        Args:
            batch: the text before and after the latents.
            latents: T.
        """
        embed, rows = self.lm.get_input_embeddings(), Sequences(self.lm)
        before_QSD, mask_QS, prompts = embed(batch.prompt_QL), batch.prompt_mask_QL, rows
        thoughts_QTD = before_QSD[:, :0]
        if latents:
            hidden_Q1D = rows.feed(before_QSD, mask_QS).last_hidden_state[:, -1:]
            prompts = rows.fork() if batch.results_QTR.shape[2] > 1 else rows
            before_QSD, thoughts_QTD = self.think(rows, hidden_Q1D, latents)
            mask_QS = mask_QS.new_ones(before_QSD.shape[:2])
        # the latents that were not run (or the prompt, if there are none) and the written text need only one pass
        embeddings_QSD = torch.cat([before_QSD, embed(batch.written_QA[:, :-1])], dim=1)
        mask_QS = torch.cat([mask_QS, batch.written_mask_QA[:, :-1]], dim=1)
        hidden_QSD = rows.feed(embeddings_QSD, mask_QS).last_hidden_state
        written = batch.written_QA.shape[1] - batch.forced
        return ModelLogits(self.lm)(hidden_QSD[:, -written:]), thoughts_QTD, prompts

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """The cross-entropy of the written tokens, plus `step_loss` times `step_results_loss` if there are latents."""
        batch = encode_batch(self.adapter, questions, stage, self.lm.device)
        written, thoughts_QTD, prompts = self.logits(batch, stage.latents)
        loss = token_loss(written, batch.targets_QA)
        if stage.latents and self.step_loss:
            results = step_results_loss(prompts, thoughts_QTD, self.next_latent, batch)
            loss = loss + self.step_loss * results
        return loss

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions whose written tokens are all predicted by the argmax.

        If no step is written, their share is the greedy accuracy, since greedy decoding then produces the gold tokens.
        """
        batch = encode_batch(self.adapter, questions, stage, self.lm.device)
        predicted = self.logits(batch, stage.latents)[0].argmax(-1)
        right = (predicted == batch.targets_QA) | (batch.targets_QA == -100)
        return int(right.all(1).sum())
