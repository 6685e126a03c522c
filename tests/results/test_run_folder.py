import hashlib
import math
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from latent_tts.errors import UsageError
from latent_tts.results import files, parts
from latent_tts.results.cache import (
    MEASURED,
    ROLLOUT_FIELDS,
    ROLLOUT_SCHEMA,
    SCORE_FIELDS,
    SCORE_SCHEMA,
    RolloutCache,
    ScoreCache,
)
from latent_tts.results.files import whole_file, written_in_parts
from latent_tts.results.parts import GatheredRows, PartWriter, runs_of
from latent_tts.results.run_folder import (
    LATENTS,
    METRIC_COLUMNS,
    METRICS,
    ROLLOUT_COLUMNS,
    ROLLOUTS,
    is_complete,
    join_tables,
    latents_file,
    open_latents,
    read_metrics,
    read_run_json,
    read_tables,
    run_folders,
    write_metrics,
    write_rollouts,
    write_run_json,
)

KEY = {"weights": "abc", "seed": 0}


def row(key, rollout, **changes):
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
        "dissimilarity": [0.5 * rollout, 0.25],
        "seconds": 0.125,
        "floor_seconds": 0.25,
        "bytes": 1e9,
        "peak_memory_bytes": 1000,
        "device": "cpu",
        "rows": 4,
    } | changes


def add(cache, rows):
    """Write a part."""
    parts.write_part(
        cache.folder,
        pa.Table.from_pylist(rows, schema=SCORE_SCHEMA if isinstance(cache, ScoreCache) else ROLLOUT_SCHEMA),
    )


def gathered(cache, pairs):
    """What the cache has of some rows."""
    if isinstance(cache, ScoreCache):
        rows = GatheredRows(wanted(*pairs), SCORE_FIELDS)
        cache.gather(rows)
    else:
        rows = GatheredRows(wanted(*pairs), ROLLOUT_FIELDS)
        cache.gather(rows, {})
    return rows


def there(cache, *pairs):
    """Which of some rows the cache has."""
    missing = set(gathered(cache, pairs).missing().itertuples(index=False, name=None))
    return {pair for pair in pairs if pair not in missing}


def read(cache, *pairs):
    rows = gathered(cache, pairs)
    assert rows.missing().empty
    return rows.frame()


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


@pytest.mark.parametrize("count", [1, 3])
def test_rollouts_come_back_as_they_were_added(cache, count):
    rows = [row("a", 0), row("a", 1, answer_ids=[], dissimilarity=[], latent_steps=0), row("b", 0)][:count]
    add(cache, rows)
    found = gathered(cache, [(each["row_key"], each["rollout"]) for each in rows])
    frame, compared = found.frame(), found.padded("dissimilarity")
    assert set(frame.columns) == {"row_key", "rollout", *ROLLOUT_FIELDS.names} - {"dissimilarity"}
    for place, expected in enumerate(rows):
        assert frame.loc[place].to_dict() == {key: expected[key] for key in frame}
        own = expected["dissimilarity"]
        assert compared[place].tolist()[: len(own)] == own
        assert np.isnan(compared[place][len(own) :]).all()


def test_the_order_of_what_is_wanted_is_kept_across_parts(cache):
    for rollout in range(3):
        add(cache, [row(key, rollout) for key in "cab"])
    add(cache, [row("unwanted", 0)])
    pairs = [("b", 2), ("a", 0), ("c", 1), ("a", 2)]
    found = read(cache, *pairs)
    assert list(zip(found["row_key"], found["rollout"], strict=True)) == pairs
    assert found["answer_logprob"].tolist() == [-1.0, 0.0, -0.5, -1.0]
    assert found["answer_ids"].tolist() == [[1, 2, 2], [1, 2, 0], [1, 2, 1], [1, 2, 2]]
    assert found.index.tolist() == [0, 1, 2, 3]


def test_a_rollout_in_two_parts_is_read_once(cache):
    add(cache, [row("a", 0), row("a", 1)])
    add(cache, [row("a", 1, answer_logprob=7.0), row("a", 2)])
    first = read(cache, ("a", 0), ("a", 1), ("a", 2))
    assert first["rollout"].tolist() == [0, 1, 2]
    pd.testing.assert_frame_equal(read(cache, ("a", 0), ("a", 1), ("a", 2)), first)


