import json

import pandas as pd
import pytest
import torch
import yaml
from refusal import check, check_refused

from latent_tts.pipeline import engine_tuning as tuning

SMALL = ["task.limit=4", "n=32", "max_answer_tokens=4", "seconds=0.5"]


@pytest.fixture
def tuned(ltts, checkpoint):
    return lambda *more: ltts("tune", f"model.checkpoint={checkpoint}", *SMALL, *more)


def settings(result):
    return yaml.safe_load(result.last.read_text())


def test_what_it_writes_is_engine_tuned_and_changes_no_rollout(tuned, run, tmp_path):
    result = tuned("dtypes=[float32]")
    assert result.code == 0, result.err
    assert result.last == tmp_path / "config" / "latent_tts" / "engine" / "tuned.yaml"
    assert settings(result)["dtype"] == "float32"
    assert "rounding" not in result.err
    own, plain = run("engine=tuned", "paths.cache=another"), run()
    assert own.code == 0, own.err
    record = json.loads((own.last.parent / "run.json").read_text())
    assert record["config"]["engine"] == {key: value for key, value in settings(result).items() if key != "defaults"}
    tables = [pd.read_parquet(path.last.parent / "rollouts.parquet") for path in (own, plain)]
    assert [table["answer_text"].tolist() for table in tables] == [tables[0]["answer_text"].tolist()] * 2


def test_the_fastest_setting_is_taken_and_a_dtype_that_changes_results_is_named(tuned, monkeypatch):
    seconds = iter([1.0, 1.0, 2.5, 0.5, 0.2, 0.9])
    drawn = []

    def measured(draw, deadline):
        rollouts = draw()
        drawn.append(len(rollouts.answer_ids))
        return next(seconds), rollouts

    monkeypatch.setattr(tuning, "_seconds", measured)
    result = tuned("task.limit=16", "n=16", "seconds=1000")
    assert result.code == 0, result.err
    # rollouts a second: 64, 128, 102; then 128, 640, 284
    assert drawn == [64, 128, 256] * 2
    assert [settings(result)[key] for key in ("dtype", "rows")] == ["bfloat16", 128]
    assert "engine.dtype=bfloat16 instead of float32" in result.err
    assert "640" in result.out


def test_rows_beyond_a_gpus_memory_end_a_dtype_and_lose_nothing(tuned, monkeypatch):
    draw = tuning._draw

    def narrow(engine, jobs, rows, *rest):
        if rows >= 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(engine, jobs, rows, *rest)

    monkeypatch.setattr(tuning, "_draw", narrow)
    result = tuned("seconds=1000")
    assert result.code == 0, result.err
    assert settings(result)["rows"] == 64
    assert "float32, 128 rows: more than the GPU's memory" in result.err
    monkeypatch.setattr(tuning, "MIN_ROWS", 128)
    failed = tuned()
    assert failed.code == 1
    assert "measuring failed: CUDA out of memory\nnothing was written" in failed.err


@pytest.mark.slow
def test_answers_are_compared_with_the_first_dtype(tuned, monkeypatch):
    draw = tuning._draw

    def altered(engine, *rest):
        rollouts = draw(engine, *rest)
        if engine.lm.dtype.itemsize == 2:
            rollouts.answer_ids[:16] = [[1, 2, 3]] * 16
        return rollouts

    monkeypatch.setattr(tuning, "_draw", altered)
    compared = []
    measure = tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda *a, **k: compared.extend(measure(*a, **k)) or compared)
    assert tuned("dtypes=[float32,bfloat16]").code == 0
    first = {setting.dtype: setting.same for setting in compared if setting.rows == 64}
    assert first["float32"] == 1.0
    assert 0 < first["bfloat16"] <= 0.75


BAD = [
    (["output=."], ["output=.", "this is a folder"]),
    (["seconds=0"], ["seconds=0"]),
    (["dtypes=[]"], ["dtypes=[]", "float32"]),
    (["dtypes=[int8]"], ["dtypes=int8", "bfloat16"]),
    (["n=0"], ["n=0"]),
    (["sampler=control", "sampler.mode=shuffle"], ["sampler=control", "gaussian"]),
    (["output=/proc/none/tuned.yaml"], ["output=/proc/none/tuned.yaml"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_bad_values(place, checkpoint, overrides, words):
    check_refused("tune", f"model.checkpoint={checkpoint}", *SMALL, *overrides, words=words)


def test_before_tuning_there_is_no_such_option_and_the_command_is_named(run):
    check(run("engine=tuned"), "engine=tuned", "default", "`ltts tune`")
