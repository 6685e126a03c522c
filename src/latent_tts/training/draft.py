"""Training of draft heads, on rollouts that are drawn for each update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from latent_tts.engine.draft import DraftHead
from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.engine.sites import SiteHooks
from latent_tts.errors import RunError
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.types import Question

VALID_BATCH, WARMUP = 64, 20


@dataclass(frozen=True)
class LatentBatch:
    """The latents of rollouts, and the states of their prompts.

    Attributes:
        latents_RTD: h_1..h_T, zeros where a row has fewer.
        steps_R: how many each has.
        prompt_RLD, lengths_R: see `RolloutState.prompt_states`.
    """

    latents_RTD: Tensor
    steps_R: Tensor
    prompt_RLD: Tensor
    lengths_R: Tensor

    @property
    def present_RS(self) -> Tensor:
        """Which of h_2..h_T a row has."""
        return torch.arange(1, self.latents_RTD.shape[1], device=self.steps_R.device) < self.steps_R[:, None]

    def errors(self, head: DraftHead) -> Tensor:
        """Squared relative error (R, S) of each prediction of h_2..h_T; 0 where a row has no such latent."""
        wanted_RSD = self.latents_RTD[:, 1:].float()
        predicted_RSD = head(self.latents_RTD[:, 0], self.prompt_RLD, self.lengths_R)
        difference_RS = (predicted_RSD - wanted_RSD).square().sum(-1)
        size_RS = wanted_RSD.square().sum(-1)
        return torch.where(self.present_RS, difference_RS / size_RS.where(self.present_RS, 1.0), 0.0)


class LatentDrawer:
    """Draws one rollout of each question, as far as its latents."""

    def __init__(self, engine: Engine, encode: Callable[[Question], list[int]], sampler: Sampler, seed: int) -> None:
        self.engine, self.encode, self.sampler, self.seed = engine, encode, sampler, seed

    @torch.no_grad()
    def draw(self, questions: Sequence[Question]) -> LatentBatch:
        """The latents of a batch."""
        engine = self.engine
        numbers_Q1 = torch.zeros(len(questions), 1, dtype=torch.long, device=engine.device)
        draw = Draw.of(self.seed, [each.id for each in questions], numbers_Q1, engine.width, engine.blocks)
        with SiteHooks(engine.lm, self.sampler) as hooks:
            state = RolloutState.start(engine, list(map(self.encode, questions)), draw, hooks, keep_states=True)
            state.make_latents()
        return LatentBatch(state.latents_RTD, state.steps_R, *state.prompt_states())


def train_draft(
    drawer: LatentDrawer,
    stream: Iterator[Question],
    *,
    updates: int,
    batch: int,
    lr: float,
    seed: int,
    report: Callable[[int, float], None],
) -> DraftHead:
    """Train a draft head on the squared relative errors of its predictions.

    Args:
        drawer: draws the latents.
        stream: endless training questions.
        updates: number of updates by AdamW; the learning rate warms up linearly, then falls by a cosine.
        batch: questions per update.
        lr: the highest learning rate.
        seed: seed of the initial weights.
        report: called with the number of updates and the loss after each.

    Raises:
        RunError: the loss is not finite.
    """
    engine = drawer.engine
    torch.manual_seed(seed)
    head = DraftHead(engine.plan.latents, engine.width).to(engine.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)

    def rate(done: int) -> float:
        return min((done + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done / updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for done in range(updates):
        thoughts = drawer.draw(list(islice(stream, batch)))
        if done == 0:
            _standardize(head, thoughts)
        loss = thoughts.errors(head).sum() / thoughts.present_RS.sum().clamp(min=1)
        if not math.isfinite(loss.item()):
            raise RunError(f"the loss at update {done} is {loss.item()}; nothing was written\ntry a smaller lr")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(done + 1, loss.item())
    return head.eval().requires_grad_(False)


@torch.no_grad()
def relative_errors(head: DraftHead, drawer: LatentDrawer, questions: Sequence[Question]) -> list[float]:
    """The relative RMS error of the predicted h_2..h_T, over the questions that have them; NaN where none has."""
    error_S, count_S = 0.0, 0.0
    for start in range(0, len(questions), VALID_BATCH):
        thoughts = drawer.draw(questions[start : start + VALID_BATCH])
        error_S = error_S + thoughts.errors(head).sum(0)
        count_S = count_S + thoughts.present_RS.sum(0)
    return (error_S / count_S).sqrt().tolist()  # pyright: ignore[reportAttributeAccessIssue]


def _standardize(head: DraftHead, batch: LatentBatch) -> None:
    """Take the means and the spread of latents from a first batch; of h_2 alone if the batch has no others."""
    latents_RSD, present_RS1 = batch.latents_RTD[:, 1:].float(), batch.present_RS[..., None]
    mean_SD = (latents_RSD * present_RS1).sum(0) / present_RS1.sum(0).clamp(min=1)
    head.mean_SD.copy_(mean_SD)
    deviation_RSD = (latents_RSD - mean_SD) * present_RS1
    count = present_RS1.sum().clamp(min=1) * latents_RSD.shape[-1]
    head.scale.copy_((deviation_RSD.square().sum() / count).sqrt().clamp(min=torch.finfo(torch.float32).eps))