def test_a_cache_is_found_again_and_another_key_has_its_own(tmp_path, cache):
    add(cache, [row("a", 0)])
    assert there(RolloutCache(tmp_path / "cache", dict(reversed(KEY.items()))), ("a", 0)) == {("a", 0)}
    assert there(RolloutCache(tmp_path / "cache", KEY | {"seed": 1}), ("a", 0)) == set()


def test_what_is_missing_is_said_and_gathered_later(cache):
    add(cache, [row("a", 0), row("a", 3)])
    rows = gathered(cache, [("a", 0), ("a", 1), ("b", 0)])
    assert rows.missing().to_dict("list") == {"row_key": ["a", "b"], "rollout": [1, 0]}
    assert runs_of(rows.missing()) == [("a", range(1, 2)), ("b", range(1))]
    add(cache, [row("b", 0), row("a", 1)])
    cache.gather(rows, {})
    assert rows.frame()["row_key"].tolist() == ["a", "a", "b"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=20),
    st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 6)), min_size=1, max_size=9), max_size=5),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_gathered_rows_are_those_of_a_loop_over_dictionaries(pairs, tables):
    pairs = list(dict.fromkeys(pairs))
    rows, known = GatheredRows(wanted(*pairs), ROLLOUT_FIELDS), {}
    for number, table in enumerate(tables):
        content = [row(key, rollout, rows=number) for key, rollout in table]
        rows.take(pa.Table.from_pylist(content, schema=ROLLOUT_SCHEMA))
        for each in content:
            known.setdefault((each["row_key"], each["rollout"]), number)
    found = rows.frame()
    assert [tuple(each) for each in found[["row_key", "rollout"]].to_numpy()] == [p for p in pairs if p in known]
    assert found["rows"].tolist() == [known[pair] for pair in pairs if pair in known]
    assert len(rows.missing()) == len([pair for pair in pairs if pair not in known])
    again = [(key, number) for key, run in runs_of(wanted(*pairs)) for number in run]
    assert again == pairs


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=20, unique=True),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=9),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_runs_that_hold_a_missing_row_are_those_of_a_loop(pairs, there, runs):
    rows = GatheredRows(wanted(*pairs), ROLLOUT_FIELDS)
    if there:
        rows.take(pa.Table.from_pylist([row(*pair) for pair in there], schema=ROLLOUT_SCHEMA))
    missing = set(pairs) - set(there)
    expected = [any((key, first + more) in missing for more in range(count)) for key, first, count in runs]
    assert [rows.any_missing([run]) for run in runs] == expected
    assert rows.any_missing(runs) == any(expected)


def test_scores_made_with_rollouts_and_those_made_later_are_found(tmp_path, cache):
    at_once = {"scored_by": "one", "scoring_step_scores": [1.0, 2.0], "scoring_seconds": 0.5}
    add(cache, [row("a", 0, **at_once), row("a", 1, **at_once | {"scored_by": "two"}), row("a", 2)])
    pairs = [("a", 0), ("a", 1), ("a", 2)]
    rows, scores = GatheredRows(wanted(*pairs), ROLLOUT_FIELDS), GatheredRows(wanted(*pairs), SCORE_FIELDS)
    cache.gather(rows, {"one": scores})
    assert scores.missing()["rollout"].tolist() == [1, 2]
    assert scores.frame()["seconds"].tolist() == [0.5]
    later = ScoreCache(cache.folder, KEY)
    add(later, [{"row_key": "a", "rollout": number, "step_scores": [3.0, 4.0]} for number in range(3)])
    later.gather(scores)
    assert scores.padded("step_scores").tolist() == [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]  # recorded ones stay


# What is read of a large cache


