"""Step-wise labels: how often completions from each prefix of a rollout's thoughts reach the right answer.

For a prefix h_1..h_t the label y_t is the share of M stochastic completions that are right. A completion forks the
rollout's own keys and values, so neither prompt nor prefix is computed again, and its random numbers are keyed by
(rollout, t, m). Where nothing random is left after h_t, all M are the rollout itself, and its own answer is the label.

Source: You et al. (arXiv 2510.07745), section 4; src/annotate_data.py of ModalityDance/LatentTTS at 6657f20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from latent_tts.engine.packing import require_finite
from latent_tts.engine.rollout import Engine, Rollouts, RolloutState
from latent_tts.engine.sites import SiteHooks
from latent_tts.random.draw import Draw
from latent_tts.random.philox import key_of
from latent_tts.sampler import Sampler
from latent_tts.types import Bools, LabelledQuestion, UnmixedQuestion, written_ids

MAX_COMPLETIONS = 1 << 16  # rollout number and completion number share a 32-bit counter word


@dataclass(frozen=True)
class LabelJob:
    """A question to label.

    Attributes:
        question_id: keys its random numbers.
        index: its place among the questions of the run.
        prompt: token ids.
        is_right: whether answer ids are a right answer.
    """

    question_id: str
    index: int
    prompt: list[int]
    is_right: Callable[[list[int]], bool]


@dataclass(frozen=True)
class Labelling:
    """What is drawn for a question.

    Attributes:
        rollouts: n, rollouts of a question.
        completions: M, completions of each prefix.
        keep_all: label every question, not only those with right and wrong rollouts.
        seed: of every random number.
        rows: maximum rows per batch.
        latent_id: placeholder of a latent in the written form.
    """

    rollouts: int
    completions: int
    keep_all: bool
    seed: int
    rows: int
    latent_id: int


@torch.inference_mode()
def label_batch(
    jobs: Sequence[LabelJob], engine: Engine, sampler: Sampler, labelling: Labelling
) -> tuple[list[LabelledQuestion | UnmixedQuestion], int]:
    """The records of some questions, and how many rollouts (completions included) they took.

    Raises:
        RunError: a latent or a log-probability is not finite.
    """
    n, device = labelling.rollouts, engine.device
    numbers_QN = torch.arange(n, device=device).expand(len(jobs), n)
    draw = Draw.of(labelling.seed, [job.question_id for job in jobs], numbers_QN, engine.width, engine.blocks)
    with SiteHooks(engine.lm, sampler) as hooks:
        state = RolloutState.start(engine, [job.prompt for job in jobs], draw, hooks).make_latents()
        rollouts = state.decode_answers()
        _require_finite(rollouts, jobs, np.arange(len(jobs)).repeat(n), engine.lm.dtype)
        corrects_QN = _are_right(jobs, np.arange(len(jobs)).repeat(n), rollouts.answer_ids).reshape(-1, n)
        mixed_Q = corrects_QN.any(1) & ~corrects_QN.all(1)
        kept = np.flatnonzero(mixed_Q | labelling.keep_all)
        steps_R = rollouts.steps_R.numpy()
        labels_RT = np.full((len(steps_R), engine.plan.latents), np.nan, dtype=np.float32)
        done = len(steps_R)
        for step in range(1, engine.plan.latents + 1):
            rows = (kept[:, None] * n + np.arange(n)).flatten()
            rows = rows[steps_R[rows] >= step]
            settled = (steps_R[rows] == step) & (not _random_after_the_last(sampler, engine))
            labels_RT[rows[settled], step - 1] = corrects_QN.flatten()[rows[settled]]
            rows = rows[~settled]
            labels_RT[rows, step - 1] = _completed(jobs, state, rows, step, labelling)
            done += len(rows) * labelling.completions
    latents_QNTD = rollouts.latents_RTD.float().cpu().numpy().reshape(len(jobs), n, engine.plan.latents, engine.width)
    labels_QNT, steps_QN = labels_RT.reshape(len(jobs), n, -1), steps_R.reshape(-1, n)
    end_ids, eos_id = engine.plan.thinking_end_ids, engine.plan.eos_id
    assert eos_id is not None, "labels are of finished answers"
    entries: list[LabelledQuestion | UnmixedQuestion] = []
    for place, job in enumerate(jobs):
        if place not in kept:
            reason = "all_correct" if corrects_QN[place, 0] else "all_wrong"
            entries.append(UnmixedQuestion(job.question_id, job.index, reason, n))
            continue
        steps = steps_QN[place].tolist()
        written = written_ids(job.prompt, steps, labelling.latent_id, end_ids, eos_id)
        values = latents_QNTD[place], labels_QNT[place], corrects_QN[place]
        entries.append(LabelledQuestion(job.question_id, job.index, written, *values))
    return entries, done


def completions_of(sampler: Sampler, engine: Engine, labelling: Labelling) -> int:
    """Completions of a kept question at most: M for each prefix of each rollout that something random follows."""
    prefixes = engine.plan.latents - (not _random_after_the_last(sampler, engine))
    return labelling.rollouts * prefixes * labelling.completions


def _random_after_the_last(sampler: Sampler, engine: Engine) -> bool:
    """Whether anything random follows a rollout's last latent."""
    return sampler.random_answers or (engine.plan.stop_id is not None and "thoughts" in sampler.random_phases)


