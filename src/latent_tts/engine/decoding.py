"""How answer tokens are chosen: the most probable one, or drawn. Every sampler of latents can be combined with it.

Each answer token takes one random number, keyed by (seed, question, rollout, step), which is looked up in the
cumulative distribution over token ids. So a draw depends on no other row, and stays the same where rounding swaps two
nearly equal logits. (A Gumbel draw would take a number for every entry of the vocabulary.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from latent_tts.errors import check_fields, require
from latent_tts.sampler import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw


@dataclass(frozen=True)
class AnswerSampling:
    """The keys `answer.temperature` and `answer.top_p`.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: a token is drawn from the fewest most probable ones whose shares add up to this, in (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields("answer", self, temperature="a finite number, 0 or more", top_p="a number in (0, 1]")
        allowed = "must be 1 with answer.temperature=0, which takes the most probable token anyway"
        require("answer.top_p", self.top_p, self.random or self.top_p == 1, allowed)

    @property
    def random(self) -> bool:
        """Whether answers are drawn."""
        return self.temperature > 0

    @property
    def settings(self) -> dict[str, float]:
        """What the cache key holds; empty where nothing is drawn."""
        return {"temperature": float(self.temperature), "top_p": float(self.top_p)} if self.random else {}

    def over(self, sampler: Sampler) -> Sampler:
        """The sampler, with answer tokens chosen in this way."""
        return cast(Sampler, SampledAnswers(sampler, self)) if self.random else sampler


class SampledAnswers:
    """A sampler whose answer tokens are drawn; all else is as the sampler of latents says.

    Attributes:
        latents: makes the latents, and masks forward passes.
        sampling: how tokens are drawn.
    """

    random_answers = chooses_tokens = True
    deterministic = only_latents = False

    def __init__(self, latents: Sampler, sampling: AnswerSampling) -> None:
        self.latents, self.sampling = latents, sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self.latents, name)

    def __repr__(self) -> str:
        return f"{self.sampling} over {self.latents}"

    def token(self, logits_RV: Tensor, draw: Draw, step: int) -> Tensor:
        """Ids (R) drawn from softmax(logits / temperature), cut to its nucleus.

        Args:
            logits_RV: of the model, float32.
            draw: random numbers of the same R rows.
            step: T plus the number of answer tokens so far.
        """
        import torch

        assert len(logits_RV) == len(draw.rollouts_R), "random numbers of other rows"
        temperature = max(self.sampling.temperature, torch.finfo(torch.float32).tiny)  # a smaller one is 0 in float32
        weight_RV = ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature).exp()
        if self.sampling.top_p < 1:
            weight_RV = weight_RV * in_nucleus(weight_RV, self.sampling.top_p)
        cumulative_RV = weight_RV.double().cumsum(-1)
        wanted_R1 = (draw.uniform(step) * cumulative_RV[:, -1])[:, None]
        return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0]


def in_nucleus(weight_RV: Tensor, top_p: float) -> Tensor:
    """Whether each token is in the smallest set of the heaviest ones that reaches the share `top_p` (R, V).

    It has at least one member; of equally heavy ones the lower ids come first.

    Source: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    order_RV = weight_RV.argsort(dim=-1, descending=True, stable=True)
    sorted_RV = weight_RV.gather(-1, order_RV).double()
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    kept_RV = before_RV < top_p * sorted_RV.sum(-1, keepdim=True)
    kept_RV[:, 0] = True
    return kept_RV.scatter(-1, order_RV, kept_RV)
