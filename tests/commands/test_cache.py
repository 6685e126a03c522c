"""`cache=on|refresh|off` of `ltts run`, and `ltts cache`."""

import json
import os
import re
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_gguf
from marks import slow
from refusal import check

from latent_tts.checkpoint.model_cache import kept_models
from latent_tts.commands.cache import size, to_prune
from latent_tts.pipeline.worker import Drawer
from latent_tts.results import report
from latent_tts.results.cache import CacheEntry, cache_entries
from latent_tts.types import file_digest


def drawn_now(result) -> int:
    assert result.code == 0, result.err
    return json.loads((result.last.parent / "run.json").read_text())["rollouts"]["drawn_now"]


def parts(folder) -> list:
    return sorted(folder.rglob("*.parquet"))


def spoil(folder) -> None:
    """Change what the cache says, as if another code had drawn it."""
    for path in parts(folder):
        table = pq.read_table(path)
        if "answer_logprob" not in table.column_names:
            continue
        wrong = table.to_pandas().assign(answer_logprob=-99.0)
        stem = path.stem.rpartition("-")[0]
        pq.write_table(type(table).from_pandas(wrong, schema=table.schema), path)
        path.rename(path.with_name(f"{stem}-{file_digest(path)}.parquet"))


def logprobs(result) -> list:
    assert result.code == 0, result.err
    return logprobs_in(result.last.parent)


def logprobs_in(folder) -> list:
    return pd.read_parquet(folder / "rollouts.parquet")["answer_logprob"].tolist()


@pytest.mark.parametrize("columns", [slow([]), ["row_key", "rollout"]])
def test_a_part_without_its_columns_is_set_aside_and_drawn_again(run, cached, tmp_path, columns):
    true = logprobs_in(cached)
    (path,) = (tmp_path / "cache").glob("*/*.parquet")
    pq.write_table(pq.read_table(path).select(columns), path)
    named = path.with_name(f"{path.stem.rpartition('-')[0]}-{file_digest(path)}.parquet")
    path.rename(named)
    again = run()
    assert (logprobs(again), drawn_now(again)) == (true, 24)
    assert f"{named} is damaged: it is now {named.name}.damaged" in again.err
    assert again.err.count("is damaged") == 1


def test_refresh_draws_again_and_replaces_what_is_there_and_nothing_else(run, checkpoint, tmp_path):
    scorer = tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    scored = ["scorer=latent_rm", f"scorer.checkpoint={scorer}", "max_answer_tokens=3"]
    true = logprobs(run(*scored))
    run(*scored, "n=6")
    spoil(tmp_path / "cache")
    assert set(logprobs(run(*scored, "n=6"))) == {-99.0}
    again = run(*scored, "cache=refresh")
    assert (logprobs(again), drawn_now(again)) == (true, 24)
    assert json.loads((again.last.parent / "run.json").read_text())["rollouts"]["scored_now"] == 24
    mixed = logprobs(run(*scored, "n=6"))
    assert [value for place, value in enumerate(mixed) if place % 6 < 4] == true
    assert {value for place, value in enumerate(mixed) if place % 6 >= 4} == {-99.0}
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    rows = pd.concat([pq.read_table(path).to_pandas() for path in folder.glob("*.parquet")])
    assert not rows.duplicated(["row_key", "rollout"]).any()


