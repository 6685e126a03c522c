"""`ltts annotate` in several processes of one launch: the first one annotates, the others wait."""

import os
import subprocess
import sys

import pytest

from latent_tts.results.annotations import AnnotationFolder


@pytest.mark.slow
def test_one_process_of_a_launch_annotates_and_the_others_wait(checkpoint, tmp_path):
    code = "from latent_tts.cli import entry; entry()"
    line = ["annotate", f"model.checkpoint={checkpoint}", "task.limit=6", "n=2", "completions=1", "keep=all"]
    line += ["max_answer_tokens=2", "output=made"]

    def start(rank: int) -> subprocess.Popen[str]:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(
            [sys.executable, "-c", code, *line], cwd=tmp_path, env=os.environ | ranks, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    second = start(1)
    assert second.stderr is not None
    told = ""
    while "waiting for process 0" not in told:
        line_told = second.stderr.readline()
        assert line_told, told
        told += line_told
    first = start(0)
    outputs = [process.communicate()[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert "questions to annotate" in outputs[0]
    assert "questions to annotate" not in told + outputs[1]
    assert len(AnnotationFolder(tmp_path / "made").present()) == 6


@pytest.mark.slow
def test_a_launch_of_two_processes_annotates_once(checkpoint, tmp_path):
    line = ["annotate", f"model.checkpoint={checkpoint}", "task.limit=6", "n=2", "completions=1", "keep=all"]
    # as `accelerate launch` starts processes; its own --cpu --num_processes 2 starts one
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "-m"]
    done = subprocess.run(
        [*launch, "latent_tts", *line, "max_answer_tokens=2", "output=made"], cwd=tmp_path, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["made", "made"]
    assert done.stderr.count("questions to annotate") == 1
    assert done.stderr.count("waiting for process 0") == 1
    assert len(AnnotationFolder(tmp_path / "made").present()) == 6
    assert not list((tmp_path / "made").glob("*.damaged"))
