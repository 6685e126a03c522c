"""From cached rows to the files of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from latent_tts.engine.cost import Shape
from latent_tts.pipeline import winners
from latent_tts.pipeline.keys import machine, versions
from latent_tts.pipeline.scoring import Scores
from latent_tts.pipeline.spec import Prepared
from latent_tts.results import metrics, plot, report, store
from latent_tts.results import statistics as stats
from latent_tts.text.classes import shared_forms

FIGURE = "scaling.png"


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder of the user's choice; first what says that it is complete."""
    for name in (store.RUN_JSON, store.METRICS, store.ROLLOUTS, store.LATENTS, FIGURE):
        (folder / name).unlink(missing_ok=True)


def write_tables(
    folder: Path,
    prepared: Prepared,
    rollouts: pd.DataFrame,
    latents: Sequence[np.ndarray],
    scores: Scores | None,
    columns: Mapping[str, Any],
) -> pd.DataFrame:
    """Write `rollouts.parquet`, `metrics.csv` and, where there is more than one n, the curve; returns the metrics."""
    if scores is not None:
        add_scores(rollouts, scores)
    table = metrics.metric_rows(
        rollouts,
        drawn=prepared.kept,
        reported=prepared.reported,
        aggregators=prepared.aggregators,
        diversity_Q=[stats.diversity(part) for part in _by_question(latents, prepared.kept)],
        gflops=gflops(prepared, rollouts, scores),
        run=columns,
    )
    return _write(folder, rollouts, table)


def write_winner_tables(
    folder: Path,
    prepared: Prepared,
    rollouts: pd.DataFrame,
    latents: Sequence[np.ndarray],
    drawn: winners.Winners,
    columns: Mapping[str, Any],
) -> pd.DataFrame:
    """The same where only winners were decoded."""
    add_scores(rollouts, drawn.scores)
    table = metrics.winner_rows(winners.reported(prepared, drawn, rollouts, latents), rollouts, columns)
    return _write(folder, rollouts, table)


def _write(folder: Path, rollouts: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    store.write_rollouts(folder, rollouts)
    store.write_metrics(folder / store.METRICS, table)
    if table["n"].nunique() > 1:
        plot.scaling_curve(table, folder / FIGURE)
    return table


def finish(folder: Path, cfg: DictConfig, prepared: Prepared, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Write `run.json` last of all, and show the table and its path."""
    scorer = prepared.scorer
    store.write_run_json(
        folder,
        {
            "config": OmegaConf.to_container(cfg, resolve=True),
            "aggregators": {
                aggregator.name: {"_target_": cfg.aggregator[aggregator.name]["_target_"], **vars(aggregator)}
                for aggregator in prepared.aggregators
            },
            "checkpoint_digest": prepared.adapter.digest,
            "scorer": None if scorer is None else {"name": scorer.name, "digest": scorer.digest},
            "versions": versions(cfg),
            "machine": machine(),
            "grading": {"given_up": prepared.task.rule.given_up},
            **record,
        },
    )
    report.print_metrics(table)
    print(folder / store.METRICS)


def rollout_table(prepared: Prepared, rows: pd.DataFrame) -> pd.DataFrame:
    """The rollouts table: cached rows, with answers read by the model's and the task's rules."""
    adapter, rule, kept = prepared.adapter, prepared.task.rule, prepared.kept
    answer_ids = [[int(token) for token in ids] for ids in rows["answer_ids"]]
    texts = [adapter.answer_text(ids) for ids in answer_ids]
    owners = [question for question in prepared.questions for _ in range(kept)]
    answers = [
        None if stop == store.NOT_DECODED else rule.read(text, adapter)
        for stop, text in zip(rows["stop_reason"], texts, strict=True)
    ]
    predictions = [  # equal answers of a question have one form, so that they are one vote
        form
        for start in range(0, len(answers), kept)
        for form in shared_forms(answers[start : start + kept], rule.equal)
    ]
    return pd.DataFrame(
        {
            "question_id": [question.id for question in owners],
            "rollout": rows["rollout"].astype("int32"),
            "prediction": pd.array(predictions, dtype=object),
            "correct": [a is not None and rule.is_right(a, q.answer) for a, q in zip(answers, owners, strict=True)],
            "score": pd.array([None] * len(rows), dtype="Float32"),
            "answer_logprob": rows["answer_logprob"],
            "answer_margin": rows["answer_margin"],
            "stop_reason": rows["stop_reason"],
            "answer_text": texts,
            "answer_ids": answer_ids,
            "answer_tokens": [len(ids) for ids in answer_ids],
            "latent_steps": rows["latent_steps"].astype("int32"),
            **{name: rows[name] for name in store.MEASURED},
        }
    )


def add_scores(rollouts: pd.DataFrame, scores: Scores) -> None:
    """Put scores, and what they cost, into a rollouts table."""
    rollouts["score"] = pd.array(scores.score, dtype="Float32")
    for name in store.MEASURED_SUMS:
        rollouts[name] += scores.rows[name].to_numpy()
    peaks = [rollouts["peak_memory_bytes"].to_numpy(dtype=float), scores.rows["peak_memory_bytes"].to_numpy()]
    rollouts["peak_memory_bytes"] = np.maximum(*peaks)


def gflops(prepared: Prepared, rollouts: pd.DataFrame, scores: Scores | None) -> list[tuple[float, float]]:
    """Per question: GFLOP paid once, and GFLOP that each of its n rollouts adds on average."""
    passes, begun = prepared.passes, len(prepared.forced_ids)
    answers_QN = rollouts["answer_tokens"].to_numpy().reshape(-1, prepared.kept) - begun
    steps_QN = rollouts["latent_steps"].to_numpy().reshape(-1, prepared.kept)
    pairs = []
    for place, question in enumerate(prepared.questions):
        prompt, steps_N = len(prepared.prompts[question.id]), steps_QN[place]
        once, each = passes.once(prompt), float(passes.rollout(prompt, steps_N, answers_QN[place]).mean())
        if prepared.kept < prepared.n:  # a search: n think, those kept answer
            thinking = float(passes.thinking(prompt, steps_N).mean())
            each = thinking + (each - thinking) * prepared.kept / prepared.n
        if scores is not None and prepared.scorer is not None:
            head = Shape.from_config(prepared.scorer.config)
            each += float(head.scoring_flops(prompt, steps_N).mean())
            # official positions need a prefill for each length of text: a cost of the rollouts, not of the question
            prefills = scores.prefills[place]
            once += head.prompt_flops(prompt)
            each += (prefills - 1) * head.prompt_flops(prompt) / prepared.n
        pairs.append((once / 1e9, each / 1e9))
    return pairs


def _by_question(latents: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
    """Latents (N, T, D) of each question; rows of unequal steps are cut to the shortest."""
    groups = [latents[start : start + n] for start in range(0, len(latents), n)]
    return [np.stack([row[: min(map(len, group))] for row in group]) for group in groups]
