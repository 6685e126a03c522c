"""`sampler=greedy`: nothing is random; one rollout per question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.sampler import Sampler


@dataclass(frozen=True)
class Greedy(Sampler):
    """Leaves the model unchanged."""

    name: ClassVar[str] = "greedy"
