"""`sampler=native`: noise of the size that the model itself predicts, where it has a Gaussian latent head.

Such a head gives every latent a mean and a standard deviation for each of its entries; the original CoLaR draws from
that Gaussian, its spread times a temperature. Without noise the latent is the mean.

Source: Tan et al. 2025 (arXiv 2505.16552); `LatentPolicy` and `latent_generate` of its code (`latent_temperature`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import bad_value, is_number
from latent_tts.sampler import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw


@dataclass(frozen=True)
class Native(Sampler):
    """Noise as large as the model's own spread times `temperature`.

    Attributes:
        temperature: 1 draws from the model's Gaussian, 0 is greedy.
    """

    temperature: float

    name: ClassVar[str] = "native"
    param: ClassVar[str | None] = "temperature"

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise bad_value("sampler.temperature", self.temperature, "a finite number, 0 or more")

    @property
    def value(self) -> float:
        """The parameter shown in tables."""
        return self.temperature

    @property
    def random_latents(self) -> bool:
        """True unless the temperature is 0."""
        return self.temperature > 0

    @property
    def only_latents(self) -> bool:
        """As long as it changes anything."""
        return self.random_latents

    @property
    def needs_spread(self) -> bool:
        """The model's own spread is what it draws with."""
        return True

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """`h + temperature * std * eps`, added in float32."""
        if self.temperature == 0:
            return h_RD
        assert draw.spread_RD is not None
        noise_RD = draw.normal(step, h_RD.shape[-1])
        return (h_RD.float() + self.temperature * draw.spread_RD.float() * noise_RD).to(h_RD.dtype)
