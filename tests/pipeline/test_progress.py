"""The bar moves within batches, and ends where the work ends."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import RolloutJob
from latent_tts.pipeline.progress import MAX_SHARE, batch_progress
from latent_tts.results import report

SECONDS_TO_END = 600
SHAPE = Shape(layers=1, width=1, vocabulary=1, attention=0, keys=1, block_weights=1)  # two operations per position


class Blocks(nn.Module):
    def forward(self, vectors_NSD: torch.Tensor) -> tuple[torch.Tensor]:
        return (vectors_NSD,)


class Bar(report.ProgressBar):
    """Remembers where it was set to."""

    def __init__(self, visible: bool = True):
        self._done, self._visible, self.shown = 0, visible, []

    visible = property(lambda self: self._visible)

    def show_part(self, count: float) -> None:
        self.shown.append(self._done + count)


def job(rollouts: int) -> RolloutJob:
    return RolloutJob("key", "question", [1, 2, 3], list(range(rollouts)))


def test_a_batch_is_measured_by_its_passes():
    bar, model = Bar(), Blocks()
    with batch_progress(bar, model, SHAPE, [job(2), job(2)], 80.0):
        for _ in range(5):
            model(torch.zeros(4, 1, 3))  # four positions: 8 of at most 80 operations
    assert bar.shown == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 4])
    with batch_progress(bar, model, SHAPE, [job(4)], 40.0):
        for _ in range(6):
            model(torch.zeros(4, 1, 3))
    assert bar.shown[6:] == pytest.approx([4.8, 5.6, 6.4, 7.2, 4 + 4 * MAX_SHARE, 4 + 4 * MAX_SHARE, 8])
    model(torch.zeros(4, 1, 3))
    assert len(bar.shown) == 13


def test_without_a_terminal_no_pass_is_counted():
    bar, model = Bar(visible=False), Blocks()
    with batch_progress(bar, model, SHAPE, [job(3)], 1.0):
        assert not model._forward_hooks
        model(torch.zeros(1, 1, 1))
    assert bar.shown == [3]


def test_a_run_and_a_rescoring_move_their_bars_within_the_first_batch(ltts, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    shown = []
    show = report.ProgressBar.show

    def remember(self, done, note):
        shown.append(done)
        show(self, done, note)

    monkeypatch.setattr(report.ProgressBar, "show", remember)
    result = ltts("run", "task.limit=2", "n=4", "budget=fixed", "scorer=none", "hydra.run.dir=run")
    assert result.code == 0, result.err
    drawn, shown[:] = shown[:], []
    result = ltts("rescore", "run", "scorer=latent_rm", "scorer.checkpoint=shipped:coconut_arith_rm")
    assert result.code == 0, result.err
    for steps, passes in ((drawn, 4), (shown, 1)):
        assert 0 < steps[0] < 8
        assert steps[-1] == 8
        assert steps == sorted(steps)
        assert len(steps) > passes


@pytest.mark.slow
def test_a_terminal_shows_the_time_left_and_ctrl_c_what_is_kept(tmp_path):
    """A real terminal, and a run of some seconds."""
    master, slave = pty.openpty()
    environment = os.environ | {"LTTS_CACHE": str(tmp_path / "cache"), "TERM": "xterm", "COLUMNS": "100"}
    line = [sys.executable, "-m", "latent_tts", "run", "n=64", "task.limit=2000", "engine.rows=256"]
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stderr=slave, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    os.close(slave)
    seen, interrupted = "", False
    give_up = time.monotonic() + SECONDS_TO_END
    while select.select([master], [], [], max(0.0, give_up - time.monotonic()))[0]:
        try:
            seen += os.read(master, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
        if not interrupted and re.search(r"rollouts .*/128000 \d+/s [\d:]+ [\d:]+ left", plain):
            process.send_signal(signal.SIGINT)
            interrupted = True
    else:
        process.kill()
    code = process.wait()
    os.close(master)
    assert interrupted, seen[-2000:]
    assert code == 130
    assert re.search(r"interrupted: \d+ of 128000 rollouts are kept; .*; re-run the command to resume", seen)