def test_off_reads_nothing_and_leaves_nothing(run, cached, tmp_path, monkeypatch):
    true = logprobs_in(cached)
    spoil(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    off = run("cache=off", "keep_latents=true")
    assert (logprobs(off), drawn_now(off)) == (true, 24)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert not list((tmp_path / "temporary").iterdir())
    assert "cache" not in json.loads((off.last.parent / "run.json").read_text())


def test_a_damaged_part_is_drawn_and_a_damaged_score_made_again_in_the_same_run(run, checkpoint, tmp_path):
    scored = ["scorer=latent_rm", f"scorer.checkpoint={tiny.write_latent_rm(tmp_path / 'rm', checkpoint)}"]
    whole = run(*scored)
    expected = pd.read_parquet(whole.last.parent / "rollouts.parquet")
    for path in parts(tmp_path / "cache"):
        good = path.read_bytes()
        path.write_bytes(good[:100] + bytes([good[100] ^ 4]) + good[101:])
        again = run(*scored)
        assert again.code == 0, again.err
        assert f"{path.name} is damaged: it is now {path.name}.damaged" in again.err.replace("\n", "")
        pd.testing.assert_frame_equal(pd.read_parquet(again.last.parent / "rollouts.parquet"), expected)
    assert len(list((tmp_path / "cache").rglob("*.damaged"))) == 1


def test_a_disk_that_is_full_ends_the_run_and_names_it(run, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latent_tts.results.parts.pq.write_table", full)
    result = run()
    assert result.code == 1
    assert "no space left on the disk\nfinished work is kept" in result.err


def test_ctrl_c_keeps_every_batch_that_was_drawn(run, completed, monkeypatch):
    drawn, draw = [], Drawer.draw

    def interrupted(self, batch, shard):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(batch)
        return draw(self, batch, shard)

    monkeypatch.setattr(Drawer, "draw", interrupted)
    stopped = run("engine.rows=4")
    assert stopped.code == 130
    kept = "12 of 24 rollouts are kept; those of an unfinished batch are not; re-run the command to resume"
    assert f"interrupted: {kept}\n" in stopped.err
    monkeypatch.undo()
    again = run("engine.rows=4")
    assert drawn_now(again) == 12
    assert logprobs(again) == pytest.approx(logprobs_in(completed), abs=1e-5)


@pytest.mark.parametrize("value", ["maybe", "true", "null"])
def test_another_mode_is_refused(refuse, value):
    refuse(f"cache={value}", words=["cache"])


@pytest.mark.usefixtures("cached")
def test_what_the_cache_holds_is_listed_and_pruned_by_age(run, ltts, tmp_path):
    run("seed=7", "sampler=gaussian", "sampler.sigma=0.25")
    (tmp_path / "cache" / "of_somebody_else").mkdir()
    listed = ltts("cache")
    assert listed.code == 0, listed.err
    assert "2 entries" in listed.out
    (row,) = [line for line in listed.out.splitlines() if "gaussian" in line]
    for cell in ("demo_coconut", "gaussian sigma=0.25", " 7 ", "float32", " 24 ", "KB", " 0 m"):
        assert cell in row
    assert "stale" not in listed.out
    old, new = sorted(cache_entries(tmp_path / "cache"), key=lambda entry: entry.key["seed"])
    for path in [old.folder, *old.folder.rglob("*")]:
        os.utime(path, (0, 0))
    pruned = ltts("cache", "prune", "older_than=30d")
    assert re.match(r"removed 1 of 2 entries, freed .+ KB of .+ KB in ", pruned.out), pruned.out
    assert not old.folder.exists()
    assert new.folder.is_dir()
    assert (tmp_path / "cache" / "of_somebody_else").is_dir()
    assert drawn_now(run()) == 24


@pytest.mark.usefixtures("cached")
def test_a_cache_that_cannot_be_pruned_is_named(ltts, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path / "part.parquet"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    check(ltts("cache", "prune", "older_than=0d"), "paths.cache=", "cannot be written to (Permission denied)")


@pytest.mark.usefixtures("cached")
def test_what_the_code_no_longer_reads_is_stale(run, ltts, tmp_path):
    (entry,) = cache_entries(tmp_path / "cache")
    os.rename(entry.folder, entry.folder.with_name("0123456789abcdef"))
    (tmp_path / "cache" / "0123456789abcdef" / "key.json").write_text('{"seed": 0}')
    run()
    assert "stale" in ltts("cache").out
    assert ltts("cache", "prune", "stale=true").out.startswith("removed 1 of 2 entries")
    assert [each.folder for each in cache_entries(tmp_path / "cache")] == [entry.folder]


def test_entries_with_a_damaged_key_are_stale_and_links_are_no_entries(ltts, place):
    keys = ['{"sampler": "x"}', '{"sampler": ["x"]}', '{"code": [1], "format": 3}', "[]", "", 50_000 * "[", "\udcff"]
    for number, key in enumerate(keys):
        entry = place / "cache" / f"{number:016x}"
        entry.mkdir(parents=True)
        (entry / "key.json").write_bytes(key.encode(errors="surrogateescape"))
    os.symlink(shutil.move(entry, place / "elsewhere"), entry)
    listed = ltts("cache")
    assert listed.code == 0, listed.err
    assert listed.out.count("stale") == 6
    assert ltts("cache", "prune", "older_than=0m").out.startswith("removed 6 of 6 entries")
    assert (place / "elsewhere" / "key.json").is_file()


def test_what_was_used_longest_ago_goes_first():
    entries = [CacheEntry(None, {}, 1, 10**9, used=float(used)) for used in (50, 40, 30)]
    rules = {"older_than": None, "max_size": None, "stale": False, "now": 60.0}
    assert to_prune(entries, **rules | {"max_size": 2e9}) == entries[2:]
    assert to_prune(entries, **rules | {"older_than": 15.0}) == entries[1:]
    assert to_prune(entries, **rules | {"older_than": 25.0, "max_size": 1e9}) == entries[1:]
    assert to_prune(entries, **rules | {"max_size": 3e9}) == []
    sizes = [CacheEntry(None, {}, 1, size, used=float(used)) for size, used in ((6, 50), (5, 40), (1, 30))]
    assert to_prune(sizes, **rules | {"max_size": 8}) == sizes[1:]
    assert (size(0), size(1500), size(2.5e12)) == ("0 B", "1.5 KB", "2.5 TB")
    assert (report.age(3), report.age(7300), report.age(90000)) == ("0 m", "2 h", "1 d")


@pytest.mark.slow
def test_models_that_were_converted_or_joined_are_listed_and_pruned(ltts, place):
    file = tiny_gguf.write(place / "mine.gguf", tiny_gguf.model())
    line = ["run", "model=cot", "task.limit=2", "n=1", "sampler=greedy", "max_answer_tokens=2"]
    assert ltts(*line, f"model.checkpoint=gguf:{file}").code == 0
    models = place / "cache" / "models"
    (converted,) = kept_models(place / "cache")
    assert (converted.source, converted.kind, converted.stale) == (str(file), "converted from GGUF", False)
    old = shutil.copytree(converted.folder, models / "joined0-0123456789abcdef")
    (models / "partial-abc").mkdir()
    shutil.copyfile(file, models / "fetched.gguf")
    listed = ltts("cache")
    assert "2 models" in listed.out  # not the one that is being written
    assert "1 entry" in listed.out
    (row,) = [line for line in listed.out.splitlines() if "joined0-0123456789abcdef" in line]
    assert "stale" in row
    pruned = ltts("cache", "prune", "stale=true")
    assert pruned.out.startswith("removed 0 of 1 entry and 1 of 2 models"), pruned.out
    assert not old.exists()
    os.utime(converted.folder, (0, 0))
    assert ltts(*line, f"model.checkpoint=gguf:{file}").code == 0  # which is a use
    assert ltts("cache", "prune", "older_than=30d").out.startswith("removed 0 of 1 entry and 0 of 1 model")
    assert ltts("cache", "prune", "max_size=1KB").out.startswith("removed 1 of 1 entry and 1 of 1 model,")
    assert {path.name for path in models.iterdir()} == {"fetched.gguf", "partial-abc"}
    os.utime(models / "partial-abc", (0, 0))  # the process that wrote it was killed long ago
    assert ltts(*line, f"model.checkpoint=gguf:{file}").code == 0
    assert not (models / "partial-abc").exists()


def test_what_cannot_be_pruned_so_is_said(ltts):
    check(ltts("cache", "prune"), "older_than=30d, max_size=20GB or stale=true")
    check(ltts("cache", "older_than=30d"), "ltts cache prune")
    check(ltts("cache", "forget"), "action=forget: must be list or prune")
    check(ltts("cache", "prune", "older_than=month"), "older_than=month: must be an age")
    check(ltts("cache", "prune", "max_size=1e9"), "max_size=")
    nothing = ltts("cache", "paths.cache=nowhere")
    assert (nothing.code, "0 entries" in nothing.out) == (0, True)
