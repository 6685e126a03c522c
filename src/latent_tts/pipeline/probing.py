"""What `ltts probe` measures: dependencies of latents, and sweeps of `schedule=speculative`, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.draft import DraftFile
from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.dependencies import PlainRecurrence, find_dependencies
from latent_tts.engine.device import synchronized_seconds
from latent_tts.engine.draft import load_draft
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import LESS_MEMORY, computing
from latent_tts.pipeline.models import find_device, load_reasoner, refuse_graphs, rollout_plan
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.random.draw import Draw
from latent_tts.results import report
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.speculative import Speculative

MIN_COMMITS_PER_SWEEP = 1.5  # fewer do not pay for the latents that are computed again
MIN_EQUAL = 0.99  # share of answers that a recommended schedule leaves as they are
MORE_SWEEPS = 1.05  # times as many as with all latents at once, for smaller chunks, which compute fewer latents again
TIMED_ROWS, TIMED_QUESTIONS = (1, 4, 16, 64, 256), 9


@dataclass(frozen=True)
class Probe:
    """The findings of a probe.

    Attributes:
        questions: a row per question: `question_id`, `latents`, `critical_path`, `potential` (latents / critical path),
            `growth`, and for each schedule `sweeps_LABEL`, `conflicts_LABEL` and `equal_LABEL` (see `label`).
        relative_TT: mean over questions of the relative dependencies; NaN where no question has the latent.
        schedules: those tried, each with all latents in one chunk.
        chunked: the best of them in smaller chunks; empty where none pays.
        ratios: by rows of a batch, the time of the recommended schedule over that of `sequential`: the median over
            questions, answers included. Up to the first that is not below 1; empty where none is recommended.
        device: where times were measured, as in `cpu`.
    """

    questions: pd.DataFrame
    relative_TT: np.ndarray
    schedules: Sequence[Speculative]
    chunked: Sequence[Speculative] = ()
    ratios: Mapping[int, float] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def max_rows(self) -> int:
        """The most rows for which the recommended schedule takes less time than `sequential`."""
        return max((rows for rows, ratio in self.ratios.items() if ratio < 1), default=0)

    def column(self, figure: str, schedule: Speculative) -> pd.Series:
        """`sweeps`, `conflicts` or `equal` of each question."""
        return self.questions[f"{figure}_{label(schedule)}"]

    def commits_per_sweep(self, schedule: Speculative) -> float:
        """Latents per sweep of all questions together, without the first: the prompt's pass makes it."""
        return (self.questions["latents"] - 1).sum() / max(self.column("sweeps", schedule).sum(), 1)

    def explained(self, schedule: Speculative) -> float:
        """R squared of sweeps on growth over questions; NaN where one of them is the same for all."""
        figures = ["growth", f"sweeps_{label(schedule)}"]
        return float(self.questions[figures].corr(min_periods=3).to_numpy()[0, 1] ** 2)

    def pays(self, schedule: Speculative) -> bool:
        """Whether it commits enough latents per sweep and changes few answers."""
        return (
            self.commits_per_sweep(schedule) > MIN_COMMITS_PER_SWEEP
            and float(self.column("equal", schedule).mean()) >= MIN_EQUAL
        )

    @property
    def best(self) -> Speculative | None:
        """Of the schedules that pay, the one with the fewest sweeps; None: sequential."""
        return min(
            filter(self.pays, self.schedules),
            key=lambda each: (self.column("sweeps", each).mean(), each.tolerance),
            default=None,
        )

    @property
    def recommended(self) -> Speculative | None:
        """`best`, in the smallest chunks that take hardly more sweeps; None: sequential."""
        if (best := self.best) is None:
            return None
        limit = MORE_SWEEPS * self.column("sweeps", best).mean()
        few = [each for each in self.chunked if self.pays(each) and self.column("sweeps", each).mean() <= limit]
        return min(few, key=lambda schedule: schedule.chunk or 0, default=best)


def label(schedule: Speculative) -> str:
    """What the columns of a schedule are called: GUESS_TOLERANCE, or GUESS_TOLERANCE_CHUNK."""
    return f"{schedule.guess}_{schedule.tolerance:g}" + ("" if schedule.chunk is None else f"_{schedule.chunk}")


def probe(
    adapter: CheckpointAdapter,
    engine: EngineSettings,
    prompts: Mapping[str, list[int]],
    *,
    schedules: Sequence[Speculative],
    chunks: Sequence[int],
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
        schedules: those to try, each with all latents in one chunk.
        chunks: to try of the best of them.
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
        engines: dict[Speculative, Engine] = {}
        sequential = Engine(reasoner, rollout_plan(adapter, max_answer_tokens))
        there = _roll(sequential, prompts)
        rows = [
            {"question_id": name, "latents": int(steps)} for name, steps in zip(prompts, there.steps_R, strict=True)
        ]

        def run(schedule: Speculative) -> None:
            engines[schedule] = Engine(reasoner, rollout_plan(adapter, max_answer_tokens, schedule), head)
            here = _roll(engines[schedule], prompts)
            for place, row in enumerate(rows):
                row[f"sweeps_{label(schedule)}"] = int(here.sweeps_R[place])
                row[f"conflicts_{label(schedule)}"] = int(here.conflicts_R[place])
                row[f"equal_{label(schedule)}"] = here.answer_ids[place] == there.answer_ids[place]

        for schedule in schedules:
            run(schedule)
        best = Probe(pd.DataFrame(rows), np.zeros((0, 0)), schedules).best
        chunked = [] if best is None else [replace(best, chunk=chunk) for chunk in chunks]
        for schedule in chunked:
            run(schedule)
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
        mean_TT = np.ma.masked_invalid(relative).mean(axis=0).filled(np.nan)
        found = Probe(pd.DataFrame(rows), mean_TT, schedules, chunked, device=torch.device(device).type)
        if (recommended := found.recommended) is None:
            return found
        return replace(found, ratios=time_ratios(sequential, engines[recommended], prompts))


def time_ratios(sequential: Engine, parallel: Engine, prompts: Mapping[str, list[int]]) -> dict[int, float]:
    """See `Probe.ratios`. The engines take turns, question by question, so that a busy machine slows both."""
    ratios: dict[int, float] = {}
    for rows in TIMED_ROWS:
        found = [
            _seconds(parallel, {name: prompt}, rows) / _seconds(sequential, {name: prompt}, rows)
            for name, prompt in list(prompts.items())[: 1 + TIMED_QUESTIONS]
        ]
        ratios[rows] = float(np.median(found[1:] or found))  # the first question warms up
        if ratios[rows] >= 1:
            break
    return ratios


def _seconds(engine: Engine, prompts: Mapping[str, list[int]], rollouts: int) -> float:
    begun = synchronized_seconds(engine.device)
    _roll(engine, prompts, rollouts)
    return synchronized_seconds(engine.device) - begun


def _roll(engine: Engine, prompts: Mapping[str, list[int]], rollouts: int = 1) -> Rollouts:
    numbers_QN = torch.arange(rollouts, device=engine.device).repeat(len(prompts), 1)
    draw = Draw.of(0, list(prompts), numbers_QN, engine.width, engine.blocks)
    return engine.roll(list(prompts.values()), draw, Greedy())
