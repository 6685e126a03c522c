"""`sampler=gaussian`: additive Gaussian noise on every latent that is fed back.

Source: You et al. (arXiv 2510.07745), section 3: h_t + eps, eps ~ N(0, sigma^2 I), independent over steps and rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import check_fields
from latent_tts.sampler import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw


@dataclass(frozen=True)
class Gaussian(Sampler):
    """Noise with standard deviation `sigma`.

    Attributes:
        sigma: in units of the latents, 0 or more; 0 is greedy.
        relative: `sigma` is in units of the root mean square of each latent instead.
    """

    sigma: float
    relative: bool

    name: ClassVar[str] = "gaussian"
    param: ClassVar[str | None] = "sigma"

    def __post_init__(self) -> None:
        check_fields("sampler", self, sigma="a finite number, 0 or more", relative="true or false")

    @property
    def random_latents(self) -> bool:
        """True unless sigma is 0."""
        return self.sigma > 0

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """`h + sigma * eps`, added in float32."""
        if self.sigma == 0:
            return h_RD
        h = h_RD.float()
        scale = self.sigma * h.square().mean(-1, keepdim=True).sqrt() if self.relative else self.sigma
        return (h + scale * draw.normal(step, h.shape[-1])).to(h_RD.dtype)
