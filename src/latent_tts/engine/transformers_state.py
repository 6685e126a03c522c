"""The state of models that shared-prefix attention would misread: transformers' own attention and cache.

Rows of equal length run together, so that there is never padding: masks and positions (windows, chunks, ALiBi, whatever
a model has) are those that transformers makes for one plain sequence. Every row has a copy of its prompt's keys and
values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from latent_tts.errors import RunError


class TransformersState:
    """R = Q*N rows in caches of transformers, one for each group of rows that have the same slots.

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
        before_part: Callable[[Tensor, slice], None] | None = None,
    ) -> None:
        """Open a state without questions.

        Args:
            backbone: a transformer with an attention of its own, without its LM head.
            rollouts: N.
            capacity: most slots of a row.
            position_offset_Q: added to the position ids of each question that will be prefilled; None adds nothing.
            before_part: called before a forward pass over part of what was asked for, with its rows (of the prompts in
                `prefill`) and tokens.

        Raises:
            RunError: the backbone takes no position ids, and they are to be moved.
        """
        if position_offset_Q is not None and "position_ids" not in inspect.signature(backbone.forward).parameters:
            raise RunError(f"scorer.positions=official: {type(backbone).__name__} takes no positions")
        self._backbone, self._before_part = backbone, before_part
        self.rollouts, self._capacity, self.used = rollouts, capacity, 0
        self._position_offset_R = (
            None if position_offset_Q is None else position_offset_Q.repeat_interleave(self.rollouts)
        )
        self._groups: list[_Group] = []
        self._rows = 0

    def prefill(self, embeddings_QLD: Tensor, lengths_Q: Tensor) -> Tensor:
        """Run prompts; each call adds questions. See `KeyValueState.prefill`."""
        hidden_QLD = torch.zeros_like(embeddings_QLD)
        for length in lengths_Q.unique().tolist():
            prompts = (lengths_Q == length).nonzero()[:, 0]
            group = _Group(self._rows + prompts * self.rollouts, DynamicCache(), 0, [])
            if length:
                part = slice(0, length)
                hidden_QLD[prompts, part] = self._run(group, embeddings_QLD[prompts, part], prompts, part)
                group.prompt = length
            places = torch.arange(len(prompts), device=prompts.device).repeat_interleave(self.rollouts)
            repeated = group.select(places)
            repeated.rows += torch.arange(self.rollouts, device=prompts.device).repeat(len(prompts))
            self._groups.append(repeated)
        self._rows += embeddings_QLD.shape[0] * self.rollouts
        return hidden_QLD

    def append(self, embeddings_RSD: Tensor, keep_first_R: Tensor | None = None) -> Tensor:
        """Append S tokens to every row; returns their final hidden states (R, S, D). See `KeyValueState.append`."""
        tokens = embeddings_RSD.shape[1]
        if self.used + tokens > self._capacity:
            raise ValueError(f"{self.used} slots and {tokens} more exceed the capacity of {self._capacity}")
        parts = [(group, True) for group in self._groups]
        if keep_first_R is not None:
            parts = [part for group in self._groups for part in group.split(keep_first_R)]
        self._groups = [group for group, _ in parts]
        hidden_RSD = torch.zeros_like(embeddings_RSD)
        for group, first_valid in parts:
            part = slice(int(not first_valid), tokens)
            if part.start < tokens:
                hidden_RSD[group.rows, part] = self._run(group, embeddings_RSD[group.rows, part], group.rows, part)
            group.holds += [bool(first_valid), *[True] * (tokens - 1)]
        self.used += tokens
        return hidden_RSD

    def rewind(self, used: int) -> None:
        """Forget all slots from `used` on."""
        assert 0 <= used <= self.used, f"{used} of {self.used} slots"
        for group in self._groups:
            group.forget(used)
        self.used = used

    def blank(self, first_R: Tensor) -> None:
        """Let each row's slots from its own first one on hold nothing; they stay used."""
        parts = [part for group in self._groups for part in group.split(first_R.clamp(max=self.used))]
        for group, first in parts:
            group.forget(first)
            group.holds += [False] * (self.used - first)
        self._groups = [group for group, _ in parts]

    def fork(self, rows: Tensor) -> TransformersState:
        """A state of its own that continues some rows; this one stays as it is. See `KeyValueState.fork`."""
        _, counts = (rows // self.rollouts).unique_consecutive(return_counts=True)
        forked = copy(self)
        forked.rollouts = 1 if bool((counts != counts[0]).any()) else int(counts[0])
        forked._rows = rows.shape[0]
        if self._position_offset_R is not None:
            forked._position_offset_R = self._position_offset_R[rows]
        forked._groups = []
        for group in self._groups:
            place_R = rows.new_full((self._rows,), -1)
            place_R[group.rows] = torch.arange(len(group.rows), device=rows.device)
            new = (place_R[rows] >= 0).nonzero()[:, 0]
            if len(new):
                chosen = group.select(place_R[rows[new]])
                chosen.rows = new
                forked._groups.append(chosen)
        return forked

    def _run(self, group: _Group, embeddings: Tensor, rows: Tensor, tokens: slice) -> Tensor:
        if self._before_part is not None:
            self._before_part(rows, tokens)
        positions = {}
        if self._position_offset_R is not None:
            start = group.prompt + sum(group.holds)
            new = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)
            positions = {"position_ids": self._position_offset_R[group.rows, None] + new}
        return self._backbone(
            inputs_embeds=embeddings, past_key_values=group.cache, use_cache=True, **positions
        ).last_hidden_state


class _Group:
    """Rows that hold equally many tokens in the same slots.

    Attributes:
        rows: which.
        cache: their keys and values. Without a config it keeps every token in every layer, so that it can be rewound;
            what a window hides is hidden by the mask.
        prompt: tokens of their prompts.
        holds: which slots hold something.
    """

    def __init__(self, rows: Tensor, cache: DynamicCache, prompt: int, holds: list[bool]) -> None:
        self.rows, self.cache, self.prompt, self.holds = rows, cache, prompt, holds

    def select(self, places: Tensor) -> _Group:
        """A group of its own with some of the rows; a row may come several times."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in cache.layers]  # which replace their tensors and never write into them
        cache.batch_select_indices(places)
        return _Group(self.rows[places], cache, self.prompt, list(self.holds))

    def split(self, values_R: Tensor) -> Iterator[tuple[_Group, int]]:
        """The rows of each value that they have."""
        own = values_R[self.rows]
        for value in own.unique().tolist():
            places = (own == value).nonzero()[:, 0]
            yield (self if len(places) == len(own) else self.select(places)), value

    def forget(self, first: int) -> None:
        """Drop all slots from one on."""
        if forgotten := sum(self.holds[first:]):
            self.cache.crop(-forgotten)
        self.holds = self.holds[:first]
