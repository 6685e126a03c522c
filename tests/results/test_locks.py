"""One writer a folder: two runs in one never mix, and a lock ends with its process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusal import check, check_refused
from safetensors.numpy import load_file, save_file

from latent_tts.errors import UsageError
from latent_tts.results.files import LOCK, locked_folder
from latent_tts.results.run_folder import open_latents, read_rollouts, read_run_metrics


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOLD = """
import sys, time
from pathlib import Path
from latent_tts.results.files import locked_folder
with locked_folder(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    time.sleep(600)
"""
HOLD_QUICKLY = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """A folder that another process holds; gives its process id."""
    folder.mkdir(exist_ok=True)
    line = [sys.executable, "-S", "-c", HOLD_QUICKLY, str(folder / LOCK)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder.pid
        finally:
            holder.kill()


def test_a_lock_names_its_process_and_dies_with_it(tmp_path):
    here = socket.gethostname()  # folders may be shared
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "held"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"^output=.*held: process {holder.pid} on {here} writes there"):
            locked_folder(tmp_path / "held", "output").__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with locked_folder(tmp_path / "held", "output"):
        assert (tmp_path / "held" / LOCK).read_text() == f"{os.getpid()} on {here}\n"
    assert not (tmp_path / "held").exists() or not list((tmp_path / "held").iterdir())


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with pytest.raises(KeyError), locked_folder(tmp_path / "a" / "b", "output"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output=.*file: must be a folder"):
        locked_folder(tmp_path / "file", "output").__enter__()


def test_the_processes_of_one_launch_share_a_folder(tmp_path, monkeypatch):
    with held_by_another(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked_folder(tmp_path, "output"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UsageError):
            locked_folder(tmp_path, "output").__enter__()


def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked_folder(tmp_path, "output"), locked_folder(tmp_path, "hydra.run.dir"):
        assert caplog.text.count("has no locks") == 1
    assert not list(tmp_path.iterdir())


def test_the_second_run_in_a_folder_is_refused_and_changes_nothing(run, tmp_path):
    first = run("hydra.run.dir=mine")
    (tmp_path / "mine" / LOCK).touch()
    before = contents(tmp_path / "mine")
    with held_by_another(tmp_path / "mine") as pid:
        check(run("hydra.run.dir=mine", "seed=1"), f"hydra.run.dir=mine: process {pid} writes there")
    assert contents(tmp_path / "mine").keys() == before.keys()
    (tmp_path / "mine" / LOCK).write_bytes(b"")
    assert contents(tmp_path / "mine") == before
    assert first.code == run("hydra.run.dir=mine", "seed=1").code == 0


def test_the_second_sweep_in_a_folder_is_refused_and_changes_nothing(run, tmp_path):
    with held_by_another(tmp_path / "mine") as pid:
        check(run("-m", "seed=0,1", "hydra.sweep.dir=mine"), f"hydra.sweep.dir=mine: process {pid} writes there")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [LOCK]


def test_a_run_folder_may_be_the_output_folder(ltts, checkpoint, tmp_path):
    few = [f"model.checkpoint={checkpoint}", "task.limit=2", "n=2", "completions=1", "max_answer_tokens=2"]
    result = ltts("annotate", *few, "output=mine", "hydra.run.dir=mine")
    assert result.code == 0, result.err
    assert (tmp_path / "mine" / ".hydra").is_dir()
    assert not (tmp_path / "mine" / LOCK).exists()


@pytest.mark.parametrize("command", ["annotate", "train-rm", "train-reasoner"])
def test_the_second_writer_of_an_output_folder_is_refused(ltts, tmp_path, command):
    with held_by_another(tmp_path / "mine") as pid:
        limits = ["task.limit=2"] if command == "annotate" else []
        check(ltts(command, "output=mine", *limits), f"output=mine: process {pid} writes there")


@pytest.mark.parametrize("name", ["metrics.csv", "rollouts.parquet"])
def test_a_file_of_another_run_or_a_damaged_one_is_refused_by_name(run, completed, tmp_path, name):
    shutil.copytree(completed, tmp_path / "one")
    other = run("hydra.run.dir=other", "seed=1")
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    refused = "is damaged, or of another run"
    check_refused("compare", "a=one", "b=one", words=[f"one/{name}: {refused}"])
    named = json.loads((tmp_path / "one" / "run.json").read_text())["files"].keys()
    assert named == {"answers.jsonl", "metrics.csv", "rollouts.parquet"}
    assert other.code == 0
    if name == "metrics.csv":
        check_refused("collect", "runs=[one]", "output=all.csv", words=[f"one/{name}: {refused}"])


def test_overwritten_latents_are_refused_by_name(run, tmp_path):
    run("hydra.run.dir=one", "keep_latents=true", "cache=off")
    open_latents(Path("one"), 24)
    path = tmp_path / "one" / "latents.safetensors"
    save_file({name: values + 1 for name, values in load_file(path).items()}, path)
    with pytest.raises(UsageError, match=r"one/latents\.safetensors: is damaged, or of another run"):
        open_latents(Path("one"), 24)


@pytest.mark.slow
def test_two_runs_that_race_for_a_folder_never_mix(checkpoint, tmp_path):
    few = ["task.limit=4", "n=2", "max_answer_tokens=4", "keep_latents=true", "cache=off"]
    ltts = [sys.executable, "-m", "latent_tts", "run", f"model.checkpoint={checkpoint}", *few]
    for race in range(8):
        folder = tmp_path / f"race{race}"
        runs = [
            subprocess.Popen([*ltts, f"seed={seed}", f"hydra.run.dir={folder}"], cwd=tmp_path, stderr=subprocess.PIPE)
            for seed in (0, 1)
        ]
        told = {run.pid: run.communicate()[1].decode() for run in runs}
        codes = sorted(run.returncode for run in runs)
        assert codes in ([0, 2], [0, 0])  # 0, 0: one after the other
        if codes == [0, 2]:
            first, second = sorted(runs, key=lambda run: run.returncode)
            # the second one may look before the first one has said who it is
            assert re.search(rf"process ({first.pid} on {socket.gethostname()}|\?) writes there", told[second.pid])
        seed = str(json.loads((folder / "run.json").read_text())["config"]["seed"])
        assert set(read_run_metrics(folder)["seed"]) == {seed}
        assert len(read_rollouts(folder)) == 8
        open_latents(folder, rows=8)  # checks them
