"""Dropout's keep decisions, compiled by numba for CPUs; bit for bit equal to `bits.decide_by_operators`.

Imported only if numba is installed (the extra `fast`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from latent_tts.random.philox import MASK32, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

# typed, because numba turns a mixture of signed and unsigned integers into floats
M0, M1, W0, W1 = (np.uint64(value) for value in (MULTIPLIER_0, MULTIPLIER_1, WEYL_0, WEYL_1))
MASK, HALF = np.uint64(MASK32), np.uint64(32)


def _decide(keys_R2: Any, rollouts_R: Any, places_P: Any, stream: int, threshold: int, kept: Any) -> None:
    rows, places, tokens, _, per_token = kept.shape
    blocks, lowest, last = per_token // 4, np.int16(threshold - 32768), np.uint64(stream)
    first, second = np.empty(2 * blocks, np.uint32), np.empty(2 * blocks, np.uint32)
    first16, second16 = first.view(np.int16), second.view(np.int16)
    for row in range(rows):
        for place in range(places):
            for token in range(tokens):
                for block in range(blocks):
                    c0, c1 = np.uint64(token * blocks + block), np.uint64(places_P[place])
                    c2, c3 = np.uint64(rollouts_R[row]), last
                    k0, k1 = np.uint64(keys_R2[row, 0]), np.uint64(keys_R2[row, 1])
                    for _ in range(ROUNDS):
                        a, b = c0 * M0, c2 * M1
                        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & MASK, (a >> HALF) ^ c3 ^ k1, a & MASK
                        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
                    first[2 * block], first[2 * block + 1] = np.uint32(c0), np.uint32(c1)
                    second[2 * block], second[2 * block + 1] = np.uint32(c2), np.uint32(c3)
                for i in range(per_token):
                    kept[row, place, token, 0, i] = first16[i] >= lowest
                    kept[row, place, token, 1, i] = second16[i] >= lowest


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no writable folder for its cache
        return njit(nogil=True)(function)


decide = _compiled(_decide)
