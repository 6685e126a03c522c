"""Shared-prefix attention: a question's prompt is kept once, each of its N rollouts adds a short suffix.

`transformers` hands keyword arguments of a model call through to the attention function, so the state of a call
travels with it and nothing is patched. A forward pass either writes the prefix (ordinary causal attention over
right-padded prompts) or reads it and appends to the suffixes: scores against the prefix and against the own suffix are
put side by side before one softmax, which is exact.

Source: the split follows bifurcated attention (Athiwaratkun et al. 2024, arXiv 2403.08845) and Hydragen (Juravsky et
al. 2024, arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

Piece = tuple[Tensor, Tensor]
NAME = "latent_tts_shared_prefix"


@dataclass
class AttentionState:
    """Keys and values of Q prefixes and of R = Q*N suffixes (H key heads, K a head's width).

    Attributes:
        lengths_Q: tokens of each prefix.
        rollouts: N.
        capacity: most tokens a suffix will have.
        prefix: per layer, keys and values (q, H, L, K) of pieces that together hold Q questions, right-padded.
        suffix: per layer, keys and values (R, H, capacity, K), allocated on first use.
        used: slots of every suffix so far.
        valid_RS: which of the slots hold something (R, capacity); None while all that are used do. Rows that think for
            different numbers of steps go through the same slots.
    """

    lengths_Q: Tensor
    rollouts: int
    capacity: int
    prefix: list[list[Piece]] = field(default_factory=list)
    suffix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    used: int = 0
    valid_RS: Tensor | None = None
    reads_prefix: bool = False
    _work: Tensor | None = None

    def positions(self, tokens: int) -> Tensor:
        """Position ids (R, tokens) of the next suffix tokens."""
        start = self.lengths_Q.repeat_interleave(self.rollouts)[:, None]
        if self.valid_RS is None:
            return start + torch.arange(self.used, self.used + tokens, device=start.device)
        counts = self.valid_RS[:, : self.used + tokens].cumsum(1)[:, self.used :]
        return start + (counts - 1).clamp(min=0)  # the clamp is for slots that hold nothing

    def fork(self, questions: Tensor, rows: Tensor, used: int | None = None) -> AttentionState:
        """A state of its own with some of the questions and suffixes.

        Args:
            questions: which prefixes; one may come several times.
            rows: suffixes, the same number for each of `questions`, question-major; a row may come several times.
            used: how many slots of the suffixes to take; None takes all.
        """
        used = self.used if used is None else used

        def part(tensor: Tensor) -> Tensor:
            new = self._room_for(tensor, rows.shape[0])
            new[:, :, :used] = tensor[:, :, :used].index_select(0, rows)
            return new

        valid_RS = None if self.valid_RS is None else self.valid_RS[rows]
        if valid_RS is not None:
            valid_RS[:, used:] = True
        return AttentionState(
            lengths_Q=self.lengths_Q[questions],
            rollouts=rows.shape[0] // questions.shape[0],
            capacity=self.capacity,
            prefix=self._prefixes_of(questions),
            suffix=[(part(keys), part(values)) for keys, values in self.suffix],
            used=used,
            valid_RS=valid_RS,
            reads_prefix=self.reads_prefix,
        )

    def _prefixes_of(self, questions: Tensor) -> list[list[Piece]]:
        """The prefixes of some questions; neighbours out of one piece are one piece again."""
        numbers = questions.tolist()
        if numbers == list(range(self.lengths_Q.shape[0])):
            return self.prefix
        sizes = [keys.shape[0] for keys, _ in self.prefix[0]]
        places = [(piece, place) for piece, size in enumerate(sizes) for place in range(size)]
        runs = groupby((places[number] for number in numbers), key=lambda place: place[0])
        chosen = [(piece, questions.new_tensor([place for _, place in run])) for piece, run in runs]
        return [[(pieces[i][0][here], pieces[i][1][here]) for i, here in chosen] for pieces in self.prefix]

    def _pieces(self, layer: int) -> Iterator[tuple[slice, slice, Piece]]:
        """A layer's pieces, with the questions and the rows that each is of."""
        start = 0
        for piece in self.prefix[layer]:
            end = start + piece[0].shape[0]
            yield slice(start, end), slice(start * self.rollouts, end * self.rollouts), piece
            start = end

    def _write_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (rows, H, L, K) of the prompts that come next."""
        if layer == len(self.prefix):
            self.prefix.append([])
        self.prefix[layer].append((key.contiguous(), value.contiguous()))

    def _room_for(self, like: Tensor, rows: int) -> Tensor:
        """Memory for keys or values (rows, H, capacity, K)."""
        _, heads, _, width = like.shape
        return like.new_empty(rows, heads, self.capacity, width)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (R, H, S, K) to a layer's suffixes; returns all of them so far."""
        if layer == len(self.suffix):
            self.suffix.append((self._room_for(key, key.shape[0]), self._room_for(value, key.shape[0])))
        end = self.used + key.shape[2]
        keys, values = self.suffix[layer]
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _dense(self, part: Tensor) -> Tensor:
        """Slots of a suffix as a product takes them at once, valid until the next call.

        On a CPU, products in half precision copy what has gaps, each time into new memory, whose pages cost more than
        the copy and, of another size each time, stay in the process. Here they share one piece of memory.
        """
        if part.device.type != "cpu" or part.element_size() > 2 or part.is_contiguous():
            return part
        if self._work is None:
            self._work = torch.empty_like(self.suffix[0][0]).flatten()
        return self._work[: part.numel()].view(part.shape).copy_(part)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    state: AttentionState,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers.

    Args:
        module: the attention layer; its `layer_idx` names the layer.
        query: (rows, heads, S, K).
        key: (rows, key heads, S, K); fewer heads than `query` in grouped-query attention.
        value: the same.
        attention_mask: unused, transformers gives None to a function without a registered mask.
        scaling: factor of the scores, 1/sqrt(K) if None.
        state: where keys and values are kept.
        **kwargs: what other attention functions read.

    Returns:
        The attended values (rows, S, heads, K), and None for the weights.
    """
    del attention_mask, kwargs
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    groups = query.shape[1] // key.shape[1]
    if not state.reads_prefix:
        state._write_prefix(layer, key, value)
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    keys, values = state._append(layer, key, value)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    # query heads that share a key head become more query tokens of that head
    grouped = query.unflatten(1, (-1, groups))
    own = (grouped * scale).flatten(2, 3)
    parts = [
        _attended(state, questions, rows, query.shape[2], own[rows], prefix, (keys[rows], values[rows]))
        for questions, rows, prefix in state._pieces(layer)
    ]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended.reshape(query.shape).transpose(1, 2), None


def _attended(
    state: AttentionState, questions: slice, rows: slice, tokens: int, own: Tensor, prefix: Piece, suffix: Piece
) -> Tensor:
    """Attended values (r, H, G*S, K) of scaled queries of q questions, by their prefixes and the suffixes so far."""
    (prefix_keys, prefix_values), (keys, values) = prefix, suffix
    count, _, length, _ = prefix_keys.shape
    siblings = own.unflatten(0, (count, state.rollouts)).transpose(1, 2)
    stacked = siblings.flatten(2, 3)

    # both parts are laid out (q, H, N*G*S, ...): the longer one, against the prefix, needs no transposing
    before = stacked @ prefix_keys.transpose(-1, -2)
    padding = torch.arange(length, device=own.device) >= state.lengths_Q[questions, None]
    before.masked_fill_(padding[:, None, None, :], float("-inf"))
    # (r, H, G*S, used + S); in this order bfloat16 products on a CPU take half the time
    after = (state._dense(keys) @ own.transpose(-1, -2)).transpose(-1, -2)
    if tokens > 1:
        future = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=own.device).triu(state.used + 1)
        after = after.masked_fill(future.repeat(own.shape[2] // tokens, 1), float("-inf"))
    if state.valid_RS is not None:
        after = after.masked_fill(~state.valid_RS[rows, None, None, : keys.shape[2]], float("-inf"))
    after = after.unflatten(0, (count, state.rollouts)).transpose(1, 2)
    # of half precision softmax makes float32, and rounds what comes out
    weights = torch.cat([before, after.reshape(*stacked.shape[:3], -1)], dim=-1).softmax(-1)
    before, after = weights.split([length, keys.shape[2]], dim=-1)

    after = after.unflatten(2, (state.rollouts, -1)).transpose(1, 2).flatten(0, 1)  # (r, H, G*S, used + S)
    out = (before @ prefix_values).view(siblings.shape).transpose(1, 2)
    return out.reshape(own.shape) + after @ state._dense(values)


def use_shared_prefix_attention(lm: PreTrainedModel) -> None:
    """Make a model's layers call `attend`."""
    AttentionInterface.register(NAME, attend)
    lm.set_attn_implementation(NAME)
