"""COCONUT's objective: the last hidden state is the next thought, and gradients flow through the thoughts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.training.reasoner.batch import Sequences, padded
from latent_tts.training.reasoner.curriculum import Stage, step_results, written_text
from latent_tts.training.reasoner.initial import trainable_lm
from latent_tts.types import Question


@dataclass(frozen=True)
class Batch:
    """Token ids of a batch: prompts padded on the left, what is written after thinking padded on the right.

    Attributes:
        prompt_QL, written_QA: ids (int64); `written` begins with the end-of-thinking tokens, if there are any.
        prompt_mask_QL, written_mask_QA: 1 on real tokens.
        forced: how many tokens of `written` are forced, so that nothing has to predict them.
        results_QT: the first token of each latent's step's result; past the last step, of the answer.
    """

    prompt_QL: Tensor
    prompt_mask_QL: Tensor
    written_QA: Tensor
    written_mask_QA: Tensor
    forced: int
    results_QT: Tensor

    @property
    def targets_QA(self) -> Tensor:
        """What is to be predicted, -100 on padding; without the forced tokens."""
        return self.written_QA[:, self.forced :].masked_fill(self.written_mask_QA[:, self.forced :] == 0, -100)


def encode_batch(adapter: CheckpointAdapter, questions: list[Question], stage: Stage) -> Batch:
    """Tokens of a stage of the curriculum."""
    end, eos, encode = adapter.thinking_end_ids, adapter.eos_id, adapter.tokenizer.encode
    written = [[*end, *encode(written_text(q.steps, q.answer, stage)).ids] for q in questions]
    prompt_QL, prompt_mask_QL = padded([adapter.encode(question) for question in questions], eos, left=True)
    written_QA, written_mask_QA = padded([[*ids, eos] for ids in written], eos, left=False)
    results = [[*step_results(q.steps), *[q.answer] * stage.latents][: stage.latents] for q in questions]
    results_QT = torch.tensor([[encode(result).ids[0] for result in row] for row in results])
    return Batch(prompt_QL, prompt_mask_QL, written_QA, written_mask_QA, len(end), results_QT)


def training_logits(
    lm: PreTrainedModel, batch: Batch, latents: int, next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden
) -> tuple[Tensor, Tensor]:
    """Logits (Q, A, V) of every written token that is not forced, and (Q, T, V) of what each latent would write.

    Gradients flow through the latents.

    Args:
        lm: the causal LM.
        batch: what stands before and after thinking.
        latents: T.
        next_latent: turns a last hidden state into the latent that is fed back.
    """
    rows, embed = Sequences(lm), lm.get_input_embeddings()
    head = lm.get_output_embeddings()
    assert head is not None
    embeddings, mask, thoughts = embed(batch.prompt_QL), batch.prompt_mask_QL, []
    for _ in range(latents):
        thoughts.append(rows.feed(embeddings, mask)[:, -1:])
        embeddings, mask = next_latent(thoughts[-1]), torch.ones_like(mask[:, :1])
    # The last latent (or the prompt, where there is none) shares a pass with everything written.
    embeddings = torch.cat([embeddings, embed(batch.written_QA[:, :-1])], dim=1)
    hidden = rows.feed(embeddings, torch.cat([mask, batch.written_mask_QA[:, :-1]], dim=1))
    written = batch.written_QA.shape[1] - batch.forced
    return head(hidden[:, -written:]), head(torch.cat([*thoughts, hidden[:, :0]], dim=1))


def written_loss(logits_QAV: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over the written tokens that are not forced."""
    return F.cross_entropy(logits_QAV.float().flatten(0, 1), batch.targets_QA.flatten(), ignore_index=-100)


def step_results_loss(logits_QTV: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the latents on their steps' results.

    It asks of each latent what its hidden step would have come to; inference never reads it. It is a light form of the
    step-level supervision of SIM-CoT (Wei et al. 2025, arXiv 2509.20317), with the model's own head for a decoder.
    """
    return F.cross_entropy(logits_QTV.float().flatten(0, 1), batch.results_QT.flatten())


class CoconutObjective:
    """Next-token prediction after a stage's latents.

    Attributes:
        lm: the causal LM in training.
        own: no modules of its own.
        next_latent: turns a last hidden state into the next latent.
    """

    def __init__(self, adapter: CheckpointAdapter, step_loss: float) -> None:
        self.adapter, self.step_loss = adapter, step_loss
        self.lm = trainable_lm(adapter.folder)
        self.own = nn.ModuleDict()
        self.next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """`written_loss`, plus `step_loss` times `step_results_loss` where there are latents."""
        batch = encode_batch(self.adapter, questions, stage)
        written, thoughts = training_logits(self.lm, batch, stage.latents, self.next_latent)
        loss = written_loss(written, batch)
        if stage.latents and self.step_loss:
            loss = loss + self.step_loss * step_results_loss(thoughts, batch)
        return loss

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """How many questions have all their written tokens as the argmax.

        With no written steps left their share is greedy accuracy: greedy decoding keeps to gold tokens that are the
        argmax.
        """
        batch = encode_batch(self.adapter, questions, stage)
        predicted = training_logits(self.lm, batch, stage.latents, self.next_latent)[0].argmax(-1)
        right = (predicted == batch.targets_QA) | (batch.targets_QA == -100)
        return int(right.all(1).sum())
