"""What `ltts annotate` makes of a question: rollouts with step-wise labels, or the reason why it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from latent_tts.types import Bools

Reason = Literal["all_correct", "all_wrong"]
Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Annotated:
    """A question whose rollouts are labelled.

    Attributes:
        question_id: as in `types.Question`.
        index: place of the question among the annotated run's questions, from 0.
        input_ids_NL: prompt, latent ids and end-of-thinking ids of each rollout; see `written_ids`.
        latents_NTD: the latents that were fed back; zeros where a rollout has no such step.
        labels_NT: share in [0, 1] of completions from each prefix that are right; NaN where there is no such step.
        corrects_N: whether each rollout's own answer is right.
    """

    question_id: str
    index: int
    input_ids_NL: Int64
    latents_NTD: Float32
    labels_NT: Float32
    corrects_N: Bools

    def prompt_ids(self, latent_id: int, pad_id: int | None = None) -> list[int]:
        """The prompt: what stands before the first latent id, without padding on the left."""
        rows = self.input_ids_NL.tolist()
        row = next((row[: row.index(latent_id)] for row in rows if latent_id in row), rows[0])
        start = next((place for place, token in enumerate(row) if token != pad_id), len(row))
        return row[start:]


@dataclass(frozen=True)
class Dropped:
    """A question that is left out, since its rollouts are all right or all wrong.

    Attributes:
        question_id, index: as in `Annotated`.
        reason: `all_correct` or `all_wrong`.
        rollouts: how many were drawn.
    """

    question_id: str
    index: int
    reason: Reason
    rollouts: int


def written_ids(
    prompt: Sequence[int], steps_N: Sequence[int], latent_id: int, end_ids: Sequence[int], pad_id: int
) -> Int64:
    """`input_ids` (N, L) of rollouts with `steps_N` latents each, padded on the right."""
    rows = [[*prompt, *[latent_id] * steps, *end_ids] for steps in steps_N]
    width = max(map(len, rows))
    return np.array([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=np.int64)


def wrong_shapes(shapes: Sequence[tuple[int, ...]], wanted: int | None) -> str | None:
    """What is wrong with the shapes of an entry's ids, latents, labels and outcomes."""
    ids, latents, labels, corrects = shapes
    if len(latents) != 3 or 0 in latents:
        return f"latent_embeds is {latents}, (rollouts, latents, width) is wanted"
    n, steps, width = latents
    if wanted not in (None, width):
        return f"latent_embeds has width {width}, {wanted} is wanted"
    if labels != (n, steps):
        return f"estimations is {labels}, latent_embeds {latents}"
    if corrects != (n,):
        return f"corrects is {corrects}, for {n} rollouts"
    if len(ids) != 2 or ids[0] != n:
        return f"input_ids is {ids}, for {n} rollouts"
    return None


def wrong_values(entry: Annotated) -> str | None:
    """What is wrong with the numbers of an entry."""
    if not np.isfinite(entry.latents_NTD).all():
        return "latent_embeds is not finite"
    has_step_NT = ~np.isnan(entry.labels_NT)
    if (has_step_NT[:, 1:] & ~has_step_NT[:, :-1]).any():
        return "estimations has a step after one that is missing"
    if not ((entry.labels_NT >= 0) & (entry.labels_NT <= 1))[has_step_NT].all():
        return "estimations has labels outside of [0, 1]"
    return None
