"""What a run needs and can be had without torch: objects built from the config, questions read, everything checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from latent_tts.aggregator import Aggregator
from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget import Budget
from latent_tts.config import build as config
from latent_tts.engine.cost import RolloutCost, Shape
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import UsageError, bad_value
from latent_tts.model import ModelAdapter
from latent_tts.sampler import Sampler
from latent_tts.schedule import Schedule
from latent_tts.scorer import Scorer
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.scorer.none import NoScorer
from latent_tts.search import Search
from latent_tts.task import Task
from latent_tts.types import Question

log = logging.getLogger(__name__)
MOST_ROLLOUTS = 1 << 20
DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# torchao multiplies int8 codes before their scale, too large for float16, and float8 into bfloat16 alone
QUANTIZED_FROM = {"int8": ("float32", "bfloat16"), "float8": ("bfloat16",)}


@dataclass
class Prepared:
    """The objects of a run."""

    adapter: ModelAdapter
    task: Task
    sampler: Sampler
    answers: AnswerSampling
    schedule: Schedule
    search: Search
    budget: Budget
    scorer: Scorer | None
    aggregators: list[Aggregator]
    questions: list[Question]
    prompts: dict[str, list[int]]
    donors: dict[str, Question]
    n: int
    shape: Shape
    forced_ids: list[int] = field(default_factory=list)

    @property
    def passes(self) -> RolloutCost:
        """What a rollout goes through."""
        adapter = self.adapter
        forced = len(adapter.thinking_end_ids) + len(self.forced_ids)
        repeated, stops = self.schedule.repeated_passes(adapter.latents), adapter.stop_id is not None
        return RolloutCost.of(self.shape, adapter.latents, forced, self.sampler.random_phases, repeated, stops)

    @property
    def kept(self) -> int:
        """Rollouts of each question in the tables: all n, or those that the search leaves."""
        return self.n if self.search.survivors is None else self.search.survivors

    @property
    def reported(self) -> list[int]:
        """The budgets that get rows in the metrics; a search that leaves few rollouts has only its own."""
        return self.budget.reported(self.n) if self.search.survivors is None else [self.n]

    def row_key(self, question: Question) -> str:
        """What the cache calls a question: its id, and its donor's where it has one."""
        donor = self.donors.get(question.id)
        return question.id if donor is None else f"{question.id}<{donor.id}"

    def wanted(self) -> pd.DataFrame:
        """The rollouts of the run (columns `row_key`, `rollout`), in the order of its tables."""
        pairs = [(self.row_key(question), number) for question in self.questions for number in range(self.kept)]
        return pd.DataFrame(pairs, columns=["row_key", "rollout"])


