"""The annotation folder: what is written is read, whatever stopped the writer; official shards; what is refused."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from latent_tts.errors import RunError, UsageError
from latent_tts.results import annotations
from latent_tts.results.annotations import FORMAT, INDEX, SETTINGS, AnnotationFolder
from latent_tts.results.files import settings_digest, whole_file
from latent_tts.results.parts import parquet_table
from latent_tts.types import LabelledQuestion, UnmixedQuestion, file_digest, written_ids

N, T, D, LATENT, END, PAD = 3, 4, 5, 90, 91, 0
WANTED = {"reasoner": "abc", "n": N, "latents": T, "width": D, "latent_id": LATENT}


def entry(index: int, steps: list[int] | None = None, prompt: tuple[int, ...] = (7, 8, 9)) -> LabelledQuestion:
    random = np.random.default_rng(index)
    latents_NTD = random.normal(size=(N, T, D)).astype(np.float32)
    labels_NT = random.uniform(size=(N, T)).astype(np.float32)
    for rollout, count in enumerate(steps or []):
        latents_NTD[rollout, count:], labels_NT[rollout, count:] = 0.0, np.nan
    ids_NL = written_ids(prompt, steps or [T] * N, LATENT, [END], PAD)
    return LabelledQuestion(f"q{index}", index, ids_NL, latents_NTD, labels_NT, np.array([True, False, index % 2 == 0]))


def same(a: LabelledQuestion, b: LabelledQuestion) -> bool:
    arrays = ("input_ids_NL", "latents_NTD", "labels_NT", "corrects_N")
    equal = all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=k == "labels_NT") for k in arrays)
    types = all(getattr(a, k).dtype == getattr(b, k).dtype for k in arrays)
    return equal and types and (a.question_id, a.index) == (b.question_id, b.index)


def part_of(path: Path, number: int) -> Path:
    (part,) = path.glob(f"{number}_on0-*.parquet")
    return part


@pytest.fixture
def path(tmp_path) -> Path:
    """A finished folder of two shards, with the questions out of order."""
    folder = AnnotationFolder(tmp_path / "annotations", WANTED)
    folder.add([entry(3), entry(0, steps=[4, 1, 2]), UnmixedQuestion("q4", 4, "all_wrong", N)])
    folder.add([entry(1), UnmixedQuestion("q2", 2, "all_correct", N)])
    assert folder.present() == {"q0", "q1", "q2", "q3", "q4"}
    assert folder.finish() == {"kept": 3, "all_correct": 1, "all_wrong": 1}
    return folder.path


def test_what_is_written_is_read_in_the_order_of_the_questions(path):
    folder = AnnotationFolder(path)
    folder.check()
    read = list(folder.read())
    assert [got.index for got in read] == [0, 1, 3]
    assert all(same(got, want) for got, want in zip(read, [entry(0, steps=[4, 1, 2]), entry(1), entry(3)], strict=True))
    assert folder.complete
    assert folder.settings == WANTED | {"format": FORMAT}
    assert folder.counts() == {"kept": 3, "all_correct": 1, "all_wrong": 1}
    index = pq.read_table(path / INDEX).to_pandas()
    assert index["question_id"].tolist() == ["q0", "q1", "q2", "q3", "q4"]
    assert index["kept"].tolist() == [True, True, False, True, False]
    assert index["share_correct"].tolist() == pytest.approx([2 / 3, 1 / 3, 1, 1 / 3, 0])
    assert index["rollouts"].tolist() == [N] * 5


@given(st.lists(st.integers(1, 30), max_size=6), st.lists(st.integers(0, T), min_size=1, max_size=4), st.integers(0, 2))
def test_the_prompt_is_what_stands_before_the_latents(prompt, steps, padding):
    ids_NL = written_ids(prompt, steps, LATENT, [END, END], PAD)
    assert ids_NL.dtype == np.int64
    assert [(row == LATENT).sum() for row in ids_NL] == steps
    if any(steps):
        padded = np.pad(ids_NL, ((0, 0), (padding, 0)), constant_values=PAD)
        got = LabelledQuestion(
            "q", 0, padded, np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.float32), np.ones(1, bool)
        )
        assert got.prompt_ids(LATENT, PAD) == prompt


def test_the_layout_on_disk_is_the_official_one(path):
    tensors = load_file(path / "0_on0.safetensors")
    assert set(tensors) == {
        "4.input_ids",
        *(f"{index}.{part}" for index in (0, 3) for part in ("input_ids", "estimations", "latent_embeds", "corrects")),
    }
    assert tensors["4.input_ids"].shape == ()
    assert tensors["4.input_ids"] == 0
    assert tensors["0.input_ids"].tolist()[1] == [7, 8, 9, LATENT, END, PAD, PAD, PAD]
    assert tensors["0.estimations"][1].tolist()[1:] == [-100.0] * 3  # what the official loader takes for missing
    assert {tensors[f"0.{part}"].dtype.name for part in ("estimations", "latent_embeds")} == {"float32"}
    assert tensors["0.corrects"].dtype == np.bool_


def test_a_shard_without_its_part_of_the_index_is_not_there(path, caplog):
    gone = part_of(path, 1)
    gone.unlink()
    with pytest.raises(UsageError, match=rf"{gone.name}: is missing; `ltts annotate`"):
        AnnotationFolder(path)  # a finished folder has all of its parts
    folder = AnnotationFolder(path, WANTED)
    assert not (path / "1_on0.safetensors").exists()
    assert [got.index for got in AnnotationFolder(path).read()] == [0, 3]
    assert f"parts are missing, such as {gone.name}" in caplog.text
    assert folder.present() == {"q0", "q3", "q4"}
    folder.add([entry(1)])
    assert not folder.complete  # until it is finished again
    assert not json.loads((path / SETTINGS).read_text())["complete"]
    assert folder.finish() == {"kept": 3, "all_correct": 0, "all_wrong": 1}


def test_a_question_annotated_twice_counts_once_as_it_was_last(path):
    folder = AnnotationFolder(path, WANTED)
    again = replace(entry(1), labels_NT=np.zeros((N, T), np.float32))
    folder.add([again])
    read = list(folder.read())
    assert [got.index for got in read] == [0, 1, 3]
    assert same(read[1], again)


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"n": 8}, "n: 3 there, 8 now"), ({"reasoner": "xyz"}, 'reasoner: "abc" there'), ({"keep": "all"}, "keep: null")],
)
def test_a_folder_of_other_settings_is_refused_by_the_first_that_differs(path, changed, words):
    with pytest.raises(UsageError, match=words):
        AnnotationFolder(path, WANTED | changed)


def test_a_question_with_another_gold_answer_than_it_was_labelled_by_is_refused(tmp_path):
    path = tmp_path / "annotations"
    AnnotationFolder(path, WANTED, {"q0": "5", "q1": "7"}).add([entry(0), UnmixedQuestion("q1", 1, "all_wrong", N)])
    assert AnnotationFolder(path, WANTED, {"q0": "5", "q1": "7", "q2": "1"}).present() == {"q0", "q1"}
    with pytest.raises(UsageError, match=r'question q1 was labelled by another gold answer.*\n.*"7" there, "8" now'):
        AnnotationFolder(path, WANTED, {"q0": "5", "q1": "8"})


def test_a_folder_of_before_there_were_gold_answers_is_read_and_not_gone_on_with(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(annotations, "FORMAT", 1)
        before.setattr(annotations, "PART_SCHEMA", annotations.INDEX_SCHEMA)
        written = AnnotationFolder(tmp_path / "before", WANTED)
        written.add([entry(0)])
        part = part_of(written.path, 0)
        rows = pq.read_table(part).to_pylist()
        part.rename(part.with_name("0_on0.parquet"))
    folder = AnnotationFolder(written.path)
    folder.check()
    assert [got.question_id for got in folder.read()] == ["q0"]
    assert folder.index().to_pylist() == rows
    with pytest.raises(UsageError, match="format: 1 there, 4 now"):
        AnnotationFolder(written.path, WANTED, {"q0": "5"})


def test_official_shards_are_read_without_our_record(path, tmp_path):
    official = tmp_path / "official"
    official.mkdir()
    for place, name in enumerate(["2_on0", "10_on0"]):  # by number, not by name
        save_file(load_file(path / f"{place}_on0.safetensors"), official / f"{name}.safetensors")
    shard = load_file(path / "1_on0.safetensors")
    again = {"1.input_ids": shard["1.input_ids"][:1], "1.latent_embeds": shard["1.latent_embeds"].astype(np.float16)}
    again |= {"1.estimations": shard["1.estimations"] * 0, "1.corrects": shard["1.corrects"]}
    save_file(again, official / "11_on1.safetensors")  # once more, with one row of ids for all rollouts
    folder = AnnotationFolder(official)
    folder.check()
    assert folder.official
    assert folder.counts() == {"kept": 3, "unknown": 2}
    read = list(folder.read())
    assert [got.question_id for got in read] == ["0", "1", "3"]
    assert (read[1].labels_NT == 0).all()
    assert read[1].input_ids_NL.tolist() == entry(1).input_ids_NL.tolist()
    assert same(replace(read[0], question_id="q0"), entry(0, steps=[4, 1, 2]))
    with pytest.raises(UsageError, match=r"holds shards but no annotations\.json"):
        AnnotationFolder(official, WANTED)
    folder.width = D + 1
    with pytest.raises(UsageError, match=f"width {D}, must be {D + 1}"):
        folder.check()


def rewrite(shard: Path, **changed: np.ndarray) -> None:
    """A shard as if it had been written with other tensors, and the same record."""
    from safetensors import safe_open

    with safe_open(shard, "np") as opened:
        metadata = opened.metadata()
    save_file(load_file(shard) | {name.replace("_", ".", 1): value for name, value in changed.items()}, shard, metadata)
    write_part(shard.parent, int(shard.name[0]))


def write_part(path: Path, number: int) -> None:
    """A shard's part of the index, written again for the shard as it is."""
    part, shard = part_of(path, number), path / f"{number}_on0.safetensors"
    rows = [row | {"digest": file_digest(shard)} for row in pq.read_table(part).to_pylist()]
    part.unlink()
    with whole_file(shard.with_suffix(".parquet"), add_digest=True) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=annotations.PART_SCHEMA), partial)
    seal(path, parts=sorted(each.name for each in path.glob("*_on0-*.parquet")))


