"""`search=independent`: n rollouts that know nothing of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Independent:
    """Every rollout is grown to its end."""

    name: ClassVar[str] = "independent"
