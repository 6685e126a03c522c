"""`search=independent`: n independent rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from latent_tts.sampler import Sampler
from latent_tts.sampler.greedy import Greedy
from latent_tts.search import Search

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.engine.packing import RolloutJob
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer


@dataclass(frozen=True)
class Independent(Search):
    """Draws every rollout independently of the others."""

    name: ClassVar[str] = "independent"

    def roll(
        self,
        engine: Engine,
        batch: Sequence[RolloutJob],
        sampler: Sampler,
        seed: int,
        *,
        scorer: LatentScorer | None = None,
        reduction: str | None = None,
        answers: bool = True,
    ) -> Rollouts:
        """Draw the rollouts of a batch; see `Search.roll`."""
        import torch

        from latent_tts.random.draw import Draw

        numbers_QN = torch.tensor([list(job.rollouts) for job in batch], device=engine.device)
        draw = Draw.of(seed, [job.question_id for job in batch], numbers_QN, engine.width, engine.blocks)
        donor_RTD = _donor_latents(engine, batch) if sampler.needs_donor else None
        return engine.roll([job.prompt for job in batch], draw, sampler, donor_RTD=donor_RTD, answers=answers)


def _donor_latents(engine: Engine, batch: Sequence[RolloutJob]) -> Tensor:
    """The greedy latents (R, T, D) of the donors' prompts; always T each, since a stop token is ignored."""
    import torch

    from latent_tts.engine.rollout import Engine
    from latent_tts.random.draw import Draw

    prompts = [job.donor for job in batch if job.donor is not None]
    assert len(prompts) == len(batch), "a job without a donor"
    draw = Draw.of(0, [job.row_key for job in batch], torch.zeros(len(batch), 1, dtype=torch.long), engine.width)
    donor = Engine(engine.reasoner, replace(engine.plan, stop_id=None, exit=None), engine.draft)
    latents_QTD = donor.roll(prompts, draw, Greedy(), answers=False).latents_RTD
    return latents_QTD.to(engine.device, engine.lm.dtype).repeat_interleave(len(batch[0].rollouts), 0)
