"""What `ltts probe` measures: dependencies of latents, and sweeps of `schedule=speculative`, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.dependencies import PlainRecurrence, find_dependencies
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


@dataclass(frozen=True)
class Probe:
    """The findings of a probe.

    Attributes:
        questions: a row per question: `question_id`, `latents`, `critical_path`, `potential` (latents / critical path),
            `growth`, and for each tolerance `sweeps_TOLERANCE` and `equal_TOLERANCE`.
        relative_TT: mean over questions of the relative dependencies; NaN where no question has the latent.
        tolerances: those tried.
    """

    questions: pd.DataFrame
    relative_TT: np.ndarray
    tolerances: Sequence[float]

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
    tolerances: Sequence[float],
    guess: str,
    chunk: int | None,
    threshold: float,
    directions: int,
    max_answer_tokens: int,
) -> Probe:
    """Probe a model's greedy rollouts.

    Args:
        adapter: the model.
        engine: how it is computed.
        prompts: token ids by question id.
        tolerances: `schedule.tolerance` to try.
        guess: `schedule.guess`.
        chunk: `schedule.chunk`.
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
        there = _roll(Engine(reasoner, rollout_plan(adapter, max_answer_tokens)), prompts)
        rows = [
            {"question_id": name, "latents": int(steps)} for name, steps in zip(prompts, there.steps_R, strict=True)
        ]
        for tolerance in tolerances:
            schedule = Speculative(chunk, tolerance, guess)
            here = _roll(Engine(reasoner, rollout_plan(adapter, max_answer_tokens, schedule)), prompts)
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
            path = found.critical_path(threshold)
            row |= {"critical_path": path, "potential": steps / max(path, 1), "growth": found.growth}
            bar.advance(1)
    some_TT = np.isfinite(relative).any(0)
    mean_TT = np.full(some_TT.shape, np.nan)
    mean_TT[some_TT] = np.nanmean(relative[:, some_TT], axis=0)
    return Probe(pd.DataFrame(rows), mean_TT, tolerances)


def _roll(engine: Engine, prompts: Mapping[str, list[int]]) -> Rollouts:
    numbers_Q1 = torch.zeros(len(prompts), 1, dtype=torch.long, device=engine.device)
    draw = Draw.of(0, list(prompts), numbers_Q1, engine.width, engine.blocks)
    return engine.roll(list(prompts.values()), draw, Greedy())
