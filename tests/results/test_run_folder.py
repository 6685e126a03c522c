import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from latent_tts.errors import RunError, UsageError
from latent_tts.results.cache import MEASURED, ROLLOUT_SCHEMA, RolloutCache, ScoreCache, unpack_latents
from latent_tts.results.files import whole_file, written_in_parts
from latent_tts.results.run_folder import (
    LATENTS,
    METRIC_COLUMNS,
    METRICS,
    ROLLOUT_COLUMNS,
    ROLLOUTS,
    is_complete,
    join_metrics,
    read_metrics,
    run_folders,
    write_latents,
    write_metrics,
    write_rollouts,
    write_run_json,
)

KEY = {"weights": "abc", "seed": 0}


def row(key, rollout, **changes):
    latents = np.arange(6, dtype="<f4").reshape(2, 3) + 10 * rollout
    return {
        "row_key": key,
        "rollout": rollout,
        "answer_ids": [1, 2, rollout],
        "answer_logprob": -0.5 * rollout,
        "answer_margin": 0.25,
        "stop_reason": "eos",
        "latent_steps": 2,
        "sweeps": 3,
        "commits": 2,
        "conflicts": 1,
        "latents": latents.tobytes(),
        "seconds": 0.125,
        "floor_seconds": 0.25,
        "bytes": 1e9,
        "peak_memory_bytes": 1000,
        "device": "cpu",
        "rows": 4,
    } | changes


def wanted(*pairs):
    return pd.DataFrame(pairs, columns=["row_key", "rollout"])


def partials(folder):
    return [path for path in folder.rglob("*") if "partial" in path.name]


@pytest.fixture
def cache(tmp_path):
    return RolloutCache(tmp_path / "cache", KEY)


# Whole files


def test_a_whole_file_is_renamed_at_the_end(tmp_path):
    path = tmp_path / "table.csv"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert not partials(tmp_path)


def fail_half_way(path):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stopped")


def test_an_error_leaves_no_partial_file_and_the_old_one_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stopped"):
        fail_half_way(path)
    assert path.read_text() == "old"
    assert not partials(tmp_path)


# The rollout cache


def test_rollouts_come_back_as_they_were_added(cache):
    rows = [row("a", 0), row("a", 1, answer_ids=[], stop_reason="length", latents=b"", latent_steps=0), row("b", 0)]
    cache.add(rows)
    assert cache.present() == {("a", 0), ("a", 1), ("b", 0)}
    found = cache.read(wanted(("a", 0), ("a", 1), ("b", 0)))
    assert set(found.columns) == set(ROLLOUT_SCHEMA.names)
    for got, expected in zip(found.to_dict("records"), rows, strict=True):
        assert {**got, "answer_ids": list(got["answer_ids"])} == expected


def test_latents_come_back_bit_for_bit(cache):
    latents = np.array([[np.pi, -0.0, 1e-42], [np.inf, 3e38, 2.5]], dtype="<f4")
    cache.add([row("a", 0, latents=latents.tobytes())])
    (found,) = unpack_latents(cache.read(wanted(("a", 0)))["latents"], 3)
    assert found.tobytes() == latents.tobytes()
    assert found.shape == (2, 3)


def test_the_order_of_what_is_wanted_is_kept_across_parts(cache):
    for rollout in range(3):
        cache.add([row(key, rollout) for key in "cab"])
    cache.add([row("unwanted", 0)])
    pairs = [("b", 2), ("a", 0), ("c", 1), ("a", 2)]
    found = cache.read(wanted(*pairs))
    assert list(zip(found["row_key"], found["rollout"], strict=True)) == pairs
    assert found["answer_logprob"].tolist() == [-1.0, 0.0, -0.5, -1.0]
    assert found.index.tolist() == [0, 1, 2, 3]


def test_other_columns_of_what_is_wanted_stay(cache):
    cache.add([row("a", 0), row("a", 1)])
    found = cache.read(wanted(("a", 1), ("a", 0)).assign(question_id=["x", "y"]))
    assert found["question_id"].tolist() == ["x", "y"]


def test_a_rollout_in_two_parts_is_read_once(cache):
    cache.add([row("a", 0), row("a", 1)])
    cache.add([row("a", 1), row("a", 2)])
    assert len(cache.present()) == 3
    assert cache.read(wanted(("a", 0), ("a", 1), ("a", 2)))["rollout"].tolist() == [0, 1, 2]


