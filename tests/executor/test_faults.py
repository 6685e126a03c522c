"""`executor=ray` under SIGKILL: of the command, of Ray's node, of a worker.

The same line then gives equal tables, and draws again no more than the shards in work and what was not yet written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from processes import is_running

from latent_tts.results.files import SECONDS_BETWEEN_PARTS
from latent_tts.results.parts import part_files
from latent_tts.results.run_folder import ROLLOUT_COLUMNS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
KILLS = int(os.environ.get("LTTS_KILLS", "20"))  # over the three victims
SECONDS_TO_START, SECONDS_TO_SAY, SECONDS_TO_WRITE, SECONDS_PER_SHARD = 600, 30, 5, 0.25
VICTIMS = ["driver", "node", "worker"]  # of one round; without a worker the command goes on to its end
SHARDS = ["fixed", "measured"]  # in turns
WORKERS, STARTS = 2, 3
ROUNDED = ["answer_logprob", "answer_margin", "score"]
QUESTIONS, ROLLOUTS = 600, 16
# Python runs this before everything else, in Ray's workers too: each shard is written down as it begins and ends, and
# lasts long enough for the run to be under way when it is killed, on a quick machine as on a slow one
RECORDER = """
import importlib.abc, importlib.util, json, os, sys, time

os.fsync = lambda descriptor: None  # no test loses power, and a busy disk takes seconds

class Recorder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "latent_tts.pipeline.worker" or "SHARDS" not in os.environ:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), record(module.Drawer))
        return spec

def record(drawer):
    compute, number = drawer.compute, 0
    def say(**what):
        log = os.open(os.environ["SHARDS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, (json.dumps(what | {"pid": os.getpid(), "time": time.monotonic()}) + "\\n").encode())
        os.close(log)
    def recorded(self, shard):
        nonlocal number
        number += 1
        runs = [[job.row_key, job.rollouts[0], len(job.rollouts)] for job in shard.jobs]
        say(shard=number, runs=runs)
        time.sleep(float(os.environ["SECONDS_PER_SHARD"]))
        parts = compute(self, shard)
        say(shard=number, runs=None)
        return parts
    drawer.compute = recorded

sys.meta_path.insert(0, Recorder())
"""


@dataclass
class Drawn:
    """A shard that a worker has begun.

    Attributes:
        places: the (row key, rollout) of its rollouts.
        began, ended: seconds; None if it did not end.
    """

    places: set[tuple[str, int]]
    began: float
    ended: float | None = None


@pytest.fixture
def start(tmp_path, checkpoint):
    """Start `ltts run` in a folder of the test's own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(RECORDER)

    def run(cache, *arguments, seconds_per_shard=SECONDS_PER_SHARD):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "LTTS_CACHE": str(tmp_path / cache), "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "SHARDS": str(tmp_path / f"{cache}.jsonl"), "SECONDS_PER_SHARD": str(seconds_per_shard),
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
    if victim == "driver":
        return [psutil.Process(driver.pid)]
    name, found = "raylet" if victim == "node" else "ray::_Actor", []
    for each in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += [each] if each.name().startswith(name) else []
    return found


def said_in(log: Path) -> list[dict[str, Any]]:
    """What workers have written down; the last line may not be whole yet."""
    whole_lines, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole_lines.splitlines()]


def wait_for_end_of_workers(log: Path):
    """Wait for those that a command has left over: what they say later would count for the next one."""
    workers, until = {said["pid"] for said in said_in(log)}, time.monotonic() + SECONDS_TO_SAY
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.05)


def shards_of(log: Path, after: int) -> list[Drawn]:
    """The shards that began in a log after its first lines; a worker that was left over may end one later."""
    begun: dict[tuple[int, int], Drawn] = {}
    for said in said_in(log)[after:]:
        key = said["pid"], said["shard"]
        if said["runs"] is not None:
            places = {(row, first + place) for row, first, count in said["runs"] for place in range(count)}
            begun[key] = Drawn(places, said["time"])
        elif key in begun:
            begun[key].ended = said["time"]
    return list(begun.values())


def wait_for_work(driver, log, lines, moments, written):
    """Return at a random moment after a worker has begun to draw, or after some of its shards are surely written."""
    until = time.monotonic() + SECONDS_TO_START
    while driver.poll() is None and time.monotonic() < until:
        shards = shards_of(log, lines)
        if surely_written(shards, time.monotonic()) if written else shards:
            time.sleep(moments.uniform(0, 5))
            return
        time.sleep(0.05)


