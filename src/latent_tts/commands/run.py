"""`ltts run`: draw rollouts, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from latent_tts import config, metrics, plot, report, stats, store
from latent_tts.cost import Shape
from latent_tts.errors import RunError, UsageError, bad_value
from latent_tts.types import Aggregator, Budget, ModelAdapter, Question, Reasoner, Sampler, Task

log = logging.getLogger(__name__)
ENGINE_SEMANTICS = 1  # part of every cache key: raised when the same settings give other rollouts
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FIGURE = "scaling.png"


@dataclass
class Prepared:
    """Everything that a run needs and that can be had without torch."""

    adapter: ModelAdapter
    task: Task
    sampler: Sampler
    budget: Budget
    aggregators: list[Aggregator]
    questions: list[Question]
    prompts: dict[str, list[int]]
    donors: dict[str, Question]
    n: int
    shape: Shape


def main(cfg: DictConfig) -> None:
    """Run one job.

    Raises:
        UsageError: something in the config is wrong; nothing has been loaded.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    started = time.perf_counter()
    prepared = prepare(cfg)
    folder = config.output_dir()
    wanted = pd.DataFrame(
        [(row_key(prepared, q), i) for q in prepared.questions for i in range(prepared.n)],
        columns=["row_key", "rollout"],
    )
    cache = store.RolloutCache(Path(cfg.paths.cache).expanduser(), cache_key(cfg, prepared))
    drawn_now = draw_missing(cfg, prepared, cache, wanted)
    rows = cache.read(wanted)
    latents = store.unpack_latents(rows["latents"], prepared.shape.width)
    rollouts = rollout_table(prepared, rows)
    table = metrics.metric_rows(
        rollouts,
        drawn=prepared.n,
        reported=prepared.budget.reported(prepared.n),
        aggregators=prepared.aggregators,
        diversity_Q=[stats.diversity(part) for part in _by_question(latents, prepared.n)],
        gflops=gflops(prepared, rollouts),
        run=run_columns(cfg, prepared),
    )
    store.write_rollouts(folder, rollouts)
    if cfg.keep_latents:
        store.write_latents(folder, latents)
    store.write_metrics(folder / store.METRICS, table)
    if table["n"].nunique() > 1:
        plot.scaling_curve(table, folder / FIGURE)
    store.write_run_json(
        folder,
        {
            "config": OmegaConf.to_container(cfg, resolve=True),
            "cache": str(cache.folder),
            "checkpoint_digest": prepared.adapter.digest,
            "devices": sorted(set(rows["device"])),
            "rows": sorted({int(value) for value in rows["rows"]}),
            "rollouts": {"total": len(rows), "drawn_now": drawn_now},
            "seconds": {"drawing": float(rows["seconds"].sum()), "this_command": time.perf_counter() - started},
            "versions": versions(),
            "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
        },
    )
    report.print_metrics(table)
    print(folder / store.METRICS)


def finish_sweep(folder: Path) -> None:
    """Join the tables of a sweep's jobs, draw their curves, and end with the joined table's path."""
    joined, left_out = store.join_metrics([path.parent for path in sorted(folder.glob("*/.hydra"))])
    for path in left_out:
        log.warning("%s did not complete: it is not in the joined table", path)
    if joined.empty:
        return
    store.write_metrics(folder / store.METRICS, joined)
    if joined["n"].nunique() > 1:
        plot.scaling_curve(store.read_metrics(folder / store.METRICS), folder / FIGURE)
        print(folder / FIGURE)
    print(folder / store.METRICS)


def prepare(cfg: DictConfig) -> Prepared:
    """Build and check everything that does not need torch.

    Raises:
        UsageError: a value, a file or a question is not usable; the message names it.
    """
    config.require("n", cfg.n, cfg.n >= 1, "a number of rollouts, 1 or more")
    config.require("max_answer_tokens", cfg.max_answer_tokens, cfg.max_answer_tokens >= 1, "1 or more")
    config.require("engine.dtype", cfg.engine.dtype, cfg.engine.dtype in ITEM_BYTES, f"one of {', '.join(ITEM_BYTES)}")
    rows = cfg.engine.rows
    config.require("engine.rows", rows, rows is None or rows >= 1, "1 or more, or null to let the model decide")
    sampler: Sampler = config.build("sampler", cfg.sampler)
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
    task: Task = config.build("task", cfg.task)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    needed = adapter.latents + len(adapter.thinking_end_ids) + cfg.max_answer_tokens
    if needed >= adapter.positions:
        raise bad_value(
            "model.latents",
            adapter.latents,
            f"with max_answer_tokens={cfg.max_answer_tokens} a rollout needs {needed} positions "
            f"beside the prompt, {adapter.name} has {adapter.positions}",
        )
    questions = task.questions()
    prompts = {question.id: adapter.encode(question) for question in questions}
    for question in questions:
        if len(prompts[question.id]) + needed > adapter.positions:
            raise UsageError(
                f"question {question.id}: its prompt of {len(prompts[question.id])} tokens, {adapter.latents} latents "
                f"and max_answer_tokens={cfg.max_answer_tokens} need more than the {adapter.positions} positions of "
                f"{adapter.name}\nit begins {question.text[:60]!r}"
            )
    donors: dict[str, Question] = {}
    if sampler.needs_donor:
        if len(questions) < 2:
            raise bad_value("sampler.mode", "shuffle", "needs at least two questions")
        donors = {q.id: other for q, other in zip(questions, [*questions[1:], questions[0]], strict=True)}
    n = cfg.n
    if sampler.deterministic and n > 1:
        log.warning("n=%d: sampler %s gives the same rollout every time, so one is drawn", n, sampler.name)
        n = 1
    return Prepared(
        adapter, task, sampler, budget, aggregators, questions, prompts, donors, n, Shape.from_config(adapter.config)
    )


