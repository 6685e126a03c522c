"""What `ltts probe` tries, checked before a model loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError, require
from latent_tts.schedule.speculative import Speculative

GUESSES = ("token", "zero", "draft")


def schedules_to_try(
    guesses: Sequence[str] | None,
    tolerances: Sequence[float],
    draft: str | None,
    mixing: int,
    adapter: CheckpointAdapter,
) -> list[Speculative]:
    """Schedules with all latents in one chunk, one for each guess and tolerance.

    Args:
        guesses: what latents are before they are computed; None for all that the model can make.
        tolerances: see `Speculative`.
        draft: the file of a draft head; None without one.
        mixing: see `Speculative`.
        adapter: the model.

    Raises:
        UsageError: a value is not usable, or not with this model.
    """
    schedules = [
        Speculative(None, float(tolerance), guess, draft if guess == "draft" else None, mixing)
        for guess in chosen_guesses(guesses, draft, adapter)
        for tolerance in tolerances
    ]
    for schedule in schedules:
        schedule.check(adapter)
    return schedules


def chunks_to_try(chunks: Sequence[int] | None, schedule: Speculative, adapter: CheckpointAdapter) -> list[int]:
    """Chunks to try with the best schedule: those given, or half and a quarter of the latents.

    Raises:
        UsageError: one is not usable with this model.
    """
    if chunks is None:
        return [chunk for chunk in (adapter.latents // 2, adapter.latents // 4) if chunk > 1]
    for chunk in chunks:
        replace(schedule, chunk=chunk).check(adapter)
    return list(chunks)


def chosen_guesses(given: Sequence[str] | None, draft: str | None, adapter: CheckpointAdapter) -> list[str]:
    """The guesses given, or all that the model has a token or a draft head for.

    Raises:
        UsageError: they are none of a probe's, or a draft head is given for no guess.
    """
    if given is None:
        return [*(["token"] if _has_latent_token(adapter) else []), "zero", *(["draft"] if draft else [])]
    allowed = ", ".join(GUESSES)
    require("guesses", "[]", len(given) > 0, f"must be a list of {allowed}")
    require(
        "guesses", list(given), set(given) <= set(GUESSES), f"must be of {allowed}: a probe has no sibling rollouts"
    )
    require("draft", draft, draft is None or "draft" in given, "must be null where draft is none of guesses")
    return list(dict.fromkeys(given))


def _has_latent_token(adapter: CheckpointAdapter) -> bool:
    try:
        _ = adapter.latent_id
    except UsageError:
        return False
    return True
