"""`budget=fixed`: report at n alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.budget import Budget


@dataclass(frozen=True)
class Fixed(Budget):
    """Reports at n alone."""

    name: ClassVar[str] = "fixed"
