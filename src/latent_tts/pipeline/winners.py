"""`answer.decode=winners`: think all rollouts, score them, and decode only the best-of-n pick of each reported n.

The picks are drawn again in full, with the same random numbers, so that their answers (and their keys and values under
dropout masks) are those of the same rollouts of any other run; they are kept with those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts.engine.cost import Shape
from latent_tts.pipeline import drawing, scoring
from latent_tts.pipeline.keys import cache_key, thoughts_key
from latent_tts.pipeline.spec import Prepared
from latent_tts.results import statistics as stats
from latent_tts.results.cache import MEASURED_SUMS, RolloutCache, unpack_latents
from latent_tts.results.metrics import WinnersAt

ANSWER_COLUMNS = ["answer_ids", "answer_logprob", "answer_margin", "stop_reason"]


@dataclass
class Winners:
    """What was drawn and decoded.

    Attributes:
        rows: as from the rollout cache, of every rollout; only the picks have answers.
        folder: cache folder of the latents.
        scores: of every rollout.
        picks: for each reported n the pick's rollout number of each question.
        decoding: `MEASURED_SUMS` of each rollout's answer, NaN where it was not decoded.
        drawn_now, decoded_now: how many rollouts were thought, and how many decoded.
    """

    rows: pd.DataFrame
    folder: Path
    scores: scoring.Scores
    picks: dict[int, np.ndarray]
    decoding: pd.DataFrame
    drawn_now: int
    decoded_now: int


def draw(cfg: DictConfig, prepared: Prepared) -> Winners:
    """Think, score, decode."""
    assert prepared.scorer is not None
    root, wanted, n = Path(cfg.paths.cache).expanduser(), prepared.wanted(), prepared.n
    thoughts = RolloutCache(root, thoughts_key(cfg, prepared))
    drawn_now = drawing.draw_missing(cfg, prepared, thoughts, wanted, answers=False)
    rows = thoughts.read(wanted)
    latents = unpack_latents(rows["latents"], prepared.shape.width)
    scores = scoring.score(cfg, prepared, prepared.scorer, thoughts.folder, [""] * len(rows), latents)
    score_QN = np.nan_to_num(scores.score.astype(np.float32), nan=-np.inf).reshape(-1, n)
    picks = {budget: score_QN[:, :budget].argmax(1) for budget in prepared.budget.reported(n)}
    places = np.unique(np.concatenate([np.arange(len(score_QN)) * n + pick for pick in picks.values()]))
    whole = RolloutCache(root, cache_key(cfg, prepared))
    chosen = wanted.iloc[places].reset_index(drop=True)
    decoded_now = drawing.draw_missing(cfg, prepared, whole, chosen)
    decoded = whole.read(chosen)
    for column in ANSWER_COLUMNS:
        values = rows[column].astype(object).tolist()
        for place, value in zip(places, decoded[column], strict=True):
            values[place] = value
        rows[column] = pd.Series(values, dtype=object).astype(rows[column].dtype)
    decoding = decoded[list(MEASURED_SUMS)].set_axis(places).reindex(range(len(rows)))
    return Winners(rows, thoughts.folder, scores, picks, decoding, drawn_now, decoded_now)


def reported(
    prepared: Prepared, winners: Winners, rollouts: pd.DataFrame, latents: Sequence[np.ndarray]
) -> list[WinnersAt]:
    """The figures of each reported n, each as if it were the only one."""
    assert prepared.scorer is not None
    n, head = prepared.n, Shape.from_config(prepared.scorer.config)
    passes, begun = prepared.passes, len(prepared.forced_ids)
    steps_QN = rollouts["latent_steps"].to_numpy().reshape(-1, n)
    figures = []
    for budget, pick in winners.picks.items():
        places = np.arange(len(pick)) * n + pick
        picked = rollouts.iloc[places]
        gflops = []
        for question, steps_N, chosen, answer in zip(
            prepared.questions, steps_QN, pick, picked["answer_tokens"], strict=True
        ):
            prompt = len(prepared.prompts[question.id])
            thinking = passes.once(prompt) + passes.thinking(prompt, steps_N[:budget]).sum()
            scoring_ = head.prompt_flops(prompt) + head.scoring_flops(prompt, steps_N[:budget]).sum()
            decoding = passes.once(prompt) + passes.rollout(prompt, steps_N[chosen], answer - begun)
            gflops.append(float(thinking + scoring_ + decoding) / 1e9)
        groups = [latents[start : start + budget] for start in range(0, len(latents), n)]
        figures.append(
            WinnersAt(
                n=budget,
                picked=picked,
                latent_steps=[sum(map(len, group)) for group in groups],
                diversity=[stats.diversity(np.stack([r[: min(map(len, group))] for r in group])) for group in groups],
                gflops=gflops,
                measured=rollouts[list(MEASURED_SUMS)].sum(skipna=False)
                + winners.decoding.iloc[places].sum(skipna=False),
            )
        )
    return figures
