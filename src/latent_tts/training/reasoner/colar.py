"""CoLaR's objective: a latent is a compressed piece of the written steps and must predict the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from latent_tts.checkpoint import files, loading
from latent_tts.checkpoint.modules import colar_head
from latent_tts.engine.head import ModelLogits
from latent_tts.engine.proof import prove_reasoner
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.model.colar import HEAD, Colar
from latent_tts.sampler.greedy import Greedy
from latent_tts.training.reasoner.batch import Sequences, check_computation, pad_rows
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import add_tensors, has_tensors, load_trainable_lm
from latent_tts.training.reasoner.validation import draw_texts
from latent_tts.types import Computation, Question, Reasoner


def add_head(folder: Path, hidden: int | None, seed: int, *, spread: bool) -> None:
    """Add a random latent head to a checkpoint that has none, and the embeddings' standard deviation to its config.

    Args:
        folder: the checkpoint, changed in place.
        hidden: hidden width of the head; None: twice the backbone's width.
        seed: seed of the random weights.
        spread: whether the head predicts a standard deviation too; `log_std` is added as zeros if it is missing.
    """
    embedding = cast(nn.Embedding, load_trainable_lm(folder).get_input_embeddings())  # which may draw random numbers
    width = embedding.embedding_dim
    torch.manual_seed(seed)
    if not has_tensors(folder, HEAD):
        inner, std = hidden or 2 * width, round(float(embedding.weight.detach().std()), 4)
        head = colar_head(width, inner, spread=False)
        add_tensors(folder, HEAD, head, latent_embedding_std=std, latent_intermediate_size=inner)
    if spread and not has_tensors(folder, f"{HEAD}log_std."):
        log_std = nn.Linear(int(files.weight_shapes(folder)[f"{HEAD}fc.0.bias"][0]), width)
        nn.init.zeros_(log_std.weight)
        nn.init.zeros_(log_std.bias)
        add_tensors(folder, f"{HEAD}log_std.", log_std)


@dataclass(frozen=True)
class Slots:
    """The positions after a prompt: latents (bags of C tokens), `###`, and answer tokens (bags of one token).

    Attributes:
        bag_QSC: ids of the tokens of each slot (int64).
        bag_mask_QSC: 1 on real tokens; rows are padded on the right with empty slots.
        latent_QS: whether a slot is a latent.
    """

    bag_QSC: Tensor
    bag_mask_QSC: Tensor
    latent_QS: Tensor

    @property
    def mask_QS(self) -> Tensor:
        """1 on real slots."""
        return self.bag_mask_QSC[:, :, 0]


def encode_slots(adapter: Colar, questions: list[Question], speed: int, device: torch.device) -> Slots:
    """Encode questions, with written steps cut into bags of `speed` tokens; the last bag may be smaller."""
    rows, encode = [], adapter.tokenizer.encode
    for question in questions:
        steps = encode("".join(f"{step}\n" for step in question.steps), add_special_tokens=False).ids
        answer = encode(f"Answer:{question.gold}", add_special_tokens=False).ids
        latents = [steps[start : start + speed] for start in range(0, len(steps), speed)]
        rows.append((latents, [*adapter.thinking_end_ids, *answer, adapter.eos_id]))
    longest = max(len(latents) + len(tokens) for latents, tokens in rows)
    bag_QSC = torch.full((len(rows), longest, speed), adapter.eos_id)
    bag_mask_QSC, latent_QS = torch.zeros_like(bag_QSC), torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (latents, tokens) in enumerate(rows):
        latent_QS[row, : len(latents)] = True
        for slot, ids in enumerate([*latents, *([token] for token in tokens)]):
            bag_QSC[row, slot, : len(ids)], bag_mask_QSC[row, slot, : len(ids)] = torch.tensor(ids), 1
    return Slots(bag_QSC.to(device), bag_mask_QSC.to(device), latent_QS.to(device))


def compress(embeddings_QSCD: Tensor, bag_mask_QSC: Tensor) -> Tensor:
    """The compressed embedding (Q, S, D) of each bag: the sum of its embeddings divided by the root of their number.

    This keeps the standard deviation of independent embeddings, which a mean would reduce.
    """
    mask_QSC1 = bag_mask_QSC[..., None].to(embeddings_QSCD.dtype)
    return (embeddings_QSCD * mask_QSC1).sum(2) / mask_QSC1.sum(2).clamp(min=1).sqrt()


def bag_cross_entropy(logits_QSV: Tensor, slots: Slots) -> Tensor:
    """Mean over real slots of the mean negative log-probability of the tokens in the bag.

    The published recipe draws one token of each bag as the label; this is the expected value.
    """
    logprob_QSC = logits_QSV.float().log_softmax(-1).gather(-1, slots.bag_QSC)
    per_slot_QS = -(logprob_QSC * slots.bag_mask_QSC).sum(-1) / slots.bag_mask_QSC.sum(-1).clamp(min=1)
    return per_slot_QS.sum() / slots.mask_QS.sum()


class ColarObjective:
    """Predicts compressed embeddings and written tokens, each from the gold ones before it.

    Attributes:
        lm: the causal LM in training.
        own: the latent head.
        computation: how the engine computes the model; None before it has.
        latent_weight, latent_noise: as in the recipe.
    """

    def __init__(self, adapter: Colar, latent_weight: float, latent_noise: float) -> None:
        self.adapter, self.latent_weight, self.latent_noise = adapter, latent_weight, latent_noise
        self.lm = load_trainable_lm(adapter.folder)
        check_computation(self.lm)
        tensors = loading.load_tensors(adapter.folder, HEAD)
        self.head = colar_head(adapter.width, tensors["fc.0.bias"].shape[0], spread="log_std.bias" in tensors)
        self.head.load_state_dict(tensors)
        self.own = nn.ModuleDict({HEAD.removesuffix("."): self.head.float().train()})
        self.computation: Computation | None = None

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """Cross-entropy of all slots, plus `latent_weight` times the loss of the latent head on the next latent.

        The latter is the mean squared distance, or for a head with `log_std` the negative log-likelihood (without its
        constant), per element, in units of the embeddings' standard deviation. No gradient flows into the targets.
        """
        adapter, embed, std = self._adapter(stage), self.lm.get_input_embeddings(), self.adapter.latent_std
        device, prompts = self.lm.device, [adapter.encode(q) for q in questions]
        slots = encode_slots(adapter, questions, stage.speed, device)
        prompt_QL, prompt_mask_QL = pad_rows(prompts, adapter.eos_id, device, left=True)
        gold_QSD = compress(embed(slots.bag_QSC), slots.bag_mask_QSC)
        fed_QSD = gold_QSD
        if self.latent_noise:
            noise_QSD = torch.randn_like(gold_QSD) * (self.latent_noise * std)
            fed_QSD = gold_QSD + noise_QSD * slots.latent_QS[..., None]
        rows = Sequences(self.lm)
        embeddings = torch.cat([embed(prompt_QL), fed_QSD[:, :-1]], dim=1)
        hidden = rows.feed(embeddings, torch.cat([prompt_mask_QL, slots.mask_QS[:, :-1]], dim=1)).last_hidden_state
        hidden_QSD = hidden[:, prompt_QL.shape[1] - 1 :]
        loss = bag_cross_entropy(ModelLogits(self.lm)(hidden_QSD), slots)
        if self.latent_weight:
            features = self.head["fc"](hidden_QSD[slots.latent_QS])
            gap = self.head["mean"](features).float() - gold_QSD[slots.latent_QS].detach().float() / std
            if "log_std" in self.head:
                log_std = self.head["log_std"](features).float()
                distance = ((gap / log_std.exp()) ** 2 / 2 + log_std).mean()
            else:
                distance = (gap**2).mean()
            loss = loss + self.latent_weight * distance
        return loss

    def _adapter(self, stage: Stage) -> Colar:
        """The adapter with the stage's speed in its prompts."""
        if stage.speed == self.adapter.thinking_speed:
            return self.adapter
        return replace(self.adapter, thinking_speed=stage.speed)

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions that greedy rollouts, with the model's own latents, answer right."""
        adapter = self._adapter(stage)

        def next_latent(hidden_RD: Tensor) -> Tensor:
            return self.head["mean"](self.head["fc"](hidden_RD)) * self.adapter.latent_std

        longest = max(len(adapter.tokenizer.encode(f"Answer:{q.gold}").ids) for q in questions)
        plan = RolloutPlan(stage.latents, adapter.thinking_end_ids, adapter.eos_id, longest + 1, adapter.stop_id)
        reasoner = Reasoner(self.lm, next_latent)
        self.computation = self.computation or prove_reasoner(reasoner, adapter.positions)
        engine = Engine(replace(reasoner, computation=self.computation), plan)
        texts = draw_texts(engine, adapter, questions, 1, Greedy())
        self.lm.set_attn_implementation("eager")  # the engine has set its own attention
        answers = [(adapter.answer_span(text), adapter.decimal_answer(text)) for text in texts]
        return sum(q.gold in read for read, q in zip(answers, questions, strict=True))
