"""`budget/rule=confidence` calibrated on the rollouts of another run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget import Tally
from latent_tts.budget.rule.confidence import Calibration, Confidence, calibrate
from latent_tts.errors import UsageError, as_typed, bad_value, require
from latent_tts.pipeline.code import FIELDS_NOT_IN_KEY
from latent_tts.results.run_folder import RUN_JSON, is_complete, read_budget, read_rollouts, read_run_json
from latent_tts.schedule import Schedule

log = logging.getLogger(__name__)
KEY = "budget.rule.calibration"


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
    needed = {f"config.{group}": dict for group in ("model", "sampler", "search", "answer", "scorer")}
    record = read_run_json(folder, {"checkpoint_digest": str, **needed})
    require(
        KEY,
        folder,
        record["checkpoint_digest"] == digests["model"],
        "that run used another checkpoint; calibrate on a run of this one",
    )
    require(
        KEY,
        folder,
        record["config"]["answer"].get("decode") != "winners",
        "its rollouts have no answers (answer.decode=winners)",
    )
    require(
        KEY,
        folder,
        read_budget(folder) is None,
        "its budget stopped questions early; calibrate on a run with all n rollouts",
    )
    groups = ["model", "sampler", "search", "answer", "max_answer_tokens", *(["scorer"] if rule.needs_score else [])]
    for group in groups:
        same = _settings(record["config"], group) == _settings(config, group)
        require(KEY, folder, same, f"that run used another {group}, or other settings of it; calibrate on one of this")
    theirs, ours = record.get("schedule"), json.loads(json.dumps(schedule_key(schedule)))
    same = theirs in (None, ours)  # earlier versions do not say it
    require(
        KEY,
        folder,
        same,
        f"that run used the schedule {schedule_text(theirs)}; calibrate on one of {schedule_text(ours)}",
    )
    for name in ("dtype", "quantize"):
        pair = [(each.get("engine") or {}).get(name) for each in (record["config"], config)]
        if pair[0] != pair[1]:
            log.warning("%s=%s: that run used engine.%s=%s, this one uses %s", KEY, folder, name, *pair)
    require(
        KEY,
        folder,
        not rule.needs_score or (record.get("scorer") or {}).get("digest") == digests["scorer"],
        "that run used another scorer; calibrate on a run with this one",
    )
    rollouts = read_rollouts(folder)
    shared = set(rollouts["question_id"]) & set(questions)
    if shared:
        why = f"has {len(shared)} of the questions that this run reports, such as {min(shared)}"
        raise bad_value(KEY, folder, f"{why}\ncalibrate on others, as on task.split=valid")
    tallies = []
    for _, rows in rollouts.sort_values("rollout", kind="stable").groupby("question_id", sort=False):
        score_N = rows["score"].to_numpy(dtype=np.float64, na_value=np.nan)
        tallies.append(
            Tally(
                n=len(rows),
                answers=[answer if isinstance(answer, str) else None for answer in rows["prediction"]],
                log_weight_N=np.zeros(len(rows)) if temperature is None else Weighted(temperature).log_weights(score_N),
                max_log_weight=0.0 if temperature is None else None,
                logprob_N=rows["answer_logprob"].to_numpy(dtype=np.float64),
                score_N=score_N,
            )
        )
    try:
        return calibrate(tallies, rule.by)
    except ValueError as error:
        raise UsageError(f"{KEY}={folder}: {error}") from error


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