def many(cache, each):
    """300,000 rollouts, as many of each question, in rows of 80 to 90 bytes as in real runs; returns 10,000 of them."""
    rows, random = 300_000, np.random.default_rng(0)
    keys = [hashlib.sha256(b"%d" % number).hexdigest()[:16] for number in range(-(-rows // each))]
    columns = {
        "row_key": pa.array(keys).take(pa.array(np.arange(rows) // each)),
        "rollout": pa.array((np.arange(rows) % each).astype(np.int32)),
        **{name: pa.array(random.random(rows, dtype=np.float32)) for name in ("answer_logprob", "answer_margin")},
        **{
            name: parts.ragged(random.random((rows, 6), dtype=np.float32), np.full(rows, 6))
            for name in ("dissimilarity", "scoring_step_scores")
        },
    }
    table = pa.Table.from_pylist([row("x", 0)], schema=ROLLOUT_SCHEMA).take(pa.array(np.zeros(rows, dtype=np.int64)))
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), ROLLOUT_SCHEMA.field(name), column)
    with PartWriter(cache.folder) as writer:
        writer.put(lambda: table)
    return table.select(parts.PLACE).slice(100_000, 10_000).to_pandas()


shapes = [1, 4, 16, 256, 5000]


@pytest.mark.parametrize("each", [64, *(pytest.param(each, marks=pytest.mark.slow) for each in shapes)])
def test_of_a_large_cache_only_the_parts_that_hold_what_is_wanted_are_read(cache, monkeypatch, each):
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1 << 20)  # a part has about 4,096 rollouts, as in real runs on a CPU
    part, read = many(cache, each), []
    method = type(cache.folder).read_bytes
    monkeypatch.setattr(type(cache.folder), "read_bytes", lambda path: read.append(path) or method(path))

    def share_read():
        """Gather; the bytes that were read, as a share of those of the parts that hold what is wanted."""
        read.clear()
        rows = GatheredRows(part, ROLLOUT_FIELDS)
        cache.gather(rows, {})
        seen = [len(method(path)) for path in read]
        assert rows.complete
        holding = [
            path.stat().st_size
            for path in parts.part_files(cache.folder)
            if rows.contains(pq.read_table(path, columns=parts.PLACE)).any()
        ]
        return sum(seen) / sum(holding)

    assert len(parts.part_files(cache.folder)) > 50
    assert share_read() <= 1.2
    for name in (parts.INDEX, parts.SAMPLE):
        (cache.folder / name).unlink()
        share_read()
        assert (cache.folder / name).is_file()
        assert share_read() <= 1.2


def test_parts_are_of_at_most_16_mb_also_where_rows_of_a_batch_differ_in_length(cache):
    lengths = np.repeat([3, 2000], [30_000, 4000])
    ids = np.random.default_rng(0).integers(0, 128_000, (len(lengths), 2000), np.int32)
    columns = {"row_key": ["a"] * len(lengths), "rollout": range(len(lengths)), "ids": parts.ragged(ids, lengths)}
    with PartWriter(cache.folder) as writer:
        writer.put(lambda: pa.table(columns))
    written = {path: path.stat().st_size for path in parts.part_files(cache.folder)}
    assert 1 < len(written) < 9
    assert max(written.values()) <= 16e6
    assert pq.read_table(list(written)).sort_by("rollout").equals(pa.table(columns))


def test_a_damaged_index_is_made_again_and_one_of_parts_that_are_gone_forgets_them(cache):
    add(cache, [row("a", 0)])
    add(cache, [row("a", 1)])
    assert there(cache, ("a", 0), ("a", 1)) == {("a", 0), ("a", 1)}
    index = cache.folder / parts.INDEX
    index.write_bytes(damaged(index.read_bytes(), 99))
    assert there(cache, ("a", 0), ("a", 1)) == {("a", 0), ("a", 1)}
    parts.part_files(cache.folder)[0].unlink()
    assert len(there(cache, ("a", 0), ("a", 1))) == 1
    add(cache, [row("a", 0), row("a", 1)])
    assert there(cache, ("a", 0), ("a", 1)) == {("a", 0), ("a", 1)}


def test_threads_of_arrow_hold_no_object_of_python(tmp_path, monkeypatch):
    """At exit, one that lets go of such an object aborts the process."""
    parts.write_part(tmp_path, pa.table({"a": [1, 2]}))
    (part,), read, addresses = tmp_path.iterdir(), pq.read_table, []
    content = part.read_bytes()
    monkeypatch.setattr(type(part), "read_bytes", lambda path: content)

    def watched(source, **options):
        addresses.append(source.read_buffer().address)
        source.seek(0)
        return read(source, **options)

    monkeypatch.setattr(pq, "read_table", watched)
    table = parts.whole_table(part, ["a"])
    assert table is not None
    assert table.to_pydict() == {"a": [1, 2]}
    assert addresses != [pa.py_buffer(content).address]


# The writer


def test_what_was_handed_over_is_written_when_drawing_fails_or_is_interrupted(cache):
    for number, error in enumerate((KeyboardInterrupt(), RuntimeError("no"))):

        def draw(number=number, error=error):
            with PartWriter(cache.folder) as writer:
                for rollout in range(9):
                    writer.put(
                        lambda rollout=rollout: pa.Table.from_pylist([row(str(number), rollout)], ROLLOUT_SCHEMA)
                    )
                raise error

        with pytest.raises(type(error)):
            draw()
        assert len(there(cache, *[(str(number), rollout) for rollout in range(9)])) == 9


def test_an_error_of_the_writer_ends_the_work_and_is_raised(cache, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.pq, "write_table", full)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)
    handed = []

    def draw():
        with PartWriter(cache.folder) as writer:
            for rollout in range(1000):
                handed.append(rollout)
                writer.put(lambda: pa.Table.from_pylist([row("a", 0)], ROLLOUT_SCHEMA))
                time.sleep(0.001)

    with pytest.raises(OSError, match=f"No space left on device: '{cache.folder}'"):
        draw()
    assert len(handed) < 1000
    with pytest.raises(OSError, match="No space left"), PartWriter(cache.folder) as writer:
        writer.put(lambda: pa.Table.from_pylist([row("a", 0)], ROLLOUT_SCHEMA))
    assert not partials(cache.folder)


def test_work_that_waits_for_a_place_in_the_queue_goes_on_when_writing_fails(cache, monkeypatch):
    def full(*arguments):
        time.sleep(0.1)  # until the queue is full
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "write_part", full)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)
    raised = []

    def draw():
        try:
            with PartWriter(cache.folder) as writer:
                for rollout in range(100):
                    writer.put(lambda rollout=rollout: pa.Table.from_pylist([row("a", rollout)], ROLLOUT_SCHEMA))
        except OSError as error:
            raised.append(error)

    work = threading.Thread(target=draw, daemon=True)
    work.start()
    work.join(timeout=60)
    assert not work.is_alive()
    assert len(raised) == 1