def kept_in(cache: Path) -> set[tuple[str, int]]:
    """The rollouts in a cache."""
    parts = [part for folder in cache.glob("*") for part in part_files(folder)]
    tables = [pd.read_parquet(part, columns=["row_key", "rollout"]) for part in parts]
    return {place for table in tables for place in table.itertuples(index=False, name=None)}


def table(folder):
    return pd.read_parquet(folder / "rollouts.parquet")


def kill_somewhen(command, victim, *when):
    """Kill a process of a kind while the command draws; says whether there was one to kill."""
    wait_for_work(command, *when)
    found = processes(command, victim)[:1] if command.poll() is None else []
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    return bool(found)


def surely_written(shards, stopped):
    """The shards that ended so long before a command stopped that its writer has had the time to write them."""
    longest = max(((shard.ended or stopped) - shard.began for shard in shards), default=0.0)
    until = stopped - SECONDS_BETWEEN_PARTS - longest - SECONDS_TO_WRITE
    return [shard for shard in shards if shard.ended is not None and shard.ended < until]


def test_killed_again_and_again_the_same_line_gives_equal_tables(start, tmp_path):
    whole = start("whole", seconds_per_shard=0)
    assert whole.wait() == 0, (tmp_path / "whole.txt").read_text()
    one = table(tmp_path / "whole_run")
    moments, codes, checked = random.Random(1), [], 0
    for first in range(0, KILLS, len(VICTIMS)):
        name, shard = f"round{first}", SHARDS[first // len(VICTIMS) % len(SHARDS)]
        folder, line = tmp_path / name, ["executor=ray", f"executor.workers={WORKERS}", f"executor.shard={shard}"]
        log, text = folder.with_suffix(".jsonl"), folder.with_suffix(".txt")
        log.touch()
        computed = lost = largest = 0
        late = VICTIMS[first // len(VICTIMS) % 2]  # killed when some shards must be written: the command, Ray's node
        for victim in [*VICTIMS[: KILLS - first], None]:
            kept, lines = kept_in(folder), len(said_in(log))
            for _ in range(STARTS):
                command = start(name, *line)
                killed = victim is not None and kill_somewhen(command, victim, log, lines, moments, victim == late)
                code, stopped = command.wait(), time.monotonic()
                if "Ray cannot be started" not in text.read_text():  # on a machine that is too busy
                    break
            wait_for_end_of_workers(log)
            # the line comes from another process, after the command is gone
            while code != 0 and "re-run" not in text.read_text() and time.monotonic() < stopped + SECONDS_TO_SAY:
                time.sleep(0.05)
            said = text.read_text()
            assert "Traceback" not in said, said
            assert code == 0 or (killed and victim != "worker" and "re-run" in said), said
            codes.append(code)

            shards, now = shards_of(log, lines), kept_in(folder)
            ended = [shard for shard in shards if shard.ended is not None]
            assert not any(shard.places & kept for shard in shards), "what was kept is drawn again"
            assert len(shards) - len(ended) <= (0 if not killed else 1 if victim == "worker" else WORKERS)
            for shard in ended if code == 0 else surely_written(shards, stopped):
                assert shard.places <= now, f"computed {stopped - shard.ended:.1f} s before the end, and lost"
                checked += code != 0
            computed += sum(len(shard.places) for shard in ended)
            lost += sum(len(shard.places - now) for shard in ended)
            largest = max([largest, *(len(shard.places) for shard in shards)])
            if code == 0:
                break
        # a worker may be killed after the end of a shard and before its answer
        assert 0 <= computed - lost - QUESTIONS * ROLLOUTS <= largest
        other = table(tmp_path / f"{name}_run")
        exact = [name for name in ROLLOUT_COLUMNS.names if name not in ROUNDED]
        pd.testing.assert_frame_equal(one[exact], other[exact])
        pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-4)
        run = json.loads((tmp_path / f"{name}_run" / "run.json").read_text())
        assert run["rollouts"]["total"] == QUESTIONS * ROLLOUTS
    assert -signal.SIGKILL in codes
    assert checked > 0 or len(VICTIMS) > KILLS