def row_key(prepared: Prepared, question: Question) -> str:
    """What the cache calls a question: its id, and its donor's where it has one."""
    donor = prepared.donors.get(question.id)
    return question.id if donor is None else f"{question.id}<{donor.id}"


def cache_key(cfg: DictConfig, prepared: Prepared) -> dict[str, Any]:
    """Everything that determines a rollout besides its question and number."""
    return {
        "semantics": ENGINE_SEMANTICS,
        "checkpoint": prepared.adapter.digest,
        "prompt": prepared.adapter.prompt_recipe,
        "adapter": cfg.model._target_,
        "sampler": OmegaConf.to_container(cfg.sampler, resolve=True),
        "latents": prepared.adapter.latents,
        "seed": cfg.seed,
        "schedule": "sequential",
        "dtype": cfg.engine.dtype,
        "max_answer_tokens": cfg.max_answer_tokens,
    }


def draw_missing(cfg: DictConfig, prepared: Prepared, cache: store.RolloutCache, wanted: pd.DataFrame) -> int:
    """Draw what the cache lacks; loads the model only if there is something. Returns how many rollouts were drawn."""
    present = cache.present()
    lacking: dict[str, list[int]] = {}
    for key, rollout in wanted.itertuples(index=False):
        if (key, rollout) not in present:
            lacking.setdefault(key, []).append(rollout)
    total = sum(map(len, lacking.values()))
    if total < len(wanted):
        log.info("%d of %d rollouts are in the cache %s", len(wanted) - total, len(wanted), cache.folder)
    if not total:
        return 0
    from latent_tts import executor
    from latent_tts.engine.packing import Job, default_rows, measured_flops, row_bytes, rows_that_fit
    from latent_tts.engine.rollout import Engine, Plan

    device = resolve_device(cfg.engine.device)
    shape, adapter = prepared.shape, prepared.adapter
    jobs = [
        Job(
            row_key=key,
            question_id=question.id,
            prompt=prepared.prompts[question.id],
            rollouts=lacking[key],
            donor=prepared.prompts[prepared.donors[question.id].id] if prepared.donors else None,
        )
        for question in prepared.questions
        if (key := row_key(prepared, question)) in lacking
    ]
    own_prompt = "prompt" in prepared.sampler.random_phases
    forced = len(adapter.thinking_end_ids)
    suffix = adapter.latents + forced + cfg.max_answer_tokens
    longest = max(len(job.prompt) for job in jobs)
    bytes_a_row = row_bytes(shape, longest, suffix, ITEM_BYTES[cfg.engine.dtype], own_prompt)
    wanted_rows = cfg.engine.rows or default_rows(shape.width, device)
    rows = rows_that_fit(wanted_rows, bytes_a_row, device)
    if rows < wanted_rows:
        log.warning("engine.rows: %d rows do not fit half of the free memory, %d do", wanted_rows, rows)
    work = sum(
        shape.prompt_flops(len(job.prompt))
        + len(job.rollouts)
        * shape.rollout_flops(len(job.prompt), adapter.latents, forced, cfg.max_answer_tokens, own_prompt)
        for job in jobs
    )
    rate = measured_flops(shape.width, cfg.engine.dtype, device)
    log.info(
        "%d rollouts to draw: at most %.3g GFLOP (every answer as long as allowed), at least %.0f s at the "
        "%.3g GFLOP/s of this device's matrix products, about %.2g GB for a batch of %d rows and the weights",
        total, work / 1e9, work / rate, rate / 1e9,
        (rows * bytes_a_row + shape.weight_bytes(ITEM_BYTES[cfg.engine.dtype])) / 1e9, rows,
    )  # fmt: skip
    reasoner = load_once(adapter, device, cfg.engine.dtype)
    engine = Engine(reasoner, Plan(adapter.latents, adapter.thinking_end_ids, adapter.eos_id, cfg.max_answer_tokens))
    with report.progress_bar(total, "rollouts") as bar:
        try:
            executor.fill(
                cache,
                jobs,
                engine,
                prepared.sampler,
                seed=cfg.seed,
                rows=rows,
                progress=lambda k: report.advance(bar, k),
            )
        except (RuntimeError, MemoryError) as error:  # what torch raises: out of memory, a failing device
            raise RunError(
                f"drawing rollouts failed: {str(error).splitlines()[0]}\nwhat was drawn is in {cache.folder}; "
                "the same line goes on from there (a smaller engine.rows needs less memory)"
            ) from error
    return total