def seal(path: Path, **changed: object) -> None:
    """Change the record of a folder, and its digest with it."""
    record = json.loads((path / SETTINGS).read_text()) | changed
    del record["digest"]
    (path / SETTINGS).write_text(json.dumps(record | {"digest": settings_digest(record)}))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("0_latent_embeds", np.zeros((N, T, D + 1), np.float32), "latent_embeds has width 6, must be 5"),
        ("0_latent_embeds", np.zeros((N, T), np.float32), "latent_embeds is"),
        ("0_estimations", np.zeros((N, T + 1), np.float32), "estimations is"),
        ("0_corrects", np.zeros(N + 1, np.bool_), "corrects is"),
        ("0_input_ids", np.zeros((N + 1, 9), np.int64), "input_ids is"),
    ],
)
def test_tensors_that_do_not_fit_are_found_without_reading_them(path, name, value, words):
    rewrite(path / "0_on0.safetensors", **{name: value})
    with pytest.raises(UsageError, match=rf"0_on0\.safetensors: question q0: {words}"):
        AnnotationFolder(path).check()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("0_latent_embeds", np.full((N, T, D), np.nan, np.float32), "not finite"),
        ("0_estimations", np.full((N, T), 1.5, np.float32), r"outside of \[0, 1\]"),
        (
            "0_estimations",
            np.tile(np.array([0.5, -100, 0.5, 0.5], np.float32), (N, 1)),
            "a step after one that is missing",
        ),
    ],
)
def test_numbers_that_cannot_be_are_found_when_they_are_read(path, name, value, words):
    rewrite(path / "0_on0.safetensors", **{name: value})
    with pytest.raises(UsageError, match=words):
        list(AnnotationFolder(path).read())


