"""Philox-4x32-10, the one source of randomness: a pure function from (counter, key) to 128 random bits.

The same code runs on Python integers, NumPy int64 arrays and torch int64 tensors on any device, because it uses only
`*`, `+`, `>>`, `&` and `^`; so the integers are equal everywhere. This module imports neither library; `draw.py` turns
the words into normals and masks.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 constants and test vectors).
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Any

MASK32 = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


class Stream(IntEnum):
    """The use of a random number; no two uses share numbers."""

    LATENT_NOISE = 0
    DROPOUT = 1
    TOKEN = 2
    SUBSET = 3
    PROBLEM = 5
    TRAINING = 6
    LINEAGE = 7


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The 64-bit Philox key of a (seed, name) pair as two 32-bit words; `name` is a question id or names a use."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four words in [0, 2**32): all integers, or int64 arrays/tensors of one dimension or more that
            broadcast, where words 1 and 3, and word 2 if it is 0, may also be integers.
        key: two words, integers or arrays as in `counter`.

    Returns:
        Four words in [0, 2**32) of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(ROUNDS):
        # A signed 64-bit product wraps, but its bits are the unsigned product's; the mask after `>>` removes the sign.
        # Products stay unmasked as the next round's words 1 and 3, since those are only xored and masked later.
        if round_ < 4:  # words may still be smaller than the broadcast shape, so not in place
            c0, c2 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
            c1, c3 = ((c2 >> 32) ^ c1 ^ k0) & MASK32, ((c0 >> 32) ^ c3 ^ k1) & MASK32
        else:
            c0 *= MULTIPLIER_0
            c2 *= MULTIPLIER_1
            c1 ^= k0
            c1 ^= c2 >> 32
            c1 &= MASK32
            c3 ^= k1
            c3 ^= c0 >> 32
            c3 &= MASK32
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


class Dice:
    """Integers drawn one after another from the counter (stream, item), for Python code that needs few numbers."""

    def __init__(self, key: tuple[int, int], stream: Stream, item: int) -> None:
        self._key, self._stream, self._item = key, stream, item
        self._block = 0
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound); its modulo bias is below bound / 2**32."""
        if not self._words:
            low, high = self._item & MASK32, self._item >> 32
            self._words = list(philox((self._block, low, high, int(self._stream)), self._key))
            self._block += 1
        return self._words.pop() % bound

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high]."""
        return low + self.below(high - low + 1)

    def pick(self, options: Any) -> Any:
        """A uniform element of a non-empty sequence."""
        return options[self.below(len(options))]
