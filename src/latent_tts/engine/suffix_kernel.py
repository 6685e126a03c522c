"""Attention over a row's own suffix, and the softmax that joins it to the prefix, in machine code for bfloat16.

Products over prefixes stay torch's: they are large. What is left is small for each row and head, so a dozen operators
over whole batches spend their time on copies and memory. Here each query stays in a core's first cache from its scores
to its result. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_tts.machine_code import (
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
    rollouts: int,
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
    heads, width, padded, count = keys.shape[2], keys.shape[3], scores.shape[3], queries.shape[2] // rollouts
    question, first = row // rollouts, (row % rollouts) * count
    for head in range(heads):
        for s in range(count):
            place = first + s
            weights = scores[question, head, place]
            for i in range(length):
                own[i] = wide(weights[i])
            for i in range(width):
                query[i] = wide(queries[question, head, place, i])
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
            result = out[question, head, place]
            for i in range(width):
                result[i] = narrow(total[i])


@compiled
def attend_suffixes(pointer: Any) -> None:
    """Make weights of scores against prefixes, and add up suffixes by theirs; a piece is a row.

    R = Q*N rows; H key heads; S = query heads of a key head times tokens, those of a query head side by side; C slots.

    Args:
        pointer: to pieces taken, R; tokens of this pass; used slots before it; Q, N, H, S, L, K, C; whether slots may
            be empty; then the addresses of
            lengths (Q), int64: tokens of each prefix;
            valid (R, C), bool: which slots hold something, read if some may be empty;
            scores (Q, H, N*S, L) against the prefixes, which become the weights, 0 for padding;
            queries (Q, H, N*S, K), scaled;
            keys (C, R, H, K); values, the same;
            out (Q, H, N*S, K), filled with the suffixes' part of the result.
    """
    numbers = numbers_at(pointer)
    rows, tokens, used = numbers[1], numbers[2], numbers[3]
    questions, rollouts, heads, count, padded, width, slots = (
        numbers[4],
        numbers[5],
        numbers[6],
        numbers[7],
        numbers[8],
        numbers[9],
        numbers[10],
    )
    lengths = array_at(numbers[12], (questions,), np.int64)
    valid = array_at(numbers[13], (rows if numbers[11] else 0, slots), np.bool_)
    scores = array_at(numbers[14], (questions, heads, rollouts * count, padded), np.uint16)
    queries = array_at(numbers[15], (questions, heads, rollouts * count, width), np.uint16)
    keys = array_at(numbers[16], (slots, rows, heads, width), np.uint16)
    values = array_at(numbers[17], (slots, rows, heads, width), np.uint16)
    out = array_at(numbers[18], (questions, heads, rollouts * count, width), np.uint16)
    own, seen = np.empty(padded + slots, np.float32), np.empty(slots, np.int64)
    query, total = np.empty(width, np.float32), np.empty(width, np.float32)
    while True:
        row = next_piece(pointer)
        if row >= rows:
            return
        length = lengths[row // rollouts]
        _attend_row(
            row, tokens, used, length, rollouts, valid, scores, queries, keys, values, out, own, query, total, seen
        )