def test_a_cache_is_found_again_and_another_key_has_its_own(tmp_path, cache):
    cache.add([row("a", 0)])
    assert RolloutCache(tmp_path / "cache", dict(reversed(KEY.items()))).present() == {("a", 0)}
    assert RolloutCache(tmp_path / "cache", KEY | {"seed": 1}).present() == set()


@pytest.mark.parametrize("added", [[], ["a"]])
def test_rollouts_that_are_not_there_are_an_error(cache, added):
    if added:
        cache.add([row(key, 0) for key in added])
    with pytest.raises(RunError, match="2 rollouts are missing"):
        cache.read(wanted(*[(key, 0) for key in added], ("b", 0), ("a", 7)))


def damaged(good: bytes, place: int) -> bytes:
    """The same bytes with one bit flipped."""
    bits = bytearray(good)
    bits[place // 8] ^= 1 << place % 8
    return bytes(bits)


@pytest.mark.parametrize("kind", ["rollouts", "scores"])
def test_no_flipped_bit_of_a_part_passes_unseen(tmp_path, caplog, kind):
    cache = RolloutCache(tmp_path, KEY) if kind == "rollouts" else ScoreCache(tmp_path, KEY)
    rows = [row("a", number) for number in range(40)]
    if kind == "scores":
        measured = {name: rows[0][name] for name in MEASURED}
        rows = [{"row_key": "a", "rollout": i, "step_scores": [0.5 * i, 1.0], **measured} for i in range(40)]
    cache.add(rows)
    (part,) = cache.folder.glob("*.parquet")
    good = part.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(good), 200, replace=False).tolist():
        part.write_bytes(damaged(good, place))
        caplog.clear()
        assert cache.present() == set()
        assert part.name in caplog.text
        (aside,) = cache.folder.glob("*.damaged")
        assert aside.read_bytes() == damaged(good, place)
        assert not part.exists()
    part.write_bytes(good)
    assert len(cache.read(wanted(*[("a", i) for i in range(40)]))) == 40


