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
from latent_tts.results.files import write_record
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
    assert pa.Table.from_pylist(folder.index(), annotations.INDEX_SCHEMA).equals(pq.read_table(path / INDEX))


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


def test_a_shard_that_is_gone_is_named_and_labelled_again(path, caplog):
    (path / "1_on0.safetensors").unlink()
    with pytest.raises(UsageError, match=r"1_on0.safetensors: is missing; `ltts annotate`"):
        AnnotationFolder(path).index()
    folder = AnnotationFolder(path, WANTED)
    assert "1_on0.safetensors is missing: its questions are labelled again" in caplog.text
    assert [got.index for got in AnnotationFolder(path).read()] == [0, 3]
    assert folder.present() == {"q0", "q3", "q4"}
    folder.add([entry(1)])
    assert not folder.complete  # until it is finished again
    assert not json.loads((path / SETTINGS).read_text())["complete"]
    assert folder.finish() == {"kept": 3, "all_correct": 0, "all_wrong": 1}


def test_a_shard_that_the_record_does_not_list_is_not_there_and_is_replaced(path, tmp_path):
    other = AnnotationFolder(tmp_path / "other", WANTED)
    other.add([entry(9)])
    shutil.copyfile(other.path / "0_on0.safetensors", path / "2_on0.safetensors")  # as when a writer is killed
    assert [got.index for got in AnnotationFolder(path).read()] == [0, 1, 3]
    folder = AnnotationFolder(path, WANTED)
    assert folder.complete
    folder.add([entry(5)])
    assert sorted(each.name for each in path.glob("*.safetensors")) == [f"{i}_on0.safetensors" for i in range(3)]
    assert [got.index for got in AnnotationFolder(path).read()] == [0, 1, 3, 5]


def test_a_question_annotated_twice_counts_once_as_it_was_last(path):
    folder = AnnotationFolder(path, WANTED)
    again = replace(entry(1), labels_NT=np.zeros((N, T), np.float32))
    folder.add([again])
    read = list(folder.read())
    assert [got.index for got in read] == [0, 1, 3]
    assert same(read[1], again)
    assert same(list(AnnotationFolder(path).read())[1], again)


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


def test_a_folder_of_another_version_is_refused(path):
    seal(path, settings=WANTED | {"format": FORMAT - 1})
    for settings in (None, WANTED):
        with pytest.raises(UsageError, match=rf"annotations\.json: format {FORMAT - 1}, written by another version"):
            AnnotationFolder(path, settings)


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
    assert folder.official
    assert folder.counts() == {"kept": 3, "unknown": 2}
    read = list(folder.read())
    assert [got.question_id for got in read] == ["0", "1", "3"]
    assert (read[1].labels_NT == 0).all()
    assert read[1].input_ids_NL.tolist() == entry(1).input_ids_NL.tolist()
    assert same(replace(read[0], question_id="q0"), entry(0, steps=[4, 1, 2]))
    with pytest.raises(UsageError, match=r"holds shards but no annotations\.json"):
        AnnotationFolder(official, WANTED)
    folder = AnnotationFolder(official)
    folder.width = D + 1
    with pytest.raises(UsageError, match=f"width {D}, must be {D + 1}"):
        folder.index()


def rewrite(shard: Path, **changed: np.ndarray) -> None:
    """A shard as if it had been written with other tensors, and the same record."""
    from safetensors import safe_open

    with safe_open(shard, "np") as opened:
        metadata = opened.metadata()
    save_file(load_file(shard) | {name.replace("_", ".", 1): value for name, value in changed.items()}, shard, metadata)
    shards = json.loads((shard.parent / SETTINGS).read_text())["shards"]
    seal(shard.parent, shards=shards | {shard.name: file_digest(shard)})


def seal(path: Path, **changed: object) -> None:
    """Change the record of a folder, and its digest with it."""
    record = json.loads((path / SETTINGS).read_text())
    del record["digest"]
    write_record(path / SETTINGS, record | changed)


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
        AnnotationFolder(path).index()


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
        AnnotationFolder(path).index()


def test_no_flipped_bit_passes_unseen_and_a_writer_sets_the_shard_aside(path, caplog):
    shard = path / "0_on0.safetensors"
    good = shard.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(good), 80, replace=False).tolist():
        bits = bytearray(good)
        bits[place // 8] ^= 1 << place % 8
        shard.write_bytes(bits)
        with pytest.raises(UsageError, match=r"0_on0\.safetensors: is damaged; `ltts annotate`"):
            AnnotationFolder(path).index()
    folder = AnnotationFolder(path, WANTED)
    assert "0_on0.safetensors is damaged: its questions are labelled again" in caplog.text
    assert folder.present() == {"q1", "q2"}
    assert not folder.complete
    assert not json.loads((path / SETTINGS).read_text())["complete"]
    assert [each.name for each in path.glob("0_on0*")] == ["0_on0.safetensors.damaged"]
    folder.add([entry(3), entry(0, steps=[4, 1, 2]), UnmixedQuestion("q4", 4, "all_wrong", N)])
    assert folder.finish() == {"kept": 3, "all_correct": 1, "all_wrong": 1}
    assert [got.index for got in AnnotationFolder(path).read()] == [0, 1, 3]


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


def test_a_folder_that_lost_its_record_is_no_official_one(path):
    (path / SETTINGS).unlink()
    with pytest.raises(UsageError, match=r"lacks annotations\.json, which was written with 0_on0.*; restore it"):
        AnnotationFolder(path).index()
    with pytest.raises(UsageError, match=r"holds shards but no annotations\.json"):
        AnnotationFolder(path, WANTED)


def test_a_shard_of_another_run_is_damage(path, tmp_path):
    other = AnnotationFolder(tmp_path / "other", WANTED | {"seed": 1})
    other.add([entry(1)])
    shutil.copyfile(other.path / "0_on0.safetensors", path / "0_on0.safetensors")
    with pytest.raises(UsageError, match=r"0_on0\.safetensors: is damaged"):
        AnnotationFolder(path).index()


def test_what_is_no_annotation_folder(path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in {"empty": "an empty folder", "file": "this is a file", "nosuch": "no such folder"}.items():
        with pytest.raises(UsageError, match=words):
            AnnotationFolder(tmp_path / name, key="valid_annotations")
    for content in ("{", "[]", json.dumps({"settings": WANTED | {"format": FORMAT}})):
        (path / SETTINGS).write_text(content)
        with pytest.raises(UsageError, match=r"annotations\.json: is damaged, or not the record"):
            AnnotationFolder(path)
