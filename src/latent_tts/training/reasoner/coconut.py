"""COCONUT's objective: the last hidden state is the next latent, and gradients flow through the latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.training.reasoner.batch import (
    Sequences,
    TokenBatch,
    encode_batch,
    result_logits,
    step_results_loss,
    written_loss,
)
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import lm_head, load_trainable_lm
from latent_tts.types import Question


def training_logits(
    lm: PreTrainedModel,
    batch: TokenBatch,
    latents: int,
    next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> tuple[Tensor, Tensor, Sequences]:
    """Logits (Q, A, V) of the written tokens that are not forced, and what each latent was made of.

    That is hidden states (Q, T, D), and the rows as they were after the prompts where results have several tokens.
    Gradients flow through the latents.

    Args:
        lm: the causal LM.
        batch: the text before and after the latents.
        latents: T.
        next_latent: turns a final hidden state into the latent that is fed back.
    """
    rows, embed, head = Sequences(lm), lm.get_input_embeddings(), lm_head(lm)
    embeddings, mask, thoughts, prompts = embed(batch.prompt_QL), batch.prompt_mask_QL, [], rows
    for step in range(latents):
        thoughts.append(rows.feed(embeddings, mask)[:, -1:])
        if step == 0 and batch.results_QTR.shape[2] > 1:
            prompts = rows.fork()
        embeddings, mask = next_latent(thoughts[-1]), torch.ones_like(mask[:, :1])
    # The last latent (or the prompt, if there are no latents) and the written text need only one pass.
    embeddings = torch.cat([embeddings, embed(batch.written_QA[:, :-1])], dim=1)
    hidden = rows.feed(embeddings, torch.cat([mask, batch.written_mask_QA[:, :-1]], dim=1))
    written = batch.written_QA.shape[1] - batch.forced
    return head(hidden[:, -written:]), torch.cat([*thoughts, hidden[:, :0]], dim=1), prompts


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
        self.own = nn.ModuleDict()
        self.next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """`written_loss`, plus `step_loss` times `step_results_loss` if there are latents."""
        batch = encode_batch(self.adapter, questions, stage, self.lm.device)
        written, thoughts_QTD, prompts = training_logits(self.lm, batch, stage.latents, self.next_latent)
        loss = written_loss(written, batch)
        if stage.latents and self.step_loss:
            results = result_logits(prompts, thoughts_QTD, self.next_latent, lm_head(self.lm), batch)
            loss = loss + self.step_loss * step_results_loss(results, batch)
        return loss

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions whose written tokens are all predicted by the argmax.

        If no step is written, their share is the greedy accuracy, since greedy decoding then produces the gold tokens.
        """
        batch = encode_batch(self.adapter, questions, stage, self.lm.device)
        predicted = training_logits(self.lm, batch, stage.latents, self.next_latent)[0].argmax(-1)
        right = (predicted == batch.targets_QA) | (batch.targets_QA == -100)
        return int(right.all(1).sum())
