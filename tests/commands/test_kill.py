"""Commands that are killed again and again, at moments nobody chose, end where one that was left alone ends."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
KILLS = 5
MEASURED = ("seconds", "floor_seconds", "rollouts_per_second", "peak_memory_bytes")
ANNOTATE = ["annotate", "task.limit=60", "n=4", "completions=2", "sampler=gaussian", "engine.rows=64"]


@pytest.fixture
def command(tmp_path):
    """Start a command in a folder of the test's own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "LTTS_CACHE": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }

    def start(*arguments, cache="cache"):
        own = environment | {"LTTS_CACHE": str(tmp_path / cache)}
        return subprocess.Popen(
            [sys.executable, "-m", "latent_tts", *map(str, arguments)],
            cwd=tmp_path, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()[-1]


def killed(start, seconds, seed):
    """Kill a command `KILLS` times, each after a part of what it takes as a whole, then let it end."""
    moments = random.Random(seed)
    killed_in_work = 0
    for _ in range(KILLS):
        process = start()
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        killed_in_work += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed_in_work, "every process had ended before it was killed"
    return finish(start())


def timed(start):
    started = time.perf_counter()
    return finish(start()), time.perf_counter() - started


def test_run(command, tmp_path):
    line = ["run", "task.limit=150", "n=32", "sampler=gaussian", "engine.rows=256", "budget=ladder"]
    whole, seconds = timed(lambda: command(*line, cache="whole"))
    again = killed(lambda: command(*line), seconds, 1)
    tables = [pd.read_csv(path) for path in (whole, again)]
    kept = [table[~table["metric"].isin([*MEASURED, "gbytes"])].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*kept, rtol=1e-5)


def annotations(folder):
    return {name: tensor for shard in folder.glob("*_on0.safetensors") for name, tensor in load_file(shard).items()}


def test_annotate(command, tmp_path):
    _, seconds = timed(lambda: command(*ANNOTATE, f"output={tmp_path / 'whole'}"))
    killed(lambda: command(*ANNOTATE, f"output={tmp_path / 'killed'}"), seconds, 2)
    whole, again = annotations(tmp_path / "whole"), annotations(tmp_path / "killed")
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-4)


def weights(path):
    return load_file(f"{path}/model.safetensors")


def same_weights(whole, again):
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_train_rm(command, tmp_path):
    finish(command(*ANNOTATE, f"output={tmp_path / 'train'}"))
    finish(command(*ANNOTATE, "task.split=valid", f"output={tmp_path / 'valid'}"))
    line = [
        "train-rm", f"annotations={tmp_path / 'train'}", f"valid_annotations={tmp_path / 'valid'}",
        "optimization.epochs=6", "optimization.batch=4",
    ]  # fmt: skip
    whole, seconds = timed(lambda: command(*line, "output=whole"))
    again = killed(lambda: command(*line, "output=killed"), seconds, 3)
    same_weights(weights(tmp_path / whole), weights(tmp_path / again))


def test_train_reasoner(command, tmp_path):
    line = [
        "train-reasoner", "backbone.layers=1", "backbone.width=32", "optimization.batch=8", "save_every=5",
        "valid_questions=8", "recipe.written_updates=40", "recipe.stage_updates=[20]", "recipe.final_updates=40",
        "optimization.bf16=false",
    ]  # fmt: skip
    whole, seconds = timed(lambda: command(*line, "output=whole"))
    again = killed(lambda: command(*line, "output=killed"), seconds, 4)
    same_weights(load_bf16(tmp_path / whole), load_bf16(tmp_path / again))


def load_bf16(folder):
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
