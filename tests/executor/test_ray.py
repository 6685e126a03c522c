"""`executor=ray`: what its workers compute is what `executor=local` computes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from latent_tts.errors import RunError
from latent_tts.executor.ray import Ray, RayPool
from latent_tts.pipeline.dispatch import ShardQueue, Unit, results_of
from latent_tts.results.annotations import AnnotationFolder

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
MEASURED_METRICS = ("seconds", "floor_seconds", "rollouts_per_second", "peak_memory_bytes", "gbytes")
RAY = ("executor=ray", "executor.workers=2")
STARTS = 3
COMMANDS = """
import sys
from latent_tts import cli

for line in sys.argv[1].splitlines():
    assert cli.main(line.split()) == 0, line
"""


def in_one_process(folder, *lines):
    """Run commands in one process, which starts Ray once; a thread computes."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "LTTS_CACHE": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config"),
    }  # fmt: skip
    text = "\n".join(" ".join(map(str, line)) for line in lines)
    for _ in range(STARTS):
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, text], cwd=folder, env=environment, capture_output=True, text=True
        )
        if "Ray cannot be started" not in done.stderr:  # on a machine that is too busy
            break
    assert done.returncode == 0, done.stderr
    return done.stderr


def tables(folder):
    rollouts = pd.read_parquet(folder / "rollouts.parquet")
    metrics = pd.read_csv(folder / "metrics.csv")
    metrics = metrics[~metrics["metric"].isin(MEASURED_METRICS)].drop(columns="run_id")
    return rollouts, metrics.reset_index(drop=True)


def check_equal(one, other, *, exact):
    """Tables are equal: bit for bit, or up to rounding."""
    for mine, theirs in zip(tables(one), tables(other), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=exact, **({} if exact else {"rtol": 1e-4}))


def line_of(checkpoint, *arguments):
    few = ("task.limit=6", "n=4", "max_answer_tokens=4", "budget=fixed", "sampler=gaussian", "engine.rows=8")
    return ("run", "model=demo_coconut", f"model.checkpoint={checkpoint}", *few, *arguments)


@pytest.mark.slow  # Ray and its workers take half a minute to start; test_dispatch.py is quick
def test_runs_rounds_and_annotations_equal_those_of_local(checkpoint, tmp_path):
    def both(name, line):
        return [(*line, f"{key}={name}_local"), (*line, *RAY, "executor.shard=fixed", f"{key}={name}_ray")]

    key, new = "hydra.run.dir", "cache=off"
    lines = both("run", line_of(checkpoint, new, "n=12", "keep_latents=true"))  # a question is in two batches
    lines += both("rounds", line_of(checkpoint, new, "budget=adaptive", "budget.round=2", "n=6"))
    lines += both("one", line_of(checkpoint, new, "n=200", "task.limit=1"))
    lines.append((*line_of(checkpoint, new, "n=12"), *RAY, f"{key}=measured"))
    key = "output"
    annotate = ("annotate", *line_of(checkpoint, "completions=2", "keep=all")[1:])
    lines += both("labels", [argument for argument in annotate if not argument.startswith("budget")])
    in_one_process(tmp_path, *lines)
    for name in ("run", "rounds", "one"):
        check_equal(tmp_path / f"{name}_local", tmp_path / f"{name}_ray", exact=True)
    check_equal(tmp_path / "run_local", tmp_path / "measured", exact=False)
    ours, theirs = [(tmp_path / f"run_{name}" / "latents.safetensors").read_bytes() for name in ("local", "ray")]
    assert ours == theirs
    for one, other in zip(
        *(AnnotationFolder(tmp_path / f"labels_{name}").read() for name in ("local", "ray")), strict=True
    ):
        np.testing.assert_array_equal(one.labels_NT, other.labels_NT)
        np.testing.assert_array_equal(one.latents_NTD, other.latents_NTD)
    record = json.loads((tmp_path / "run_ray" / "run.json").read_text())
    assert record["executor"]["workers"] == 2
    assert record["executor"]["shards"] == 9  # of eight rows
    assert set(pd.read_csv(tmp_path / "one_ray" / "timeline.csv")["worker"]) == {0, 1}
    timeline = pd.read_csv(tmp_path / "run_ray" / "timeline.csv")
    assert timeline["rollouts"].sum() == 6 * 12
    assert (tmp_path / "labels_ray" / "timeline.png").is_file()
    assert "executor" not in json.loads((tmp_path / "run_local" / "run.json").read_text())


