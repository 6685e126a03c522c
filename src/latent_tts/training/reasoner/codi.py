"""CODI's objective: the student's hidden state after its latents must match the teacher's after written steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_tts.checkpoint import loading
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.modules import codi_projector
from latent_tts.engine.head import ModelLogits
from latent_tts.errors import require
from latent_tts.model.codi import PROJECTOR
from latent_tts.training.reasoner.batch import (
    Sequences,
    TokenBatch,
    encode_batch,
    step_results_loss,
    token_loss,
)
from latent_tts.training.reasoner.coconut import CoconutObjective
from latent_tts.training.reasoner.curriculum import Distilled, Stage, written_before_answer
from latent_tts.training.reasoner.initial import add_tensors, has_tensors, load_trainable_lm
from latent_tts.types import Question

SAMPLE_TOKENS = 32


def add_projector(folder: Path, hidden: int | None, seed: int, *, identity: bool) -> None:
    """Add a new projector to a checkpoint that has none.

    Args:
        folder: the checkpoint, changed in place.
        hidden: hidden width of the projector; None: the backbone's width, or twice that if `identity`.
        seed: seed of the random weights.
        identity: the projector only changes the norm of vectors, to that of hidden states.

    Raises:
        UsageError: the projector is too narrow for the identity.
    """
    if has_tensors(folder, PROJECTOR):
        return
    lm = load_trainable_lm(folder).eval()
    width = int(lm.config.hidden_size)
    inner = hidden or (2 * width if identity else width)
    torch.manual_seed(seed)
    projector = codi_projector(width, inner)
    if identity:
        require(
            "recipe.projector_hidden",
            inner,
            inner >= 2 * width,
            f"must be {2 * width} or more for projector_init=identity",
        )
        with torch.no_grad():  # any tokens: after the final norm all hidden states have about the same norm
            hidden_1SD = lm.base_model(torch.arange(SAMPLE_TOKENS)[None]).last_hidden_state
        set_identity(projector, width, float(hidden_1SD.std()))
    add_tensors(folder, PROJECTOR, projector, projector=True, projector_hidden_size=inner)


@torch.no_grad()
def set_identity(projector: Any, width: int, scale: float) -> None:
    """Make both linear layers compose to the identity, since gelu(x) - gelu(-x) = x, and scale the output."""
    first, second, norm = projector[1], projector[3], projector[4]
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    first.weight[: 2 * width], first.bias[: 2 * width] = both, 0.0
    second.weight.zero_()
    second.weight[:, : 2 * width], second.bias[:] = both.T, 0.0
    norm.weight.fill_(scale)


def alignment(student: list[Tensor], teacher: list[Tensor], loss: str) -> Tensor:
    """Mean over layers of the distance between hidden states (Q, D), divided by the teacher's standard deviation.

    No gradient flows into the teacher.

    Args:
        student: per layer, the hidden states (Q, D) at the token before the answer.
        teacher: the same for the teacher, after written steps.
        loss: `smooth_l1` or `l1`.
    """
    distance = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[loss]
    pairs = [(ours.float(), theirs.detach().float()) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack([distance(ours, theirs) / theirs.std() for ours, theirs in pairs]).mean()


class CodiObjective(CoconutObjective):
    """The cross-entropies of student and teacher, the distance between their hidden states, and the loss of steps.

    Attributes:
        own: the projector.
        recipe: holds the weights of the parts of the loss.
    """

    def __init__(self, adapter: CheckpointAdapter, recipe: Distilled, projector_dropout: float) -> None:
        super().__init__(adapter, recipe.step_loss)
        self.recipe = recipe
        tensors = loading.load_tensors(adapter.folder, PROJECTOR)
        projector = codi_projector(adapter.width, tensors["1.bias"].shape[0], projector_dropout)
        projector.load_state_dict(tensors)
        self.own = nn.ModuleDict({PROJECTOR.removesuffix("."): projector.float().train()})
        self.next_latent = projector

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """Without latents the teacher's cross-entropy, else the weighted sum of all parts.

        Teacher and student share the pass over the prompt.
        """
        if not stage.latents:
            return super().loss(questions, stage)
        recipe, embed = self.recipe, self.lm.get_input_embeddings()
        written_stage = Stage(0, 0, 0)
        student = encode_batch(self.adapter, questions, stage, self.lm.device)
        teacher = encode_batch(self.adapter, questions, written_stage, self.lm.device)
        rows = Sequences(self.lm)
        hidden_Q1D = rows.feed(embed(student.prompt_QL), student.prompt_mask_QL).last_hidden_state[:, -1:]
        prompts = rows.fork() if recipe.step_loss and student.results_QTR.shape[2] > 1 else rows
        written_QAD, mask_QA = embed(teacher.written_QA[:, :-1]), teacher.written_mask_QA[:, :-1]
        layers = rows.fork().feed(written_QAD, mask_QA, every_layer=True).hidden_states[1:]
        teacher_loss = self._written_loss(layers[-1], teacher)
        before = self._before_answer(layers, questions, written_stage)
        latents_QSD, thoughts_QTD = self.think(rows, hidden_Q1D, stage.latents)
        pending = latents_QSD.shape[1]
        embeddings = torch.cat([latents_QSD, embed(student.written_QA[:, :-1])], dim=1)
        mask = F.pad(student.written_mask_QA[:, :-1], (pending, 0), value=1)
        layers = [layer[:, pending:] for layer in rows.feed(embeddings, mask, every_layer=True).hidden_states[1:]]
        loss = self._written_loss(layers[-1], student) + recipe.teacher_weight * teacher_loss
        if recipe.distill_weight:
            distance = alignment(self._before_answer(layers, questions, stage), before, recipe.distill_loss)
            loss = loss + recipe.distill_weight * distance
        if recipe.step_loss:
            results = step_results_loss(prompts, thoughts_QTD, self.next_latent, student)
            loss = loss + recipe.step_loss * results
        return loss

    def _written_loss(self, hidden_QAD: Tensor, batch: TokenBatch) -> Tensor:
        """The cross-entropy from the hidden states of all written tokens except the last."""
        return token_loss(ModelLogits(self.lm)(hidden_QAD[:, batch.forced - 1 :]), batch.targets_QA)

    def _before_answer(self, layers, questions: list[Question], stage: Stage) -> list[Tensor]:
        """Per layer, the hidden states (Q, D) at the token before the answer, selected from those of written tokens."""
        encode, end = self.adapter.tokenizer.encode, len(self.adapter.thinking_end_ids)
        texts = [written_before_answer(q.steps, stage) for q in questions]
        places = [end + len(encode(text, add_special_tokens=False).ids) - 1 for text in texts]
        place_Q = torch.tensor(places, device=self.lm.device)
        row_Q = torch.arange(len(questions), device=self.lm.device)
        return [layer[row_Q, place_Q] for layer in layers]
