"""Tables of someone else's run folder, whose digests fit: what is no table of a run is refused in one line."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from marks import slow
from records import change_record, sign
from refusal import check_refused

ROLLOUTS, METRICS = "rollouts.parquet", "metrics.csv"


def compare_refused(folder, *words):
    check_refused("compare", f"a={folder}", f"b={folder}", words=[*words])


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("prediction", [1], "column prediction must contain string"),
        ("rollout", "0", "column rollout must contain int32"),
        ("rollout", None, "column rollout must contain int32"),
        ("correct", 1, "column correct must contain bool"),
        ("answer_logprob", "low", "column answer_logprob must contain float"),
        ("question_id", None, "column question_id must contain string"),
    ],
)
def test_rollouts_of_wrong_types(own_copy, column, value, words):
    table = pq.read_table(own_copy / ROLLOUTS)
    changed = table.set_column(table.column_names.index(column), column, pa.array([value] * len(table)))
    pq.write_table(changed, own_copy / ROLLOUTS)
    sign(own_copy, ROLLOUTS)
    compare_refused(own_copy, f"{ROLLOUTS}: cannot be read", words)


def test_rollouts_without_a_value(own_copy):
    table = pq.read_table(own_copy / ROLLOUTS)
    ids = pa.array([None, *table["question_id"].to_pylist()[1:]])
    pq.write_table(table.set_column(1, "question_id", ids), own_copy / ROLLOUTS)
    sign(own_copy, ROLLOUTS)
    compare_refused(own_copy, f"{ROLLOUTS}: cannot be read", "column question_id lacks a value")


def test_rollouts_without_rows(own_copy):
    pq.write_table(pq.read_table(own_copy / ROLLOUTS)[:0], own_copy / ROLLOUTS)
    sign(own_copy, ROLLOUTS)
    compare_refused(own_copy, f"{ROLLOUTS}: cannot be read", "it has no rows")


@pytest.mark.parametrize(("column", "value"), [("n", "inf"), ("n", "0"), ("drawn", "-4"), ("questions", "1.5")])
def test_counts_that_are_none(own_copy, column, value):
    table = pd.read_csv(own_copy / METRICS, dtype=str, keep_default_na=False)
    table.assign(**{column: value}).to_csv(own_copy / METRICS, index=False)
    sign(own_copy, METRICS)
    words = f"column {column} must contain integers, 1 or more"
    compare_refused(own_copy, METRICS, words)
    check_refused("collect", f"runs=[{own_copy}]", "output=all.csv", words=[METRICS, words])


@pytest.mark.parametrize("cache", ["elsewhere/0123456789abcdef", slow(5)])
def test_a_record_makes_no_folder_elsewhere(run, ltts, checkpoint, tmp_path, cache):
    tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    assert run("hydra.run.dir=one", "keep_latents=true").code == 0

    def elsewhere(record):
        record["cache"], record["config"]["paths"]["cache"] = cache, str(tmp_path / "elsewhere")

    change_record(tmp_path / "one", elsewhere)
    for line in (
        ["rescore", "one", "scorer=latent_rm", "scorer.checkpoint=rm"],
        ["replay", "one", "budget=adaptive"],
        ["trace", "run=one"],
    ):
        done = ltts(*line)
        assert done.code == 0, done.err
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("key", ["n", "max_answer_tokens"])
def test_a_record_without_a_number_that_a_run_has(own_copy, key):
    change_record(own_copy, lambda record: record["config"].update({key: {"a": 1}}))
    for command in ("rescore", "replay", "trace"):
        check_refused(command, f"run={own_copy}", words=[f"wrong type: config.{key}"])
