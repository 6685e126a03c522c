"""The keys and values of a batch of sequences, behind five operations: prefill, append, rewind, blank, fork.

The latent loop and the scorer know these operations alone (`State`). There are two ways behind them: shared-prefix
attention (`KeyValueState`, whose layers call `attention.attend`), and transformers' own attention and cache
(`transformers_state.py`) for models that the first one would misread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tts.engine.transformers_state import TransformersState
from latent_tts.types import Computation

Piece: TypeAlias = tuple[Tensor, Tensor]


class KeyValueState:
    """Keys and values of Q prefixes and of R = Q*N suffixes (H key heads, K a head's width, C slots).

    Attributes:
        rollouts: N.
        capacity: C, most slots of a suffix.
        lengths_Q: tokens of each prefix.
        prefix: per layer, keys and values (q, H, L, K) of pieces that together hold Q questions, right-padded.
        suffix: per layer, keys and values (R, H, C, K), allocated on first use.
        used: slots of every suffix so far.
        valid_RC: which slots hold something; None while all that are used do. Rows that think for different numbers of
            steps go through the same slots.
        fills_prefix: whether the present pass runs prompts.
        slots_S: slots of the tokens of the present pass.
        window: how many slots they look at.
        later_SC: which of these come after each token; None if none does.
    """

    slots_S: Tensor
    window: int
    later_SC: Tensor | None

    def __init__(
        self,
        backbone: PreTrainedModel,
        rollouts: int,
        capacity: int,
        *,
        position_offset_Q: Tensor | None = None,
    ) -> None:
        """Open a state without questions.

        Args:
            backbone: a transformer that `prepare_backbone` has prepared, without its LM head.
            rollouts: N.
            capacity: most slots of a row.
            position_offset_Q: added to the position ids of each question that will be prefilled; None adds nothing.
        """
        self._backbone, self._position_offset_Q = backbone, position_offset_Q
        self.rollouts, self.capacity, self.used = rollouts, capacity, 0
        self.lengths_Q = torch.empty(0, dtype=torch.long)
        self.prefix: list[list[Piece]] = []
        self.suffix: list[Piece] = []
        self.valid_RC: Tensor | None = None
        self.fills_prefix = False
        self._work: Tensor | None = None

    # --- the five operations

    def prefill(self, embeddings_QLD: Tensor, lengths_Q: Tensor) -> Tensor:
        """Run prompts; each call adds questions.

        Args:
            embeddings_QLD: of prompts, padded on the right; L is at least 1.
            lengths_Q: tokens of each, at most L.

        Returns:
            Final hidden states (Q, L, D); those of padding mean nothing.
        """
        new = self._add_questions(lengths_Q)
        # positions of padding stay within the model's
        positions_L = torch.arange(embeddings_QLD.shape[1], device=lengths_Q.device)
        positions_QL = torch.minimum(positions_L, (lengths_Q[:, None] - 1).clamp(min=0))
        if self._position_offset_Q is not None:
            positions_QL = positions_QL + self._position_offset_Q[new, None]
        self.fills_prefix = True
        hidden_QLD = self._run(embeddings_QLD, positions_QL)
        self.fills_prefix = False
        return hidden_QLD

    def append(self, embeddings_RSD: Tensor, keep_first_R: Tensor | None = None) -> Tensor:
        """Append S tokens to every row; returns their final hidden states (R, S, D).

        Args:
            embeddings_RSD: what is appended.
            keep_first_R: False in rows whose first token is ignored: its slot stays empty, and no token attends to it.
                None keeps all.

        Raises:
            ValueError: too few slots are left.
        """
        tokens = embeddings_RSD.shape[1]
        self.reserve(tokens)
        if keep_first_R is not None:
            self._validity(keep_first_R)[:, self.used] = keep_first_R
        hidden_RSD = self._run_suffix(embeddings_RSD)
        self.used += tokens
        return hidden_RSD

    def rewind(self, used: int) -> None:
        """Forget all slots from `used` on."""
        assert 0 <= used <= self.used, f"{used} of {self.used} slots"
        self.used = used
        if self.valid_RC is not None:
            self.valid_RC[:, used:] = True

    def blank(self, first_R: Tensor) -> None:
        """Let each row's slots from its own first one on hold nothing; they stay used."""
        slots = torch.arange(self.used, device=first_R.device)
        self._validity(first_R)[:, : self.used] &= slots < first_R[:, None]

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

        def part(tensor: Tensor) -> Tensor:
            new = self._new_suffix(tensor, rows.shape[0])
            if self.used:
                slots, new_slots = (each.permute(2, 0, 1, 3)[: self.used] for each in (tensor, new))
                torch.index_select(slots, 1, rows, out=new_slots)
            return new

        forked = copy(self)
        forked.rollouts = rows.shape[0] // questions.shape[0]
        forked.lengths_Q, forked.prefix = self.lengths_Q[questions], self._prefixes_of(questions)
        forked.suffix = [(part(keys), part(values)) for keys, values in self.suffix]
        forked.valid_RC = None if self.valid_RC is None else self.valid_RC[rows]
        forked._work = None
        if self._position_offset_Q is not None:
            forked._position_offset_Q = self._position_offset_Q[questions]
        return forked

    # --- what attention reads and writes

    def write_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (q, H, L, K) of the prompts that come next."""
        if layer == len(self.prefix):
            self.prefix.append([])
        self.prefix[layer].append((key.contiguous(), value.contiguous()))

    def reserve(self, tokens: int) -> None:
        """Set the slots of a pass of S more tokens.

        Raises:
            ValueError: too few are left.
        """
        self.window = self.used + tokens
        if self.window > self.capacity:
            raise ValueError(f"{self.used} slots and {tokens} more exceed the capacity of {self.capacity}")
        self.slots_S = torch.arange(self.used, self.window, device=self.lengths_Q.device)
        self.later_SC = None
        if tokens > 1:
            self.later_SC = torch.arange(self.window, device=self.slots_S.device) > self.slots_S[:, None]

    def write_suffix(self, layer: int, key: Tensor, value: Tensor) -> Piece:
        """Add keys and values (R, H, S, K) to a layer's suffixes; returns those of the slots that the pass looks at."""
        keys, values = self._suffix_of(layer, key, value)
        keys[:, :, self.used : self.window] = key
        values[:, :, self.used : self.window] = value
        return keys[:, :, : self.window], values[:, :, : self.window]

    def pieces(self, layer: int) -> Iterator[tuple[slice, slice, Piece]]:
        """A layer's pieces, each with the questions and the rows that it belongs to."""
        start = 0
        for piece in self.prefix[layer]:
            end = start + piece[0].shape[0]
            yield slice(start, end), slice(start * self.rollouts, end * self.rollouts), piece
            start = end

    def dense(self, part: Tensor) -> Tensor:
        """Slots of a suffix without gaps, valid until the next call.

        On a CPU, products in half precision copy what has gaps, each time into new memory, whose pages cost more than
        the copy and, of another size each time, stay in the process. Here they share one piece of memory.
        """
        if part.device.type != "cpu" or part.element_size() > 2 or part.is_contiguous():
            return part
        if self._work is None:
            self._work = part.new_empty(self.suffix[0][0].numel())
        return self._work[: part.numel()].view(part.shape).copy_(part)

    def _add_questions(self, lengths_Q: Tensor) -> slice:
        """Say how many tokens the prefixes that come next have; returns which questions they are."""
        start = len(self.lengths_Q)
        self.lengths_Q = torch.cat([self.lengths_Q, lengths_Q]) if start else lengths_Q
        return slice(start, len(self.lengths_Q))

    def _run_suffix(self, embeddings_RSD: Tensor) -> Tensor:
        """Run tokens in the slots that are set; their positions are counted without gaps."""
        places: Tensor = self.slots_S
        if self.valid_RC is not None:
            earlier_SC = torch.arange(self.window, device=places.device) < places[:, None]
            places = (self.valid_RC[:, None, : self.window] & earlier_SC).sum(2)
        first_Q = self.lengths_Q
        if self._position_offset_Q is not None:
            first_Q = first_Q + self._position_offset_Q
        return self._run(embeddings_RSD, first_Q.repeat_interleave(self.rollouts)[:, None] + places)

    def _run(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self._backbone(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, shared_prefix_state=self
        ).last_hidden_state

    def _validity(self, like_R: Tensor) -> Tensor:
        """`valid_RC`, made if all slots held something until now."""
        if self.valid_RC is None:
            self.valid_RC = torch.ones(like_R.shape[0], self.capacity, dtype=torch.bool, device=like_R.device)
        return self.valid_RC

    def _suffix_of(self, layer: int, key: Tensor, value: Tensor) -> Piece:
        """Keys and values (R, H, C, K) of a layer, made on first use."""
        if layer == len(self.suffix):
            self.suffix.append((self._new_suffix(key, key.shape[0]), self._new_suffix(value, key.shape[0])))
        return self.suffix[layer]

    def _new_suffix(self, like: Tensor, rows: int) -> Tensor:
        """Memory for keys or values (rows, H, C, K), on a CPU slot by slot.

        A pass then writes one piece of memory, and reads pieces from their beginning to their end. Row by row, what it
        writes would lie in as many pages as there are rows.
        """
        _, heads, _, width = like.shape
        if like.device.type == "cpu":
            return like.new_empty(self.capacity, rows, heads, width).permute(1, 2, 0, 3)
        return like.new_empty(rows, heads, self.capacity, width)

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


class FixedState(KeyValueState):
    """A state of given sizes whose tensors stay where they are, so that passes can be recorded and replayed."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        rollouts: int,
        capacity: int,
        *,
        questions: int,
        length: int,
    ) -> None:
        """Open a state for Q questions of at most `length` tokens; see `KeyValueState`."""
        super().__init__(backbone, rollouts, capacity)
        self.lengths_Q = torch.zeros(questions, dtype=torch.long, device=backbone.device)
        self._length, self._known = length, 0  # questions whose prefixes are set

    def restart(self) -> None:
        """Forget all questions."""
        self._known = self.used = 0
        if self.valid_RC is not None:
            self.valid_RC.fill_(True)

    def append_at(self, embeddings_R1D: Tensor, at_1: Tensor) -> Tensor:
        """Append a token to every row in a slot that the device knows, so that one recording serves several slots.

        Args:
            embeddings_R1D: what is appended.
            at_1: the slot (int64), the next one afterwards.

        Returns:
            Final hidden states (R, 1, D).
        """
        self.slots_S, self.window = at_1, self.capacity
        self.later_SC = torch.arange(self.window, device=at_1.device) > at_1[:, None]
        hidden_R1D = self._run_suffix(embeddings_R1D)
        at_1.add_(1)
        return hidden_R1D

    def write_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `KeyValueState`."""
        if layer == len(self.prefix):
            # zeros, since padding takes part in sums with weight zero
            sizes = [(len(self.lengths_Q), part.shape[1], self._length, part.shape[3]) for part in (key, value)]
            self.prefix.append([(key.new_zeros(sizes[0]), value.new_zeros(sizes[1]))])
        new = slice(self._known - key.shape[0], self._known)
        for kept, part in zip(self.prefix[layer][0], (key, value), strict=True):
            kept[new, :, : part.shape[2]] = part

    def write_suffix(self, layer: int, key: Tensor, value: Tensor) -> Piece:
        """See `KeyValueState`."""
        keys, values = self._suffix_of(layer, key, value)
        keys.index_copy_(2, self.slots_S, key)
        values.index_copy_(2, self.slots_S, value)
        return keys[:, :, : self.window], values[:, :, : self.window]

    def for_rows(self, questions: int, rollouts: int) -> FixedState:
        """A state for fewer rows of fewer questions, in memory of its own."""
        rows, other = questions * rollouts, copy(self)
        other.rollouts, other.lengths_Q = rollouts, self.lengths_Q[:questions].clone()
        other.prefix = [[(keys[:questions].clone(), values[:questions].clone())] for [(keys, values)] in self.prefix]
        other.suffix = [(keys[:rows].clone(), values[:rows].clone()) for keys, values in self.suffix]
        other.valid_RC = None if self.valid_RC is None else self.valid_RC[:rows].clone()
        return other

    def of_questions(self) -> list[Tensor]:
        """Its tensors with an entry per prefix."""
        return [self.lengths_Q, *(part for [piece] in self.prefix for part in piece)]

    def of_rows(self) -> list[Tensor]:
        """Its tensors with an entry per row, as far as they are made."""
        return [part for piece in self.suffix for part in piece] + ([] if self.valid_RC is None else [self.valid_RC])

    def _add_questions(self, lengths_Q: Tensor) -> slice:
        new = slice(self._known, self._known + len(lengths_Q))
        self.lengths_Q[new] = lengths_Q
        self._known = new.stop
        return new

    def _new_suffix(self, like: Tensor, rows: int) -> Tensor:
        return super()._new_suffix(like, rows).zero_()


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