def test_what_does_not_fit_is_not_written(tmp_path):
    folder = AnnotationFolder(tmp_path / "new", WANTED)
    with pytest.raises(ValueError, match="question q0: corrects is"):
        folder.add([replace(entry(0), corrects_N=np.ones(N + 1, np.bool_))])
    assert folder.present() == set()
    assert not list(folder.path.glob("*.safetensors"))


def test_latents_that_are_not_finite_end_the_run(tmp_path):
    folder = AnnotationFolder(tmp_path / "new", WANTED)
    with pytest.raises(RunError, match="question q0: latent_embeds is not finite"):
        folder.add([replace(entry(0), latents_NTD=np.full((N, T, D), np.inf, np.float32))])
    assert folder.present() == set()


def test_a_shard_that_is_cut_off(path):
    shard = path / "0_on0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UsageError, match=r"0_on0\.safetensors: is damaged; `ltts annotate`"):
        AnnotationFolder(path).check()


@pytest.mark.parametrize("kind", ["shard", "part"])
def test_no_flipped_bit_passes_unseen_and_a_writer_sets_the_shard_aside(path, kind, caplog):
    target = path / "0_on0.safetensors" if kind == "shard" else part_of(path, 0)
    good = target.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(good), 80, replace=False).tolist():
        bits = bytearray(good)
        bits[place // 8] ^= 1 << place % 8
        target.write_bytes(bits)
        with pytest.raises(UsageError, match=rf"{target.name}: is damaged; `ltts annotate`"):
            AnnotationFolder(path).check()
    folder = AnnotationFolder(path, WANTED)
    assert "0_on0.safetensors or its part of the index is damaged" in caplog.text
    assert folder.present() == {"q1", "q2"}
    assert not folder.complete
    assert len(list(path.glob("0_on0*.damaged"))) == 2
    assert not list(path.glob("0_on0*.parquet"))
    folder.add([entry(3), entry(0, steps=[4, 1, 2]), UnmixedQuestion("q4", 4, "all_wrong", N)])
    assert folder.finish() == {"kept": 3, "all_correct": 1, "all_wrong": 1}
    AnnotationFolder(path).check()


def test_no_flipped_bit_of_the_record_passes_unseen(path):
    good = (path / SETTINGS).read_bytes()
    expected = AnnotationFolder(path)
    for place in range(0, 8 * len(good), 29):
        bits = bytearray(good)
        bits[place // 8] ^= 1 << place % 8
        (path / SETTINGS).write_bytes(bits)
        with suppress(UsageError):
            found = AnnotationFolder(path)
            assert (found.settings, found.complete) == (expected.settings, expected.complete)


def test_a_part_that_is_none_of_a_finished_folder(path, tmp_path):
    other = AnnotationFolder(tmp_path / "other", WANTED)
    other.add([entry(9)])
    shutil.copyfile(other.path / "0_on0.safetensors", path / "2_on0.safetensors")
    shutil.copyfile(part_of(other.path, 0), path / part_of(other.path, 0).name)
    with pytest.raises(UsageError, match=r"0_on0-.*\.parquet: is no part of this folder"):
        AnnotationFolder(path)


def test_a_folder_that_lost_its_record_is_no_official_one(path):
    (path / SETTINGS).unlink()
    for settings in (None, WANTED):
        with pytest.raises(UsageError, match=r"lacks annotations\.json, which was written with 0_on0-.*; restore it"):
            AnnotationFolder(path, settings)


def test_a_shard_that_is_gone(path):
    (path / "1_on0.safetensors").unlink()
    with pytest.raises(UsageError, match=r"names 1_on0\.safetensors, which does not exist"):
        AnnotationFolder(path).check()


def test_a_shard_of_another_run(path, tmp_path):
    other = AnnotationFolder(tmp_path / "other", WANTED | {"seed": 1})
    other.add([entry(1)])
    shutil.copyfile(other.path / "0_on0.safetensors", path / "0_on0.safetensors")
    write_part(path, 0)
    with pytest.raises(UsageError, match=r"0_on0\.safetensors: a shard of another run"):
        AnnotationFolder(path).check()


def test_what_is_no_annotation_folder(path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in {"empty": "an empty folder", "file": "this is a file", "nosuch": "no such folder"}.items():
        with pytest.raises(UsageError, match=words):
            AnnotationFolder(tmp_path / name, key="valid_annotations")
    (path / SETTINGS).write_text("{")
    with pytest.raises(UsageError, match=r"annotations\.json: is not the record"):
        AnnotationFolder(path)
    (path / SETTINGS).write_text(json.dumps({"settings": {"format": 5}}))
    with pytest.raises(UsageError, match="format 5, this version reads 1 to 4"):
        AnnotationFolder(path)
    (path / SETTINGS).write_text(json.dumps({"settings": WANTED | {"format": FORMAT}}))
    part_of(path, 0).write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"0_on0-.*\.parquet: is damaged"):
        AnnotationFolder(path).index()


def test_threads_of_arrow_hold_no_object_of_python(tmp_path, monkeypatch):
    """At exit, one that lets go of such an object aborts the process."""
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "part.parquet")
    content, read, addresses = (tmp_path / "part.parquet").read_bytes(), pq.read_table, []

    def watched(source, **options):
        addresses.append(source.read_buffer().address)
        source.seek(0)
        return read(source, **options)

    monkeypatch.setattr(pq, "read_table", watched)
    assert parquet_table(content, columns=["a"]).to_pydict() == {"a": [1, 2]}
    assert addresses != [pa.py_buffer(content).address]
