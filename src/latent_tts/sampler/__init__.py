"""What makes the rollouts of a question differ; one option of the group `sampler` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from latent_tts.types import Forward, Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw


class Sampler(Protocol):
    """What makes the rollouts of one question differ. Classes inherit these defaults: nothing random at all.

    Attributes:
        name, param: as tables show the sampler and its parameter.
    """

    name: ClassVar[str]
    param: ClassVar[str | None] = None

    @property
    def value(self) -> float | str | None:
        """The parameter's value, None where there is no parameter."""
        return None

    @property
    def random_phases(self) -> frozenset[Phase]:
        """Phases whose forward passes are random; they run once a rollout instead of once a question."""
        return frozenset()

    @property
    def random_latents(self) -> bool:
        """Whether latents of a question's rollouts may differ; a sampler whose own `latent` is not random denies it."""
        return type(self).latent is not Sampler.latent or bool(self.random_phases & {"prompt", "thoughts"})

    @property
    def random_answers(self) -> bool:
        """Whether answers to the same thoughts may differ."""
        return "answer" in self.random_phases or self.chooses_tokens

    @property
    def deterministic(self) -> bool:
        """Whether all rollouts of a question are the same, so that one is enough."""
        return not (self.random_latents or self.random_answers)

    @property
    def needs_donor(self) -> bool:
        """Whether it reads the latents of another question."""
        return False

    @property
    def chooses_tokens(self) -> bool:
        """Whether `token` is asked for answer tokens; otherwise they are those of the highest logits."""
        return False

    @property
    def needs_spread(self) -> bool:
        """Whether it reads the spread that the model's own latent head predicts."""
        return False

    @property
    def only_latents(self) -> bool:
        """Whether all that it changes are latents and the passes that make them, so that it takes a model with some."""
        return False

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """The latent (R, D) fed back in place of `h_RD`, the model's own; `step` counts from 0."""
        del draw, step
        return h_RD

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        """Factors (R, S, D) for the output of a site in a forward pass, or None for all ones."""
        del site, layer, draw, forward

    def token(self, logits_RV: Tensor, draw: Draw, step: int) -> Tensor:
        """Ids (R) of the next answer tokens; asked only where `chooses_tokens`."""
        del draw, step
        return logits_RV.argmax(-1)