def _completed(
    jobs: Sequence[LabelJob], state: RolloutState, rows: np.ndarray, step: int, labelling: Labelling
) -> np.ndarray:
    """The share of completions that are right, for each of `rows` from its first `step` latents."""
    count, device, n = labelling.completions, state.latents_RTD.device, labelling.rollouts
    keys = torch.tensor([key_of(labelling.seed, f"{job.question_id} from {step}") for job in jobs], device=device)
    shares = np.empty(len(rows), dtype=np.float32)
    most = max(1, labelling.rows // count)
    size = most // n * n or most  # whole questions where they fit
    for part in (slice(start, start + size) for start in range(0, len(rows), size)):
        here: Tensor = torch.from_numpy(rows[part]).to(device).repeat_interleave(count)
        completion = torch.arange(count, device=device).repeat(len(rows[part]))
        numbers, engine = here % n * MAX_COMPLETIONS + completion, state.engine
        draw = Draw(keys[here // n], numbers, engine.width, engine.blocks)
        ended = state.fork(here, draw, step).make_latents().decode_answers()
        owners = (here // n).cpu().numpy()
        _require_finite(ended, jobs, owners, engine.lm.dtype)
        right = _are_right(jobs, owners, ended.answer_ids)
        shares[part] = right.reshape(-1, count).mean(1)
    return shares


def _require_finite(rollouts: Rollouts, jobs: Sequence[LabelJob], owners: np.ndarray, dtype: torch.dtype) -> None:
    """Raise RunError unless latents and log-probabilities are finite: an answer of NaN reads like others."""
    ids = (jobs[owner].question_id for owner in owners.tolist())
    finite_R = rollouts.latents_RTD.flatten(1).isfinite().all(1).cpu() & rollouts.answer_logprob_R.isfinite().cpu()
    require_finite("latents or log-probabilities of answers", finite_R, ids, dtype, "labelling rollouts")


def _are_right(jobs: Sequence[LabelJob], owners: np.ndarray, answers: Sequence[list[int]]) -> Bools:
    """Which answers are right. Rows of a question often have equal answers, so each is read once."""

    @cache
    def is_right(owner: int, ids: tuple[int, ...]) -> bool:
        return jobs[owner].is_right(list(ids))

    found = [is_right(owner, tuple(ids)) for owner, ids in zip(owners.tolist(), answers, strict=True)]
    return np.array(found, dtype=np.bool_)
