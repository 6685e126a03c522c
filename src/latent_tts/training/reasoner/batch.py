"""Batches of questions: order and token ids, forward passes with gradients, losses that families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.head import ModelLogits
from latent_tts.engine.proof import LATENTS, LOG_PROBABILITIES
from latent_tts.errors import bad_value, require
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.training.reasoner.curriculum import Stage, step_results, written_text
from latent_tts.types import Question

PROOF_PROMPTS, PROOF_TOKENS = [[3, 1, 2], [5, 4, 2, 0, 1]], [[8, 9], [6, 7]]  # token ids modulo the vocabulary
BATCHES_PER_POOL = 8  # sorted by length together, so that batches have little padding


def question_batches(stream: Iterator[Question], batch: int) -> Iterator[list[Question]]:
    """Batches of questions of similar length: pools of `BATCHES_PER_POOL` batches are sorted by length and split."""
    for pool in iter(lambda: list(islice(stream, BATCHES_PER_POOL * batch)), []):
        pool.sort(key=lambda question: len(question.text.split()))
        for index in (3, 6, 0, 5, 2, 7, 1, 4):  # a fixed order that mixes long and short batches
            yield pool[index * batch : (index + 1) * batch]


@dataclass(frozen=True)
class TokenBudget:
    """How many questions an update takes.

    Attributes:
        questions: at most.
        tokens: at most, padding included.
        parts: micro-batches of an update in all processes; each has a question at least.
        lengths: the tokens of a question's prompt, and of what may follow it.
        seed: of the order of batches.
    """

    questions: int
    tokens: int
    parts: int
    lengths: Callable[[Question], tuple[int, int]]
    seed: int

    def batches(self, stream: Iterator[Question]) -> Iterator[list[Question]]:
        """Batches of questions of like length, which lose no question.

        Questions for about `BATCHES_PER_POOL` batches are sorted by length and cut, longest and shortest first in
        turns. What is too little for a batch comes first among the next ones. The order of the batches is keyed.

        Raises:
            UsageError: a question is so long that an update would have too few.
        """
        left: list[Question] = []
        for pool_number in count():
            pool, taken = left, 0
            while taken < BATCHES_PER_POOL * self.tokens and len(pool) < BATCHES_PER_POOL * self.questions:
                question = next(stream)
                self.check(question)
                pool.append(question)
                taken += sum(self.lengths(question))
            batches, left = self._cut(pool, longest_first=pool_number % 2 == 0)
            key = key_of(self.seed, "batches")
            draws = [philox((place, pool_number, 0, int(Stream.TRAINING)), key)[:2] for place in range(len(batches))]
            yield from (batches[place] for place in sorted(range(len(batches)), key=draws.__getitem__))

    def check(self, question: Question) -> None:
        """Check that a batch of questions as long as this one has a question per micro-batch.

        Raises:
            UsageError: it has not.
        """
        needed = self.parts * sum(self.lengths(question))
        require(
            "optimization.batch_tokens",
            self.tokens,
            needed <= self.tokens,
            f"must be {needed} or more: question {question.quoted} with "
            f"its steps and latents has {needed // self.parts} tokens, and an update has {self.parts} "
            "micro-batches",
        )

    def _cut(self, pool: list[Question], *, longest_first: bool) -> tuple[list[list[Question]], list[Question]]:
        """The batches of a pool, and the questions that are left."""
        batches: list[list[Question]] = []
        current: list[Question] = []
        longest = (0, 0)
        pool = sorted(pool, key=lambda question: (sum(self.lengths(question)), question.id), reverse=longest_first)
        for question in pool:
            prompt, rest = self.lengths(question)
            wider = max(longest[0], prompt), max(longest[1], rest)
            full = len(current) == self.questions or (len(current) + 1) * sum(wider) > self.tokens
            if full and len(current) >= self.parts:
                batches.append(current)
                current, wider = [], (prompt, rest)
            current.append(question)
            longest = wider
        return batches, current


def micro_batch(batch: list[Question], part: int, parts: int) -> list[Question]:
    """One of the parts of a batch, as equal as can be."""
    return batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]


def pad_rows(rows: list[list[int]], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows on the left or the right; returns ids and mask (rows, longest), both int64, mask 1 on real tokens."""
    side, ids = "left" if left else "right", [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of a batch: prompts padded on the left, the text after the latents padded on the right.

    Attributes:
        prompt_QL, written_QA: ids (int64); `written` begins with the end-of-thinking tokens, if there are any.
        prompt_mask_QL, written_mask_QA: 1 on real tokens.
        forced: number of leading tokens of `written` that are forced, which the model need not predict.
        results_QTR: the tokens of the result of each latent's step; of the answer after the last step. -100 on padding.
    """

    prompt_QL: Tensor
    prompt_mask_QL: Tensor
    written_QA: Tensor
    written_mask_QA: Tensor
    forced: int
    results_QTR: Tensor

    @property
    def targets_QA(self) -> Tensor:
        """Ids of the tokens to predict, without the forced ones; -100 on padding."""
        return self.written_QA[:, self.forced :].masked_fill(self.written_mask_QA[:, self.forced :] == 0, -100)


def encode_batch(
    adapter: CheckpointAdapter, questions: list[Question], stage: Stage, device: torch.device
) -> TokenBatch:
    """Encode questions for a stage of the curriculum."""
    end, eos = adapter.thinking_end_ids, adapter.eos_id

    def encode(text: str) -> list[int]:
        return adapter.tokenizer.encode(text, add_special_tokens=False).ids

    written = [[*end, *encode(written_text(q.steps, q.gold, stage))] for q in questions]
    prompt_QL, prompt_mask_QL = pad_rows([adapter.encode(question) for question in questions], eos, device, left=True)
    written_QA, written_mask_QA = pad_rows([[*ids, eos] for ids in written], eos, device, left=False)
    results = [[*step_results(q.steps), *[q.gold] * stage.latents][: stage.latents] for q in questions]
    ids = [encode(result) for row in results for result in row] or [[eos]]
    results_NR, mask_NR = pad_rows(ids, eos, device, left=False)
    results_QTR = results_NR.masked_fill(mask_NR == 0, -100)[: len(questions) * stage.latents]
    results_QTR = results_QTR.view(len(questions), stage.latents, results_NR.shape[1])
    return TokenBatch(prompt_QL, prompt_mask_QL, written_QA, written_mask_QA, len(end), results_QTR)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of tokens (...) by their logits (..., V); -100 stands for none."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-100)


class Sequences:
    """Rows to which forward passes append, with gradients; only the first pass may be padded on the left.

    Positions count real tokens.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, self.cache = lm, DynamicCache()
        self.mask: Tensor | None = None

    def feed(self, embeddings_QSD: Tensor, mask_QS: Tensor | None = None) -> Tensor:
        """Append S vectors to every row (all real without a mask); returns their final hidden states (Q, S, D)."""
        return self._run(embeddings_QSD, mask_QS, every_layer=False).last_hidden_state

    def feed_all_layers(self, embeddings_QSD: Tensor, mask_QS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Append S vectors like `feed`; returns the outputs (Q, S, D) of all blocks, the last one normalised."""
        return self._run(embeddings_QSD, mask_QS, every_layer=True).hidden_states[1:]

    def _run(self, embeddings_QSD: Tensor, mask_QS: Tensor | None, *, every_layer: bool):
        if mask_QS is None:
            mask_QS = torch.ones(embeddings_QSD.shape[:2], dtype=torch.long, device=embeddings_QSD.device)
        self.mask = mask_QS if self.mask is None else torch.cat([self.mask, mask_QS], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings_QSD.shape[1] :]
        return self.lm.base_model(
            inputs_embeds=embeddings_QSD,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=every_layer,
        )

    def fork(self) -> Sequences:
        """A copy that can be continued independently; it shares the keys and values so far."""
        other = copy(self)
        other.cache = copy(self.cache)
        other.cache.layers = [copy(layer) for layer in self.cache.layers]  # they replace their tensors
        return other


@torch.no_grad()
def find_head(lm: PreTrainedModel) -> Callable[[PreTrainedModel], nn.Module]:
    """What gives the module that makes logits of a model's final hidden states.

    That is the LM head, or all that the model does to logits where that is more. It is not looked up but tried: two
    padded prompts, a latent and two tokens go through `Sequences` and through the model's own forward pass.

    Args:
        lm: in float32 on a CPU, in training mode.

    Raises:
        UsageError: hidden states or logits differ.
    """
    lm.eval()
    embed = cast(nn.Embedding, lm.get_input_embeddings())
    vocabulary = embed.weight.shape[0]
    prompt_QL, mask_QL = pad_rows(
        [[token % vocabulary for token in ids] for ids in PROOF_PROMPTS], 0, lm.device, left=True
    )
    rows = Sequences(lm)
    latent_Q1D = rows.feed(embed(prompt_QL), mask_QL)[:, -1:]
    fed_QSD = torch.cat([latent_Q1D, embed(torch.tensor(PROOF_TOKENS) % vocabulary)], dim=1)
    hidden_QSD = torch.cat([rows.feed(latent_Q1D), rows.feed(fed_QSD[:, 1:])], dim=1)
    seen: list[Any] = []
    hook = lm.base_model.register_forward_hook(lambda _module, _args, output: seen.append(output.last_hidden_state))
    try:
        logits = []
        for prompt_L, real_L, fed_SD in zip(embed(prompt_QL), mask_QL == 1, fed_QSD, strict=True):
            vectors_1SD = torch.cat([prompt_L[real_L], fed_SD])[None]
            logits.append(lm(inputs_embeds=vectors_1SD, use_cache=False).logits[:, -fed_QSD.shape[1] :])
    finally:
        hook.remove()
        lm.train()
    own_QSD = torch.cat([each[:, -fed_QSD.shape[1] :] for each in seen])
    apart = float((hidden_QSD - own_QSD).abs().max() / own_QSD.abs().max())
    problem = "" if apart <= LATENTS else f"hidden states are off by {apart:.1g} of their largest value"
    logprobs_QSV = torch.cat(logits).log_softmax(-1)
    for head_of in (own_head, ModelLogits):
        apart = float((head_of(lm)(hidden_QSD).log_softmax(-1) - logprobs_QSV).abs().max())
        if not problem and apart <= LOG_PROBABILITIES:
            return head_of
    why = problem or f"log-probabilities are off by {apart:.1g}"
    raise bad_value("init", type(lm).__name__, f"training does not compute this model as it computes itself: {why}")


def own_head(lm: PreTrainedModel) -> nn.Module:
    """The LM head."""
    return cast(nn.Module, lm.get_output_embeddings())


def step_results_loss(
    prompts: Sequences,
    thoughts_QTD: Tensor,
    next_latent: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    batch: TokenBatch,
) -> Tensor:
    """Mean cross-entropy of the tokens of the result of each latent's step.

    Each latent must predict the result of the step that it replaces; inference does not use this prediction. It is a
    light form of the step-level supervision of SIM-CoT (Wei et al. 2025, arXiv 2509.20317), with the model's own head
    as decoder. A latent's hidden state predicts the first token, as if the result were written in the latent's place;
    the others follow from the prompt, the latents before and the tokens before.

    Args:
        prompts: rows that end with the prompts; not changed.
        thoughts_QTD: final hidden states of which the latents are made.
        next_latent: makes them.
        head: the LM head.
        batch: with the results.
    """
    steps, length = batch.results_QTR.shape[1:]
    logits_QTRV = head(thoughts_QTD)[:, :, None]
    if length == 1:
        return token_loss(logits_QTRV, batch.results_QTR)
    embed, latents_QTD, rest = prompts.lm.get_input_embeddings(), next_latent(thoughts_QTD), []
    for step in range(steps):
        ids_QS = batch.results_QTR[:, step, :-1]
        mask_QS = F.pad((ids_QS != -100).long(), (step, 0), value=1)
        inputs_QSD = torch.cat([latents_QTD[:, :step], embed(ids_QS.clamp(min=0))], dim=1)
        rest.append(head(prompts.fork().feed(inputs_QSD, mask_QS)[:, step:]))
    return token_loss(torch.cat([logits_QTRV, torch.stack(rest, dim=1)], dim=2), batch.results_QTR)
