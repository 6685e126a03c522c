"""What reasoners are trained on: sets with steps, in keyed epochs, without test questions."""

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml

from latent_tts.config.build import conf_dir
from latent_tts.errors import UsageError
from latent_tts.task.arith import Arith, is_problem
from latent_tts.task.benchmark import Benchmark
from latent_tts.task.jsonl import Jsonl
from latent_tts.training.reasoner import questions as module
from latent_tts.training.reasoner.questions import digest_of, epochs, known_questions, training_questions

ROWS = [
    {"question": f"What is {a} plus {b}?", "answer": a + b, "steps": [f"<<{a}+{b}={a + b}>>"]}
    for a in range(5) for b in range(8)
]  # fmt: skip
# as on the hub: a written solution with calculator marks, then the answer after ####
WRITTEN = [
    {
        "question": f"Each of {n} friends has {n + 1} pens. They lose {n}. How many are left?",
        "answer": f"They have {n} * {n + 1} = <<{n}*{n + 1}={n * n + n}>>{n * n + n} pens.\n\n"
        f"So {n * n + n} - {n} = <<{n * n + n}-{n}={n * n}>>{n * n} are left.\n#### {n * n}",
    }
    for n in range(2, 12)
]


def file_of(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def jsonl(folder, rows):
    return Jsonl(file_of(folder, rows), None, None, None)


def gsm8k(**more):
    fields = yaml.safe_load(Path(conf_dir(), "task", "gsm8k.yaml").read_text())
    del fields["_target_"]
    return Benchmark(**fields | {"split": "train"} | more)


def chosen(task, valid=4, seed=0, step_results=False):
    return training_questions(task, valid_questions=valid, seed=seed, step_results=step_results)


def test_every_question_comes_once_per_epoch_in_an_order_keyed_by_seed_and_epoch(tmp_path):
    found = chosen(jsonl(tmp_path, ROWS))
    size = len(found.finite)
    first, second = (list(islice(found.stream(), size * epoch, size * (epoch + 1))) for epoch in (0, 1))
    assert set(first) == set(second) == set(found.finite)
    assert first != second
    assert list(islice(found.stream(), size)) == first
    assert list(islice(epochs(found.finite, seed=1), size)) != first


def test_the_order_of_a_file_does_not_matter(tmp_path):
    questions = chosen(jsonl(tmp_path, ROWS)).finite
    assert list(islice(epochs(questions, 0), 30)) == list(islice(epochs(questions[::-1], 0), 30))


def test_a_set_without_valid_holds_questions_out_that_more_rows_do_not_move(tmp_path):
    few, more = (chosen(jsonl(tmp_path, rows), valid=3) for rows in (ROWS[:30], [*ROWS[:30], *WRITTEN[:0]]))
    assert len(few.valid) == 3
    assert few.valid == more.valid
    assert not set(few.valid) & set(few.finite)
    assert len(chosen(jsonl(tmp_path, ROWS), valid=500).valid) == len(ROWS) // 10


def test_arith_stays_a_stream_with_its_own_valid_split():
    found = chosen(Arith("train", None, None, 0))
    assert list(islice(found.stream(), 5)) == list(islice(Arith("train", None, None, 0).stream(), 5))
    assert found.valid == Arith("valid", 4, None, 0).questions()
    assert not found.finite


@pytest.mark.parametrize("steps", ["marks", "sentences"])
def test_steps_are_the_marks_of_a_written_solution_or_its_lines(tmp_path, steps):
    questions = gsm8k(path=file_of(tmp_path, WRITTEN), steps=steps).questions()
    wanted = {
        "marks": ("<<2*3=6>>", "<<6-2=4>>"),
        "sentences": ("They have 2 * 3 = 6 pens.", "So 6 - 2 = 4 are left."),
    }
    assert questions[0].steps == wanted[steps]
    assert [question.answer for question in questions] == [str(n * n) for n in range(2, 12)]
    assert all(len(question.steps) == 2 for question in questions)


def test_rows_without_steps_are_left_out_counted_and_named(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [*ROWS, {"question": "No steps?", "answer": 1}, {"question": "None here?", "answer": 2}]
    found = chosen(jsonl(tmp_path, rows))
    assert len(found.finite) + len(found.valid) == len(ROWS)
    assert "2 of 42 questions are left out, since they have no written steps; the first is" in caplog.text
    assert "No steps?" in caplog.text


def test_known_test_questions_are_refused_and_valid_ones_left_out(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    known = {digest_of(ROWS[3]["question"]): ("gsm8k", "valid")}
    monkeypatch.setattr(module, "known_questions", lambda: known)
    found = chosen(jsonl(tmp_path, ROWS))
    assert ROWS[3]["question"] not in {question.text for question in (*found.finite, *found.valid)}
    assert "1 of 40 questions are left out, since they belong to a split valid" in caplog.text
    known[digest_of("  what IS 4   plus 7? ")] = ("svamp", "test")
    with pytest.raises(UsageError, match=r"1 of its 40 questions are test questions.*task=svamp: 'What is 4 plus 7\?'"):
        chosen(jsonl(tmp_path, ROWS))


def test_test_questions_of_arith_are_refused_wherever_they_come_from(tmp_path):
    test = Arith("test", 1, None, 0).questions()[0]
    row = {"question": test.text, "answer": test.answer, "steps": list(test.steps)}
    with pytest.raises(UsageError, match=r"test questions.*task=arith"):
        chosen(jsonl(tmp_path, [*ROWS, row]))
    assert is_problem(test.text)
    assert not is_problem("Adam has 18 magnets. How many magnets does Adam have?")


def test_copies_in_other_quotes_cases_and_spaces_are_the_same_question():
    assert digest_of("Ann\u2019s  \u201cpens\u201d ?") == digest_of('ann\'s "PENS" ?')
    assert digest_of("Ann has 3") != digest_of("Ann has 4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [row | {"steps": []} for row in rows], "no question of it has any"),
        (lambda rows: [rows[0] | {"steps": ["<<1+1=2>>", " "]}, *rows[1:]], "step 2 is empty"),
        (lambda rows: rows[:4], "must be 10 or more"),
        (lambda rows: [{name: row[name] for name in ("question", "steps")} for row in rows], "have no gold answers"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_refused(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        chosen(jsonl(tmp_path, change(ROWS)))


def test_a_loss_on_results_needs_steps_with_results(tmp_path):
    rows = [row | {"steps": ["First we add."]} for row in ROWS]
    assert chosen(jsonl(tmp_path, rows)).finite
    with pytest.raises(UsageError, match=r"recipe\.step_loss.*must be 0.*names no result"):
        chosen(jsonl(tmp_path, rows), step_results=True)
    assert chosen(jsonl(tmp_path, ROWS), step_results=True).finite


def test_other_splits_than_train_and_other_kinds_of_steps_are_refused():
    with pytest.raises(UsageError, match=r"task\.steps=words: must be marks or sentences"):
        gsm8k(steps="words")
    with pytest.raises(UsageError, match=r"task\.split=test: must be train"):
        chosen(gsm8k(split="test"))


def test_the_digests_cover_every_published_set():
    counts = Counter(known_questions().values())
    assert {name: counts[name, "test"] for name in ("gsm8k", "math500", "multiarith", "prosqa", "svamp")} == {
        "gsm8k": 1319, "math500": 500, "multiarith": 580, "prosqa": 500, "svamp": 300
    }  # fmt: skip
    assert (counts["gsm_hard", "test"], counts["gsm8k", "valid"], counts["prosqa", "valid"]) == (990, 500, 300)


@pytest.mark.realdata
def test_the_digests_are_those_of_the_sets_and_every_training_row_counts():
    known = known_questions()
    for name in ("test", "valid"):
        digests = {digest_of(question.text) for question in gsm8k(split=name).questions()}
        assert digests <= {digest for digest, place in known.items() if place[1] == name}
    assert os.environ["LTTS_DATA"]
    assert len(chosen(gsm8k()).finite) == 6884
