"""Scoring what the score cache lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts.engine.cost import Shape
from latent_tts.errors import FEWER_ROWS, RunError, computing
from latent_tts.pipeline.drawing import load_scorer_once, missing, resolve_device, rows_of_a_batch
from latent_tts.pipeline.keys import score_key
from latent_tts.pipeline.spec import ITEM_BYTES, Prepared, positions_of
from latent_tts.results import report, store
from latent_tts.scorer import Scorer

log = logging.getLogger(__name__)


@dataclass
class Scores:
    """The scores of a rollouts table.

    Attributes:
        rows: `step_scores` and what was measured of each rollout, in the table's order.
        score: the trajectory score of each.
        prefills: how many prompts the scorer ran for each question.
        scored_now: how many rollouts the cache did not have.
    """

    rows: pd.DataFrame
    score: np.ndarray
    prefills: list[int]
    scored_now: int


def score(
    cfg: DictConfig,
    prepared: Prepared,
    scorer: Scorer,
    rollout_folder: store.Path,
    answer_texts: Sequence[str],
    latents: Sequence[np.ndarray],
) -> Scores:
    """Score the run's rollouts, taking from the cache what is there.

    Args:
        cfg: the job's config, for `engine`.
        prepared: the run.
        scorer: what scores.
        rollout_folder: cache folder of the rollouts; scores are kept in it.
        answer_texts: of each rollout, in the order of `prepared.wanted()`; official positions count their tokens.
        latents: (steps, D) of each.

    Raises:
        RunError: a sequence is too long for the scorer, or a failure while scoring.
    """
    wanted = prepared.wanted()
    cache = store.ScoreCache(rollout_folder, score_key(scorer, cfg.engine.dtype, prepared.n))
    offsets = _offsets(prepared, scorer, answer_texts, latents)
    lacking = missing(cache, wanted, "scored in")
    scored_now = sum(map(len, lacking.values()))
    if scored_now:
        _fill(cfg, prepared, scorer, cache, lacking, dict(zip(_places(wanted), latents, strict=True)), offsets)
    rows = cache.read(wanted)
    step_scores = [np.asarray(steps, dtype=np.float64) for steps in rows["step_scores"]]
    return Scores(
        rows=rows,
        score=scorer.reduced(step_scores),
        prefills=[
            len({offsets.get((prepared.row_key(q), i), 0) for i in range(prepared.n)}) for q in prepared.questions
        ],
        scored_now=scored_now,
    )


def _places(wanted: pd.DataFrame) -> list[tuple[str, int]]:
    return list(wanted[["row_key", "rollout"]].itertuples(index=False, name=None))


def _offsets(
    prepared: Prepared, scorer: Scorer, answer_texts: Sequence[str], latents: Sequence[np.ndarray]
) -> dict[tuple[str, int], int]:
    """What official positions add for each rollout; empty for correct ones."""
    if scorer.positions != "official":
        return {}
    from latent_tts.engine.official_positions import position_offsets

    forced, n = len(prepared.adapter.thinking_end_ids), prepared.n
    beside = [len(rows) + forced + scorer.text_tokens(text) for text, rows in zip(answer_texts, latents, strict=True)]
    lengths = [
        [len(prepared.prompts[question.id]) + tokens for tokens in beside[place * n : (place + 1) * n]]
        for place, question in enumerate(prepared.questions)
    ]
    longest, limit = max(map(max, lengths)), positions_of(scorer)
    if longest > limit:
        raise RunError(
            f"scorer.positions=official: a rollout's text has {longest} tokens, {scorer.name} takes {limit}\n"
            "scorer.positions=correct needs the prompt and the latents alone"
        )
    offsets = [offset for row in position_offsets(lengths) for offset in row]
    return dict(zip(_places(prepared.wanted()), offsets, strict=True))


def _fill(
    cfg: DictConfig,
    prepared: Prepared,
    scorer: Scorer,
    cache: store.ScoreCache,
    lacking: dict[str, list[int]],
    latents: dict[tuple[str, int], np.ndarray],
    offsets: dict[tuple[str, int], int],
) -> None:
    from latent_tts.engine.packing import RolloutJob, measured_rates, row_bytes
    from latent_tts.engine.scoring import LatentScorer
    from latent_tts.pipeline import executor

    device, dtype = resolve_device(cfg.engine.device), cfg.engine.dtype
    shape = Shape.from_config(scorer.config)
    jobs = []
    for question in prepared.questions:
        key = prepared.row_key(question)
        by_offset: dict[int, list[int]] = {}
        for number in lacking.get(key, []):
            by_offset.setdefault(offsets.get((key, number), 0), []).append(number)
        prompt = prepared.prompts[question.id]
        jobs += [
            RolloutJob(key, question.id, prompt, numbers, position_offset=offset)
            for offset, numbers in by_offset.items()
        ]
    total = sum(len(job.rollouts) for job in jobs)
    longest, steps = max(len(job.prompt) for job in jobs), max(map(len, latents.values()))
    # a batch may hold one row a prompt
    bytes_per_row = row_bytes(shape, longest, steps, ITEM_BYTES[dtype], own_prompt=True)
    rows = rows_of_a_batch(cfg, shape, bytes_per_row, device, own_prompt=False)
    work = sum(
        shape.prompt_flops(len(job.prompt)) + len(job.rollouts) * shape.scoring_flops(len(job.prompt), steps)
        for job in jobs
    )
    log.info("%d rollouts to score with %s: at most %.3g GFLOP", total, scorer.name, work / 1e9)
    model = LatentScorer(load_scorer_once(scorer, device, dtype))
    with report.progress_bar(total, "scores") as bar:
        with computing("scoring rollouts", f"what was scored is in {cache.folder}", FEWER_ROWS):
            rates = measured_rates(shape.width, dtype, device)
            executor.fill_scores(
                cache, jobs, model, latents, rows=rows, rates=rates, progress=lambda k: report.advance(bar, k)
            )