def test_a_second_interruption_leaves_no_thread_that_waits(cache, monkeypatch):
    """The process would wait for it at its end."""
    write, goes_on, ended = parts.write_part, threading.Event(), threading.Event()

    class Writer(PartWriter):
        def _write_all(self):
            super()._write_all()
            ended.set()

    monkeypatch.setattr(parts, "write_part", lambda *arguments: (goes_on.wait(60), write(*arguments)))
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)
    count = parts.MAX_WAITING + 1  # as many as there is room for, and the one that is being written
    writer = Writer(cache.folder)

    def draw():
        with writer:
            for rollout in range(count):
                writer.put(lambda rollout=rollout: pa.Table.from_pylist([row("a", rollout)], ROLLOUT_SCHEMA))
            threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    goes_on.set()
    has_ended = ended.wait(10)
    writer._queue.put(None)  # otherwise this process would not end either
    assert has_ended
    assert len(there(cache, *[("a", rollout) for rollout in range(count)])) == count


def test_a_file_system_that_is_slower_than_the_work_is_named_once(cache, monkeypatch, caplog):
    write = parts.write_part
    monkeypatch.setattr(parts, "write_part", lambda *arguments: (time.sleep(0.02), write(*arguments)))
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1)
    monkeypatch.setattr(parts, "SECONDS_TO_SAY", 0.1)
    with PartWriter(cache.folder) as writer:
        for rollout in range(30):
            writer.put(lambda rollout=rollout: pa.Table.from_pylist([row("a", rollout)], ROLLOUT_SCHEMA))
    assert caplog.text.count(f"{cache.folder}: its file system is slower than the work") == 1
    assert len(there(cache, *[("a", rollout) for rollout in range(30)])) == 30


def test_work_that_is_slower_than_its_file_system_is_not_said_to_wait(cache, monkeypatch, caplog):
    monkeypatch.setattr(parts, "SECONDS_TO_SAY", 0.0)
    monkeypatch.setattr(files, "SECONDS_BETWEEN_PARTS", math.inf)  # nothing is written before the end
    with PartWriter(cache.folder) as writer:
        for rollout in range(3):
            writer.put(lambda rollout=rollout: pa.Table.from_pylist([row("a", rollout)], ROLLOUT_SCHEMA))
    assert not caplog.text


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
    add(cache, rows)
    pairs = [("a", number) for number in range(40)]
    (part,) = cache.folder.glob("*.parquet")
    good = part.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(good), 80, replace=False).tolist():
        part.write_bytes(damaged(good, place))
        caplog.clear()
        assert there(cache, *pairs) == set()
        assert part.name in caplog.text
        (aside,) = cache.folder.glob("*.damaged")
        assert aside.read_bytes() == damaged(good, place)
        assert not part.exists()
    part.write_bytes(good)
    assert len(read(cache, *pairs)) == 40


