"""Sweeps by Hydra's launchers: jobs in processes of their own share a cache and give the table of a plain sweep."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

MEASURED = ("seconds", "floor_seconds", "rollouts_per_second", "peak_memory_bytes", "gbytes")
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
}


def sweep(folder, checkpoint, *arguments):
    """The table of a sweep whose jobs want the same rollouts, and the number of rollouts in its cache."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "LTTS_CACHE": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config"),
    }  # fmt: skip
    line = [
        "run", "-m", "model=demo_coconut", f"model.checkpoint={checkpoint}", "task.limit=6", "n=2,4", "seed=0,1",
        "sampler=gaussian", "max_answer_tokens=4", "scorer=none", "hydra.sweep.dir=sweep", *arguments,
    ]  # fmt: skip
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "latent_tts", *line], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "sweep" / "metrics.csv")
    table = table[~table["metric"].isin(MEASURED)].drop(columns=["run_id"])
    return table.reset_index(drop=True), {path.parent.name for path in Path(folder / "cache").glob("*/*.parquet")}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_processes_share_a_cache_and_give_the_table_of_a_plain_sweep(launcher, checkpoint, tmp_path):
    plugin, settings = LAUNCHERS[launcher]
    if find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    table, entries = sweep(tmp_path / "plain", checkpoint)
    other, others = sweep(tmp_path / "other", checkpoint, f"hydra/launcher={launcher}", *settings)
    pd.testing.assert_frame_equal(table, other, rtol=1e-5)
    assert others == entries
    assert len(entries) == 2
