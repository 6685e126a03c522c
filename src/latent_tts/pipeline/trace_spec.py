"""What `ltts trace` is asked for, checked without torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latent_tts.budget import is_adaptive
from latent_tts.budget.fixed import Fixed
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import RunError, UsageError, check_fields, is_number, require
from latent_tts.pipeline import rescoring
from latent_tts.pipeline.calibration import schedule_text
from latent_tts.pipeline.rollouts import RunRollouts
from latent_tts.pipeline.spec import RunSpec, check_sampler
from latent_tts.pipeline.tables import rollout_table
from latent_tts.results.cache import NOT_DECODED
from latent_tts.results.run_folder import ANSWERS, read_budget, read_rollouts
from latent_tts.results.trace import MAPS
from latent_tts.sampler import Sampler
from latent_tts.sampler.greedy import Greedy
from latent_tts.search.independent import Independent

MAX_TRACED_QUESTIONS = 8  # side by side
MAX_TRACED_ROLLOUTS = 64  # of a run that has more
MAX_TOKENS = 20  # of a lens
SHOWN_IDS = 3  # in an error
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """What is shown of the rollouts.

    Attributes:
        maps: methods, see `results.trace.MAPS`.
        top: tokens of each latent.
        threshold: relative dependency from which a latent counts as depending on another.
        directions: random directions per latent for the dependencies; 0 for none.
    """

    maps: list[str]
    top: int
    threshold: float
    directions: int

    def __post_init__(self) -> None:
        require(
            "maps",
            self.maps,
            0 < len(self.maps) == len(set(self.maps) & set(MAPS)),
            f"must be a list of {' and '.join(MAPS)}, as in maps=[{','.join(MAPS)}]",
        )
        require(
            "maps",
            self.maps,
            "tsne" not in self.maps or find_spec("sklearn") is not None,
            "scikit-learn is not installed: pip install '.[trace]' in the clone",
        )
        require("top", self.top, 1 <= self.top <= MAX_TOKENS, f"must be 1 to {MAX_TOKENS}")
        check_fields("", self, threshold="a positive number", directions="an integer, 0 or more")


@dataclass(frozen=True)
class TraceSpec:
    """What is to be shown.

    Attributes:
        run: the rollouts, of few questions.
        beside: those of another sampler on the same maps; None for none.
        deterministic: one rollout per question without randomness.
        view: how they are shown.
        source: the folder of the run; None where it is drawn now.
    """

    run: RunSpec
    beside: RunSpec | None
    deterministic: RunSpec
    view: View
    source: Path | None = None

    @property
    def no_dependencies(self) -> str:
        """Why there is no dependency graph; empty where there is one."""
        if self.view.directions == 0:
            return "left out by directions=0"
        if self.run.adapter.own_schedule is None:
            return ""
        return f"model={self.run.adapter.name} makes its latents in sweeps of its own"


def check_trace(
    run: RunSpec,
    view: View,
    beside: tuple[Sampler, Mapping[str, Any]] | None,
    *,
    n: int,
    source: Path | None = None,
) -> TraceSpec:
    """Check that a run can be traced.

    Args:
        run: the run, of the questions to be shown.
        view: how they are shown.
        beside: another sampler for the same maps, with its config.
        n: how many of its rollouts to draw.
        source: see `TraceSpec`.

    Raises:
        UsageError: there are too many questions, or nothing to see.
    """
    require(
        "task.limit",
        len(run.questions),
        len(run.questions) <= MAX_TRACED_QUESTIONS,
        f"a trace shows at most {MAX_TRACED_QUESTIONS} questions side by side",
    )
    require("model.latents", run.adapter.latents, run.adapter.latents > 0, "must be 1 or more: a trace shows latents")
    run = replace(run, decode="all")  # a trace shows every answer
    other = None
    if beside is not None:
        sampler, config = beside
        require(
            "beside",
            sampler.name,
            not sampler.needs_donor,
            "reads the latents of other questions, so it has no place on the map of one",
        )
        check_sampler(sampler, run.adapter)
        other = replace_sampler(run, sampler, config, 1 if sampler.deterministic else n)
    return TraceSpec(
        run, other, replace_sampler(run, Greedy(), {"_target_": "latent_tts.sampler.greedy.Greedy"}, 1), view, source
    )


def replace_sampler(run: RunSpec, sampler: Sampler, config: Mapping[str, Any], n: int) -> RunSpec:
    """The same questions under another sampler, each rollout on its own and every answer the most probable one."""
    return replace(
        run, sampler=sampler, search=Independent(), budget=Fixed(), answers=AnswerSampling(), decode="all", counts=None,
        donors={}, refresh=False, on_answers=None, n=n, config={**run.config, "sampler": dict(config)},
    )  # fmt: skip


def select_questions(
    spec: RunSpec, source: Path, record: Mapping[str, Any], wanted: Sequence[str], n: int | None
) -> RunSpec:
    """Some questions of a completed run.

    Args:
        spec: the run.
        source: its folder.
        record: its `run.json`.
        wanted: ids of questions, or beginnings of ids; none for the first question.
        n: how many of a question's first rollouts to show; None for all that the run's budget used, at most
            `MAX_TRACED_ROLLOUTS`.

    Raises:
        UsageError: a question is not in the run, it has fewer rollouts, or its checkpoint has changed.
        RunError: the questions of its task have changed since that run.
    """
    rescoring.require_same_weights(spec, source, record)
    questions = {question.id: question for question in spec.questions}
    counts = read_rollouts(source).groupby("question_id", sort=False).size()
    if gone := [name for name in counts.index if name not in questions]:
        raise RunError(f"run={source}: the questions of its task have changed since that run: {gone[0]} is missing")
    chosen = [questions[name] for name in find_ids(wanted, list(counts.index), source)]
    has = [int(counts[question.id]) for question in chosen]
    whole = spec.guided or (spec.scorer is not None and spec.scorer.positions == "official")
    if n is not None:
        require("n", n, 1 <= n <= min(has), f"must be 1 to {min(has)}, which the run has")
        require("n", n, not whole or n == max(has), "its rollouts were drawn or scored all together: n must be theirs")
    budget = read_budget(source)
    if budget is not None and n is None:
        has = budget.set_index("question_id")["used"][[question.id for question in chosen]].tolist()
    counts = None if whole else [min(n or MAX_TRACED_ROLLOUTS, count) for count in has]
    return with_fixed_budget(replace(spec, questions=chosen), counts)


def with_fixed_budget(run: RunSpec, counts: list[int] | None) -> RunSpec:
    """The run with the rollouts that it has; where its budget looked at them, it has picks of one aggregator alone."""
    budget, aggregators = run.budget, run.aggregators
    if is_adaptive(budget):
        aggregators = [each for each in aggregators if each.name == budget.aggregator]
    return replace(run, counts=counts, budget=Fixed(), aggregators=aggregators)


def warn_of_differences(run: RunSpec, rollouts: RunRollouts, source: Path) -> None:
    """Warn of answers that differ from those of the run's folder, as on another machine where rounding decides."""
    here = rollout_table(run, rollouts).set_index(["question_id", "rollout"])
    there = read_rollouts(source).set_index(["question_id", "rollout"]).loc[here.index]
    decoded = there["stop_reason"] != NOT_DECODED
    changed = (there["answer_text"] != here["answer_text"]) & decoded
    if changed.any():
        log.warning("run=%s: %d of %d answers differ from those of the run: they were drawn again, with other rounding",
                    source, changed.sum(), decoded.sum())  # fmt: skip


