"""What a run needs, checked without torch: `RunRequest` is what the user asked for, `RunSpec` what will be done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator
from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget import AdaptiveBudget, Budget, is_adaptive
from latent_tts.budget.adaptive import Adaptive
from latent_tts.budget.fixed import Fixed
from latent_tts.budget.rule.confidence import Confidence
from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.draft import DraftFile, find_draft
from latent_tts.engine.cost import RolloutCost, Shape
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import DEVICE, SEED, UsageError, bad_value, check_fields, is_whole, require
from latent_tts.executor import Executor
from latent_tts.executor.local import Local
from latent_tts.pipeline import calibration
from latent_tts.results.run_folder import ANSWERS
from latent_tts.sampler import Sampler
from latent_tts.schedule import GUESSES_OF_ROLLOUTS, Schedule
from latent_tts.schedule.auto import Auto
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.scorer.none import NoScorer
from latent_tts.search import Search
from latent_tts.task import Task, has_gold, questions_of
from latent_tts.types import Float64, Int64, Question

log = logging.getLogger(__name__)
MAX_ROLLOUTS = 1 << 20
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
# torchao multiplies int8 codes before it scales them, which overflows float16; its float8 products are bfloat16 only
QUANTIZED_FROM = {"int8": ("float32", "bfloat16"), "float8": ("bfloat16",)}


@dataclass(frozen=True)
class EngineSettings:
    """The keys `engine.*`: how rollouts are computed.

    Attributes:
        dtype: of weights and activations: `float32`, `bfloat16` or `float16` (`fp32`, `bf16`, `fp16` mean the same).
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`. Whether it exists is checked where something is computed.
        rows: maximum rows per batch; None derives it from the model's width and the device.
        quantize: None, or the format of the reasoner's blocks: `int8` or `float8`.
        graph: whether batches are replayed as CUDA graphs: `auto`, `on` or `off`.
    """

    dtype: str
    device: str
    rows: int | None
    quantize: str | None = None
    graph: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))
        check_fields(
            "engine",
            self,
            dtype=BYTES_PER_NUMBER,
            rows="a positive integer, or null to let the model decide",
            graph=("auto", "on", "off"),
            device=DEVICE,
        )
        if self.quantize is None:
            return
        require("engine.quantize", self.quantize, self.quantize in QUANTIZED_FROM, "must be null, int8 or float8")
        fitting = QUANTIZED_FROM[self.quantize]
        require("engine.quantize", self.quantize, self.dtype in fitting, f"takes engine.dtype={' or '.join(fitting)}")
        require(
            "engine.quantize",
            self.quantize,
            find_spec("torchao") is not None,
            "torchao is not installed: pip install '.[quant]' in the clone",
        )

    @property
    def bytes_per_number(self) -> int:
        """Bytes per number of `dtype`."""
        return BYTES_PER_NUMBER[self.dtype]


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """What the user asked a command for that draws rollouts: the objects that the config describes, and its values.

    Attributes:
        adapter, task, sampler, schedule: the chosen options.
        answers: how answer tokens are chosen.
        n: rollouts per question.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
        engine: how rollouts are computed.
        config: the resolved config, as `run.json` keeps it.
        chosen: which of the keys `schedule`, `budget`, `aggregator` and `scorer.checkpoint` the user set. The others
            are defaults, which may be replaced by what the model or the search needs.
        executor: where rollouts are computed.
    """

    adapter: CheckpointAdapter
    task: Task
    sampler: Sampler
    schedule: Schedule
    answers: AnswerSampling
    n: int
    seed: int
    max_answer_tokens: int
    engine: EngineSettings
    config: Mapping[str, Any]
    chosen: frozenset[str] = frozenset()
    executor: Executor = field(default_factory=Local)

    @property
    def all_same(self) -> bool:
        """Whether all rollouts of a question would be the same, so that one is drawn."""
        return self.sampler.deterministic and not self.answers.random


@dataclass(frozen=True, kw_only=True)
class RunRequest(DrawingRequest):
    """What the user asked `ltts run` for.

    Attributes:
        search, budget, aggregators: the chosen options.
        scorer: the chosen scorer; `NoScorer` for none.
        decode: `all`, or `winners`: only best-of-n picks are decoded.
        forced_prefix: text that every answer begins with.
        cache: folder of cached rollouts.
        refresh: whether to draw anew the rollouts that the cache has.
        on_answers: called after each batch with the (row key, rollout) pairs and the answer ids.
        keep_steps: whether `Scores` keep those of each latent; tables do without them.
    """

    search: Search
    budget: Budget
    scorer: LatentRM | NoScorer
    aggregators: list[Aggregator]
    decode: str
    forced_prefix: str
    cache: Path
    refresh: bool = False
    on_answers: Callable[[Sequence[tuple[str, int]], Sequence[Sequence[int]]], None] | None = None
    keep_steps: bool = False

    @property
    def guided(self) -> bool:
        """Whether the scorer decides which rollouts the run has: those that survive the search."""
        return self.search.survivors is not None


@dataclass(frozen=True, kw_only=True)
class RunSpec(RunRequest):
    """A checked run: every value that a stage of the pipeline reads.

    Attributes:
        schedule: the requested one, or the model's own.
        draft: the file of its draft head; None without one.
        planned: the keys that `schedule=auto` has chosen, as tables show them; empty without it.
        planned_on: the kind of device on which what it has chosen was faster; None where any will do.
        scorer: None if rollouts get no scores.
        aggregators: those that can be reported.
        n: the requested one; 1 if all rollouts of a question would be the same.
        questions: of the task.
        prompts: token ids by question id.
        donors: by question id, the question whose latents it uses; empty unless the sampler needs them.
        forced_ids: token ids that every answer begins with.
        counts: rollouts of each of `questions`; None if each has as many.
    """

    scorer: LatentRM | None  # pyright: ignore[reportIncompatibleVariableOverride]
    draft: DraftFile | None
    planned: dict[str, Any]
    planned_on: str | None
    questions: list[Question]
    prompts: dict[str, list[int]]
    donors: dict[str, Question]
    forced_ids: list[int]
    counts: list[int] | None = None

    @cached_property
    def shape(self) -> Shape:
        """The sizes of the model."""
        return replace(Shape.from_config(self.adapter.sizes), block_item=None if self.engine.quantize is None else 1)

    @property
    def passes(self) -> RolloutCost:
        """The passes of a rollout, and their cost."""
        adapter, schedule = self.adapter, self.schedule
        return RolloutCost.of(
            self.shape,
            adapter.latents,
            forced=len(adapter.thinking_end_ids) + len(self.forced_ids),
            random_phases=self.sampler.random_phases,
            repeated=schedule.repeated_passes(adapter.latents),
            looks_for_stop=adapter.stop_id is not None,
            exit_tokens=None if schedule.exit is None else len(exit_ids(adapter, schedule)),
            latent_weights=adapter.latent_weights,
        )

    @property
    def longest_sequence(self) -> int:
        """Tokens and latents of the longest sequence that the model may run."""
        return max(map(len, self.prompts.values())) + reserved_positions(self.adapter, self.max_answer_tokens)

    @property
    def given_scorer(self) -> LatentRM:
        """The scorer of a run that has one."""
        assert self.scorer is not None, "no scorer"
        return self.scorer

    @property
    def kept(self) -> int:
        """Rollouts of each question in the tables: all n, or those that the search keeps."""
        return self.search.survivors or self.n

    @property
    def table_counts(self) -> list[int]:
        """Rollouts of each question in the tables, in the order of `questions`."""
        return [self.kept] * len(self.questions) if self.counts is None else self.counts

    def rollout_gflop(
        self,
        question: Question,
        steps_N: Int64,
        tokens_N: Int64 | None,
        conflicts_N: Int64 | None = None,
        *,
        scored: bool = True,
    ) -> tuple[float, Float64]:
        """The GFLOP that the rollouts of a question share, and what each of them adds (N).

        Args:
            question: whose rollouts they are.
            steps_N: latents of each.
            tokens_N: answer tokens of each, forced ones included; None where no answer is decoded.
            conflicts_N: latents of each that were computed again; None for none.
            scored: whether the run's scorer, if it has one, reads them.
        """
        passes, prompt = self.passes, len(self.prompts[question.id])
        shared = passes.shared_flops(prompt)
        each_N = (
            passes.thinking_flops(prompt, steps_N)
            if tokens_N is None
            else passes.rollout_flops(prompt, steps_N, tokens_N - len(self.forced_ids))
        )
        if self.schedule.guess in GUESSES_OF_ROLLOUTS:
            shared += passes.guess_flops(prompt)
        if self.draft is not None:
            each_N = each_N + self.draft.record.flops(prompt)
        if conflicts_N is not None:  # with all latents before them, which is a little too many
            each_N = each_N + conflicts_N * passes.again_flops(prompt, steps_N)
        if scored and self.scorer is not None:
            head = Shape.from_config(self.scorer.sizes)
            shared, each_N = shared + head.pass_flops(prompt), each_N + head.scoring_flops(prompt, steps_N)
        return float(shared) / 1e9, np.asarray(each_N, dtype=np.float64) / 1e9

    def row_key(self, question: Question) -> str:
        """A question's name in the cache: its id, and the id of its donor if it has one."""
        donor = self.donors.get(question.id)
        return question.id if donor is None else f"{question.id}<{donor.id}"

    def wanted(self, after: Sequence[int] | None = None) -> pd.DataFrame:
        """The rollouts of the run (columns `row_key`, `rollout`), in the order of its tables.

        Args:
            after: how many of each question's first rollouts to leave out; None for none.
        """
        keys = [self.row_key(question) for question in self.questions]
        first_Q = np.zeros(len(keys), dtype=np.int64) if after is None else np.array(after)
        size_Q = np.array(self.table_counts) - first_Q
        numbers = np.arange(size_Q.sum()) + (first_Q + size_Q - size_Q.cumsum()).repeat(size_Q)
        codes = np.arange(len(keys)).repeat(size_Q)  # one str object per row would cost too much memory
        row_keys = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(keys))
        return pd.DataFrame({"row_key": row_keys, "rollout": numbers.astype(np.int32)})


def check_run(request: RunRequest) -> RunSpec:
    """Check everything that can be checked without torch.

    Raises:
        UsageError: a value, a file or a question cannot be used; the message names it.
    """
    adapter, sampler, decode = request.adapter, request.sampler, request.decode
    require("n", request.n, 1 <= request.n <= MAX_ROLLOUTS, f"must be a number of rollouts, 1 to {MAX_ROLLOUTS}")
    check_fields("", request, seed=SEED)
    request.executor.check(request.engine.device)
    require("answer.decode", decode, decode in ("all", "winners"), "must be all or winners")
    adapter.check()
    check_sampler(sampler, adapter)
    request, planned, planned_on = follow_plan(request)
    schedule = settle_schedule(request.schedule, adapter, chosen="schedule" in request.chosen)
    scorer = settle_scorer(request)
    aggregators = settle_aggregators(request, scorer)
    budget = settle_budget(request, scorer, aggregators)
    scorer = None if isinstance(scorer, NoScorer) or (is_adaptive(budget) and not budget.needs_score) else scorer
    check_search(request, schedule, scorer)
    if schedule.verify:
        require("answer.decode", decode, decode == "all", "must be all: schedule.verify compares every answer")
        require(
            "budget",
            budget.name,
            not is_adaptive(budget),
            "must be ladder or fixed: schedule.verify compares equally many rollouts of each question",
        )
    reserved = reserved_positions(adapter, request.max_answer_tokens)
    looked_at = len(exit_ids(adapter, schedule)) - len(adapter.thinking_end_ids)
    require(
        "schedule.exit_prefix",
        schedule.exit_prefix,
        looked_at <= request.max_answer_tokens,
        f"must be at most max_answer_tokens={request.max_answer_tokens} tokens, it has {looked_at}",
    )
    questions = questions_of(request.task)
    if is_adaptive(budget):
        budget.check(len(questions), request.n, request.task.rule.name)
        budget = calibrate_budget(budget, request, schedule, aggregators, scorer, questions)
    if not has_gold(questions):
        log.info(
            "task=%s: no gold answers, so no accuracies; answers are in %s",
            request.task.name, ANSWERS, extra={"once": True},
        )  # fmt: skip
    settled: dict[str, Any] = {
        "schedule": schedule, "budget": budget, "scorer": scorer, "aggregators": aggregators,
        "n": needed_rollouts(request),
    }  # fmt: skip
    spec = RunSpec(
        **vars(request) | settled,
        draft=None if schedule.draft is None else find_draft(schedule.draft, adapter.digest, adapter.latents),
        planned=planned,
        planned_on=planned_on,
        questions=questions,
        prompts=encode_prompts(adapter, questions, reserved),
        donors=donors_of(questions) if sampler.needs_donor else {},
        forced_ids=forced_answer_ids(adapter, request.forced_prefix, request.max_answer_tokens),
    )
    check_position_scaling(
        "model.checkpoint", adapter.checkpoint, adapter.config, adapter.positions, spec.longest_sequence
    )
    if scorer is not None:
        check_scorer_reads(scorer, adapter, spec.prompts)
    return spec


def check_sampler(sampler: Sampler, adapter: CheckpointAdapter) -> None:
    """Check that a sampler can draw from a model.

    Raises:
        UsageError: the sampler reads a spread that the model does not predict, or acts on latents and the model has
            none.
    """
    require(
        "sampler",
        sampler.name,
        not sampler.needs_spread or bool(adapter.has_spread),
        f"the latent head of model={adapter.name} predicts no spread (one of CoLaR with "
        "lt_head.log_std.* does)\nsampler=gaussian adds noise of a size that you choose",
    )
    require(
        "sampler",
        sampler.name,
        adapter.latents != 0 or not sampler.only_latents,
        f"it acts on latents, and model={adapter.name} has no latents (model.latents=0)\n"
        "sampler=greedy goes with it; answer.temperature above 0 makes its rollouts differ",
    )


def settle_schedule(schedule: Schedule, adapter: CheckpointAdapter, *, chosen: bool) -> Schedule:
    """The schedule that was requested, or the model's own.

    Args:
        schedule: the requested one.
        adapter: the model.
        chosen: whether the user chose it.

    Raises:
        UsageError: the model cannot run it; or the model has its own, and the user chose another.
    """
    own = adapter.own_schedule
    if own is not None:
        text = calibration.schedule_text(own.key)
        require(
            "schedule.exit", schedule.exit, schedule.exit is None,
            f"must be null: model={adapter.name} has a schedule of its own ({text})",
        )  # fmt: skip
        require(
            "schedule", schedule.name, not chosen and schedule.stepwise,
            f"model={adapter.name} has its own ({text}): it is part of the model and cannot be chosen",
        )  # fmt: skip
        schedule = own
    schedule.check(adapter)
    return schedule


def follow_plan(request: RunRequest) -> tuple[RunRequest, dict[str, Any], str | None]:
    """A request with the schedule that `schedule=auto` chooses, also in its config.

    Returns:
        The request, the keys that tables show, and the device that a parallel schedule was timed on.

    Raises:
        UsageError: there is no plan to follow.
    """
    schedule = request.schedule
    if not isinstance(schedule, Auto) or request.adapter.own_schedule is not None:
        return request, {}, None
    rows = len(request.task.questions()) * (1 if request.all_same else request.n)
    plan = schedule.read(request.adapter, request.adapter.digest, request.engine.dtype)
    chosen = plan.choose(min(rows, request.engine.rows or rows))
    node = {"_target_": f"{type(chosen).__module__}.{type(chosen).__qualname__}", **vars(chosen)}
    shown = {f"schedule.{each.name}": node[each.name] for each in fields(chosen) if node[each.name] != each.default}
    request = replace(request, schedule=chosen, config={**request.config, "schedule": node})
    return request, shown, None if chosen.stepwise else plan.device


def require_steps(schedule: Schedule, adapter: CheckpointAdapter, why: str) -> None:
    """Raise UsageError with the reason `why` unless the schedule makes all latents, one after another."""
    key, value = ("schedule", schedule.name) if adapter.own_schedule is None else ("model", adapter.name)
    require(key, value, schedule.stepwise, f"{why}, and parallel sweeps make all latents at once")
    require("schedule.exit", schedule.exit, schedule.exit is None, f"must be null: {why}")


def settle_scorer(request: RunRequest) -> LatentRM | NoScorer:
    """The scorer of the run, or the reason why there is none. The scorer's warnings are logged.

    Raises:
        UsageError: the user chose a scorer that cannot score these rollouts.
    """
    scorer, adapter, sampler, config = request.scorer, request.adapter, request.sampler, request.config
    if isinstance(scorer, NoScorer):
        require(
            "scorer.checkpoint",
            config["scorer"].get("checkpoint"),
            "scorer.checkpoint" not in request.chosen,
            f"{scorer.reason}; is scorer=latent_rm meant?",
        )
        return scorer
    if scorer.only_own and scorer.trained.get("reasoner") != adapter.digest:
        return NoScorer(f"{scorer.checkpoint} was trained for other weights than {adapter.checkpoint}")
    if request.n > 1 and (request.answers.random or sampler.random_answers) and not sampler.random_latents:
        why = f"sampler {sampler.name} gives all rollouts of a question the same latents, and so the same score"
        require("scorer", scorer.name, scorer.only_own, why)
        return NoScorer(why)
    require("scorer", scorer.name, adapter.latents != 0, "a scorer scores latents, and model.latents=0")
    warnings, budget = scorer.check(adapter, config["sampler"]), request.budget
    for warning in () if is_adaptive(budget) and not budget.needs_score else warnings:  # else it scores nothing
        log.warning("%s", warning)
    return scorer


def settle_aggregators(request: RunRequest, scorer: LatentRM | NoScorer) -> list[Aggregator]:
    """The aggregators that can be reported; those that need scores get their temperature from the scorer.

    Default aggregators that cannot be reported are left out.

    Raises:
        UsageError: one that the user chose cannot be reported.
    """
    aggregators, chosen = request.aggregators, "aggregator" in request.chosen
    if isinstance(scorer, NoScorer):
        scored = [aggregator.name for aggregator in aggregators if aggregator.needs_score]
        require("aggregator", ",".join(scored), not scored or not chosen, f"needs a scorer ({scorer})")
        require("answer.decode", "winners", request.decode == "all", "needs a scorer, which finds the winners")
        if scorer.reason is not None:
            log.info("%s, so rollouts get no scores", scorer, extra={"once": True})
        return [aggregator for aggregator in aggregators if not aggregator.needs_score]
    aggregators = [
        replace(aggregator, temperature=scorer.temperature)
        if isinstance(aggregator, Weighted) and aggregator.temperature is None
        else aggregator
        for aggregator in aggregators
    ]
    if request.decode == "all":
        return aggregators
    require(
        "scorer.positions",
        "official",
        scorer.positions != "official",
        "needs every answer, and answer.decode=winners decodes only the picks",
    )
    best = [aggregator for aggregator in aggregators if aggregator.name == "best_of_n"]
    require(
        "aggregator",
        ",".join(aggregator.name for aggregator in aggregators),
        bool(best) and (best == aggregators or not chosen),
        "answer.decode=winners goes with best_of_n alone; votes need every answer",
    )
    return best


def check_search(request: RunRequest, schedule: Schedule, scorer: LatentRM | None) -> None:
    """Check that the search goes with the schedule, the scorer and `answer.decode`.

    Raises:
        UsageError: it does not.
    """
    search, decode = request.search, request.decode
    require("search", search.name, scorer is not None or not request.guided, "needs a scorer, as in scorer=latent_rm")
    search.check(request.n, request.sampler, scorer)
    if not request.guided:
        return
    require_steps(
        schedule, request.adapter, f"search={search.name} grows rollouts of equally many latents step by step"
    )
    require("answer.decode", decode, decode == "all", f"must be all: search={search.name} decodes the beams it keeps")


def settle_budget(request: RunRequest, scorer: LatentRM | NoScorer, aggregators: Sequence[Aggregator]) -> Budget:
    """The requested budget; `fixed` in place of the default if a search keeps few of its rollouts.

    Raises:
        UsageError: the search has no figures at a smaller n, and the user chose a budget that reports them; or the
            budget comes in rounds, and the search has none; or it looks at something that the run does not have.
    """
    budget, decode = request.budget, request.decode
    if request.guided:
        require(
            "budget",
            budget.name,
            budget.name == "fixed" or "budget" not in request.chosen,
            f"must be fixed: rollouts of search={request.search.name} depend on each other, so they cannot come in "
            "rounds, and have no figures at a smaller n",
        )
        return Fixed()
    if not is_adaptive(budget):
        return budget
    require("answer.decode", decode, decode == "all", f"must be all: budget={budget.name} looks at every answer")
    chosen = ("budget/rule", budget.rule.name) if isinstance(budget, Adaptive) else ("budget", budget.name)
    if budget.needs_score:
        if isinstance(scorer, NoScorer):
            raise bad_value(*chosen, f"needs scores, and there is no scorer ({scorer})")
        require(
            "scorer.positions",
            scorer.positions,
            scorer.positions != "official",
            "gives scores only once all n answers are known, and the budget needs them earlier; use correct",
        )
        require(
            *chosen,
            budget.aggregator != "weighted" or scorer.range is not None,
            "bounds the weights of future votes, and scores have no declared range\n"
            "scorer.range=[LOW,HIGH] declares one; a score beyond it is an error",
        )
    reported = [aggregator.name for aggregator in aggregators]
    require(
        *chosen,
        budget.aggregator in reported,
        f"looks at the pick of {budget.aggregator}, which is not reported: aggregator=[{','.join(reported)}]",
    )
    return budget


def calibrate_budget(
    budget: AdaptiveBudget,
    request: RunRequest,
    schedule: Schedule,
    aggregators: Sequence[Aggregator],
    scorer: LatentRM | None,
    questions: Sequence[Question],
) -> AdaptiveBudget:
    """The budget, with its rule calibrated if it needs that; see `calibration.calibrate_on_run`.

    Raises:
        UsageError: the run to calibrate on cannot be used.
    """
    if not (isinstance(budget, Adaptive) and isinstance(budget.rule, Confidence)):
        return budget
    fitted = calibration.calibrate_on_run(
        budget.rule,
        request.config,
        schedule,
        {"model": request.adapter.identity, "scorer": None if scorer is None else scorer.digest},
        [each.id for each in questions],
        next((each.temperature for each in aggregators if isinstance(each, Weighted)), None)
        if budget.aggregator == "weighted"
        else None,
    )
    return replace(budget, rule=replace(budget.rule, fitted=fitted))


def check_position_scaling(key: str, checkpoint: str, config: Mapping[str, Any], positions: int, longest: int) -> None:
    """Check that the meaning of positions does not depend on the batch.

    Args:
        key: the config key of the checkpoint, which the error names.
        checkpoint: its value.
        config: the checkpoint's `config.json`.
        positions: tokens of the longest sequence that the checkpoint takes.
        longest: tokens of the longest sequence of the run.

    Raises:
        UsageError: the model scales positions by the longest sequence of the batch once that exceeds a limit, and a
            sequence of this run may exceed it.
    """
    config = files.common_sizes(config)  # of a model that sees, too
    given = [part for part in map(config.get, ("rope_parameters", "rope_scaling")) if isinstance(part, dict)]
    of_layers = [part for each in given for part in each.values() if isinstance(part, dict)]  # one per kind of layer
    for part in [*given, *of_layers]:
        kind = part.get("type") if part.get("type") in LENGTH_DEPENDENT_ROPE else part.get("rope_type")
        limit = part.get("original_max_position_embeddings", config.get("original_max_position_embeddings", positions))
        require(
            key,
            checkpoint,
            kind not in LENGTH_DEPENDENT_ROPE or not is_whole(limit) or longest <= limit,
            f"it scales positions by the longest sequence of the batch ({kind}) beyond {limit} "
            f"tokens, so results would depend on the batch; this run may need {longest} tokens\n"
            "use shorter questions or a smaller max_answer_tokens",
        )


def check_scorer_reads(scorer: LatentRM, adapter: CheckpointAdapter, prompts: Mapping[str, Sequence[int]]) -> None:
    """Check that a scorer has the positions and the vocabulary that the prompts need.

    Raises:
        UsageError: it has fewer.
    """
    longest = max(map(len, prompts.values())) + adapter.latents
    tokens, highest = int(scorer.sizes["vocab_size"]), max(map(max, prompts.values()))
    require(
        "scorer.checkpoint",
        scorer.checkpoint,
        longest <= scorer_positions(scorer),
        f"it has {scorer_positions(scorer)} positions, the longest prompt with its latents needs {longest}",
    )
    check_position_scaling("scorer.checkpoint", scorer.checkpoint, scorer.config, scorer_positions(scorer), longest)
    require(
        "scorer.checkpoint",
        scorer.checkpoint,
        highest < tokens,
        f"its vocabulary has {tokens} tokens, and prompts of model={adapter.name} have token id {highest}",
    )


def scorer_positions(scorer: LatentRM) -> int:
    """Tokens of the longest sequence that a scorer takes."""
    return int(scorer.sizes["n_positions" if "n_embd" in scorer.sizes else "max_position_embeddings"])


def reserved_positions(adapter: CheckpointAdapter, max_answer_tokens: int) -> int:
    """Positions that a rollout needs beyond its prompt.

    Raises:
        UsageError: the model has fewer, or `max_answer_tokens` is below 1.
    """
    require("max_answer_tokens", max_answer_tokens, max_answer_tokens >= 1, "must be 1 or more")
    needed = adapter.latents + len(adapter.thinking_end_ids) + max_answer_tokens
    require(
        "model.latents",
        adapter.latents,
        needed < adapter.positions,
        f"with max_answer_tokens={max_answer_tokens} a rollout needs {needed} positions beyond the prompt, "
        f"and {adapter.name} has {adapter.positions} in all",
    )
    return needed


def forced_answer_ids(adapter: CheckpointAdapter, prefix: str, max_answer_tokens: int) -> list[int]:
    """Token ids of `answer.forced_prefix`.

    Raises:
        UsageError: the tokenizer cannot read it, or it leaves no token to choose.
    """
    ids = adapter.forced_ids(prefix)
    require(
        "answer.forced_prefix",
        prefix,
        len(ids) < max_answer_tokens,
        f"must be fewer tokens than max_answer_tokens={max_answer_tokens}, it has {len(ids)}",
    )
    return ids


def exit_ids(adapter: CheckpointAdapter, schedule: Schedule) -> list[int]:
    """The tokens between a latent and the answer that `schedule.exit` is about, as if it were the last one.

    Raises:
        UsageError: the model cannot read `schedule.exit_prefix`.
    """
    prefix = "" if schedule.exit is None else schedule.exit_prefix or ""
    try:
        return [*adapter.thinking_end_ids, *adapter.forced_ids(prefix)]
    except UsageError as error:
        raise bad_value(
            "schedule.exit_prefix", prefix, f"must be text in the vocabulary of model={adapter.name}, without its eos"
        ) from error


def encode_prompts(adapter: CheckpointAdapter, questions: Sequence[Question], reserved: int) -> dict[str, list[int]]:
    """Token ids of each question's prompt, by its id.

    Raises:
        UsageError: a question cannot be read, or leaves fewer than `reserved` positions.
    """
    prompts = {question.id: adapter.encode(question) for question in questions}
    for question in questions:
        if len(prompts[question.id]) + reserved > adapter.positions:
            raise UsageError(
                f"question {question.quoted}: its prompt of {len(prompts[question.id])} tokens, with {reserved} for "
                f"latents and answer (model.latents, max_answer_tokens), needs more than the {adapter.positions} "
                f"positions of {adapter.name}"
            )
    return prompts


def donors_of(questions: Sequence[Question]) -> dict[str, Question]:
    """By question id, the question whose latents it uses: the next one, and for the last question the first one.

    Raises:
        UsageError: there is only one question.
    """
    require("sampler.mode", "shuffle", len(questions) >= 2, "needs at least two questions")
    return {q.id: other for q, other in zip(questions, [*questions[1:], questions[0]], strict=True)}


def needed_rollouts(request: RunRequest) -> int:
    """The requested n; 1, with a warning, if nothing random makes rollouts differ."""
    if request.all_same and request.n > 1:
        log.warning(
            "n=%d: sampler %s gives the same rollout every time, so one is drawn%s",
            request.n,
            request.sampler.name,
            "" if request.adapter.latents else f": model={request.adapter.name} has no latents",
        )
        return 1
    return request.n
