"""`executor=ray`: what its workers compute is what `executor=local` computes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from latent_tts.executor.ray import Ray
from latent_tts.results.annotations import AnnotationFolder

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
MEASURED_METRICS = ("seconds", "floor_seconds", "rollouts_per_second", "peak_memory_bytes", "gbytes")
RAY = ("executor=ray", "executor.workers=2")
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
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, text], cwd=folder, env=environment, capture_output=True, text=True
    )
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
    lines.append((*line_of(checkpoint, new, "n=12"), *RAY, f"{key}=measured"))
    key = "output"
    annotate = ("annotate", *line_of(checkpoint, "completions=2", "keep=all")[1:])
    lines += both("labels", [argument for argument in annotate if not argument.startswith("budget")])
    in_one_process(tmp_path, *lines)
    for name in ("run", "rounds"):
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
    timeline = pd.read_csv(tmp_path / "run_ray" / "timeline.csv")
    assert timeline["rollouts"].sum() == 6 * 12
    assert (tmp_path / "labels_ray" / "timeline.png").is_file()
    assert "executor" not in json.loads((tmp_path / "run_local" / "run.json").read_text())


BAD = [
    (["executor.address=127.0.0.1:1"], ["executor.address=127.0.0.1:1", "nobody answers there"]),
    (["executor.address=here"], ["executor.address=here", "HOST:PORT"]),
    (["executor.workers=0"], ["executor.workers=0", "1 or more"]),
    (["executor.shard=small"], ["executor.shard=small", "measured, fixed"]),
    (["executor.max_restarts=-1"], ["executor.max_restarts=-1", "0 or more"]),
    (["engine.device=cuda:0"], ["engine.device=cuda:0", "gives each worker a GPU"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_what_cannot_be_is_refused(refuse, arguments, words):
    refuse("executor=ray", *arguments, words=words)


def test_without_ray_the_extra_is_named(refuse, monkeypatch):
    monkeypatch.setattr("latent_tts.executor.ray.find_spec", lambda name: None)
    refuse("executor=ray", words=["executor=ray", "pip install 'latent-tts[ray]'"])
    Ray()  # an option that is not used needs nothing
