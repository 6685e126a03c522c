"""`scorer.positions=official`: position ids as the official script makes them, to repeat its published figures.

The official script gives the LatentRM the rollouts of a question as left-padded texts without position ids. So padding
shifts the positions of every row: by the length of the longest text of its group minus its own.

Source: ModalityDance/LatentTTS at 6657f20, src/infer_gpt2_rm.py.
"""

from __future__ import annotations

from collections.abc import Sequence


def position_offsets(text_tokens_GN: Sequence[Sequence[int]]) -> list[list[int]]:
    """What left padding to the longest text of its group adds to each row's position ids.

    Args:
        text_tokens_GN: tokens of each row's whole text (prompt, latents, end of thinking, answer), a list per group.
    """
    return [[max(group) - own for own in group] for group in text_tokens_GN]
