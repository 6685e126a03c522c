"""Scripts of experiments/: what they print and write."""

import importlib
import sys
from pathlib import Path

import pandas as pd
import pytest

from latent_tts.task.arith import Arith

SCRIPTS = Path(__file__).parents[1] / "experiments" / "parallel_in_time"


@pytest.fixture
def script(monkeypatch):
    """A module of experiments/parallel_in_time."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_latency_is_a_row_per_reasoner_size_and_phase_with_energy_where_there_is_a_counter(
    script, monkeypatch, checkpoint, tmp_path
):
    latency, table = script("latency"), tmp_path / "latency.csv"
    monkeypatch.setattr(latency, "QUESTIONS", 2)
    monkeypatch.setattr(latency, "WARM_UP", 1)
    monkeypatch.setattr(latency, "SIZES", (1, 2))
    monkeypatch.setattr("sys.argv", ["latency.py", str(table), f"one=coconut:{checkpoint}:3:0"])
    counter = tmp_path / "energy_uj"
    monkeypatch.setattr(latency, "ENERGY", counter)
    latency.main()
    measured = pd.read_csv(table)
    assert measured[["rollouts", "phase"]].drop_duplicates().shape[0] == len(measured) == 8
    assert (measured["p95_ms"] >= measured["median_ms"]).all()
    assert measured["joules"].isna().all()
    readings, read = iter(range(0, 10**9, 2_500_000)), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: str(next(readings)) if path == counter else read(path))
    latency.main()
    whole = pd.read_csv(table).set_index("phase")["joules"]
    assert whole["whole"].tolist() == [2.5, 2.5]
    assert whole.drop("whole").isna().all()


def test_steps_are_compared_question_by_question_over_seeds(script, monkeypatch, capsys, tmp_path):
    questions = Arith(split="test", limit=40, seed=0, steps=None).questions()
    for run, wrong in {"ours": (), "theirs": (2,)}.items():
        right = [len(question.steps) not in wrong for question in questions]
        (tmp_path / run).mkdir()
        table = pd.DataFrame({"question_id": [question.id for question in questions], "correct": right})
        table.to_parquet(tmp_path / run / "rollouts.parquet")
    pair = [str(tmp_path / run) for run in ("ours", "theirs")]
    monkeypatch.setattr("sys.argv", ["steps.py", *pair, *pair])
    script("steps").main()
    lines = capsys.readouterr().out.splitlines()
    twos = sum(len(question.steps) == 2 for question in questions)
    assert lines[0].startswith(f"2 steps ({twos}): 100.0 and 0.0 %, +100.0 [")
    assert ": 100.0 and 100.0 %, +0.0 [" in lines[1]
    assert lines[-1].startswith("up to 5 steps (40): ")
    assert f"+{100 * twos / 40:.1f} [" in lines[-1]
