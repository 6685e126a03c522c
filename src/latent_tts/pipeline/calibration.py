"""`budget/rule=confidence` calibrated on the rollouts of another run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget import Tally
from latent_tts.budget.rule.confidence import Calibration, Confidence, calibrate
from latent_tts.errors import UsageError, as_typed, bad_value, require
from latent_tts.pipeline.code import FIELDS_NOT_IN_KEY
from latent_tts.results.run_folder import RUN_JSON, is_complete, read_budget, read_rollouts, read_run_json
from latent_tts.schedule import Schedule

log = logging.getLogger(__name__)
KEY = "budget.rule.calibration"
NEEDED = {
    "checkpoint_digest": str,
    **dict.fromkeys(("config.model", "config.sampler", "config.search", "config.answer", "config.scorer"), dict),
}


def calibrate_on_run(
    rule: Confidence,
    config: Mapping[str, Any],
    schedule: Schedule,
    digests: Mapping[str, str | None],
    questions: Sequence[str],
    temperature: float | None,
) -> Calibration:
    """Calibrate a rule on the run that it names.

    Args:
        rule: the rule.
        config: of the run that it is to be used in.
        schedule: of that run.
        digests: of the weights there: `model`, and `scorer`, which may be None.
        questions: ids of the questions that it is to be used on.
        temperature: of the weighted vote, if it stops for that.

    Raises:
        UsageError: there is no such run, its rollouts or scores are others, or it has some of these questions.
    """
    folder = Path(str(rule.calibration)).expanduser()
    require(KEY, folder, is_complete(folder), f"must be the folder of a completed run; it has no {RUN_JSON}")
    _check_run(rule, folder, read_run_json(folder, NEEDED), config, schedule, digests)
    rollouts = read_rollouts(folder)
    shared = set(rollouts["question_id"]) & set(questions)
    if shared:
        raise bad_value(
            KEY, folder, f"has {len(shared)} of the questions that this run reports, such as {min(shared)}\n"
            "calibrate on others, as on task.split=valid",
        )  # fmt: skip
    try:
        return calibrate(
            [_tally(rows, temperature) for _, rows in rollouts.groupby("question_id", sort=False)], rule.by
        )
    except ValueError as error:
        raise UsageError(f"{KEY}={folder}: {error}") from error


def _check_run(
    rule: Confidence,
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    schedule: Schedule,
    digests: Mapping[str, str | None],
) -> None:
    """Check that a run's rollouts and scores are of the kind that the rule will see; see `calibrate_on_run`."""
    theirs, ours = record.get("schedule"), json.loads(json.dumps(schedule_key(schedule)))
    groups = ["model", "sampler", "search", "answer", "max_answer_tokens", *(["scorer"] if rule.needs_score else [])]
    problems = {
        "that run used another checkpoint; calibrate on a run of this one": (
            record["checkpoint_digest"] != digests["model"]
        ),
        "its rollouts have no answers (answer.decode=winners)": record["config"]["answer"].get("decode") == "winners",
        "its budget stopped questions early; calibrate on a run with all n rollouts": read_budget(folder) is not None,
        **{
            f"that run used another {group}, or other settings of it; calibrate on one of this": (
                _settings(record["config"], group) != _settings(config, group)
            )
            for group in groups
        },
        f"that run used the schedule {schedule_text(theirs)}; calibrate on one of {schedule_text(ours)}": (
            theirs != ours
        ),
        "that run used another scorer; calibrate on a run with this one": (
            rule.needs_score and (record.get("scorer") or {}).get("digest") != digests["scorer"]
        ),
    }
    for problem, is_so in problems.items():
        require(KEY, folder, not is_so, problem)
    for name in ("dtype", "quantize"):
        pair = [(each.get("engine") or {}).get(name) for each in (record["config"], config)]
        if pair[0] != pair[1]:
            log.warning("%s=%s: that run used engine.%s=%s, this one uses %s", KEY, folder, name, *pair)


def _tally(rows: pd.DataFrame, temperature: float | None) -> Tally:
    """What a rule sees of a question: its rollouts in their order."""
    score_N = rows["score"].to_numpy(dtype=np.float64, na_value=np.nan)
    return Tally(
        n=len(rows),
        answers=[answer if isinstance(answer, str) else None for answer in rows["prediction"]],
        log_weight_N=np.zeros(len(rows)) if temperature is None else Weighted(temperature).log_weights(score_N),
        max_log_weight=0.0 if temperature is None else None,
        logprob_N=rows["answer_logprob"].to_numpy(dtype=np.float64),
        score_N=score_N,
    )


def schedule_key(schedule: Schedule) -> Any:
    """What a schedule does to rollouts; those that give the latents of `sequential` are alike."""
    return "sequential" if schedule.exact else schedule.key


def schedule_text(key: Any) -> str:
    """A `schedule_key`, for people: `speculative chunk=3 tolerance=0.01`."""
    if not isinstance(key, Mapping):
        return str(key)
    named = [f"{name}={as_typed(value)}" for name, value in key.items() if name != "name" and value is not None]
    return " ".join([str(key.get("name")), *named])


def _settings(config: Mapping[str, Any], group: str) -> Any:
    """What a config says of a group that changes rollouts or scores."""
    value = config.get(group)
    not_in_key = FIELDS_NOT_IN_KEY.get(group, set()) - {"reduce"}
    return {key: each for key, each in value.items() if key not in not_in_key} if isinstance(value, Mapping) else value
