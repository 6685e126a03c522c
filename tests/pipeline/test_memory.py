"""Batches that do not fit memory are halved; what fits is remembered, and results are equal."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from latent_tts.engine.cost import Shape
from latent_tts.engine.diversity import DirectionSums
from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.pipeline.batch import rows_per_batch
from latent_tts.pipeline.driver import Driver
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.pipeline.worker import Computed, Part, Request
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.results.cache import known_to_fit
from latent_tts.results.run_folder import ROLLOUT_COLUMNS

MEMORY = Path(__file__).parents[2] / "experiments" / "scale" / "memory.py"
ROUNDED = ["answer_logprob", "answer_margin", "score"]
HALVED = "16 rows do not fit the memory of cpu, so batches are halved to 8"


@pytest.fixture
def seven_rows(monkeypatch):
    """A device that holds seven rows."""
    roll, start = Engine.roll, RolloutState.start

    def refuse(rows):
        if rows > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def roll_few(self, prompts, draw, *arguments, **options):
        refuse(len(draw.rollouts_R))
        return roll(self, prompts, draw, *arguments, **options)

    def start_few(engine, prompts, draw, *arguments, **options):
        refuse(len(draw.rollouts_R))
        return start(engine, prompts, draw, *arguments, **options)

    monkeypatch.setattr(Engine, "roll", roll_few)
    monkeypatch.setattr(RolloutState, "start", start_few)


@pytest.mark.usefixtures("little_memory")
def test_rows_that_do_not_fit_are_warned_about_where_they_were_asked_for(caplog):
    shape = Shape(layers=2, width=64, vocabulary=600, attention=64, keys=32, block_weights=40_000)
    for rows, warnings in ((None, 0), (4096, 1)):
        settings = EngineSettings("float32", "cpu", rows)
        assert rows_per_batch(settings, shape, 1 << 12, "cpu", own_prompt=False) == 128
        assert caplog.text.count("4096 rows do not fit half of the free memory, 128 do") == warnings


def rollouts(result):
    assert result.code == 0, result.err
    return pd.read_parquet(result.last.parent / "rollouts.parquet")


def check_equal(one, other):
    exact = [name for name in ROLLOUT_COLUMNS.names if name not in ROUNDED]
    pd.testing.assert_frame_equal(one[exact], other[exact])
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("seven_rows")
def test_a_batch_that_does_not_fit_is_halved_said_once_and_remembered(run, completed, tmp_path):
    halved = run("engine.rows=16")
    check_equal(rollouts(halved), pd.read_parquet(completed / "rollouts.parquet"))
    assert halved.err.count(HALVED) == 1
    assert halved.err.count("8 rows do not fit the memory of cpu, so batches are halved to 4") == 1
    assert halved.err.count("do not fit") == 2
    (key,) = json.loads((tmp_path / "cache" / "memory.json").read_text())
    assert key.endswith(" float32 cpu")
    again = run("engine.rows=16", "seed=1")
    assert again.code == 0
    assert "halved" not in again.err


@pytest.mark.slow
def test_labels_are_made_in_smaller_batches(ltts, checkpoint, request):
    line = ["annotate", "model=demo_coconut", f"model.checkpoint={checkpoint}", "task.limit=6", "n=4", "completions=2",
            "keep=all", "max_answer_tokens=4", "sampler=gaussian", "engine.rows=16"]  # fmt: skip
    whole = ltts(*line, "output=whole")
    request.getfixturevalue("seven_rows")
    halved = ltts(*line, "output=halved")
    assert halved.code == 0, halved.err
    assert halved.err.count(HALVED) == 1
    for one, other in zip(AnnotationFolder(whole.last).read(), AnnotationFolder(halved.last).read(), strict=True):
        np.testing.assert_array_equal(one.labels_NT, other.labels_NT)


def test_a_single_row_that_does_not_fit_ends_the_run(run, monkeypatch):
    def never(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(Engine, "roll", never)
    result = run()
    assert result.code == 1
    assert "drawing rollouts failed: CUDA out of memory. Tried\n" in result.err
    assert "a smaller engine.rows needs less memory" in result.err


# Arrow's own allocator would reserve a GiB of addresses, used or not
CAPPED = """
import os, resource, sys
os.environ |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
from pathlib import Path
import torch
from latent_tts import cli

torch.ones(1) @ torch.ones(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
cap = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs a cap on memory")
def test_under_a_cap_on_memory_a_run_is_completed_in_smaller_batches(tmp_path):
    line = ["run", "task.limit=64", "n=128", "sampler=gaussian", "scorer=none", "budget=fixed", "engine.rows=8192"]
    frames = []
    for cap in (1 << 40, 1200 << 20):
        arguments = [str(cap), *line, f"hydra.run.dir={cap}", f"paths.cache=cache{cap}"]
        done = subprocess.run([sys.executable, "-c", CAPPED, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        frames.append(pd.read_parquet(tmp_path / str(cap) / "rollouts.parquet"))
    assert "batches are halved" in done.stderr
    check_equal(*frames)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cached_rollout_takes_at_most_300_bytes(tmp_path):
    line = [sys.executable, str(MEMORY), "--drawn=100", "--rollouts=500,20000", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = (float(row.split(",")[3]) for row in done.stdout.splitlines()[1:])
    assert many - few < 20 * (20_000 - 500) * 300 / 1e6


def test_what_fits_is_remembered_for_the_memory_of_the_worker_that_said_it(monkeypatch, tmp_path):
    parts = [Part([], None), Part([], None)]
    done = [Computed(parts[:1], fits={"small": 5}), Computed(parts[1:])]
    monkeypatch.setattr("latent_tts.pipeline.driver.results_of", lambda *_: [([], each) for each in done])
    driver = Driver.__new__(Driver)
    driver.spec = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        executor=SimpleNamespace(in_process=False, fixed=False), budget=SimpleNamespace(adaptive=False), cache=tmp_path,
        guided=False, adapter=SimpleNamespace(latents=6),
    )  # fmt: skip
    common = {"rows": 8, "device": "cpu", "computations": None}
    driver.workers = [SimpleNamespace(memory=name, **common) for name in ("large", "small")]  # pyright: ignore
    driver._pool, driver.timeline = None, []  # pyright: ignore[reportAttributeAccessIssue]
    driver._directions, driver._rows = DirectionSums(), 8
    bar = SimpleNamespace(advance=lambda rows: None)
    assert list(driver.parts([], Request(True, False), bar)) == parts  # pyright: ignore[reportArgumentType]
    assert known_to_fit(tmp_path) == {"small": 5}
