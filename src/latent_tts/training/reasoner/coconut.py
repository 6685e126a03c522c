"""COCONUT's objective: the last hidden state is the next latent, and gradients flow through the latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.training.reasoner.batch import Sequences, TokenBatch, encode_batch, step_results_loss, written_loss
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import lm_head, load_trainable_lm
from latent_tts.types import Question


def training_logits(
    lm: PreTrainedModel,
    batch: TokenBatch,
    latents: int,
    next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> tuple[Tensor, Tensor]:
    """Logits (Q, A, V) of the written tokens that are not forced, and logits (Q, T, V) of the latents.

    Gradients flow through the latents.

    Args:
        lm: the causal LM.
        batch: the text before and after the latents.
        latents: T.
        next_latent: turns a final hidden state into the latent that is fed back.
    """
    rows, embed, head = Sequences(lm), lm.get_input_embeddings(), lm_head(lm)
    embeddings, mask, thoughts = embed(batch.prompt_QL), batch.prompt_mask_QL, []
    for _ in range(latents):
        thoughts.append(rows.feed(embeddings, mask)[:, -1:])
        embeddings, mask = next_latent(thoughts[-1]), torch.ones_like(mask[:, :1])
    # The last latent (or the prompt, if there are no latents) and the written text need only one pass.
    embeddings = torch.cat([embeddings, embed(batch.written_QA[:, :-1])], dim=1)
    hidden = rows.feed(embeddings, torch.cat([mask, batch.written_mask_QA[:, :-1]], dim=1))
    written = batch.written_QA.shape[1] - batch.forced
    return head(hidden[:, -written:]), head(torch.cat([*thoughts, hidden[:, :0]], dim=1))


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
        written, thoughts = training_logits(self.lm, batch, stage.latents, self.next_latent)
        loss = written_loss(written, batch)
        if stage.latents and self.step_loss:
            loss = loss + self.step_loss * step_results_loss(thoughts, batch)
        return loss

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions whose written tokens are all predicted by the argmax.

        If no step is written, their share is the greedy accuracy, since greedy decoding then produces the gold tokens.
        """
        batch = encode_batch(self.adapter, questions, stage, self.lm.device)
        predicted = training_logits(self.lm, batch, stage.latents, self.next_latent)[0].argmax(-1)
        right = (predicted == batch.targets_QA) | (batch.targets_QA == -100)
        return int(right.all(1).sum())
