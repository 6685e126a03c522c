"""`search=beam`: beam search over latents, guided by a LatentRM.

The paper describes such a search, but the official repository does not contain one, so this definition is our own. The
root of a question is its prompt. At step t each beam is expanded to `candidates` continuations: its next latent is
computed `candidates` times, with random numbers keyed by (lineage of the beam, t, candidate). The first step expands
the root to all n = beams * candidates at once. A prefix is ranked by its cumulative score, the LatentRM's step scores
so far reduced by `scorer.reduce`. The `beams` best survive; ties go to the lower index (children of better parents come
first). With `diverse` each beam keeps the best of its own candidates, so that subtrees never merge (as in DVTS). After
the last step the survivors decode their answers; they are the rollouts of the question, best first. A row whose
thinking was ended by a token has only itself as continuation.

Every step runs n rows per question, so the latents cost as much as those of n independent rollouts.

Source: You et al. (arXiv 2510.07745), section 4, for the idea; Beeching et al. 2024 ("Scaling test-time compute") for
the diverse variant; the rest is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import check_fields, require
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.search import Search

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.engine.packing import RolloutJob
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer
    from latent_tts.sampler import Sampler
    from latent_tts.scorer.latent_rm import LatentRM


@dataclass(frozen=True)
class Beam(Search):
    """Beam search over latents.

    Attributes:
        beams: number of prefixes kept after every step.
        candidates: number of continuations of each.
        diverse: keep the best candidate of each beam instead of the best of all beams.
    """

    beams: int
    candidates: int
    diverse: bool

    name: ClassVar[str] = "beam"

    def __post_init__(self) -> None:
        check_fields(
            "search", self, beams="a positive integer", candidates="a positive integer", diverse="true or false"
        )

    @property
    def survivors(self) -> int:
        """Number of rollouts per question at the end."""
        return self.beams

    @property
    def rows_per_survivor(self) -> int:
        """Number of candidates per beam."""
        return self.candidates

    def check(self, n: int, sampler: Sampler, scorer: LatentRM | None) -> None:
        """Check that the search works with n, the sampler and the scorer.

        Raises:
            UsageError: the scorer needs answers, n is not beams * candidates, or the sampler gives all continuations of
                a prefix the same latents.
        """
        positions = "correct" if scorer is None else scorer.positions
        allowed = "must be correct: search=beam scores before there are answers"
        require("scorer.positions", positions, positions == "correct", allowed)
        require(
            "sampler",
            sampler.name,
            sampler.random_latents and sampler.random_phases & {"prompt", "thoughts"} != {"prompt"},
            "must make the continuations of a beam differ: gaussian, or dropout with thoughts in sampler.where",
        )
        require(
            "sampler.mask",
            "locked",
            getattr(sampler, "mask", "fresh") == "fresh",
            "must be fresh: with locked masks all continuations of a beam are the same",
        )
        product = self.beams * self.candidates
        require(
            "n",
            n,
            product == n,
            f"must be search.beams * search.candidates = {self.beams} * {self.candidates} = {product}",
        )

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
        """Search the questions of a batch; see `Search.roll`.

        Args:
            engine: the loaded reasoner.
            batch: questions with `beams` rollouts each, numbered by the rank of the surviving beams.
            sampler: how candidates are made to differ.
            seed: of the run.
            scorer: the loaded LatentRM.
            reduction: how step scores are reduced to the score of a prefix: `sum`, `mean` or `last`.
            answers: whether the survivors decode their answers.

        Raises:
            RunError: a step score is not finite.
        """
        assert scorer is not None, "no scorer"
        assert reduction is not None, "no reduction"
        import torch

        from latent_tts.engine.packing import require_finite
        from latent_tts.engine.rollout import RolloutState
        from latent_tts.engine.sites import SiteHooks
        from latent_tts.random.draw import Draw

        prompts, ids = [job.prompt for job in batch], [job.question_id for job in batch]
        questions, n, device = len(batch), self.beams * self.candidates, engine.device
        keys = torch.tensor([key_of(seed, f"{question_id} beams") for question_id in ids], device=device)
        first_row_Q1 = n * torch.arange(questions, device=device)[:, None]

        def draw_of(lineages_QC: Tensor) -> Draw:
            keys_R2 = keys.repeat_interleave(lineages_QC.shape[1], 0)
            return Draw(keys_R2, lineages_QC.flatten(), engine.width, engine.blocks)

        with torch.inference_mode(), SiteHooks(engine.lm, sampler) as hooks:
            candidate_C = torch.arange(n, device=device)
            lineages_QC = children(torch.zeros(questions, n, dtype=torch.long, device=device), 0, candidate_C)
            kept_QB = candidate_C.expand(questions, n)
            rollouts = RolloutState.start(engine, prompts, draw_of(lineages_QC), hooks)
            scores = scorer.open(prompts, n, rollouts.total)
            so_far_RT = torch.full((questions * n, rollouts.total), float("nan"), dtype=torch.float64, device=device)
            finite_R = torch.ones(questions * n, dtype=torch.bool, device=device)
            for step in range(rollouts.total):
                if step:
                    parents_QC = kept_QB.repeat_interleave(self.candidates, 1)
                    lineages_QC = children(lineages_QC.gather(1, parents_QC), step, candidate_C % self.candidates)
                    rows = (first_row_Q1 + parents_QC).flatten()
                    rollouts, scores = rollouts.fork(rows, draw_of(lineages_QC)), scores.fork(rows)
                    so_far_RT = so_far_RT[rows]
                score_R = scorer.extend(scores, rollouts.advance()[:, None])[:, 0].to(device)
                alive_R = torch.ones_like(finite_R) if rollouts.thinking_R is None else rollouts.thinking_R
                finite_R &= score_R.isfinite() | ~alive_R
                so_far_RT[:, step] = score_R.masked_fill(~alive_R, float("nan"))
                rank_QC = prefix_scores(so_far_RT.view(questions, n, -1), reduction)
                kept_QB = self._best(rank_QC, alive_R.view(questions, n) if step else None)
            rows = (first_row_Q1 + kept_QB).flatten()
            rollouts = rollouts.fork(rows, draw_of(lineages_QC.gather(1, kept_QB)))
            finite_Q = finite_R.view(questions, n).all(1)
            require_finite("step scores", finite_Q, ids, scorer.backbone.dtype, "drawing rollouts")
            return rollouts.decode_answers() if answers else rollouts.finish()

    def _best(self, rank_QC: Tensor, alive_QC: Tensor | None) -> Tensor:
        """Indices of the surviving candidates (Q, beams), best first; a tie goes to the lower index.

        Args:
            rank_QC: their scores (Q, C).
            alive_QC: whether they still think (Q, C); None where no two of a beam are the same.
        """
        if alive_QC is not None:
            rank_QC = rank_QC.masked_fill(copies(~alive_QC, self.candidates), float("-inf"))
        if not self.diverse:
            return rank_QC.argsort(dim=1, descending=True, stable=True)[:, : self.beams]
        import torch

        groups = rank_QC.view(len(rank_QC), self.beams, self.candidates)
        best_QB = groups.argsort(dim=2, descending=True, stable=True)[..., 0]
        survivors = best_QB + torch.arange(self.beams, device=rank_QC.device) * self.candidates
        order = rank_QC.gather(1, survivors).argsort(dim=1, descending=True, stable=True)
        return survivors.gather(1, order)


def copies(stopped_QC: Tensor, candidates: int) -> Tensor:
    """Whether a candidate (Q, C) has the latents of an earlier one of its beam: all that have stopped are the same."""
    stopped_QBc = stopped_QC.unflatten(1, (-1, candidates))
    return (stopped_QBc & (stopped_QBc.cumsum(-1) > 1)).flatten(1)


def children(parents_QC: Tensor, step: int, candidate_C: Tensor) -> Tensor:
    """Lineages of continuations: 32-bit codes, each a hash of (lineage of the parent, step, candidate).

    They take the place of rollout numbers. Two prefixes of the same step have the same code, and so the same
    continuation, with probability 2**-32.
    """
    counter = parents_QC, step, candidate_C.expand_as(parents_QC), int(Stream.LINEAGE)
    return philox(counter, key_of(0, "lineages"))[0]


def prefix_scores(step_scores_QCT: Tensor, reduction: str) -> Tensor:
    """Scores (Q, C) of prefixes from step scores (NaN at steps that a row does not have); -inf without any step."""
    has = ~step_scores_QCT.isnan()
    count_QC = has.sum(-1)
    if reduction == "last":
        last = step_scores_QCT.gather(-1, (count_QC - 1).clamp(min=0)[..., None])[..., 0]
    else:
        last = step_scores_QCT.nansum(-1)
        if reduction == "mean":
            last = last / count_QC.clamp(min=1)
    return last.masked_fill(count_QC == 0, float("-inf"))
