"""Attention over a row's own suffix, and the softmax that joins it to the prefix, in machine code for bfloat16.

Products over prefixes stay torch's: they are large. What is left is small for each row and head, so a dozen operators
over whole batches spend their time on copies and memory. Here each query stays in a core's first cache from its scores
to its result. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_tts.random.machine_code import (
    F32,
    ONE,
    U16,
    array_at,
    compiled,
    exp,
    inlined,
    narrow,
    next_piece,
    numbers_at,
    wide,
)


@inlined
def _attend_row(
    row: int,
    tokens: int,
    used: int,
    length: int,
    rollout: int,
    queried: int,
    valid: Any,
    scores: Any,
    queries: Any,
    keys: Any,
    values: Any,
    out: Any,
    own: Any,
    query: Any,
    total: Any,
    slots: Any,
) -> None:
    """All heads and tokens of a row; `own`, `query`, `total` and `slots` are room to work in."""
    heads, width, padded = keys.shape[2], keys.shape[3], scores.shape[2]
    for head in range(heads):
        for s in range(queried):
            place = rollout * queried + s
            weights = scores[head, place]
            for i in range(length):
                own[i] = wide(weights[i])
            for i in range(width):
                query[i] = wide(queries[head, place, i])
            seen = 0
            for slot in range(used + s % tokens + 1):
                if valid.shape[0] > 0 and not valid[row, slot]:
                    continue
                score, key = F32(0), keys[slot, row, head]
                for i in range(width):
                    score += query[i] * wide(key[i])
                own[length + seen], slots[seen] = score, slot
                seen += 1
            both = length + seen
            highest, sum_of_all = own[0], F32(0)
            for i in range(both):
                highest = max(highest, own[i])
            for i in range(both):
                own[i] = exp(own[i] - highest)
                sum_of_all += own[i]
            factor = ONE / sum_of_all
            for i in range(length):
                weights[i] = narrow(own[i] * factor)
            for i in range(length, padded):
                weights[i] = U16(0)
            for i in range(width):
                total[i] = F32(0)
            for j in range(seen):
                weight, value = own[length + j] * factor, values[slots[j], row, head]
                for i in range(width):
                    total[i] += weight * wide(value[i])
            result = out[head, place]
            for i in range(width):
                result[i] = narrow(total[i])


@compiled
def attend_suffixes(pointer: Any) -> None:
    """Make weights of scores against prefixes, and add up suffixes by theirs, for q questions; a piece is a row.

    R = Q*N rows in all; H key heads; S = query heads of a key head times tokens, those of a query head side by side; C
    slots.

    Args:
        pointer: to pieces taken, q*N; tokens of this pass; used slots before it; the first question; q; L; N; H; S; K;
            C; R; whether slots may be empty; then the addresses of
            lengths (Q), int64: tokens of each prefix;
            valid (R, C), bool: which slots hold something, read if some may be empty;
            scores (q, H, N*S, L) against the prefixes, which become the weights, 0 for padding;
            queries (Q, H, N*S, K), scaled;
            keys (C, R, H, K); values, the same;
            out (Q, H, N*S, K), of which the q questions' are filled with the suffixes' part of the result.
    """
    numbers = numbers_at(pointer)
    pieces, tokens, used, first, count = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    padded, rollouts, heads, queried, width = numbers[6], numbers[7], numbers[8], numbers[9], numbers[10]
    slots, rows, gaps = numbers[11], numbers[12], numbers[13]
    questions = rows // rollouts
    lengths = array_at(numbers[14], (questions,), np.int64)
    valid = array_at(numbers[15], (rows if gaps else 0, slots), np.bool_)
    scores = array_at(numbers[16], (count, heads, rollouts * queried, padded), np.uint16)
    queries = array_at(numbers[17], (questions, heads, rollouts * queried, width), np.uint16)
    keys = array_at(numbers[18], (slots, rows, heads, width), np.uint16)
    values = array_at(numbers[19], (slots, rows, heads, width), np.uint16)
    out = array_at(numbers[20], (questions, heads, rollouts * queried, width), np.uint16)
    own, seen = np.empty(padded + slots, np.float32), np.empty(slots, np.int64)
    query, total = np.empty(width, np.float32), np.empty(width, np.float32)
    while True:
        piece = next_piece(pointer)
        if piece >= pieces:
            return
        question, row = first + piece // rollouts, first * rollouts + piece
        weights = scores[piece // rollouts]
        _attend_row(
            *(row, tokens, used, lengths[question], piece % rollouts, queried, valid, weights, queries[question]),
            *(keys, values, out[question], own, query, total, seen),
        )