def find_ids(wanted: Sequence[str], ids: Sequence[str], source: Path) -> list[str]:
    """The ids of a run's questions that are meant: ids, or beginnings that only one has; the first one for none.

    Raises:
        UsageError: there is none, or there are several.
    """
    found = []
    for text in wanted or ids[:1]:
        fits = [text] if text in ids else [name for name in ids if text and name.startswith(text)]
        if len(fits) != 1:
            what = "the ids of several questions begin with it" if fits else "no question of this run"
            raise UsageError(
                f"question={text}: {what}; {source / ANSWERS} lists the ids, such as "
                f"{', '.join((fits or ids)[:SHOWN_IDS])}"
            )
        found += fits
    return list(dict.fromkeys(found))


def shown_settings(spec: TraceSpec) -> dict[str, str]:
    """The settings, as people read them."""
    run, view = spec.run, spec.view
    rollouts = sorted(set(run.table_counts))
    settings = {
        "model": run.adapter.name,
        "checkpoint": run.adapter.checkpoint,
        "task": "/".join(filter(None, [run.task.name, run.task.split])),
        "sampler": sampler_text(run.sampler),
        "beside": "" if spec.beside is None else sampler_text(spec.beside.sampler),
        "rollouts": f"{rollouts[0]}" if len(rollouts) == 1 else f"{rollouts[0]} to {rollouts[-1]}",
        "latents": f"{'up to ' if run.adapter.stop_id is not None else ''}{run.adapter.latents}",
        "schedule": schedule_text(run.schedule.key),
        "search": run.search.name if run.guided else "",
        "scorer": "" if run.scorer is None else run.scorer.name.removeprefix("latent_rm:"),
        "seed": str(run.seed),
        "dtype": run.engine.dtype,
        "threshold": f"{view.threshold:g}",
        "run": "" if spec.source is None else str(spec.source),
    }
    return {key: value for key, value in settings.items() if value}


def sampler_text(sampler: Sampler) -> str:
    """A sampler with its parameter: `dropout 0.05`."""
    value = sampler.value
    return (
        sampler.name
        if value is None
        else f"{sampler.name} {value:g}"
        if is_number(value)
        else f"{sampler.name} {value}"
    )
