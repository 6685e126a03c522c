"""What `ltts probe` measures: dependencies of latents, and sweeps of `schedule=speculative`, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from latent_tts.checkpoint.draft import DraftFile
from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.dependencies import PlainRecurrence, find_dependencies
from latent_tts.engine.device import synchronized_seconds
from latent_tts.engine.draft import load_draft
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import LESS_MEMORY, computing
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.models import find_device, load_reasoner, refuse_graphs, rollout_plan
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.random.draw import Draw
from latent_tts.results import report
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.speculative import Speculative

MIN_COMMITS_PER_SWEEP = 1.5  # fewer do not pay for the latents that are computed again
MIN_EQUAL = 0.99  # share of answers that a recommended tolerance leaves as they are
TIMED_ROWS, TIMED_QUESTIONS = (1, 4, 16, 64, 256), 9


@dataclass(frozen=True)
class Probe:
    """The findings of a probe.

    Attributes:
        questions: a row per question: `question_id`, `latents`, `critical_path`, `potential` (latents / critical path),
            `growth`, and for each tolerance `sweeps_TOLERANCE` and `equal_TOLERANCE`.
        relative_TT: mean over questions of the relative dependencies; NaN where no question has the latent.
        tolerances: those tried.
        ratios: by rows of a batch, the time of the recommended schedule over that of `sequential`: the median over
            questions, answers included. Up to the first that is not below 1; empty where none is recommended.
        device: where times were measured, as in `cpu`.
    """

    questions: pd.DataFrame
    relative_TT: np.ndarray
    tolerances: Sequence[float]
    ratios: Mapping[int, float] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def max_rows(self) -> int:
        """The most rows for which the recommended schedule takes less time than `sequential`."""
        return max((rows for rows, ratio in self.ratios.items() if ratio < 1), default=0)

    def commits_per_sweep(self, tolerance: float) -> float:
        """Latents per sweep of all questions together."""
        return self.questions["latents"].sum() / max(self.questions[f"sweeps_{tolerance:g}"].sum(), 1)

    def explained(self, tolerance: float) -> float:
        """R squared of sweeps on growth over questions; NaN where one of them is the same for all."""
        both = self.questions[["growth", f"sweeps_{tolerance:g}"]].dropna()
        if len(both) < 3 or (both.nunique() < 2).any():
            return float("nan")
        return float(np.corrcoef(both.to_numpy().T)[0, 1] ** 2)

    @property
    def recommended(self) -> float | None:
        """The largest tolerance that commits enough latents per sweep and changes few answers; None: sequential."""
        fits = [
            tolerance
            for tolerance in self.tolerances
            if self.commits_per_sweep(tolerance) > MIN_COMMITS_PER_SWEEP
            and self.questions[f"equal_{tolerance:g}"].mean() >= MIN_EQUAL
        ]
        return max(fits, default=None)


def probe(
    adapter: ModelAdapter,
    engine: EngineSettings,
    prompts: Mapping[str, list[int]],
    *,
    schedules: Sequence[Speculative],
    draft: DraftFile | None,
    threshold: float,
    directions: int,
    max_answer_tokens: int,
) -> Probe:
    """Probe a model's greedy rollouts.

    Args:
        adapter: the model.
        engine: how it is computed.
        prompts: token ids by question id.
        schedules: those to try, with different tolerances.
        draft: the file of their draft head; None without one.
        threshold: relative dependency from which one latent counts as depending on another.
        directions: random directions for each latent.
        max_answer_tokens: most tokens of an answer.

    Raises:
        RunError: a failure while computing.
    """
    device = find_device(engine)
    refuse_graphs(engine, "ltts probe runs each question once")
    with (
        computing("probing", "nothing was written", LESS_MEMORY),
        report.progress_bar(len(prompts), "questions") as bar,
    ):
        reasoner = load_reasoner(adapter, engine, device)
        head = None if draft is None else load_draft(draft.path, draft.record, reasoner.lm.device)
        engines = {
            schedule.tolerance: Engine(reasoner, rollout_plan(adapter, max_answer_tokens, schedule), head)
            for schedule in schedules
        }
        sequential = Engine(reasoner, rollout_plan(adapter, max_answer_tokens))
        there = _roll(sequential, prompts)
        rows = [
            {"question_id": name, "latents": int(steps)} for name, steps in zip(prompts, there.steps_R, strict=True)
        ]
        for tolerance, parallel in engines.items():
            here = _roll(parallel, prompts)
            for place, row in enumerate(rows):
                row[f"sweeps_{tolerance:g}"] = int(here.sweeps_R[place])
                row[f"equal_{tolerance:g}"] = here.answer_ids[place] == there.answer_ids[place]
        plain = adapter.load(device=device, dtype=engine.dtype)
        use_own_attention(plain.lm, "eager")
        relative = np.full((len(prompts), adapter.latents, adapter.latents), np.nan)
        for place, (row, prompt) in enumerate(zip(rows, prompts.values(), strict=True)):
            steps = row["latents"]
            latents_TD = there.latents_RTD[place, :steps].to(device, plain.lm.dtype)
            found = find_dependencies(PlainRecurrence(plain, prompt), latents_TD, directions)
            relative[place, :steps, :steps] = found.relative_TT.float().cpu().numpy()
            path = len(found.critical_path(threshold))
            row |= {"critical_path": path, "potential": steps / max(path, 1), "growth": found.growth}
            bar.advance(1)
        found = Probe(pd.DataFrame(rows), _mean(relative), list(engines), device=torch.device(device).type)
        if found.recommended is None:
            return found
        return replace(found, ratios=time_ratios(sequential, engines[found.recommended], prompts))


def _mean(relative_QTT: np.ndarray) -> np.ndarray:
    """The mean over the questions that have both latents; NaN where none has."""
    some_TT = np.isfinite(relative_QTT).any(0)
    mean_TT = np.full(some_TT.shape, np.nan)
    mean_TT[some_TT] = np.nanmean(relative_QTT[:, some_TT], axis=0)
    return mean_TT


def time_ratios(sequential: Engine, parallel: Engine, prompts: Mapping[str, list[int]]) -> dict[int, float]:
    """See `Probe.ratios`. The engines take turns, question by question, so that a busy machine slows both."""
    ratios: dict[int, float] = {}
    for rows in TIMED_ROWS:
        pairs = []
        for name, prompt in list(prompts.items())[: 1 + TIMED_QUESTIONS]:
            seconds = []
            for engine in (sequential, parallel):
                begun = synchronized_seconds(engine.device)
                _roll(engine, {name: prompt}, rows)
                seconds.append(synchronized_seconds(engine.device) - begun)
            pairs.append(seconds[1] / seconds[0])
        ratios[rows] = float(np.median(pairs[1:] or pairs))  # the first question warms up
        if ratios[rows] >= 1:
            break
    return ratios


def _roll(engine: Engine, prompts: Mapping[str, list[int]], rollouts: int = 1) -> Rollouts:
    numbers_QN = torch.arange(rollouts, device=engine.device).repeat(len(prompts), 1)
    draw = Draw.of(0, list(prompts), numbers_QN, engine.width, engine.blocks)
    return engine.roll(list(prompts.values()), draw, Greedy())
