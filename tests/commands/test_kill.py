"""Commands that are killed again and again, at moments nobody chose, end where one that was left alone ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from latent_tts.results.run_folder import ROLLOUT_COLUMNS

pytestmark = pytest.mark.slow
KILLS = 5
MEASURED = ["seconds", "floor_seconds", "rollouts_per_second", "peak_memory_bytes", "gbytes"]
ROUNDED = ["answer_logprob", "answer_margin", "score"]
ANNOTATE = ["annotate", "task.limit=60", "n=4", "completions=2", "sampler=gaussian", "engine.rows=8"]
RESULTS = (".parquet", ".safetensors")
SAVES_OFTEN_AND_SLOWLY = """
import sys, time
from latent_tts.cli import entry
from latent_tts.results import files

def take_time(event, arguments):
    if event == "os.rename" and not str(arguments[1]).endswith(".pyc"):
        time.sleep(0.05)

# every batch is saved, on a quick machine as on a slow one, and there is time to see that before the last one is
files.SECONDS_BETWEEN_PARTS = 0.0
sys.addaudithook(take_time)
entry()
"""


@pytest.fixture
def command(tmp_path):
    """Start a command in a folder of the test's own."""

    def start(*arguments, cache="cache"):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "LTTS_CACHE": str(tmp_path / cache),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
        }
        with (tmp_path / "stderr.txt").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-c", SAVES_OFTEN_AND_SLOWLY, *map(str, arguments)],
                cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    return start


def finish(process, tmp_path):
    out, _ = process.communicate()
    assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    return out.splitlines()[-1]


def files(folder):
    return {str(Path(at) / name) for at, _, names in os.walk(folder) for name in names}


def wait_for_work(process, folder, moments):
    """Return when a process has saved a result, and a random number of files and milliseconds later."""
    before, further, first = files(folder), moments.randrange(8), None
    while process.poll() is None:
        new = files(folder) - before
        if first is None and any(name.endswith(RESULTS) for name in new):
            first = len(new)
        if first is not None and len(new) >= first + further:
            time.sleep(moments.uniform(0, 0.02))
            return
        time.sleep(0.001)


def killed(start, tmp_path, seed):
    """What a command prints last that is killed `KILLS` times in its work and then left alone.

    Where it has ended before it is killed, the next one begins anew in another folder: a list, of one line per folder.
    """
    moments, kills, lines = random.Random(seed), 0, []
    while True:
        name = f"killed{len(lines)}"
        process = start(name)
        if kills < KILLS:
            wait_for_work(process, tmp_path / name, moments)
            process.kill()
        out, _ = process.communicate()
        if process.returncode == -signal.SIGKILL and not out:
            kills += 1
            continue
        assert out, (tmp_path / "stderr.txt").read_text()
        lines.append(out.splitlines()[-1])
        if kills == KILLS:
            return lines
        assert len(lines) < KILLS, f"{kills} processes were killed in their work, the others had ended before"


def test_a_killed_run_started_again_gives_equal_tables(command, tmp_path):
    line = ["run", "task.limit=150", "n=32", "sampler=gaussian", "engine.rows=256", "budget=ladder"]
    whole = (tmp_path / finish(command(*line, cache="whole"), tmp_path)).parent
    for table in killed(lambda name: command(*line, cache=name), tmp_path, 1):
        again = (tmp_path / table).parent
        assert json.loads((again / "run.json").read_text())["rollouts"]["drawn_now"] < 150 * 32
        tables = [pd.read_csv(folder / "metrics.csv") for folder in (whole, again)]
        kept = [table[~table["metric"].isin(MEASURED)].reset_index(drop=True) for table in tables]
        pd.testing.assert_frame_equal(*kept, rtol=1e-5)
        frames = [pd.read_parquet(folder / "rollouts.parquet") for folder in (whole, again)]
        exact = [name for name in ROLLOUT_COLUMNS.names if name not in ROUNDED]
        pd.testing.assert_frame_equal(frames[0][exact], frames[1][exact])
        pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-3, atol=1e-4)


def annotations(folder):
    return {name: tensor for shard in folder.glob("*_on0.safetensors") for name, tensor in load_file(shard).items()}


def annotate(command, output, *arguments):
    return command(*ANNOTATE, *arguments, f"output={output}")


def test_killed_annotating_started_again_gives_equal_labels(command, tmp_path):
    finish(annotate(command, "whole"), tmp_path)
    whole = annotations(tmp_path / "whole")
    for line in killed(lambda name: annotate(command, name), tmp_path, 2):
        again = annotations(tmp_path / line)
        assert whole.keys() == again.keys()
        for name, tensor in whole.items():
            np.testing.assert_allclose(again[name], tensor, atol=1e-4)


def same_weights(command, tmp_path, line, load, seed):
    """Training ends with the same weights, bit for bit."""
    whole = load(tmp_path / finish(command(*line, "output=whole"), tmp_path))
    for folder in killed(lambda name: command(*line, f"output={name}"), tmp_path, seed):
        again = load(tmp_path / folder)
        assert whole.keys() == again.keys()
        for name, tensor in whole.items():
            np.testing.assert_array_equal(again[name], tensor)


def test_killed_train_rm_started_again_gives_equal_weights(command, tmp_path):
    finish(annotate(command, "train"), tmp_path)
    finish(annotate(command, "valid", "task.split=valid"), tmp_path)
    line = [
        "train-rm", "annotations=train", "valid_annotations=valid", "optimization.epochs=24", "optimization.batch=4",
    ]  # fmt: skip
    same_weights(command, tmp_path, line, lambda folder: load_file(folder / "model.safetensors"), 3)


def test_killed_train_reasoner_started_again_gives_equal_weights(command, tmp_path):
    line = [
        "train-reasoner", "backbone.layers=1", "backbone.width=32", "optimization.batch=8", "save_every=3",
        "valid_questions=8", "recipe.written_updates=40", "recipe.stage_updates=[20]", "recipe.final_updates=40",
        "optimization.bf16=false",
    ]  # fmt: skip
    same_weights(command, tmp_path, line, load_bf16, 4)


def load_bf16(folder):
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
