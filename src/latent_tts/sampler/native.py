"""`sampler=native`: Gaussian noise with the standard deviation that the model's own latent head predicts.

Such a head predicts a mean and a standard deviation for each element of a latent. The original CoLaR draws latents from
this Gaussian, with the standard deviation times a temperature. Without noise the latent is the mean.

Source: Tan et al. 2025 (arXiv 2505.16552); `LatentPolicy` and `latent_generate` of its code (`latent_temperature`).
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
class Native(Sampler):
    """Noise with the predicted standard deviation times `temperature`.

    Attributes:
        temperature: 0 or more; 1 draws from the model's Gaussian, 0 is greedy.
    """

    temperature: float

    name: ClassVar[str] = "native"
    param: ClassVar[str | None] = "temperature"
    needs_spread: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields("sampler", self, temperature="a finite number, 0 or more")

    @property
    def random_latents(self) -> bool:
        """True unless the temperature is 0."""
        return self.temperature > 0

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """`h + temperature * std * eps`, added in float32."""
        if self.temperature == 0:
            return h_RD
        assert draw.spread_RD is not None
        noise_RD = draw.normal(step, h_RD.shape[-1])
        return (h_RD.float() + self.temperature * draw.spread_RD.float() * noise_RD).to(h_RD.dtype)
