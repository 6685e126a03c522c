"""`ltts tune`: measure which engine settings suit this machine, and keep them as `engine=tuned`."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.engine.cost import Shape
from latent_tts.errors import bad_value, computing
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.drawing import engine_device, load_once, plan_of
from latent_tts.pipeline.keys import machine
from latent_tts.pipeline.spec import ITEM_BYTES, check_engine, check_spread, encode, positions_beside_the_prompt
from latent_tts.results import report, store
from latent_tts.sampler import Sampler
from latent_tts.task import Task

if TYPE_CHECKING:
    from latent_tts.engine.packing import RolloutJob
    from latent_tts.engine.rollout import Engine, Rollouts

log = logging.getLogger(__name__)
FEWEST_ROWS = 64
MOST_REPEATS = 3
WORSE, WORSE_IN_TURN = 0.97, 2  # rates below this share of the best count as worse; so many end a dtype


@dataclass
class Setting:
    """What was measured of a dtype and a number of rows.

    Attributes:
        dtype, rows: as in `engine`.
        rate: rollouts a second.
        same: share of rollouts with the answer of the first dtype, by the same random numbers; where that had not as
            many rows, the share at its most.
    """

    dtype: str
    rows: int
    rate: float
    same: float


def main(cfg: DictConfig) -> None:
    """Measure, print a table, write the settings, and print their path.

    Raises:
        UsageError: a value is not usable, or the file cannot be written.
        RunError: a failure while drawing.
    """
    adapter, sampler, prompts = _prepare(cfg)
    path = Path(cfg.output).expanduser() if cfg.output else config.user_conf_dir() / "engine" / "tuned.yaml"
    config.require("output", path, not path.is_dir(), "the path of a YAML file, this is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # measuring takes minutes, so this is found out before
            pass
    except OSError as error:
        raise bad_value("output", path, f"cannot be written ({error.strerror})") from error
    device = engine_device(cfg)
    with computing("measuring", "nothing was written"):
        settings = _measure(cfg, adapter, sampler, prompts, device)
    best = max(settings, key=lambda setting: setting.rate)
    _print(settings, best, cfg, sampler)
    _write(path, best, cfg, adapter, sampler)
    print(path)


def _prepare(cfg: DictConfig) -> tuple[ModelAdapter, Sampler, dict[str, list[int]]]:
    """Build and check everything that does not need torch; prompts by question id."""
    check_engine(cfg)
    config.require("n", cfg.n, cfg.n >= 1, "a number of rollouts, 1 or more")
    config.require("seconds", cfg.seconds, cfg.seconds > 0, "above 0")
    for dtype in cfg.dtypes:
        config.require("dtypes", dtype, dtype in ITEM_BYTES, f"a list out of {', '.join(ITEM_BYTES)}")
    config.require("dtypes", "[]", len(cfg.dtypes) > 0, f"a list out of {', '.join(ITEM_BYTES)}")
    sampler: Sampler = config.build("sampler", cfg.sampler)
    if sampler.needs_donor:
        raise bad_value("sampler", sampler.name, "one that draws rollouts: greedy, gaussian or dropout")
    task: Task = config.build("task", cfg.task)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    check_spread(sampler, adapter)
    needed = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    return adapter, sampler, encode(adapter, task.questions(), needed)


def _measure(
    cfg: DictConfig, adapter: ModelAdapter, sampler: Sampler, prompts: dict[str, list[int]], device: str
) -> list[Setting]:
    """Rates of every dtype, over rows that double until they no longer help, fit or leave time."""
    import torch

    from latent_tts.engine.packing import RolloutJob, row_bytes
    from latent_tts.engine.rollout import Engine

    shape, schedule = Shape.from_config(adapter.config), adapter.own_schedule
    suffix = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    longest, own_prompt = max(map(len, prompts.values())), "prompt" in sampler.random_phases
    jobs = [RolloutJob(key, key, prompt, list(range(cfg.n))) for key, prompt in prompts.items()]
    settings: list[Setting] = []
    expected: dict[int, list[list[int]]] = {}  # answers of the first dtype, by rows
    for dtype in cfg.dtypes:
        chosen: Any = OmegaConf.merge(cfg, {"engine": {"dtype": dtype}})
        check_engine(chosen)
        engine = Engine(load_once(adapter, device, chosen), plan_of(adapter, cfg.max_answer_tokens, schedule))
        a_row = row_bytes(shape, longest, suffix, ITEM_BYTES[dtype], own_prompt)
        deadline, best, same = time.perf_counter() + cfg.seconds / len(cfg.dtypes), 0.0, 1.0
        worse = 0
        for rows in _rows_to_try(len(jobs) * cfg.n, a_row, device):
            try:
                taken, rollouts = _seconds(partial(_draw, engine, jobs, rows, sampler, cfg.seed), deadline)
            except torch.OutOfMemoryError:
                if rows == FEWEST_ROWS:
                    raise
                log.info("%s, %d rows: more than the GPU's memory", dtype, rows)
                break
            rate = len(rollouts.answer_ids) / taken
            if dtype == cfg.dtypes[0]:
                expected[rows] = rollouts.answer_ids
            if rows in expected:
                pairs = list(zip(rollouts.answer_ids, expected[rows], strict=True))
                same = sum(ids == other for ids, other in pairs) / len(pairs)
            settings.append(Setting(dtype, rows, rate, same))
            log.info("%s, %d rows: %.0f rollouts/s", dtype, rows, rate)
            worse, best = worse + 1 if rate < WORSE * best else 0, max(best, rate)
            # twice the rows, a warm-up beside them
            if worse == WORSE_IN_TURN or time.perf_counter() + 4 * taken > deadline:
                break
    return settings


def _rows_to_try(rollouts: int, row_bytes: int, device: str) -> Iterator[int]:
    """Rows, doubled each time; the first in any case, then as many as there are rollouts for and memory has room."""
    from latent_tts.engine.packing import rows_that_fit

    rows = FEWEST_ROWS
    yield rows
    while 2 * rows <= rollouts and rows_that_fit(2 * rows, row_bytes, device) == 2 * rows:
        rows *= 2
        yield rows


def _draw(engine: Engine, jobs: list[RolloutJob], rows: int, sampler: Sampler, seed: int) -> Rollouts:
    """One batch."""
    from latent_tts.engine.packing import batches, max_prompts
    from latent_tts.search.independent import Independent

    batch = next(batches(jobs, rows, max_prompts(engine.width, engine.device.type)))
    return Independent().roll(engine, batch, sampler, seed)


def _seconds(draw: Callable[[], Rollouts], deadline: float) -> tuple[float, Rollouts]:
    """Median seconds after a warm-up; of the warm-up itself if there is no time left."""
    taken = []
    while True:
        started = time.perf_counter()
        rollouts = draw()
        taken.append(time.perf_counter() - started)
        if len(taken) > MOST_REPEATS or time.perf_counter() + taken[-1] > deadline:
            return statistics.median(taken[1:] or taken), rollouts


def _print(settings: list[Setting], best: Setting, cfg: DictConfig, sampler: Sampler) -> None:
    first = settings[0].dtype
    lines = [
        [setting.dtype, setting.rows, f"{setting.rate:.0f}", f"{setting.rate / best.rate:.2f}", f"{setting.same:.1%}"]
        for setting in settings
    ]
    columns = ["engine.dtype", "engine.rows", "rollouts/s", "of the best", f"answers as in {first}"]
    report.print_table(f"{cfg.model.name}, sampler {sampler.name}, n={cfg.n}", columns, lines)
    if best.dtype != cfg.engine.dtype:
        log.warning(
            "engine=tuned takes engine.dtype=%s instead of %s: the random numbers stay, rounding moves %.1f %% of the "
            "answers measured here; `ltts tune dtypes=[%s]` tunes without that",
            best.dtype, cfg.engine.dtype, 100 * (1 - best.same), cfg.engine.dtype,
        )  # fmt: skip


def _write(path: Path, best: Setting, cfg: DictConfig, adapter: ModelAdapter, sampler: Sampler) -> None:
    measured = f"{best.rate:.0f} rollouts/s with model {adapter.name}, sampler {sampler.name}, n={cfg.n}"
    found = machine()
    with store.whole_file(path) as partial:
        partial.write_text(
            f"# by `ltts tune` on {date.today()}, {found.get('gpu', found['processor'])}: {measured}\n"
            "defaults: [default, _self_]\n"
            f"dtype: {best.dtype}\ndevice: {cfg.engine.device}\nrows: {best.rows}\n"
            f"quantize: {cfg.engine.quantize or 'null'}\n"
        )