@pytest.mark.parametrize("damage", [lambda good: b"", lambda good: b"not parquet", lambda good: good[: len(good) // 2]])
def test_a_part_that_is_not_whole_is_set_aside_and_the_others_are_read(cache, caplog, damage):
    add(cache, [row("a", 0)])
    (part,) = cache.folder.glob("*.parquet")
    add(cache, [row("a", 1)])
    part.write_bytes(damage(part.read_bytes()))
    assert there(cache, ("a", 0), ("a", 1)) == {("a", 1)}
    assert part.name in caplog.text


def test_partial_and_foreign_files_are_not_read(cache):
    add(cache, [row("a", 0)])
    (cache.folder / ".123.parquet.0.partial").write_bytes(b"half")
    (cache.folder / ".456.parquet").write_bytes(b"half")
    (cache.folder / "older.parquet").write_bytes(b"of an earlier version")
    assert there(cache, ("a", 0)) == {("a", 0)}
    assert (cache.folder / "older.parquet").is_file()


def test_a_cache_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"^paths\.cache=.*file/cache: cannot be written to"):
        RolloutCache(tmp_path / "file" / "cache", KEY)


# Run folders


def test_rollouts_are_written_with_their_columns_in_order(tmp_path):
    values = {name: [1, 2] for name in reversed([*ROLLOUT_COLUMNS.names, "seconds"])}
    texts = {name: ["x", "y"] for name in ("question_id", "stop_reason", "answer_text")}
    missing = {"prediction": [None, None], "correct": [None, None], "score": [0.5, np.nan]}
    table = pd.DataFrame(values | texts | missing | {"answer_ids": [[1, 2], []]})
    write_rollouts(tmp_path, table)
    assert pq.read_schema(tmp_path / ROLLOUTS).field("prediction").type == pa.string()  # as if one could be read
    table = pd.read_parquet(tmp_path / ROLLOUTS)
    assert list(table.columns) == ROLLOUT_COLUMNS.names
    assert table[["prediction", "correct"]].isna().all(axis=None)
    assert table["score"].isna().tolist() == [False, True]
    assert list(map(list, table["answer_ids"])) == [[1, 2], []]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_latents_are_kept_in_the_order_of_the_table_and_in_their_dtype(tmp_path, dtype):
    pairs = [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    latents = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    with latents_file(tmp_path / LATENTS, wanted(*pairs), (3, 5), dtype) as keep:
        keep(pairs[2:], latents[2:])
        keep([pairs[1]], latents[1:2])
        assert not (tmp_path / LATENTS).exists()
    tensors = load_file(tmp_path / LATENTS)
    assert list(tensors) == ["latents_RTD"]
    assert tensors["latents_RTD"].dtype == latents.dtype
    assert not tensors["latents_RTD"][0].any()
    assert torch.equal(tensors["latents_RTD"][1:], latents[1:])
    assert torch.equal(open_latents(tmp_path, 4)[1:3], latents[1:3])
    with pytest.raises(UsageError, match="4 rows, but 5"):
        open_latents(tmp_path, 5)


def test_an_error_leaves_no_latents_behind(tmp_path):
    with pytest.raises(RuntimeError), latents_file(tmp_path / LATENTS, wanted(("a", 0)), (1, 2), "float32"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


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
    other = run_folder(tmp_path / "3", metrics_table("r3", ns=[2]))
    assert [is_complete(folder) for folder in (good, stopped)] == [True, False]
    tables = read_tables([good, stopped, other])
    assert list(tables) == [good, other]
    joined = join_tables(tables.values())
    assert joined["run_id"].tolist() == ["r0"] * 4 + ["r3"] * 2
    assert list(joined.columns) == METRIC_COLUMNS


def test_joining_drops_rows_that_are_there_twice(tmp_path):
    folders = [run_folder(tmp_path / str(i), metrics_table(ns=ns)) for i, ns in enumerate([[1, 2], [2, 4]])]
    joined = join_tables(read_tables(folders).values())
    assert joined["n"].tolist() == [1, 1, 2, 2, 4, 4]
    assert joined.index.tolist() == list(range(6))


def test_no_changed_bit_of_a_record_passes_unseen(completed, tmp_path):
    content = bytearray((completed / "run.json").read_bytes())
    expected = read_run_json(completed, {})
    for place in range(0, 8 * len(content), 101):
        content[place // 8] ^= 1 << place % 8
        (tmp_path / "run.json").write_bytes(content)
        content[place // 8] ^= 1 << place % 8
        with suppress(UsageError):
            assert read_run_json(tmp_path, {}) == expected


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
