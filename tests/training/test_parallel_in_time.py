"""`make parallel-in-time`: its script with a few updates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "parallel_in_time" / "train.sh"


@pytest.mark.slow
def test_the_script_trains_each_cell_once(tmp_path):
    environment = os.environ | {
        "OUTPUT": "trained", "UPDATES": "2", "LTTS": f"{sys.executable} -m latent_tts", "LTTS_CACHE": str(tmp_path),
    }  # fmt: skip

    def train():
        line = ["bash", SCRIPT, "4-4-0", "6-2-1-first"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert train() == ["trained/4-4-0/checkpoint", "trained/6-2-1-first/checkpoint"]
    for cell, known_first in (("4-4-0", False), ("6-2-1-first", True)):
        config = json.loads((tmp_path / "trained" / cell / "checkpoint" / "config.json").read_text())
        latents, sweeps = map(int, cell.split("-")[:2])
        assert config["latent_tts"] == {"latents": latents, "sweeps": sweeps, "known_first": known_first}
    assert train() == []  # they are left as they are
