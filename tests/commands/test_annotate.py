"""`ltts annotate` through the command line, and `ltts train-rm` on what it makes."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from refusal import check, check_refused

from latent_tts.pipeline import labeller, models, temperature
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.types import COMPUTATIONS

SMALL = ("n=4", "completions=2", "max_answer_tokens=4", "task.limit=6")
NOISE = ("sampler=gaussian", "sampler.sigma=1.0")


@pytest.fixture
def annotate(ltts, checkpoint, tmp_path):
    return lambda *overrides, sampler=NOISE: ltts(
        "annotate", f"model.checkpoint={checkpoint}", *SMALL, *sampler, f"output={tmp_path / 'labels'}", *overrides
    )


def test_every_question_gets_labels_or_a_reason(annotate, ltts, tmp_path):
    result = annotate("keep=all")
    assert result.code == 0, result.err
    assert result.last == tmp_path / "labels"
    assert "no run in outputs" in ltts("list", "runs").err
    assert "at most 264 rollouts" in result.err  # 6 * (4 + 4 * 5 * 2)
    folder = AnnotationFolder(result.last)
    assert folder.complete
    assert folder.settings["task"]["split"] == "train"
    entries = list(folder.read())
    assert [entry.index for entry in entries] == list(range(6))
    for entry in entries:
        assert entry.labels_NT.shape == (4, 6)
        np.testing.assert_array_equal(entry.labels_NT[:, -1], entry.corrects_N)


def test_the_same_line_goes_on_and_ends_with_the_same_labels(annotate, ltts, checkpoint, tmp_path):
    assert annotate("keep=all", "task.limit=2").code == 0
    longer = annotate("keep=all")
    assert "2 of 6 questions are in" in longer.err
    whole = ltts(
        "annotate", f"model.checkpoint={checkpoint}", *SMALL, *NOISE, f"output={tmp_path / 'whole'}", "keep=all"
    )
    for one, other in zip(AnnotationFolder(longer.last).read(), AnnotationFolder(whole.last).read(), strict=True):
        assert one.question_id == other.question_id
        np.testing.assert_array_equal(one.labels_NT, other.labels_NT)
    again = annotate("keep=all")
    assert "6 of 6 questions are in" in again.err
    assert "to annotate" not in again.err
    shard = longer.last / "0_on0.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    mended = annotate("keep=all")
    assert "0_on0.safetensors is damaged: its questions are labelled again" in mended.err
    assert "4 of 6 questions are in" in mended.err
    for one, other in zip(AnnotationFolder(mended.last).read(), AnnotationFolder(whole.last).read(), strict=True):
        np.testing.assert_array_equal(one.labels_NT, other.labels_NT)


def test_what_was_labelled_before_a_stop_is_kept(annotate, tmp_path, monkeypatch):
    label_batch, started = labeller.label_batch, []

    def stop_in_the_second_batch(*arguments):
        started.append(True)
        if len(started) == 2:
            raise KeyboardInterrupt
        return label_batch(*arguments)

    monkeypatch.setattr(labeller, "label_batch", stop_in_the_second_batch)
    assert annotate("keep=all", "engine.rows=4").code == 130
    assert len(AnnotationFolder(tmp_path / "labels").present()) == 1


def test_a_rollout_is_that_of_a_run(annotate, run):
    entries = AnnotationFolder(annotate("keep=all", "seed=3").last).read()
    drawn = run("task.split=train", "sampler=gaussian", "sampler.sigma=1.0", "seed=3", "keep_latents=true")
    rollouts = pd.read_parquet(drawn.last.parent / "rollouts.parquet")
    for entry in entries:
        rows = rollouts[rollouts["question_id"] == entry.question_id]
        assert rows["correct"].tolist() == entry.corrects_N.tolist()


BAD = [
    (["completions=0"], ["completions=0", "1 or more"]),
    (["n=1"], ["n=1", "2 or more"]),
    (["keep=some"], ["keep=some", "mixed or all"]),
    (["sampler=greedy"], ["sampler=greedy", "gaussian, or dropout in prompt or thoughts"]),
    (["sampler=greedy", "answer.temperature=1"], ["sampler=greedy", "latents differ"]),
    (["answer.top_p=2"], ["answer.top_p=2", "(0, 1]"]),
    (["sampler=control", "sampler.mode=shuffle"], ["sampler=control"]),
    (["model.latents=0"], ["model.latents=0"]),
    (["completions=70000"], ["completions=70000", "less than 65536"]),
    (["engine.rows=0"], ["engine.rows=0"]),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("overrides", "words"), BAD, ids=lambda value: " ".join(value))
def test_annotate_refuses(place, checkpoint, overrides, words):
    sampler = () if overrides[0].startswith("sampler") else NOISE
    check_refused(
        "annotate", f"model.checkpoint={checkpoint}", *SMALL, *sampler, "output=labels", *overrides, words=words
    )


def test_other_settings_need_another_folder(annotate):
    assert annotate("keep=all", "task.limit=1").code == 0
    result = annotate("keep=all", "task.limit=1", "completions=3")
    assert result.code == 2
    assert "completions: 2 there, 3 now" in result.err


def test_labels_of_a_reasoner_computed_in_two_ways_do_not_mix(annotate, monkeypatch):
    first = annotate("keep=all", "task.limit=2")
    assert AnnotationFolder(first.last).settings["computation"] == {"attention": "shared-prefix", "logits": "head"}
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "prove_reasoner", lambda reasoner, longest: COMPUTATIONS[2])
    assert annotate("keep=all", "task.limit=2").code == 0  # all labels are there: no reasoner is loaded
    check(annotate("keep=all"), "made with other settings", "computation:", '"transformers"')


def test_a_labelled_question_whose_gold_answer_has_changed_is_named(annotate, tmp_path):
    questions = tmp_path / "q.jsonl"
    question = {"question": "Ann has 3 pens. She buys 4 more. How many pens does Ann have?", "answer": 7}
    questions.write_text(json.dumps(question))
    line = ("keep=all", "task=jsonl", f"task.path={questions}", "task.split=train")
    labelled = annotate(*line)
    assert labelled.code == 0, labelled.err
    (entry,) = AnnotationFolder(labelled.last).read()
    questions.write_text(json.dumps(question | {"answer": "7.0"}))  # the same number
    assert annotate(*line).code == 0
    questions.write_text(json.dumps(question | {"answer": 8}))
    check(annotate(*line), f"question {entry.question_id}", 'answer: "7" there, "8" now')


def test_questions_are_told_from_their_texts_not_from_the_path_of_their_file(annotate, tmp_path):
    def write(name, *counts):
        rows = [{"question": f"Ann has {n} pens. How many pens does Ann have?", "answer": n} for n in counts]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("q.jsonl", 3, 4)
    write("other.jsonl", 5)
    line = ("keep=all", "task=jsonl", "task.split=train", "task.limit=null")
    first = annotate(*line, f"task.path={tmp_path / 'q.jsonl'}", "task.limit=1")
    assert first.code == 0, first.err
    (tmp_path / "link.jsonl").symlink_to("q.jsonl")
    for path in ("q.jsonl", "./q.jsonl", "link.jsonl"):
        again = annotate(*line, f"task.path={path}")
        assert again.code == 0, again.err
        assert f"{1 if path == 'q.jsonl' else 2} of 2 questions are in" in again.err
    check(annotate(*line, "task.path=other.jsonl"), "was made with other questions", "question 1:")
    assert AnnotationFolder(tmp_path / "labels").task["path"] == "link.jsonl"


@pytest.mark.slow
def test_plain_train_rm_annotates_trains_and_calibrates(ltts, tmp_path):
    few = ["annotate.annotations.limit=8", "annotate.valid_annotations.limit=6"]
    few += [f"annotate.{key}.{one}" for key in ("annotations", "valid_annotations") for one in ("n=4", "completions=1")]
    line = ["train-rm", f"output={tmp_path / 'rm'}", "optimization.epochs=1", "optimization.batch=4", *few]
    result = ltts(*line)
    assert result.code == 0, result.err
    trained = json.loads((result.last / "config.json").read_text())["latent_rm"]
    assert trained["reasoner_name"] == "demo_coconut"
    assert trained["temperature"] > 0
    again = ltts(*line)
    assert again.last == result.last
    assert "to annotate" not in again.err
    scored = ltts("run", "budget=fixed", "task.limit=3", "n=4", "scorer=latent_rm", f"scorer.checkpoint={result.last}")
    assert scored.code == 0, scored.err
    assert "was trained" not in scored.err
    assert {"best_of_n", "weighted"} <= set(pd.read_csv(scored.last)["aggregator"])


def test_the_temperature_is_chosen_on_the_questions_that_are_labelled(
    annotate, ltts, checkpoint, tmp_path, monkeypatch
):
    whole = AnnotationFolder(annotate("keep=all").last)
    settings = {name: value for name, value in whole.settings.items() if name != "format"}
    stopped, mixed = AnnotationFolder(tmp_path / "stopped", settings), np.array([True, False, True, False])
    kept = [replace(entry, corrects_N=mixed) for entry in whole.read() if entry.index in (2, 4)]
    stopped.add(kept)  # `annotate` labels long prompts first, and was stopped
    drawn, draw = [], temperature.draw_rollouts
    monkeypatch.setattr(temperature, "draw_rollouts", lambda spec: drawn.extend(spec.questions) or draw(spec))
    line = ["train-rm", f"model.checkpoint={checkpoint}", "optimization.epochs=0", "output=rm"]
    result = ltts(*line, "annotations=stopped", "valid_annotations=stopped")
    assert result.code == 0, result.err
    assert [question.id for question in drawn] == [entry.question_id for entry in kept]


@pytest.mark.usefixtures("little_memory")
def test_rows_that_do_not_fit_are_fewer_and_that_is_said_and_recorded(annotate):
    result = annotate("task.limit=2", "engine.rows=4096")
    assert result.code == 0, result.err
    assert result.err.count("engine.rows: 4096 rows do not fit half of the free memory") == 1
    rows = json.loads((result.last / "annotations.json").read_text())["rows"]
    assert f", {rows} do" in result.err
    assert 1 <= rows < 4096
    again = annotate("task.limit=2")  # nothing is left to draw
    assert json.loads((again.last / "annotations.json").read_text())["rows"] == rows
