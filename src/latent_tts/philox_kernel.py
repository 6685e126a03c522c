"""Dropout decisions in machine code, for CPUs: what `rng.Draw` computes with NumPy, in one pass over memory.

Imported where numba is installed (the extra `fast`); the decisions are the same bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from latent_tts.philox import MASK32, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

# typed, since numba would make a mixture of signed and unsigned integers a float
M0, M1, W0, W1 = (np.uint64(value) for value in (MULTIPLIER_0, MULTIPLIER_1, WEYL_0, WEYL_1))
MASK, HALF = np.uint64(MASK32), np.uint64(32)


def _decide(
    keys: np.ndarray, rollouts: np.ndarray, places: np.ndarray, stream: int, threshold: int, kept: np.ndarray
) -> None:
    """Fill `kept` with keep decisions.

    Args:
        keys: (R, 2), int64.
        rollouts: (R), int64.
        places: (P), int64: counter words of the masked places.
        stream: counter word of the use.
        threshold: how many of a decision's 65536 patterns drop, in [0, 65536).
        kept: (R, P, S, 2, 4B), bool: the decisions out of the words 0 and 1, then 2 and 3, of B blocks a token.
    """
    rows, count, tokens, _, width = kept.shape
    blocks = width // 4
    first, second = np.empty(2 * blocks, np.uint32), np.empty(2 * blocks, np.uint32)
    first16, second16 = first.view(np.int16), second.view(np.int16)
    lowest = np.int16(threshold - 32768)
    for row in range(rows):
        for place in range(count):
            for token in range(tokens):
                for block in range(blocks):
                    c0, c1 = np.uint64(token * blocks + block), np.uint64(places[place])
                    c2, c3 = np.uint64(rollouts[row]), np.uint64(stream)
                    k0, k1 = np.uint64(keys[row, 0]), np.uint64(keys[row, 1])
                    for _ in range(ROUNDS):
                        a, b = c0 * M0, c2 * M1
                        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & MASK, (a >> HALF) ^ c3 ^ k1, a & MASK
                        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
                    first[2 * block], first[2 * block + 1] = np.uint32(c0), np.uint32(c1)
                    second[2 * block], second[2 * block + 1] = np.uint32(c2), np.uint32(c3)
                for i in range(width):
                    kept[row, place, token, 0, i] = first16[i] >= lowest
                    kept[row, place, token, 1, i] = second16[i] >= lowest


try:
    decide = njit(nogil=True, cache=True)(_decide)
except RuntimeError:  # no folder to keep machine code in can be written
    decide = njit(nogil=True)(_decide)
