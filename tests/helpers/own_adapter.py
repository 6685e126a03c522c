"""An adapter as a user writes one."""

from dataclasses import dataclass

from latent_tts.model.coconut import Coconut


@dataclass(frozen=True)
class Soft(Coconut):
    """An adapter with a field of its own, and one that JSON does not know."""

    softness: float = 0.5
    table: object = None
