"""One visit to a piece of the LM head's logits in bfloat16: highest two, their tokens and the sum of exponentials."""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_tts.random.machine_code import F32, I32, array_at, compiled, exp, inlined, next_piece, numbers_at, wide

AT_ONCE = 32  # tokens whose logits are looked at twice: first for maxima, then for the sum, still in a core's cache


@inlined
def _visit(
    logits: Any,
    rows: int,
    first: int,
    last: int,
    start: int,
    highest: Any,
    second: Any,
    token: Any,
    second_token: Any,
    total: Any,
    before: Any,
) -> None:
    """Go on with the tokens from `start + first` to `start + last`; `before` is room to work in."""
    for begin in range(first, last, AT_ONCE):
        end = min(begin + AT_ONCE, last)
        for row in range(rows):
            before[row] = highest[row]
        for place in range(begin, end):
            name, logits_R = I32(start + place), logits[place]
            for row in range(rows):
                logit, high, low = wide(logits_R[row]), highest[row], second[row]
                is_first, is_second = logit > high, logit > low
                second[row] = high if is_first else (logit if is_second else low)
                second_token[row] = token[row] if is_first else (name if is_second else second_token[row])
                highest[row] = logit if is_first else high
                token[row] = name if is_first else token[row]
        for row in range(rows):
            total[row] *= exp(before[row] - highest[row])
        for place in range(begin, end):
            logits_R = logits[place]
            for row in range(rows):
                total[row] += exp(wide(logits_R[row]) - highest[row])


@compiled
def visit(pointer: Any) -> None:
    """Let G groups look at a G-th of the tokens each; a piece is a group, and goes on from what it has found before.

    Args:
        pointer: to pieces taken, G; P tokens; R rows; how wide W the groups' tensors are, at least R; the first token;
            then the addresses of
            logits (P, R), bfloat16;
            highest and second highest logit (G, W), float32, and their tokens (G, W), int32, the lowest of equal ones;
            total (G, W), float32: sum of exp(logit - highest).
    """
    numbers = numbers_at(pointer)
    groups, tokens, rows, room, start = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    logits = array_at(numbers[6], (tokens, rows), np.uint16)
    highest = array_at(numbers[7], (groups, room), np.float32)
    second = array_at(numbers[8], (groups, room), np.float32)
    token = array_at(numbers[9], (groups, room), np.int32)
    second_token = array_at(numbers[10], (groups, room), np.int32)
    total = array_at(numbers[11], (groups, room), np.float32)
    before = np.full(rows, F32(0))
    while True:
        group = next_piece(pointer)
        if group >= groups:
            return
        first, last = tokens * group // groups, tokens * (group + 1) // groups
        _visit(
            *(logits, rows, first, last, start, highest[group], second[group], token[group], second_token[group]),
            *(total[group], before),
        )
