"""How rollouts of a question are made to differ; one option of the group `sampler` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from latent_tts.types import Forward, Phase, Site

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw, DropPlace


class Sampler(Protocol):
    """How rollouts of a question are made to differ. Options inherit these defaults, under which nothing is random.

    Attributes:
        name: as shown in tables.
        param: the field that tables show as its parameter; None if there is none.
        chooses_tokens: whether `token` chooses the answer tokens; otherwise the highest logit does.
        needs_spread: whether it reads the standard deviations that the model's latent head predicts.
    """

    name: ClassVar[str]
    param: ClassVar[str | None] = None
    chooses_tokens: ClassVar[bool] = False
    needs_spread: ClassVar[bool] = False

    @property
    def value(self) -> float | str | None:
        """The value of the parameter; None if there is no parameter."""
        return getattr(self, self.param) if self.param else None

    @property
    def random_phases(self) -> frozenset[Phase]:
        """Phases whose forward passes are random; they run once per rollout instead of once per question."""
        return frozenset()

    @property
    def random_latents(self) -> bool:
        """Whether latents may differ between rollouts of a question; override it if `latent` is not random."""
        return type(self).latent is not Sampler.latent or bool(self.random_phases & {"prompt", "thoughts"})

    @property
    def random_answers(self) -> bool:
        """Whether answers may differ although the latents are the same."""
        return "answer" in self.random_phases or self.chooses_tokens

    @property
    def deterministic(self) -> bool:
        """Whether all rollouts of a question are the same, so that one rollout is enough."""
        return not (self.random_latents or self.random_answers)

    @property
    def needs_donor(self) -> bool:
        """Whether it reads the latents of another question."""
        return False

    @property
    def only_latents(self) -> bool:
        """Whether it changes only latents and the passes that compute them, so that it needs a model with latents."""
        return self.random_latents and self.random_phases <= {"thoughts"} and not self.chooses_tokens

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """The latent (R, D) that is fed back instead of the model's own `h_RD`; `step` counts from 0."""
        return h_RD

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        """Factors (R, S, D) that multiply the output of a site in a forward pass; None for all ones."""

    def dropout(self, site: Site, layer: int, forward: Forward) -> DropPlace | None:
        """What `factors` are if they are those of dropout: a GPU draws them where it multiplies; None otherwise."""

    def token(self, logits_RV: Tensor, draw: Draw, step: int) -> Tensor:
        """Ids (R) of the next answer tokens; called only if `chooses_tokens`."""
        return logits_RV.argmax(-1)
