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
from latent_tts.engine.proof import LOG_PROBABILITIES
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


def token_batches(
    stream: Iterator[Question],
    *,
    questions: int,
    tokens: int,
    parts: int,
    lengths: Callable[[Question], tuple[int, int]],
    seed: int,
) -> Iterator[list[Question]]:
    """Batches of questions of like length, by their tokens; they lose no question.

    Questions for about `BATCHES_PER_POOL` batches are sorted by length and cut, longest and shortest first in turns.
    What is too little for a batch comes first among the next ones. The order of the batches is keyed.

    Args:
        stream: endless questions.
        questions: of a batch, at most.
        tokens: of a batch, at most, padding included.
        parts: micro-batches of an update in all processes; each has a question at least.
        lengths: the tokens of a question's prompt, and of what may follow it.
        seed: of the order of batches.

    Raises:
        UsageError: a question is so long that an update would have too few.
    """
    left: list[tuple[int, int, Question]] = []
    for pool_number in count():
        pool, taken = left, 0
        while taken < BATCHES_PER_POOL * tokens and len(pool) < BATCHES_PER_POOL * questions:
            question = next(stream)
            prompt, rest = lengths(question)
            require(
                "optimization.batch_tokens",
                tokens,
                parts * (prompt + rest) <= tokens,
                f"must be {parts * (prompt + rest)} or more: question {question.quoted} with its steps and latents has "
                f"{prompt + rest} tokens, and an update has {parts} micro-batches",
            )
            pool.append((prompt, rest, question))
            taken += prompt + rest
        pool.sort(key=lambda item: (item[0] + item[1], item[2].id), reverse=pool_number % 2 == 0)
        batches, left, longest = [], [], (0, 0)
        for prompt, rest, question in pool:
            longest = max(longest[0], prompt), max(longest[1], rest)
            full = len(left) == questions or (len(left) + 1) * sum(longest) > tokens
            if full and len(left) >= parts:
                batches.append([each for _, _, each in left])
                left, longest = [], (prompt, rest)
            left.append((prompt, rest, question))
        key = key_of(seed, "batches")
        draws = [philox((place, pool_number, 0, int(Stream.TRAINING)), key)[:2] for place in range(len(batches))]
        yield from (batches[place] for place in sorted(range(len(batches)), key=draws.__getitem__))


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

    def feed(self, embeddings_QSD: Tensor, mask_QS: Tensor | None = None, *, every_layer: bool = False) -> Any:
        """Append S vectors to every row (all real without a mask).

        Returns:
            The output of the model without its head: `last_hidden_state` (Q, S, D), and for `every_layer` also
            `hidden_states`, the embeddings and the outputs (Q, S, D) of all blocks, the last one normalised.
        """
        if mask_QS is None:
            mask_QS = torch.ones(embeddings_QSD.shape[:2], dtype=torch.long, device=embeddings_QSD.device)
        self.mask = mask_QS if self.mask is None else torch.cat([self.mask, mask_QS], dim=1)
        return self.lm.base_model(
            inputs_embeds=embeddings_QSD,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings_QSD.shape[1] :],
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
def check_computation(lm: PreTrainedModel) -> None:
    """Check that training computes a model as it computes itself.

    Two padded prompts, a latent and two tokens go through `Sequences` and `ModelLogits`, and through the model's own
    forward pass.

    Args:
        lm: in float32 on a CPU, in training mode.

    Raises:
        UsageError: log-probabilities differ, or its head does not run alone.
    """
    lm.eval()
    embed = cast(nn.Embedding, lm.get_input_embeddings())
    vocabulary = embed.weight.shape[0]
    prompt_QL, mask_QL = pad_rows(
        [[token % vocabulary for token in ids] for ids in PROOF_PROMPTS], 0, lm.device, left=True
    )
    rows = Sequences(lm)
    latent_Q1D = rows.feed(embed(prompt_QL), mask_QL).last_hidden_state[:, -1:]
    fed_QSD = torch.cat([latent_Q1D, embed(torch.tensor(PROOF_TOKENS) % vocabulary)], dim=1)
    hidden_QSD = torch.cat([rows.feed(part).last_hidden_state for part in (latent_Q1D, fed_QSD[:, 1:])], dim=1)
    gaps: list[Tensor] = []
    for row, (prompt_L, real_L) in enumerate(zip(embed(prompt_QL), mask_QL == 1, strict=True)):
        vectors_1SD = torch.cat([prompt_L[real_L], fed_QSD[row]])[None]
        wanted_SV = lm(inputs_embeds=vectors_1SD, use_cache=False).logits[0, -fed_QSD.shape[1] :]
        try:
            found_SV = ModelLogits(lm)(hidden_QSD[row])
        except AttributeError as error:  # as OPT, whose causal LM calls the decoder in its body
            raise bad_value("init", type(lm).__name__, f"training cannot run its head alone ({error})") from error
        gaps.append((found_SV.log_softmax(-1) - wanted_SV.log_softmax(-1)).abs().max())
    apart = float(torch.stack(gaps).max())  # NaN if one is
    allowed = f"training does not compute this model as it computes itself: log-probabilities are off by {apart:.1g}"
    require("init", type(lm).__name__, apart <= LOG_PROBABILITIES, allowed)
    lm.train()


def step_results_loss(
    prompts: Sequences,
    thoughts_QTD: Tensor,
    next_latent: Callable[[Tensor], Tensor],
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
        batch: with the results.
    """
    head, (steps, length) = ModelLogits(prompts.lm), batch.results_QTR.shape[1:]
    logits_QTRV = head(thoughts_QTD)[:, :, None]
    if length == 1:
        return token_loss(logits_QTRV, batch.results_QTR)
    embed, latents_QTD, rest = prompts.lm.get_input_embeddings(), next_latent(thoughts_QTD), []
    for step in range(steps):
        ids_QS = batch.results_QTR[:, step, :-1]
        mask_QS = F.pad((ids_QS != -100).long(), (step, 0), value=1)
        inputs_QSD = torch.cat([latents_QTD[:, :step], embed(ids_QS.clamp(min=0))], dim=1)
        rest.append(head(prompts.fork().feed(inputs_QSD, mask_QS).last_hidden_state[:, step:]))
    return token_loss(torch.cat([logits_QTRV, torch.stack(rest, dim=1)], dim=2), batch.results_QTR)