def prepare(cfg: DictConfig) -> Prepared:
    """Build and check everything that does not need torch.

    Raises:
        UsageError: a value, a file or a question is not usable; the message names it.
    """
    config.require("n", cfg.n, 1 <= cfg.n <= MOST_ROLLOUTS, f"a number of rollouts, 1 to {MOST_ROLLOUTS}")
    check_engine(cfg)
    decode = cfg.answer.decode
    config.require("answer.decode", decode, decode in ("all", "winners"), "all or winners")
    sampler: Sampler = config.build("sampler", cfg.sampler)
    answers = AnswerSampling(cfg.answer.temperature, cfg.answer.top_p)
    budget: Budget = config.build("budget", cfg.budget)
    config.require(
        "aggregator",
        cfg.aggregator,
        OmegaConf.is_dict(cfg.aggregator),
        "options of the group, as in aggregator=[majority]",
    )
    aggregators: list[Aggregator] = [
        config.build(f"aggregator.{name}", cfg.aggregator[name]) for name in cfg.aggregator
    ]
    built: Scorer | NoScorer = config.build("scorer", cfg.scorer)
    task: Task = config.build("task", cfg.task)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    check_spread(sampler, adapter)
    if adapter.latents == 0 and sampler.only_latents:
        raise bad_value(
            "sampler", sampler.name, f"it acts on latents, and model={adapter.name} has no latents (model.latents=0)\n"
            "sampler=greedy goes with it; answer.temperature above 0 makes its rollouts differ",
        )  # fmt: skip
    schedule = schedule_of(cfg, adapter)
    if isinstance(built, NoScorer) and config.is_given("scorer.checkpoint"):
        raise bad_value("scorer.checkpoint", cfg.scorer.checkpoint, f"{built.reason}; is scorer=latent_rm meant?")
    if isinstance(built, LatentRM) and built.only_own and built.trained.get("reasoner") != adapter.digest:
        built = NoScorer(f"{built.checkpoint} was trained for other weights than {adapter.checkpoint}")
    answers_differ = answers.random or sampler.random_answers
    if isinstance(built, LatentRM) and cfg.n > 1 and answers_differ and not sampler.random_latents:
        why = f"sampler {sampler.name} gives all rollouts of a question the same latents, which it scores alike"
        if not built.only_own:
            raise bad_value("scorer", built.name, why)
        built = NoScorer(why)
    if isinstance(built, NoScorer):
        scorer, aggregators = None, _without_scores(cfg, built, aggregators)
    else:
        scorer, aggregators = built, _with_scores(cfg, built, adapter, aggregators)
    search: Search = config.build("search", cfg.search)
    search.check(cfg.n, sampler, scorer)
    if search.survivors is not None:
        require_steps(schedule, adapter, f"search={search.name} grows rollouts latent by latent")
        config.require(
            "budget", budget.name, budget.name == "fixed", f"fixed: search={search.name} has no figures at a smaller n"
        )
        config.require(
            "answer.decode", decode, decode == "all", f"all: search={search.name} decodes the beams it keeps"
        )
    if cfg.answer.decode == "winners":
        aggregators = _only_winners(cfg, scorer, aggregators)
    needed = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    forced_ids, most = adapter.forced_ids(cfg.answer.forced_prefix), cfg.max_answer_tokens
    if len(forced_ids) >= most:
        allowed = f"fewer tokens than max_answer_tokens={most}, it has {len(forced_ids)}"
        raise bad_value("answer.forced_prefix", cfg.answer.forced_prefix, allowed)
    questions = task.questions()
    prompts = encode(adapter, questions, needed)
    if scorer is not None:
        longest = max(len(prompt) for prompt in prompts.values()) + adapter.latents
        config.require(
            "scorer.checkpoint",
            scorer.name.partition(":")[2],
            longest <= positions_of(scorer),
            f"it has {positions_of(scorer)} positions, the longest prompt with its latents needs {longest}",
        )
        tokens, highest = int(scorer.config.get("vocab_size", 0)), max(map(max, prompts.values()))
        if highest >= tokens:
            why = f"it knows {tokens} tokens, and prompts of model={adapter.name} have number {highest}"
            raise bad_value("scorer.checkpoint", scorer.name.partition(":")[2], why)
    donors: dict[str, Question] = {}
    if sampler.needs_donor:
        if len(questions) < 2:
            raise bad_value("sampler.mode", "shuffle", "needs at least two questions")
        donors = {q.id: other for q, other in zip(questions, [*questions[1:], questions[0]], strict=True)}
    n = cfg.n
    if sampler.deterministic and not answers.random and n > 1:
        log.warning("n=%d: sampler %s gives the same rollout every time, so one is drawn", n, sampler.name)
        n = 1
    shape = Shape.from_config(adapter.config)
    return Prepared(
        adapter,
        task,
        sampler,
        answers,
        schedule,
        search,
        budget,
        scorer,
        aggregators,
        questions,
        prompts,
        donors,
        n,
        shape,
        forced_ids,
    )


def check_spread(sampler: Sampler, adapter: ModelAdapter) -> None:
    """Raises UsageError for a sampler that reads a spread which the model does not predict."""
    if sampler.needs_spread and not adapter.has_spread:
        raise bad_value(
            "sampler", sampler.name, f"the latent head of model={adapter.name} predicts no spread (one of CoLaR with "
            "lt_head.log_std.* does)\nsampler=gaussian adds noise of a size that you choose",
        )  # fmt: skip


def schedule_of(cfg: DictConfig, adapter: ModelAdapter) -> Schedule:
    """The schedule that was chosen, or the model's own.

    Raises:
        UsageError: the model cannot think so, or one was chosen for a model that has its own.
    """
    schedule: Schedule = config.build("schedule", cfg.schedule)
    own = adapter.own_schedule
    if own is not None:
        chosen = config.is_given("schedule") or not schedule.stepwise
        config.require(
            "schedule", schedule.name, not chosen,
            f"model={adapter.name} has its own, {own}: it is part of the model, and there is none to choose",
        )  # fmt: skip
        schedule = own
    schedule.check(adapter)
    return schedule


def require_steps(schedule: Schedule, adapter: ModelAdapter, why: str) -> None:
    """Raises UsageError unless the schedule makes one latent after another, which it says that something needs."""
    key, value = ("schedule", schedule.name) if adapter.own_schedule is None else ("model", adapter.name)
    config.require(key, value, schedule.stepwise, f"{why}, and parallel sweeps remake all latents at once")


