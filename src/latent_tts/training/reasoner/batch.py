"""Batches of questions as token ids, and causal passes over them with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from latent_tts.types import Question

POOL = 8  # updates whose questions are drawn together and grouped by length, so that little is padding


def question_batches(stream: Iterator[Question], batch: int) -> Iterator[list[Question]]:
    """Batches of like length: `POOL` batches are drawn at once, sorted by length and handed out in a fixed order."""
    for pool in iter(lambda: list(islice(stream, POOL * batch)), []):
        pool.sort(key=lambda question: len(question.text.split()))
        for index in (3, 6, 0, 5, 2, 7, 1, 4):  # long and short batches in turn
            yield pool[index * batch : (index + 1) * batch]


def padded(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, longest), both int64, the mask 1 on real tokens."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


class Sequences:
    """Rows in the making: what has been fed so far, with gradients; padding may stand at the left of the first pass.

    Positions count the real tokens.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, self.cache = lm, DynamicCache()
        self.mask: Tensor | None = None

    def feed(self, embeddings_QSD: Tensor, mask_QS: Tensor | None = None) -> Tensor:
        """Append S vectors to every row; returns their final hidden states (Q, S, D). No mask: all are real."""
        return self._run(embeddings_QSD, mask_QS, every_layer=False).last_hidden_state

    def feed_and_see(self, embeddings_QSD: Tensor, mask_QS: Tensor | None = None) -> tuple[Tensor, ...]:
        """The same; returns the outputs (Q, S, D) of every block, the last one's normalised."""
        return self._run(embeddings_QSD, mask_QS, every_layer=True).hidden_states[1:]

    def _run(self, embeddings_QSD: Tensor, mask_QS: Tensor | None, *, every_layer: bool):
        if mask_QS is None:
            mask_QS = torch.ones(embeddings_QSD.shape[:2], dtype=torch.long)
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
        """The same rows, to be gone on with in another way."""
        other = Sequences(self.lm)
        other.mask = self.mask
        for layer, part in enumerate(self.cache.layers):
            assert isinstance(part, DynamicLayer)
            assert part.keys is not None
            assert part.values is not None
            other.cache.update(part.keys, part.values, layer)
        return other
