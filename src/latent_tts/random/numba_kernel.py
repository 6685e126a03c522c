"""Dropout decisions in machine code, for CPUs: what `rng.Draw` computes with NumPy, in one pass over memory.

Imported where numba is installed (the extra `fast`); the decisions are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_tts.random.machine_code import array_at, compiled, next_piece, numbers_at
from latent_tts.random.philox import MASK32, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

# typed, since numba would make a mixture of signed and unsigned integers a float
M0, M1, W0, W1 = (np.uint64(value) for value in (MULTIPLIER_0, MULTIPLIER_1, WEYL_0, WEYL_1))
MASK, HALF = np.uint64(MASK32), np.uint64(32)


@compiled
def decide(pointer: Any) -> None:
    """Make keep decisions; a piece is a row.

    Args:
        pointer: to pieces taken; R rows; P masked places; S tokens; B blocks a token; the counter word of the use; how
            many of a decision's 65536 patterns drop, in [0, 65536); then the addresses of
            keys (R, 2) and rollouts (R), int64;
            places (P), int64: counter words of the masked places;
            kept (R, P, S, 2, 4B), bool: the decisions out of the words 0 and 1, then 2 and 3, of the blocks.
    """
    numbers = numbers_at(pointer)
    rows, count, tokens, blocks, stream = numbers[1], numbers[2], numbers[3], numbers[4], np.uint64(numbers[5])
    lowest = np.int16(numbers[6] - 32768)
    keys, rollouts = array_at(numbers[7], (rows, 2), np.int64), array_at(numbers[8], (rows,), np.int64)
    places = array_at(numbers[9], (count,), np.int64)
    kept = array_at(numbers[10], (rows, count, tokens, 2, 4 * blocks), np.bool_)
    first, second = np.empty(2 * blocks, np.uint32), np.empty(2 * blocks, np.uint32)
    first16, second16 = first.view(np.int16), second.view(np.int16)
    while True:
        row = next_piece(pointer)
        if row >= rows:
            return
        for place in range(count):
            for token in range(tokens):
                for block in range(blocks):
                    c0, c1 = np.uint64(token * blocks + block), np.uint64(places[place])
                    c2, c3 = np.uint64(rollouts[row]), stream
                    k0, k1 = np.uint64(keys[row, 0]), np.uint64(keys[row, 1])
                    for _ in range(ROUNDS):
                        a, b = c0 * M0, c2 * M1
                        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & MASK, (a >> HALF) ^ c3 ^ k1, a & MASK
                        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
                    first[2 * block], first[2 * block + 1] = np.uint32(c0), np.uint32(c1)
                    second[2 * block], second[2 * block + 1] = np.uint32(c2), np.uint32(c3)
                for i in range(4 * blocks):
                    kept[row, place, token, 0, i] = first16[i] >= lowest
                    kept[row, place, token, 1, i] = second16[i] >= lowest
