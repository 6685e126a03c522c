"""Folders on file systems that lack something or fail on the way, as network file systems do."""

import errno
import os
from pathlib import Path

import pandas as pd
import pytest
from marks import slow
from refusal import check

from latent_tts.results import cache, files
from latent_tts.results.files import whole_file


def failing(name, number, monkeypatch, after=0):
    """A function of `os` that fails from some call on."""
    real, calls = getattr(os, name), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", [errno.EINVAL, slow(errno.EOPNOTSUPP)])
def test_without_flushing_a_run_completes_and_says_so_once(run, monkeypatch, number):
    monkeypatch.setattr(files, "_unsynced", set())
    failing("fsync", number, monkeypatch)
    result = run("hydra.run.dir=one")
    assert result.code == 0
    assert result.err.count("its file system cannot flush files, so a power cut may damage the last ones") == 1


IO, STALE = (errno.EIO, "Input/output error"), (errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("name", "number", "words"), [("fsync", *IO), ("replace", *STALE), slow("fsync", *STALE), slow("replace", *IO)]
)
def test_a_failure_on_the_way_is_one_line_and_the_same_command_completes(run, completed, name, number, words):
    for after in (2, 7, 13):
        with pytest.MonkeyPatch.context() as patch:
            failing(name, number, patch, after)
            result = run("hydra.run.dir=one", "paths.cache=mine")
        if result.code == 0:
            break
        assert words in result.err
        assert "Traceback" not in result.err
        assert "re-run the command to resume" in result.err or "paths.cache=mine: cannot be written to" in result.err
    else:
        assert run("hydra.run.dir=one", "paths.cache=mine").code == 0
    one, other = (pd.read_parquet(folder / "rollouts.parquet") for folder in (Path("one"), completed))
    pd.testing.assert_frame_equal(one, other)
    assert not list(Path("mine").rglob("*.partial"))


def test_a_rename_that_the_server_did_but_denies_is_done(tmp_path, monkeypatch):
    real = os.replace

    def sent_twice(source, target):
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "replace", sent_twice)
    with whole_file(tmp_path / "a") as path:
        path.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(os, "replace", lambda source, target: real(tmp_path / "nothing", target))
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a") as path:
        path.write_text("newer")
    assert (tmp_path / "a").read_text() == "new"


def test_a_cache_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(run, monkeypatch):
    failing("replace", errno.EROFS, monkeypatch)
    check(run("paths.cache=mine"), "paths.cache=mine: cannot be written to (Read-only file system)")


@pytest.fixture
def read_only(monkeypatch):
    """Make a folder one that cannot be written to; for root permissions would not."""

    def make(folder):
        real = os.replace

        def refuse(source, target):
            if Path(target).resolve().is_relative_to(Path(folder).resolve()):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(source, target)

        monkeypatch.setattr(os, "replace", refuse)

    return make


def test_a_cache_that_cannot_be_written_to_is_read(run, place, latent_rm, read_only):
    scored = ("paths.cache=mine", "scorer=latent_rm", f"scorer.checkpoint={latent_rm}")
    assert run("hydra.run.dir=one", "paths.cache=mine").code == 0
    assert run("hydra.run.dir=scored", *scored).code == 0
    before = sorted(Path("mine").rglob("*"))
    read_only("mine")
    for name, more in (("scored", scored), ("one", ["paths.cache=mine"])):
        cache._warn_read_only.cache_clear()
        again = run("hydra.run.dir=again", *more)
        assert again.code == 0, again.err
        assert again.err.count("cannot be written to") == 1
        assert "mine cannot be written to (Read-only file system): what it has is read" in again.err
        one, other = (pd.read_parquet(place / folder / "rollouts.parquet") for folder in (name, "again"))
        pd.testing.assert_frame_equal(one, other)
    assert sorted(Path("mine").rglob("*")) == before
    words = "paths.cache=mine: cannot be written to (Read-only file system), and "
    check(run("hydra.run.dir=more", "paths.cache=mine", "n=8"), words, "rollouts are missing from it")
    check(run("hydra.run.dir=more", *scored, "scorer.positions=official"), words, "scores of its rollouts are missing")
    check(run("hydra.run.dir=more", "paths.cache=mine", "cache=refresh"), words, "cache=refresh draws")
    check(run("hydra.run.dir=more", "paths.cache=mine", "seed=3"), "paths.cache=mine: cannot be written to")
    kept = {path.name: path.read_bytes() for path in Path("one").iterdir() if path.suffix != ".log" and path.is_file()}
    check(run("hydra.run.dir=one", "paths.cache=mine", "n=8"), words)
    assert {name: Path("one", name).read_bytes() for name in kept} == kept
    assert sorted(path.name for path in Path("one").iterdir() if path.is_dir()) == [".hydra"]
