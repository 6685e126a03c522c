"""The keys and values of a batch of sequences, behind five operations: prefill, append, rewind, blank, fork.

The latent loop and the scorer know these operations alone (`State`). There are two ways behind them: shared-prefix
attention (`KeyValueState`), and transformers' own attention and cache (`transformers_state.py`) for models that the
first one would misread.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tts.engine.attention import SharedPrefixCache
from latent_tts.engine.transformers_state import TransformersState
from latent_tts.types import Computation


class KeyValueState:
    """Keys and values of Q prompts and of R = Q*N rows that continue them, and the backbone that computes them.

    Attributes:
        rollouts: N.
        used: slots of every row so far; a slot may hold nothing in some of the rows.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        rollouts: int,
        capacity: int,
        *,
        position_offset_Q: Tensor | None = None,
        cache: SharedPrefixCache | None = None,
    ) -> None:
        """Open a state without questions.

        Args:
            backbone: a transformer that `prepare_backbone` has prepared, without its LM head.
            rollouts: N.
            capacity: most slots of a row.
            position_offset_Q: added to the position ids of each question that will be prefilled; None adds nothing.
            cache: where keys and values are kept; None for memory of its own.
        """
        self._backbone, self._position_offset_Q = backbone, position_offset_Q
        self._cache = SharedPrefixCache(rollouts, capacity) if cache is None else cache

    @property
    def rollouts(self) -> int:
        """N, rows per question."""
        return self._cache.rollouts

    @property
    def used(self) -> int:
        """Slots of every row so far."""
        return self._cache.used

    def prefill(self, embeddings_QLD: Tensor, lengths_Q: Tensor) -> Tensor:
        """Run prompts; each call adds questions.

        Args:
            embeddings_QLD: of prompts, padded on the right.
            lengths_Q: tokens of each, at most L.

        Returns:
            Final hidden states (Q, L, D); those of padding mean nothing.
        """
        start = self._cache.questions_so_far
        self._cache.add_questions(lengths_Q)
        questions, tokens, _ = embeddings_QLD.shape
        if tokens == 0:
            self._cache.add_empty_prefixes(embeddings_QLD, self._backbone.config.get_text_config())
            return embeddings_QLD
        # positions of padding stay within the model's
        last_Q1 = (lengths_Q[:, None] - 1).clamp(min=0)
        positions_QL = torch.minimum(torch.arange(tokens, device=lengths_Q.device).expand(questions, -1), last_Q1)
        if self._position_offset_Q is not None:
            positions_QL = positions_QL + self._position_offset_Q[start : start + questions, None]
        self._cache.fills_prefix = True
        hidden_QLD = self._run(embeddings_QLD, positions_QL)
        self._cache.fills_prefix = False
        return hidden_QLD

    def append(self, embeddings_RSD: Tensor, keep_first_R: Tensor | None = None) -> Tensor:
        """Append S tokens to every row; returns their final hidden states (R, S, D).

        Args:
            embeddings_RSD: what is appended.
            keep_first_R: False in rows whose first token is ignored: its slot stays empty, and no token attends to it.
                None keeps all.
        """
        cache, tokens = self._cache, embeddings_RSD.shape[1]
        cache.reserve(tokens, keep_first_R)
        positions_R1 = cache.lengths_Q.repeat_interleave(self.rollouts)[:, None]
        if self._position_offset_Q is not None:
            positions_R1 = positions_R1 + self._position_offset_Q.repeat_interleave(self.rollouts)[:, None]
        hidden_RSD = self._run(embeddings_RSD, positions_R1 + cache.places(tokens))
        cache.count(tokens)
        return hidden_RSD

    def rewind(self, used: int) -> None:
        """Forget all slots from `used` on."""
        self._cache.rewind(used)

    def blank(self, first_R: Tensor) -> None:
        """Let each row's slots from its own first one on hold nothing; they stay used."""
        self._cache.blank(first_R)

    def fork(self, rows: Tensor) -> KeyValueState:
        """A state of its own that continues some rows; this one stays as it is.

        Args:
            rows: which rows, those of a question side by side; a row may come several times. Unless every question has
                equally many, each row gets a copy of its prompt's keys and values.
        """
        owners = rows // self.rollouts
        questions, counts = owners.unique_consecutive(return_counts=True)
        if bool((counts != counts[0]).any()):
            questions = owners
        forked = self.on(self._cache.fork(questions, rows))
        if self._position_offset_Q is not None:
            forked._position_offset_Q = self._position_offset_Q[questions]
        return forked

    def on(self, cache: SharedPrefixCache) -> KeyValueState:
        """The same backbone on other keys and values."""
        other = copy(self)
        other._cache = cache
        return other

    def _run(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self._backbone(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, shared_prefix_cache=self._cache
        ).last_hidden_state


State: TypeAlias = KeyValueState | TransformersState


def open_state(
    backbone: PreTrainedModel,
    computation: Computation,
    rollouts: int,
    capacity: int,
    *,
    position_offset_Q: Tensor | None = None,
    before_part: Callable[[Tensor, slice], None] | None = None,
) -> State:
    """An empty state, of the kind that was proven to compute this model correctly.

    Args:
        backbone: a transformer that `prepare_backbone` has prepared, without its LM head.
        computation: how it is computed.
        rollouts: N.
        capacity: most slots of a row.
        position_offset_Q: added to the position ids of each question that will be prefilled; None adds nothing.
        before_part: called with rows and tokens before a forward pass over part of what was asked for.
    """
    if computation.attention == "shared-prefix":
        return KeyValueState(backbone, rollouts, capacity, position_offset_Q=position_offset_Q)
    return TransformersState(backbone, rollouts, capacity, position_offset_Q=position_offset_Q, before_part=before_part)