def check_engine(cfg: DictConfig) -> None:
    """Raises UsageError unless the keys that every command with an engine has are usable."""
    config.require("max_answer_tokens", cfg.max_answer_tokens, cfg.max_answer_tokens >= 1, "1 or more")
    config.require("engine.dtype", cfg.engine.dtype, cfg.engine.dtype in ITEM_BYTES, f"one of {', '.join(ITEM_BYTES)}")
    device = cfg.engine.device  # whether it is there is asked where something is computed
    config.require("engine.device", device, DEVICE.fullmatch(device) is not None, "one of auto, cpu, cuda, cuda:INDEX")
    rows = cfg.engine.rows
    config.require("engine.rows", rows, rows is None or rows >= 1, "1 or more, or null to let the model decide")
    quantize, dtype = cfg.engine.quantize, cfg.engine.dtype
    if quantize is None:
        return
    config.require("engine.quantize", quantize, quantize in QUANTIZED_FROM, "null, int8 or float8")
    fitting = QUANTIZED_FROM[quantize]
    config.require("engine.quantize", quantize, dtype in fitting, f"takes engine.dtype={' or '.join(fitting)}")
    if find_spec("torchao") is None:
        raise bad_value("engine.quantize", quantize, "torchao is not installed: pip install 'latent-tts[quant]'")


def positions_beside_the_prompt(adapter: ModelAdapter, max_answer_tokens: int) -> int:
    """Positions that a rollout needs besides its prompt.

    Raises:
        UsageError: the model has not as many.
    """
    needed = adapter.latents + len(adapter.thinking_end_ids) + max_answer_tokens
    if needed >= adapter.positions:
        raise bad_value(
            "model.latents",
            adapter.latents,
            f"with max_answer_tokens={max_answer_tokens} a rollout needs {needed} positions "
            f"beside the prompt, {adapter.name} has {adapter.positions}",
        )
    return needed


def encode(adapter: ModelAdapter, questions: Sequence[Question], needed: int) -> dict[str, list[int]]:
    """Token ids of each question's prompt, by its id.

    Raises:
        UsageError: a question cannot be read, or leaves fewer than `needed` positions.
    """
    prompts = {question.id: adapter.encode(question) for question in questions}
    for question in questions:
        if len(prompts[question.id]) + needed > adapter.positions:
            raise UsageError(
                f"question {question.id}: its prompt of {len(prompts[question.id])} tokens, with {needed} for latents "
                f"and answer (model.latents, max_answer_tokens), needs more than the {adapter.positions} positions of "
                f"{adapter.name}\nit begins {question.text[:60]!r}"
            )
    return prompts


def _without_scores(cfg: DictConfig, built: NoScorer, aggregators: list[Aggregator]) -> list[Aggregator]:
    """The aggregators that need no scores; those that do may be left out only where nobody asked for them.

    Raises:
        UsageError: somebody did.
    """
    scored = [aggregator.name for aggregator in aggregators if aggregator.needs_score]
    why = "scorer=none" if built.reason is None else f"scorer=auto: {built.reason}"
    if scored and not config.is_default("aggregator", cfg):
        raise bad_value("aggregator", ",".join(scored), f"needs a scorer ({why})")
    if built.reason is not None:
        log.info("%s, so rollouts get no scores", why)
    return [aggregator for aggregator in aggregators if not aggregator.needs_score]


def _with_scores(
    cfg: DictConfig, scorer: Scorer, adapter: ModelAdapter, aggregators: list[Aggregator]
) -> list[Aggregator]:
    """Check a scorer against the model; the aggregators take from it what they leave to it."""
    if adapter.latents == 0:
        raise bad_value("scorer", scorer.name, "a scorer scores latents, and model.latents=0")
    sampler: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
    for warning in scorer.check(adapter, sampler):
        log.warning("%s", warning)
    return [
        replace(aggregator, temperature=scorer.temperature)
        if isinstance(aggregator, Weighted) and aggregator.temperature is None
        else aggregator
        for aggregator in aggregators
    ]


def _only_winners(cfg: DictConfig, scorer: Scorer | None, aggregators: list[Aggregator]) -> list[Aggregator]:
    """What can be reported where only the best-of-n picks are decoded.

    Raises:
        UsageError: there is no scorer, or something that was asked for needs every answer.
    """
    if scorer is None:
        raise bad_value("answer.decode", "winners", "needs a scorer, which finds them")
    if scorer.positions == "official":
        raise bad_value(
            "scorer.positions", "official", "needs every answer, and answer.decode=winners decodes the picks alone"
        )
    best = [aggregator for aggregator in aggregators if aggregator.name == "best_of_n"]
    if not best or (len(best) < len(aggregators) and not config.is_default("aggregator", cfg)):
        names = ",".join(aggregator.name for aggregator in aggregators)
        raise bad_value("aggregator", names, "answer.decode=winners goes with best_of_n alone; votes need every answer")
    return best


def positions_of(scorer: Scorer) -> int:
    """The longest sequence a scorer takes."""
    settings: Mapping[str, Any] = scorer.config
    return int(settings.get("n_positions", settings.get("max_position_embeddings", 0)))
