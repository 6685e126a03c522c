"""`sampler=dropout`: Monte Carlo dropout, that is dropout switched on at test time.

Source: You et al. (arXiv 2510.07745), section 3; ModalityDance/LatentTTS at 6657f20 for the `residual` sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import check_fields, require
from latent_tts.sampler import Sampler
from latent_tts.types import PHASES, Forward, Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw, DropPlace

SITES: dict[str, tuple[Site, ...]] = {
    "ffn": ("ffn",),
    "residual": ("attention", "ffn"),
    "residual_embedding": ("embedding", "attention", "ffn"),
}
BRANCH: dict[Site, int] = {"embedding": 0, "attention": 1, "ffn": 2}


@dataclass(frozen=True)
class Dropout(Sampler):
    """Dropout with rate `rate`; kept values are scaled by 1 / (1 - rate).

    Attributes:
        rate: share of dropped values, in [0, 1), rounded to 1/65536; 0 is greedy.
        site: `ffn` after the feed-forward of each block (the paper), `residual` both residual branches (the official
            evaluation), `residual_embedding` also the embedding (the official annotation and best-of-N).
        where: the forward passes with dropout: a list of `prompt`, `thoughts`, `answer`. `thoughts` are the T passes
            that compute h_1..h_T, beginning with the last prompt token; `prompt` are the tokens before it.
        mask: `fresh` (new masks in every forward pass) or `locked` (one mask for all passes and tokens of a rollout).
    """

    rate: float
    site: str
    where: Sequence[Phase]
    mask: str

    name: ClassVar[str] = "dropout"
    param: ClassVar[str | None] = "rate"

    def __post_init__(self) -> None:
        check_fields("sampler", self, rate="a number in [0, 1)", site=SITES, mask=("fresh", "locked"))
        require(
            "sampler.where",
            self.where,
            not isinstance(self.where, str)
            and isinstance(self.where, Sequence)
            and bool(self.where)
            and all(phase in PHASES for phase in self.where),
            f"must be a list of {', '.join(PHASES)}",
        )

    @property
    def random_phases(self) -> frozenset[Phase]:
        """The phases in `where`; none if the rate is 0."""
        return frozenset(self.where) if self._threshold else frozenset()

    @cached_property
    def _threshold(self) -> int:
        return min(round(self.rate * 65536), 65535)

    def dropout(self, site: Site, layer: int, forward: Forward) -> DropPlace | None:
        """The place of a site; None where there is no dropout."""
        if site not in SITES[self.site] or forward.phase not in self.random_phases:
            return None
        from latent_tts.random.draw import DropPlace

        if self.mask == "locked":
            return DropPlace(code_of(site, layer), 0, 1, self._threshold)
        step = forward.step + (0 if forward.phase == "prompt" else 1)
        return DropPlace(code_of(site, layer), step, forward.tokens, self._threshold)

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        """Factors (R, S, D): 0 with probability `rate`, else 1 / (1 - rate); None where there is no dropout."""
        place = self.dropout(site, layer, forward)
        if place is None:
            return None
        import torch

        expected = masked_codes(self.site, draw.blocks)
        kept = draw.keep(place.layer, place.step, place.tokens, draw.width, place.threshold, expected=expected)
        # torch converts bytes to floats several times faster than booleans
        return kept.view(torch.uint8).to(torch.float32).mul_(65536 / (65536 - place.threshold))


def code_of(site: Site, layer: int) -> int:
    """The layer code that keys the random numbers of a site in a block."""
    return layer * len(BRANCH) + BRANCH[site]


@cache
def masked_codes(site: str, blocks: int) -> tuple[int, ...]:
    """The layer codes of all places that `site` stands for in a model of `blocks` blocks, in the order of a pass."""
    return tuple(
        code_of(name, layer) for layer in range(blocks) for name in SITES[site] if name != "embedding" or layer == 0
    )
