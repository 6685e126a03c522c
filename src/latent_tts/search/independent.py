"""`search=independent`: n rollouts that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from latent_tts.sampler import Sampler
from latent_tts.sampler.greedy import Greedy
from latent_tts.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.engine.packing import Job
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer


@dataclass(frozen=True)
class Independent:
    """Every rollout is grown to its end."""

    name: ClassVar[str] = "independent"
    guided: ClassVar[bool] = False
    rows_per_survivor: ClassVar[int] = 1
    survivors: ClassVar[int | None] = None

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Nothing to check: it can always be run."""

    def roll(
        self,
        engine: Engine,
        batch: Sequence[Job],
        sampler: Sampler,
        seed: int,
        *,
        scorer: LatentScorer | None = None,
        reduction: str | None = None,
        answers: bool = True,
    ) -> Rollouts:
        """Draw the rollouts of a batch; arguments as in `Search.roll`."""
        import torch

        from latent_tts.random.draw import Draw

        del scorer, reduction
        numbers_QN = torch.tensor([job.rollouts for job in batch], device=engine.device)
        draw = Draw.of(seed, [job.question_id for job in batch], numbers_QN, engine.width, engine.blocks)
        donor = donor_latents(batch, engine, numbers_QN.shape[1]) if sampler.needs_donor else None
        make = engine.roll if answers else engine.think
        return make([job.prompt for job in batch], draw, sampler, donor_RTD=donor)


def donor_latents(batch: Sequence[Job], engine: Engine, rollouts: int) -> Tensor:
    """The greedy latents (R, T, D) of the donors' prompts."""
    import torch

    from latent_tts.engine.rollout import Engine
    from latent_tts.random.draw import Draw

    prompts = [job.donor for job in batch]
    assert all(prompt is not None for prompt in prompts)
    draw = Draw.of(0, [job.row_key for job in batch], torch.zeros(len(batch), 1, dtype=torch.long), engine.width)
    thinker = Engine(engine.reasoner, replace(engine.plan, stop_id=None))
    latents = thinker.think(prompts, draw, Greedy()).latents_RTD  # type: ignore[arg-type]
    return latents.to(engine.device, engine.lm.dtype).repeat_interleave(rollouts, 0)