BAD = [
    (["executor.address=127.0.0.1:1"], ["executor.address=127.0.0.1:1", "no Ray cluster answers there"]),
    (["executor.address=here"], ["executor.address=here", "HOST:PORT"]),
    (["executor.workers=0"], ["executor.workers=0", "positive integer"]),
    (["executor.shard=small"], ["executor.shard=small", "measured or fixed"]),
    (["executor.max_restarts=-1"], ["executor.max_restarts=-1", "0 or more"]),
    (["engine.device=cuda:0"], ["engine.device=cuda:0", "gives each worker a GPU"]),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_what_cannot_be_is_refused(refuse, arguments, words):
    refuse("executor=ray", *arguments, words=words)


def test_without_ray_the_extra_is_named(refuse, monkeypatch):
    monkeypatch.setattr("latent_tts.executor.ray.find_spec", lambda name: None)
    refuse("executor=ray", words=["executor=ray", "pip install '.[ray]'"])
    Ray()  # an option that is not used needs nothing


class Gone(Exception):
    """What Ray raises for an actor that it does not start again."""


class FakeRay:
    """Actors whose tasks are done at once; those of dead ones raise."""

    class exceptions:
        RayTaskError = type("RayTaskError", (Exception,), {})
        RayError = Gone

    def __init__(self, dead):
        self._dead, self.warnings = dead, []

    def put(self, content):
        return content

    def wait(self, references, num_returns, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        if reference[0] in self._dead:
            raise Gone("The actor died\nunexpectedly.\n\nMore about it.")
        return reference[1], 1.0, self.warnings


class FakeActor:
    def __init__(self, number):
        call = SimpleNamespace(remote=lambda _id, _content, _method, shard=None: (number, shard))
        self.call = SimpleNamespace(options=lambda max_task_retries: call)


def test_a_lost_workers_shard_goes_to_another_and_without_workers_one_line_says_why(monkeypatch, caplog):
    fake = FakeRay({1})
    monkeypatch.setattr("latent_tts.executor.ray._ray", lambda: fake)
    pool = RayPool(dict.fromkeys([FakeActor(0), FakeActor(1)], True), "work", retries=0)
    units = [Unit(number, 1.0, 1) for number in range(20)]
    timeline = []
    results = [part for _, part in results_of(pool, ShardQueue(units, 2, 1), tuple, timeline)]
    assert sorted(unit for part in results for unit in part) == list(range(20))
    assert pool.workers == [0]
    assert [span.worker for span in timeline if not span.rows] == [1]
    assert "lost worker 1, 1 are left: The actor died unexpectedly\n" in caplog.text
    fake._dead.add(0)
    with pytest.raises(
        RunError, match=r"^no worker .* is left: The actor died unexpectedly; re-run the command to resume$"
    ):
        list(results_of(pool, ShardQueue(units, 1, 1), tuple, timeline))


def test_what_several_workers_warn_of_is_said_once(monkeypatch, caplog):
    fake = FakeRay(set())
    fake.warnings = [("latent_tts", 30, "batches are halved")]
    monkeypatch.setattr("latent_tts.executor.ray._ray", lambda: fake)
    pool = RayPool(dict.fromkeys([FakeActor(0), FakeActor(1)], True), "work", retries=0)
    for worker in pool.workers:
        pool.submit(worker, None)
        pool.next_finished()
    assert caplog.text.count("batches are halved") == 1
