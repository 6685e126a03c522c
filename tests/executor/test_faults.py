"""`executor=ray` under SIGKILL: of the command, of a worker, of Ray's node; the same line then gives equal tables."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pandas as pd
import psutil
import pytest

from latent_tts.results.run_folder import ROLLOUT_COLUMNS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
KILLS = int(os.environ.get("LTTS_KILLS", "20"))  # over the three victims
SECONDS_TO_START, SECONDS_TO_SAY = 240, 30
VICTIMS = ["driver", "worker", "node"]
ROUNDED = ["answer_logprob", "answer_margin", "score"]
QUESTIONS, ROLLOUTS = 1500, 16


@pytest.fixture
def start(tmp_path, checkpoint):
    """Start `ltts run` in a folder of the test's own."""

    def run(cache, *arguments):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "LTTS_CACHE": str(tmp_path / cache), "XDG_CONFIG_HOME": str(tmp_path / "config"),
        }  # fmt: skip
        line = [
            "run", "model=demo_coconut", f"model.checkpoint={checkpoint}", f"task.limit={QUESTIONS}", f"n={ROLLOUTS}",
            "sampler=gaussian", "max_answer_tokens=8", "budget=fixed", "engine.rows=64", f"hydra.run.dir={cache}_run",
        ]  # fmt: skip
        with (tmp_path / f"{cache}.txt").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "latent_tts", *line, *arguments],
                cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    return run


def processes(driver, victim):
    """The processes of a kind that a command has started."""
    family = psutil.Process(driver.pid).children(recursive=True)
    if victim == "driver":
        return [psutil.Process(driver.pid)]
    if victim == "node":
        return [each for each in family if each.name() == "raylet"]
    return [each for each in family if each.name().startswith("ray::_Actor")]


def wait_for_work(driver, folder, moments):
    """Return at a random moment after the command has begun to draw."""
    until = time.monotonic() + SECONDS_TO_START
    before = len(list(folder.rglob("*.parquet")))
    while driver.poll() is None and time.monotonic() < until:
        if (
            len(list(folder.rglob("*.parquet"))) > before
            or "rollouts to draw" in folder.with_suffix(".txt").read_text()
        ):
            time.sleep(moments.uniform(0, 3))
            return
        time.sleep(0.05)


def table(folder):
    return pd.read_parquet(folder / "rollouts.parquet")


def test_killed_again_and_again_the_same_line_gives_equal_tables(start, tmp_path):
    whole = start("whole")
    assert whole.wait() == 0, (tmp_path / "whole.txt").read_text()
    moments, ended = random.Random(1), []
    for kill in range(KILLS):
        victim = VICTIMS[kill % len(VICTIMS)]
        command = start("killed", "executor=ray", "executor.workers=2")
        wait_for_work(command, tmp_path / "killed", moments)
        if command.poll() is None:
            for process in processes(command, victim)[:1]:
                process.send_signal(signal.SIGKILL)
        code, log = command.wait(), tmp_path / "killed.txt"
        # the line comes from another process, after the command is gone
        until = time.monotonic() + SECONDS_TO_SAY
        while code != 0 and "re-run" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        text = log.read_text()
        assert "Traceback" not in text, text
        if victim == "worker":
            assert code == 0, text
        elif code != 0:
            assert "re-run" in text, text
        ended.append(code)
    last = start("killed", "executor=ray", "executor.workers=2")
    assert last.wait() == 0, (tmp_path / "killed.txt").read_text()
    one, other = table(tmp_path / "whole_run"), table(tmp_path / "killed_run")
    exact = [name for name in ROLLOUT_COLUMNS if name not in ROUNDED]
    pd.testing.assert_frame_equal(one[exact], other[exact])
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-4)
    assert -signal.SIGKILL in ended
    assert json.loads((tmp_path / "killed_run" / "run.json").read_text())["rollouts"]["total"] == QUESTIONS * ROLLOUTS
