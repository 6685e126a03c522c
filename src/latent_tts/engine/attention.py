"""Shared-prefix attention: a question's prompt is kept once, each of its N rollouts adds a short suffix.

transformers passes keyword arguments of a model call on to the attention function, so that the cache of a call travels
with it and nothing is patched. A forward pass either fills the prefix (ordinary causal attention over right-padded
prompts) or appends to the suffixes: scores against the prefix and against the row's own suffix are put side by side
before one softmax, which is exact.

Source: the split follows bifurcated attention (Athiwaratkun et al. 2024, arXiv 2403.08845) and Hydragen (Juravsky et
al. 2024, arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from latent_tts.random.kernel_check import is_usable

Piece = tuple[Tensor, Tensor]
NAME = "latent_tts_shared_prefix"
KERNEL_WIDTHS = range(16, 257)  # of heads
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_TOLERANCE = 8  # roundings of half precision; values are of the order of 1
KERNEL_TOLERANCE_32 = 1e-5
# questions, siblings, key heads, query heads of each, tokens, slots used, prefix tokens, whether slots hold nothing
KERNEL_CASES = [
    (2, 3, 2, 1, 1, 4, 20, False),
    (3, 40, 1, 2, 1, 0, 70, True),
    (2, 1, 2, 4, 3, 2, 5, True),
    (32, 20, 4, 1, 1, 1, 35, False),  # enough for large tiles
]
SHORTEST = 16  # of what grows by powers of two
MAX_NUMBER = 1 << 12  # of the slots that are counted without a kernel


@dataclass
class SharedPrefixCache:
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
    """

    rollouts: int
    capacity: int
    lengths_Q: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    prefix: list[list[Piece]] = field(default_factory=list)
    suffix: list[Piece] = field(default_factory=list)
    used: int = 0
    valid_RC: Tensor | None = None
    fills_prefix: bool = False
    _work: Tensor | None = None

    @property
    def questions_so_far(self) -> int:
        """How many prefixes it has."""
        return self.lengths_Q.shape[0]

    def add_questions(self, lengths_Q: Tensor) -> None:
        """Say how many tokens the prefixes that come next have."""
        self.lengths_Q = torch.cat([self.lengths_Q, lengths_Q]) if len(self.lengths_Q) else lengths_Q

    def add_empty_prefixes(self, like_QLD: Tensor, config: Any) -> None:
        """Keep prefixes without tokens, which no pass makes."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = like_QLD.new_empty(like_QLD.shape[0], heads, 0, width)
        for layer in range(config.num_hidden_layers):
            self.write_prefix(layer, empty, empty)

    def write_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (q, H, L, K) of the prompts that come next."""
        if layer == len(self.prefix):
            self.prefix.append([])
        self.prefix[layer].append((key.contiguous(), value.contiguous()))

    def reserve(self, tokens: int, keep_first_R: Tensor | None) -> None:
        """Check that S more slots are left, and mark the first one as holding nothing where `keep_first_R` is False.

        Raises:
            ValueError: there are too few.
        """
        if self.used + tokens > self.capacity:
            raise ValueError(f"{self.used} slots and {tokens} more exceed the capacity of {self.capacity}")
        if keep_first_R is not None:
            self._validity(keep_first_R)[:, self.used] = keep_first_R

    def blank(self, first_R: Tensor) -> None:
        """Mark each row's slots from its own first one on as holding nothing."""
        slots = torch.arange(self.used, device=first_R.device)
        self._validity(first_R)[:, : self.used] &= slots < first_R[:, None]

    def _validity(self, like_R: Tensor) -> Tensor:
        """`valid_RC`, made if all slots held something until now."""
        if self.valid_RC is None:
            self.valid_RC = torch.ones(like_R.shape[0], self.capacity, dtype=torch.bool, device=like_R.device)
        return self.valid_RC

    def append(self, layer: int, key: Tensor, value: Tensor) -> Piece:
        """Add keys and values (R, H, S, K) to a layer's suffixes; returns all of them so far."""
        self._make_suffix(layer, key, value)
        end = self.used + key.shape[2]
        keys, values = self.suffix[layer]
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _make_suffix(self, layer: int, key: Tensor, value: Tensor) -> None:
        if layer == len(self.suffix):
            self.suffix.append((self._new_suffix(key, key.shape[0]), self._new_suffix(value, key.shape[0])))

    def rewind(self, used: int) -> None:
        """Forget all slots from `used` on."""
        assert 0 <= used <= self.used, f"{used} of {self.used} slots"
        self.used = used
        if self.valid_RC is not None:
            self.valid_RC[:, used:] = True

    def count(self, tokens: int) -> None:
        """Say that S more slots are used."""
        self.used += tokens

    def places(self, tokens: int) -> Tensor:
        """How many tokens stand before each of the next S in its suffix (S, or R x S)."""
        if self.valid_RC is None:
            return torch.arange(self.used, self.used + tokens, device=self.lengths_Q.device)
        counts_RS = self.valid_RC[:, : self.used + tokens].cumsum(1)[:, self.used :]
        return (counts_RS - 1).clamp(min=0)  # of slots that hold nothing

    def later_slots(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which of the slots that `append` gives come after each of the S tokens (S, C); None if none does."""
        if tokens == 1:
            return None
        return torch.ones(tokens, self.used + tokens, dtype=torch.bool, device=device).triu(self.used + 1)

    def used_1(self, device: torch.device) -> Tensor:
        """`used` on the device (int64)."""
        if self.used > MAX_NUMBER:
            return torch.full((1,), self.used, device=device)
        return _numbers(device)[self.used : self.used + 1]

    def fork(self, questions: Tensor, rows: Tensor) -> SharedPrefixCache:
        """A cache of its own with some of the questions and suffixes.

        Args:
            questions: which prefixes; one may come several times.
            rows: suffixes, the same number for each of `questions`, question-major; a row may come several times.
        """

        def part(tensor: Tensor) -> Tensor:
            new = self._new_suffix(tensor, rows.shape[0])
            if self.used:
                slots, new_slots = (each.permute(2, 0, 1, 3)[: self.used] for each in (tensor, new))
                torch.index_select(slots, 1, rows, out=new_slots)
            return new

        return SharedPrefixCache(
            rollouts=rows.shape[0] // questions.shape[0],
            capacity=self.capacity,
            lengths_Q=self.lengths_Q[questions],
            prefix=self._prefixes_of(questions),
            suffix=[(part(keys), part(values)) for keys, values in self.suffix],
            used=self.used,
            valid_RC=None if self.valid_RC is None else self.valid_RC[rows],
        )

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


@dataclass
class FixedCache(SharedPrefixCache):
    """A cache of given sizes whose tensors stay where they are, so that passes can be recorded and replayed.

    What a recording would keep as a number, and what differs between its replays, is on the device.

    Attributes:
        questions: Q.
        length: L, most tokens of a prefix.
        at_1: slots used so far (int64), where a pass is to be replayed at several; None where `used` says it.
        window: slots that such a pass looks at.
    """

    questions: int = 0
    length: int = 0
    at_1: Tensor | None = None
    window: int = 0
    _known: int = 0  # questions whose prefixes are set

    def restart(self) -> None:
        """Forget all questions."""
        self._known = self.used = 0
        self.at_1 = None
        if self.valid_RC is not None:
            self.valid_RC.fill_(True)

    @property
    def questions_so_far(self) -> int:
        """How many prefixes are set."""
        return self._known

    def add_questions(self, lengths_Q: Tensor) -> None:
        """See `SharedPrefixCache`."""
        if not len(self.lengths_Q):
            self.lengths_Q = lengths_Q.new_zeros(self.questions)
        self._known += lengths_Q.shape[0]
        self.lengths_Q[self._known - lengths_Q.shape[0] : self._known] = lengths_Q

    def write_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `SharedPrefixCache`."""
        if layer == len(self.prefix):
            # zeros, since padding takes part in sums with weight zero
            sizes = [(self.questions, part.shape[1], self.length, part.shape[3]) for part in (key, value)]
            self.prefix.append([(key.new_zeros(sizes[0]), value.new_zeros(sizes[1]))])
        new = slice(self._known - key.shape[0], self._known)
        for kept, part in zip(self.prefix[layer][0], (key, value), strict=True):
            kept[new, :, : part.shape[2]] = part

    def reserve(self, tokens: int, keep_first_R: Tensor | None) -> None:
        """See `SharedPrefixCache`; slots counted on the device are not checked."""
        if self.at_1 is None:
            super().reserve(tokens, keep_first_R)

    def append(self, layer: int, key: Tensor, value: Tensor) -> Piece:
        """See `SharedPrefixCache`; a pass at `at_1` has one token."""
        if self.at_1 is None:
            return super().append(layer, key, value)
        self._make_suffix(layer, key, value)  # a model without latents appends nothing before its first token
        keys, values = self.suffix[layer]
        keys.index_copy_(2, self.at_1, key)
        values.index_copy_(2, self.at_1, value)
        return keys[:, :, : self.window], values[:, :, : self.window]

    def count(self, tokens: int) -> None:
        """See `SharedPrefixCache`."""
        if self.at_1 is None:
            super().count(tokens)
        else:
            self.at_1.add_(tokens)

    def places(self, tokens: int) -> Tensor:
        """See `SharedPrefixCache`."""
        if self.at_1 is None:
            return super().places(tokens)
        if self.valid_RC is None:
            return self.at_1
        earlier_C = torch.arange(self.window, device=self.at_1.device) < self.at_1
        return (self.valid_RC[:, : self.window] & earlier_C).sum(1, keepdim=True)

    def later_slots(self, tokens: int, device: torch.device) -> Tensor | None:
        """See `SharedPrefixCache`."""
        if self.at_1 is None:
            return super().later_slots(tokens, device)
        return (torch.arange(self.window, device=device) > self.at_1)[None]

    def used_1(self, device: torch.device) -> Tensor:
        """See `SharedPrefixCache`."""
        return super().used_1(device) if self.at_1 is None else self.at_1

    def window_of(self, slots: int) -> int:
        """How many slots a pass that sees some looks at: one recording serves several passes of the same window.

        The kernel reads from the device how many there are; operators look at all, so that their windows grow.
        """
        if self.suffix and has_kernel(self.suffix[0][0]):
            return self.capacity
        return min(power_of_two(slots), self.capacity)

    def fork(self, questions: Tensor, rows: Tensor) -> SharedPrefixCache:
        """Not to be forked: rows stay where they are, or move to a cache `for_rows`."""
        raise NotImplementedError

    def for_rows(self, questions: int, rollouts: int) -> FixedCache:
        """A cache for fewer rows of fewer questions; `take` fills it."""
        rows = questions * rollouts
        return FixedCache(
            rollouts, self.capacity, self.lengths_Q[:questions].clone(),
            prefix=[[(keys[:questions].clone(), values[:questions].clone())] for [(keys, values)] in self.prefix],
            suffix=[(keys[:rows].clone(), values[:rows].clone()) for keys, values in self.suffix],
            valid_RC=None if self.valid_RC is None else self.valid_RC[:rows].clone(),
            questions=questions, length=self.length,
        )  # fmt: skip

    def take(self, other: FixedCache, questions: Tensor, rows: Tensor) -> None:
        """Copy prefixes and suffixes of a cache of the same capacity; see `SharedPrefixCache.fork`."""
        owners = {0: questions, 1: questions, 2: rows, 3: rows}
        self.lengths_Q.copy_(other.lengths_Q[questions])
        for ours, theirs in zip(self._layers(), other._layers(), strict=True):
            for place, (kept, part) in enumerate(zip(ours, theirs, strict=True)):
                kept.copy_(part.index_select(0, owners[place]))
        if self.valid_RC is not None:
            assert other.valid_RC is not None
            self.valid_RC.copy_(other.valid_RC[rows])

    def _layers(self) -> list[list[Tensor]]:
        """Per layer: keys and values of prefixes, then of suffixes."""
        return [[*piece, *own] for [piece], own in zip(self.prefix, self.suffix, strict=True)]

    def tensors(self) -> list[Tensor]:
        """All that it holds so far."""
        found = [part for pieces in self.prefix for piece in pieces for part in piece]
        found += [part for piece in self.suffix for part in piece]
        return [*found, *(each for each in (self.lengths_Q, self.valid_RC) if each is not None and len(each))]

    def _new_suffix(self, like: Tensor, rows: int) -> Tensor:
        return super()._new_suffix(like, rows).zero_()


def power_of_two(number: int) -> int:
    """The next power of two, at least `SHORTEST`."""
    return max(SHORTEST, 1 << (number - 1).bit_length())


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    shared_prefix_cache: SharedPrefixCache,
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
        shared_prefix_cache: where keys and values are kept.
        **kwargs: what other attention functions read.

    Returns:
        The attended values (rows, S, heads, K), and None for the weights.
    """
    cache, layer = shared_prefix_cache, int(module.layer_idx)  # type: ignore[arg-type]
    groups = query.shape[1] // key.shape[1]
    if cache.fills_prefix:
        cache.write_prefix(layer, key, value)
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    keys, values = cache.append(layer, key, value)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if has_kernel(query) and value.shape == key.shape:
        return _attend_by_kernel(cache, query, layer, (keys, values), scale), None
    # query heads that share a key head become more query tokens of that head
    own = (query.unflatten(1, (-1, groups)) * scale).flatten(2, 3)
    parts = [
        _attend_piece(cache, questions, rows, query.shape[2], own[rows], prefix, (keys[rows], values[rows]))
        for questions, rows, prefix in cache.pieces(layer)
    ]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended.reshape(query.shape).transpose(1, 2), None


def _attend_piece(
    cache: SharedPrefixCache, questions: slice, rows: slice, tokens: int, own: Tensor, prefix: Piece, suffix: Piece
) -> Tensor:
    """Attended values (r, H, G*S, K) of scaled queries of q questions, by their prefixes and the suffixes so far."""
    (prefix_keys, prefix_values), (keys, values) = prefix, suffix
    count, _, length, _ = prefix_keys.shape
    siblings = own.unflatten(0, (count, cache.rollouts)).transpose(1, 2)
    stacked = siblings.flatten(2, 3)

    # both parts are laid out (q, H, N*G*S, ...): the longer one, against the prefix, needs no transposing
    before = stacked @ prefix_keys.transpose(-1, -2)
    padding = torch.arange(length, device=own.device) >= cache.lengths_Q[questions, None]
    before.masked_fill_(padding[:, None, None, :], float("-inf"))
    # (r, H, G*S, used + S); in this order bfloat16 products on a CPU take half the time
    after = (cache.dense(keys) @ own.transpose(-1, -2)).transpose(-1, -2)
    later = cache.later_slots(tokens, own.device)
    if later is not None:
        after = after.masked_fill(later.repeat(own.shape[2] // tokens, 1), float("-inf"))
    if cache.valid_RC is not None:
        after = after.masked_fill(~cache.valid_RC[rows, None, None, : keys.shape[2]], float("-inf"))
    after = after.unflatten(0, (count, cache.rollouts)).transpose(1, 2)
    # softmax computes half precision in float32 and rounds the result
    weights = torch.cat([before, after.reshape(*stacked.shape[:3], -1)], dim=-1).softmax(-1)
    before, after = weights.split([length, keys.shape[2]], dim=-1)

    after = after.unflatten(2, (cache.rollouts, -1)).transpose(1, 2).flatten(0, 1)  # (r, H, G*S, used + S)
    out = (before @ prefix_values).view(siblings.shape).transpose(1, 2)
    return out.reshape(own.shape) + after @ cache.dense(values)


def _attend_by_kernel(cache: SharedPrefixCache, query: Tensor, layer: int, suffix: Piece, scale: float) -> Tensor:
    """Attended values (R, S, heads, K)."""
    from latent_tts.engine.attention_kernel import attend_piece

    out, used_1 = query.new_empty(*query.transpose(1, 2).shape), cache.used_1(query.device)
    for questions, rows, prefix in cache.pieces(layer):
        valid_RC = None if cache.valid_RC is None else cache.valid_RC[rows]
        own = suffix[0][rows], suffix[1][rows]
        attend_piece(query[rows], prefix, own, cache.lengths_Q[questions], used_1, valid_RC, scale, out[rows])
    return out


def has_kernel(like: Tensor) -> bool:
    """Whether Triton's kernel attends with heads like these (..., K)."""
    has_one = like.is_cuda and like.dtype in KERNEL_DTYPES
    return has_one and is_usable("attention", kernel_agrees, like.device, like.dtype, like.shape[-1])


def kernel_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel gives what the operators give, for ragged prompts, grouped heads and unused slots."""
    if width not in KERNEL_WIDTHS:
        raise ValueError(f"heads of width {width}, not {KERNEL_WIDTHS[0]} to {KERNEL_WIDTHS[-1]}")
    from latent_tts.engine.attention_kernel import attend_piece

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    agree = True
    for questions, siblings, heads, groups, tokens, used, length, with_valid in KERNEL_CASES:
        rows, capacity = questions * siblings, used + tokens + 2
        lengths_Q = torch.tensor([length - 3 * (place % 3) for place in range(questions)], device=device).clamp(min=0)
        prefix, suffix = ([numbers(count, heads, size, width) for _ in range(2)] for count, size in
                          ((questions, length), (rows, capacity)))  # fmt: skip
        valid_RC = None
        if with_valid:
            valid_RC = torch.rand(rows, capacity, generator=generator).to(device) < 0.6
            valid_RC[:, 0] = True
        query = numbers(rows, heads * groups, tokens, width)
        out = torch.empty(rows, tokens, heads * groups, width, dtype=dtype, device=device)
        used_1 = torch.tensor([used], device=device)
        attend_piece(query, tuple(prefix), tuple(suffix), lengths_Q, used_1, valid_RC, width**-0.5, out)
        kept = SharedPrefixCache(siblings, capacity, lengths_Q, used=used, valid_RC=valid_RC)
        own = (query.unflatten(1, (heads, groups)).double() * width**-0.5).flatten(2, 3)
        wide = [[part.double() for part in pair] for pair in (prefix, [part[:, :, : used + tokens] for part in suffix])]
        slices = slice(0, questions), slice(0, rows)
        expected = _attend_piece(kept, *slices, tokens, own, tuple(wide[0]), tuple(wide[1]))  # type: ignore[arg-type]
        difference = (out.double() - expected.reshape(query.shape).transpose(1, 2)).abs().max()
        limit = KERNEL_TOLERANCE_32 if dtype == torch.float32 else KERNEL_TOLERANCE * torch.finfo(dtype).eps
        agree &= bool(difference < limit)
    return agree


@cache
def _numbers(device: torch.device) -> Tensor:
    """The first numbers from 0 on, so that a count on the device needs no copy to it."""
    return torch.arange(MAX_NUMBER + 1, device=device)


def use_shared_prefix_attention(lm: PreTrainedModel) -> None:
    """Make a model's layers call `attend`."""
    AttentionInterface.register(NAME, attend)
    lm.set_attn_implementation(NAME)


def use_own_attention(lm: PreTrainedModel, kind: str | None = None) -> None:
    """Make a model's layers call an attention of transformers.

    Args:
        lm: the model.
        kind: `sdpa` or `eager`; None for the first one that the model has.

    Raises:
        ValueError: the model does not have `kind`.
    """
    if kind is not None:
        lm.set_attn_implementation(kind)
        return
    try:
        lm.set_attn_implementation("sdpa")
    except ValueError:  # as where it cannot cap scores
        lm.set_attn_implementation("eager")