_loaded: dict[tuple[str, str, str, str], Reasoner] = {}


def load_once(adapter: ModelAdapter, device: str, dtype: str) -> Reasoner:
    """The adapter's loaded model; the last one is kept, since the jobs of a sweep mostly share it."""
    key = (type(adapter).__name__, adapter.digest, device, dtype)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = adapter.load(device=device, dtype=dtype)
    return _loaded[key]


def resolve_device(wanted: str) -> str:
    """The torch device of `engine.device`.

    Raises:
        UsageError: no such device, or CUDA is asked for and not there.
    """
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise bad_value("engine.device", wanted, "one of auto, cpu, cuda, cuda:INDEX")
    if kind == "cpu":
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise bad_value(
            "engine.device", wanted, f"this machine has {count} CUDA devices; engine.device=cpu works anywhere"
        )
    return f"cuda:{index or 0}"


def rollout_table(prepared: Prepared, rows: pd.DataFrame) -> pd.DataFrame:
    """The rollouts table: cached rows, with answers read by the model's and the task's rules."""
    adapter, task = prepared.adapter, prepared.task
    answer_ids = [[int(token) for token in ids] for ids in rows["answer_ids"]]
    texts = [adapter.answer_text(ids) for ids in answer_ids]
    owners = [question for question in prepared.questions for _ in range(prepared.n)]
    predictions = [task.parse(adapter.raw_answer(text)) for text in texts]
    return pd.DataFrame(
        {
            "question_id": [question.id for question in owners],
            "rollout": rows["rollout"].astype("int32"),
            "prediction": pd.array(predictions, dtype=object),
            "correct": [p is not None and task.equal(p, q.answer) for p, q in zip(predictions, owners, strict=True)],
            "score": pd.array([None] * len(rows), dtype="Float32"),
            "answer_logprob": rows["answer_logprob"],
            "answer_margin": rows["answer_margin"],
            "stop_reason": rows["stop_reason"],
            "answer_text": texts,
            "answer_ids": answer_ids,
            "answer_tokens": [len(ids) for ids in answer_ids],
            "latent_steps": rows["latent_steps"].astype("int32"),
            "seconds": rows["seconds"],
            "peak_memory_bytes": rows["peak_memory_bytes"],
        }
    )


def gflops(prepared: Prepared, rollouts: pd.DataFrame) -> list[tuple[float, float]]:
    """Per question: GFLOP paid once, and GFLOP that each of its rollouts adds on average."""
    shape, adapter = prepared.shape, prepared.adapter
    own_prompt = "prompt" in prepared.sampler.random_phases
    forced = len(adapter.thinking_end_ids)
    answers = rollouts["answer_tokens"].to_numpy().reshape(-1, prepared.n).mean(1)
    pairs = []
    for question, answer in zip(prepared.questions, answers, strict=True):
        prompt = len(prepared.prompts[question.id])
        once = 0.0 if own_prompt else shape.prompt_flops(prompt)
        each = shape.rollout_flops(prompt, adapter.latents, forced, float(answer), own_prompt)
        pairs.append((once / 1e9, each / 1e9))
    return pairs


def run_columns(cfg: DictConfig, prepared: Prepared) -> dict[str, Any]:
    """The columns that say which run a metrics row belongs to."""
    sampler = prepared.sampler
    own_columns = {
        "n", "seed", "model.name", "model.checkpoint", "task.split", "task.path", "task._target_", "sampler._target_",
        f"sampler.{sampler.param}", "budget", "aggregator", "paths", "engine.dtype", "engine.rows", "engine.device",
        "keep_latents",
    }  # fmt: skip
    columns = {
        "model": prepared.adapter.name,
        "checkpoint": prepared.adapter.checkpoint,
        "task": prepared.task.name,
        "split": prepared.task.split or "",
        "sampler": sampler.name,
        "sampler_param": sampler.param or "",
        "sampler_value": "" if sampler.value is None else str(sampler.value),
        "settings": config.non_defaults(cfg, own_columns),
        "schedule": "",
        "search": "",
        "budget": prepared.budget.name,
        "scorer": "",
        "seed": str(cfg.seed),
        "dtype": cfg.engine.dtype,
    }
    identity = {
        **columns,
        "n": prepared.n,
        "weights": prepared.adapter.digest,
        "questions": [q.id for q in prepared.questions],
    }
    return {"run_id": store.settings_digest(identity)[:12], **columns}


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit where there is one."""
    names = ("latent-tts", "torch", "transformers", "tokenizers", "numpy", "pandas", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, **commit()}


def commit() -> dict[str, str]:
    """The commit of a source checkout (`-dirty` if it has changes); nothing for an installed package."""
    import subprocess

    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return {}
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False
    )
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def _by_question(latents: list, n: int) -> list:
    """Latents (N, T, D) of each question; rows of unequal steps are cut to the shortest."""
    import numpy as np

    groups = [latents[start : start + n] for start in range(0, len(latents), n)]
    return [np.stack([row[: min(map(len, group))] for row in group]) for group in groups]
