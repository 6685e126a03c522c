"""The metrics table of the smoke experiment on the shipped reasoner, rewritten only by `make golden`."""

import os
from pathlib import Path

import pandas as pd

from latent_tts.results.run_folder import read_metrics, write_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.csv"
MEASURED = {"seconds", "floor_seconds", "gbytes", "rollouts_per_second", "peak_memory_bytes"}


def test_the_smoke_experiment_gives_the_golden_table(ltts, no_figures):
    result = ltts("run", "experiment=smoke")
    assert result.code == 0, result.err
    table = read_metrics(result.last)
    table = table[~table["metric"].isin(MEASURED)].reset_index(drop=True)
    if os.environ.get("LTTS_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        write_metrics(GOLDEN, table)
    pd.testing.assert_frame_equal(table, read_metrics(GOLDEN), rtol=1e-4, atol=1e-6)