@pytest.mark.parametrize("damage", [lambda good: b"", lambda good: b"not parquet", lambda good: good[: len(good) // 2]])
def test_a_part_that_is_not_whole_is_set_aside_and_the_others_are_read(cache, caplog, damage):
    cache.add([row("a", 0)])
    (part,) = cache.folder.glob("*.parquet")
    cache.add([row("a", 1)])
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(RunError, match="1 rollouts are missing"):
        cache.read(wanted(("a", 0), ("a", 1)))
    assert part.name in caplog.text
    assert cache.missing(wanted(("a", 0), ("a", 1))) == {"a": [0]}


def test_partial_and_foreign_files_are_not_read(cache):
    cache.add([row("a", 0)])
    (cache.folder / ".123.parquet.0.partial").write_bytes(b"half")
    (cache.folder / ".456.parquet").write_bytes(b"half")
    (cache.folder / "older.parquet").write_bytes(b"of an earlier version")
    assert cache.present() == {("a", 0)}
    assert (cache.folder / "older.parquet").is_file()


def test_a_cache_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"^paths\.cache=.*file/cache: cannot be written to"):
        RolloutCache(tmp_path / "file" / "cache", KEY)


# Run folders


def test_rollouts_are_written_with_their_columns_in_order(tmp_path):
    table = pd.DataFrame({name: ["x", None] for name in reversed([*ROLLOUT_COLUMNS, "seconds"])})
    write_rollouts(tmp_path, table)
    read = pd.read_parquet(tmp_path / ROLLOUTS)
    assert list(read.columns) == ROLLOUT_COLUMNS
    assert read["prediction"].isna().tolist() == [False, True]


def test_latents_of_rows_with_fewer_steps_end_in_zeros(tmp_path):
    latents = [np.full((steps, 4), steps, dtype=np.float32) for steps in (2, 3, 0)]
    write_latents(tmp_path, latents)
    tensors = load_file(tmp_path / LATENTS)
    assert list(tensors) == ["latents_RTD"]
    latents_RTD = tensors["latents_RTD"]
    assert latents_RTD.dtype == np.float32
    assert latents_RTD[..., 0].tolist() == [[2, 2, 0], [3, 3, 3], [0, 0, 0]]
    assert (latents_RTD == latents_RTD[..., :1]).all()


def metrics_table(run_id="r0", ns=(1, 2)):
    rows = [
        {"run_id": run_id, "model": "coconut", "seed": 0, "sampler_value": 0.1, "aggregator": aggregator, "n": n}
        | {"drawn": 2, "metric": metric, "value": value, "questions": 3}
        for n in ns
        for metric, aggregator, value in [("accuracy", "majority", 1 / 3), ("peak_memory_bytes", "", np.nan)]
    ]
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def test_metrics_come_back_with_missing_figures_missing(tmp_path):
    path = tmp_path / METRICS
    write_metrics(path, metrics_table())
    read = read_metrics(path)
    assert list(read.columns) == METRIC_COLUMNS
    np.testing.assert_allclose(read["value"], [1 / 3, np.nan] * 2, rtol=1e-9)
    assert read["ci_low"].isna().all()
    assert read["n"].tolist() == [1, 1, 2, 2]
    assert read["seed"].tolist() == ["0"] * 4
    assert read["sampler_value"].tolist() == ["0.1"] * 4
    assert read["scorer"].tolist() == [""] * 4
    assert read["aggregator"].tolist() == ["majority", ""] * 2
    assert ",,," in path.read_text()
    assert "nan" not in path.read_text().lower()


def test_writing_what_was_read_gives_the_same_file(tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    write_metrics(first, metrics_table())
    write_metrics(second, read_metrics(first))
    assert first.read_bytes() == second.read_bytes()


def test_a_name_that_reads_like_a_missing_cell_stays_a_name(tmp_path):
    write_metrics(tmp_path / "m.csv", metrics_table().assign(task="NA", split="null"))
    read = read_metrics(tmp_path / "m.csv")
    assert read["task"].tolist() == ["NA"] * 4
    assert read["split"].tolist() == ["null"] * 4


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"\x89PNG\r\n\xff\xfe\x00", b'"open\n', b"run_id,model\nx,y,z,u\n"]
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"other\.csv: (cannot be read as|not) a metrics table"):
        read_metrics(path)


def test_a_missing_table_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(UsageError, match="cannot be read as a metrics table"):
            read_metrics(path)


def run_folder(path, table=None, complete=True):
    (path / ".hydra").mkdir(parents=True)
    if table is not None:
        write_metrics(path / METRICS, table)
    if complete:
        write_run_json(path, {"n": 4})
    return path


def test_joining_leaves_out_runs_that_did_not_end(tmp_path):
    good = run_folder(tmp_path / "0", metrics_table("r0"))
    stopped = run_folder(tmp_path / "1", metrics_table("r1"), complete=False)
    no_table = run_folder(tmp_path / "2")
    other = run_folder(tmp_path / "3", metrics_table("r3", ns=[2]))
    assert [is_complete(folder) for folder in (good, stopped)] == [True, False]
    joined, left_out = join_metrics([good, stopped, no_table, other])
    assert left_out == [stopped, no_table]
    assert joined["run_id"].tolist() == ["r0"] * 4 + ["r3"] * 2
    assert list(joined.columns) == METRIC_COLUMNS


def test_joining_drops_rows_that_are_there_twice(tmp_path):
    folders = [run_folder(tmp_path / str(i), metrics_table(ns=ns)) for i, ns in enumerate([[1, 2], [2, 4]])]
    joined, left_out = join_metrics(folders)
    assert not left_out
    assert joined["n"].tolist() == [1, 1, 2, 2, 4, 4]
    assert joined.index.tolist() == list(range(6))


def test_joining_nothing_gives_an_empty_table(tmp_path):
    stopped = run_folder(tmp_path / "0", complete=False)
    joined, left_out = join_metrics([stopped])
    assert joined.empty
    assert list(joined.columns) == METRIC_COLUMNS
    assert left_out == [stopped]


def test_run_folders_are_found_in_job_order(tmp_path):
    folders = [run_folder(tmp_path / "sweep" / str(i)) for i in (10, 2, 0)]
    assert run_folders(tmp_path / "sweep") == folders[::-1]
    assert run_folders(folders[0]) == [folders[0]]


def test_a_path_without_runs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a run folder"):
        run_folders(tmp_path)
    with pytest.raises(UsageError, match=r"^runs=.*missing: no such folder"):
        run_folders(tmp_path / "missing")


def test_results_are_written_every_two_seconds_and_at_the_end_however_it_ends(monkeypatch):
    now, parts = [0.0], []
    monkeypatch.setattr("latent_tts.results.files.time.perf_counter", lambda: now[0])

    def interrupted():
        with written_in_parts(parts.append) as take:
            for number in range(7):
                take([number])
                now[0] += 0.75
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert parts == [[0, 1, 2, 3], [4, 5, 6]]
    with written_in_parts(parts.append) as take:
        now[0] += 9
        take([])
    assert len(parts) == 2
