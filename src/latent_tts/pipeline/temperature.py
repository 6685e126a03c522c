"""The temperature of the score-weighted vote, chosen on the questions that LatentRM was validated on."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from latent_tts.errors import require
from latent_tts.pipeline.rollouts import draw_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import rollout_table
from latent_tts.results import statistics
from latent_tts.results.files import write_text
from latent_tts.results.metrics import rollout_arrays
from latent_tts.task import require_gold


def choose_temperature(spec: RunSpec, ids: Collection[str]) -> float:
    """The temperature at which the vote of the run's rollouts, weighted by its scorer, is right most often.

    Rollouts are drawn where the cache lacks them: annotations say which are right, but a vote needs their predictions.

    Args:
        spec: the run.
        ids: of its questions, those to choose on.

    Raises:
        UsageError: the questions have no gold answers, or are none of the run.
    """
    require_gold(spec.task, spec.questions, "the temperature of the weighted vote is chosen by accuracy")
    spec = replace(spec, questions=[question for question in spec.questions if question.id in ids])
    require(
        "valid_annotations", len(ids), bool(spec.questions), "its questions are none of its task; annotate them again"
    )
    return statistics.best_temperature(rollout_arrays(rollout_table(spec, draw_rollouts(spec)), spec.n))


def write_temperature(checkpoint: Path, temperature: float) -> None:
    """Write the temperature into the `config.json` of a LatentRM's folder, where `LatentRM.temperature` reads it."""
    path = checkpoint / "config.json"
    record = json.loads(path.read_text())
    record["latent_rm"]["temperature"] = temperature
    write_text(path, json.dumps(record, indent=2) + "\n")
