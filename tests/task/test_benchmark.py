"""Published sets: where they are read from, what is wrong with a file, and the files themselves where they are."""

import gzip
import json
import os
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml

from latent_tts.config import reference
from latent_tts.errors import UsageError
from latent_tts.task.benchmark import Benchmark
from latent_tts.text.number import canonical_number

CONF = Path(reference.conf_dir()) / "task"
DATA = os.environ.get("LTTS_DATA")
NAMES = ["gsm8k", "gsm_hard", "math500", "multiarith", "prosqa", "svamp"]
ON_THE_HUB = ["gsm8k", "gsm_hard", "math500", "multiarith", "svamp"]
ROWS = [
    {"question": "Ann has 3 pens. She buys 4 more. How many pens does Ann have?", "answer": "7.0", "steps": ["3+4=7"]},
    {"question": "Ben has 9 pens. He loses 4. How many pens does Ben have?", "answer": 5},
]  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No folder of sets, and no hub."""
    monkeypatch.delenv("LTTS_DATA", raising=False)

    def no_network(path, *arguments, **options):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    monkeypatch.setattr("latent_tts.errors._answers", lambda *_: False)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def hub(monkeypatch):
    """A hub with some rows; returns what it was asked for."""
    asked = []

    def serve(rows):
        def load_dataset(path, name=None, *, split, revision):
            asked.append((path, name, split, revision))
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def settings(name):
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    values.pop("_target_")
    return values


def benchmark(name, **changes):
    return Benchmark(**{**settings(name), **changes})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_split_names_a_file_and_a_hub_copy_or_where_to_get_it(name):
    values = settings(name)
    assert values["name"] == name
    for split in values["splits"].values():
        assert split["file"].endswith(".jsonl")
        assert split["revision"] if split["hub"] else split["get"].startswith("data/")


def test_a_path_comes_before_the_folder_and_the_folder_before_the_hub(tmp_path, monkeypatch, hub):
    asked = hub([{"question": "From the hub?", "answer": "so #### 1"}])
    mine = write(tmp_path / "mine.jsonl", [{"question": "From a path?", "answer": 1}])
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "From the folder?", "answer": 1}])

    def texts(**changes):
        return [question.text for question in benchmark("gsm8k", **changes).questions()]

    assert texts() == ["From the hub?"]
    monkeypatch.setenv("LTTS_DATA", str(tmp_path))
    assert texts() == ["From the folder?"]
    assert texts(path=mine) == ["From a path?"]
    assert len(asked) == 1


def test_the_folder_is_asked_for_the_splits_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LTTS_DATA", str(tmp_path))
    write(tmp_path / "gsm8k_test.jsonl", ROWS)
    write(tmp_path / "gsm8k_valid.jsonl", ROWS[1:])
    assert [len(benchmark("gsm8k", split=split).questions()) for split in ("test", "valid")] == [2, 1]


HUB_ROWS = {
    "gsm8k": [
        {"question": " Two and two? ", "answer": "He has 2+2=<<2+2=4>>4.\nThen 4/2=<<4/2=2>>2.\n#### 1,002"},
        ("Two and two?", "1002", ("<<2+2=4>>", "<<4/2=2>>")),
    ],
    "gsm_hard": [{"input": "Much?", "code": "x = 1", "target": -9867630.5}, ("Much?", "-9867630.5", ())],
    "multiarith": [{"question": " How many? ", "final_ans": "39"}, ("How many?", "39", ())],
    "svamp": [{"question_concat": "Body. How?", "Question": "How?", "Answer": "27.0"}, ("Body. How?", "27", ())],
    "math500": [{"problem": "Half?", "answer": r"\dfrac12", "solution": "so"}, ("Half?", r"\frac{1}{2}", ())],
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_rows_of_the_hub_are_mapped_and_the_revision_is_pinned(name, hub, caplog):
    row, expected = HUB_ROWS[name]
    asked = hub([row])
    (question,) = benchmark(name).questions()
    assert (question.text, question.answer, question.steps) == expected
    split = settings(name)["splits"]["test"]
    assert asked == [(split["hub"], split.get("subset"), split["hub_split"], split["revision"])]
    assert f"has 1 questions at revision {split['revision']}; expected {split['rows']}" in caplog.text


def test_multiarith_drops_the_repeats_of_the_hub_and_keeps_the_first_places(hub):
    hub([{"question": f"{n} apples?", "final_ans": str(n)} for n in (3, 1, 3, 2, 1)])
    assert [question.answer for question in benchmark("multiarith").questions()] == ["3", "1", "2"]
    assert [question.answer for question in benchmark("multiarith", limit=2).questions()] == ["3", "1"]


def test_a_gold_of_the_hub_that_cannot_be_read_is_named_by_its_row(hub):
    hub([{"question_concat": "a", "Answer": "1"}, {"question_concat": "b", "Answer": "one"}])
    with pytest.raises(UsageError, match=r"^ChilleD/SVAMP@main, split test: row 1: the answer 'one' is not a number$"):
        benchmark("svamp").questions()


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_without_a_network_three_lines_say_how_to_get_the_file(name):
    with pytest.raises(UsageError) as error:
        benchmark(name).questions()
    lines = str(error.value).splitlines()
    split = settings(name)["splits"]["test"]
    assert len(lines) == 3
    assert (
        f"task={name}: {split['hub']} cannot be read from the hub (https://huggingface.co cannot be reached" in lines[0]
    )
    assert lines[1].endswith(f"https://huggingface.co/datasets/{split['hub']}")
    assert "task.path=FILE.jsonl" in lines[2]
    assert f"{split['file']} in the folder that LTTS_DATA names" in lines[2]


@pytest.mark.parametrize(
    ("name", "split", "origin"),
    [("prosqa", "test", "coconut"), ("prosqa", "valid", "coconut"), ("gsm8k", "valid", "da03/Internalize_CoT")],
)
def test_a_split_without_a_copy_on_the_hub_says_where_it_is(name, split, origin):
    with pytest.raises(UsageError) as error:
        benchmark(name, split=split)
    lines = str(error.value).splitlines()
    assert lines[0] == f"task={name} task.split={split}: not on the hub"
    assert origin in lines[1]
    assert "LTTS_DATA" in lines[2]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gsm8k", {"split": "exam"}, r"^task\.split=exam: must be one of test, valid, train$"),
        ("svamp", {"split": None}, r"^task\.split=null: must be one of test$"),
        ("gsm8k", {"limit": 0}, r"^task\.limit=0: must be a positive integer"),
        ("gsm8k", {"path": "no/such.jsonl"}, r"^task\.path=no/such\.jsonl: no such file"),
        ("gsm8k", {"tolerance": -1}, r"^task\.tolerance=-1: must be a finite number, 0 or more"),
        (
            "math500",
            {"tolerance": 0.1},
            r"^task\.tolerance=0\.1: must be null: it applies only to task\.answer=decimal",
        ),
        ("gsm8k", {"answer": "float"}, r"^task\.answer=float: must be one of decimal, latex, words$"),
    ],
)
def test_bad_values_are_usage_errors_that_name_their_key(name, changes, message):
    with pytest.raises(UsageError, match=message):
        benchmark(name, **changes)


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LTTS_DATA", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"^LTTS_DATA=.*missing: no such folder"):
        benchmark("gsm8k")


@pytest.mark.parametrize(
    ("name", "bad", "wanted"),
    [("gsm_hard", "many", "a number"), ("math500", r"\frac{1", "a LaTeX expression with a value")],
)
def test_a_gold_that_cannot_be_read_is_named_by_file_and_line(tmp_path, name, bad, wanted):
    path = write(tmp_path / "q.jsonl", [ROWS[0], {"question": "b", "answer": bad}])
    message = f"task.path={path}: line 2: the answer {bad!r} is not {wanted}"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        benchmark(name, path=path).questions()


def test_each_rule_reads_what_a_model_hands_over(tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS)
    gsm8k, loose = benchmark("gsm8k", path=path), benchmark("gsm8k", path=path, tolerance=0.5)
    assert gsm8k.rule.parse("1,234.50") == "1234.5"
    assert not gsm8k.rule.is_right("7", "7.5")
    assert loose.rule.is_right("7", "7.5")
    prosqa = benchmark("prosqa", path=path).rule
    assert prosqa.parse(" Every  Cat is a dog. ") == "every cat is a dog"
    assert prosqa.parse(" . ") is None
    math500 = benchmark("math500", path=path).rule
    assert math500.parse("0.5") == math500.parse(r"\frac12")
    assert math500.is_right(math500.parse("5"), math500.parse("x=5"))


@pytest.mark.parametrize("name", ON_THE_HUB)
@pytest.mark.parametrize("layout", ["jsonl", "json", "jsonl.gz", "json.gz"])
def test_rows_of_the_hub_are_read_from_a_local_copy_too(tmp_path, monkeypatch, name, layout):
    row, (text, answer, steps) = HUB_ROWS[name]
    monkeypatch.setenv("LTTS_DATA", str(tmp_path))
    stem = settings(name)["splits"]["test"]["file"].removesuffix(".jsonl")
    content = json.dumps(row if layout.startswith("jsonl") else [row]).encode("utf-8-sig")
    path = tmp_path / f"{stem}.{layout}"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    (question,) = benchmark(name).questions()
    assert (question.text, question.answer, question.steps) == (text, answer, steps)
    split = "valid" if name == "gsm8k" else "test"
    assert benchmark(name, path=str(path), split=split).questions() == [question]


def test_rows_of_coconuts_lists_are_read_as_they_are(tmp_path):
    """Data files of COCONUT and LatentTTS."""
    rows = [{"question": "How many? ", "steps": ["<<3+4=7>>"], "answer": "1,007", "idx": 0}]
    path = tmp_path / "gsm_test.json"
    path.write_text(json.dumps(rows))
    (question,) = benchmark("gsm8k", path=str(path)).questions()
    assert (question.text, question.answer, question.steps) == ("How many?", "1007", ("<<3+4=7>>",))


def test_rows_with_the_toolkits_names_keep_their_steps(tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS)
    for name in NAMES:
        assert [question.steps for question in benchmark(name, path=path).questions()] == [("3+4=7",), ()]


def test_a_run_reads_the_file_and_writes_every_table(run, tmp_path):
    result = run("task=gsm8k", f"task.path={write(tmp_path / 'mine.jsonl', ROWS)}", "task.split=valid")
    assert result.code == 0, result.err
    assert "2 questions from" in result.err
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert len(rollouts) == 8
    metrics = pd.read_csv(result.last)
    assert set(metrics["task"]) == {"gsm8k"}
    assert set(metrics["split"]) == {"valid"}
    assert set(metrics["questions"]) == {2}


def test_a_right_answer_in_latex_or_words_is_counted(run, tmp_path):
    first = run("sampler=greedy", "n=1", "task=jsonl", f"task.path={write(tmp_path / 'a.jsonl', ROWS)}")
    written = pd.read_parquet(first.last.parent / "rollouts.parquet")["answer_text"]
    golds = [{**row, "answer": text.rpartition("#")[2].strip()} for row, text in zip(ROWS, written, strict=True)]
    path = write(tmp_path / "b.jsonl", golds)
    for task in ("math500", "prosqa"):
        result = run("sampler=greedy", "n=1", f"task={task}", f"task.path={path}")
        assert result.code == 0, result.err
        assert all(pd.read_parquet(result.last.parent / "rollouts.parquet")["correct"])


def test_on_the_command_line_what_is_missing_is_a_short_error(run):
    for overrides, word in [
        (["task=svamp"], "cannot be read from the hub"),
        (["task=prosqa"], "not on the hub"),
        (["task=gsm8k", "task.split=exam"], "task.split=exam: must be one of test, valid, train"),
    ]:
        result = run(*overrides)
        assert result.code == 2
        assert word in result.err
        assert "Traceback" not in result.err


# the files themselves

FILES = [
    ("gsm8k", "test", 1319), ("gsm8k", "valid", 500), ("gsm_hard", "test", 1319), ("multiarith", "test", 580),
    ("svamp", "test", 300), ("math500", "test", 500), ("prosqa", "test", 500), ("prosqa", "valid", 300),
]  # fmt: skip


@pytest.fixture
def data(monkeypatch):
    if not DATA:
        pytest.skip("LTTS_DATA names no folder")
    monkeypatch.setenv("LTTS_DATA", DATA)
    return Path(DATA)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "split", "rows"), FILES)
def test_every_row_of_the_files_is_read(data, name, split, rows):
    task = benchmark(name, split=split)
    questions = task.questions()
    assert len(questions) == rows
    assert len({question.id for question in questions}) == rows
    for question in questions:
        assert task.rule.parse(question.answer) == question.answer
        assert task.rule.is_right(question.answer, question.answer)


@pytest.mark.realdata
def test_answers_of_gsm_hard_are_exact(data):
    questions = benchmark("gsm_hard").questions()
    values = [Decimal(question.answer) for question in questions]
    assert sum(value != value.to_integral_value() for value in values) == 303
    assert sum(value < 0 for value in values) == 146
    assert 9e12 < max(map(abs, values)) < 1e13
    raw = [json.loads(line)["answer"] for line in (data / "gsm_hard.jsonl").read_text().splitlines()]
    assert [canonical_number(repr(float(text))) for text in raw] == [str(question.answer) for question in questions]


@pytest.mark.realdata
def test_test_sets_share_no_question_with_the_validation_set(data):
    valid = {question.id for question in benchmark("gsm8k", split="valid").questions()}
    for name in ("gsm8k", "gsm_hard", "multiarith", "svamp"):
        assert not valid & {question.id for question in benchmark(name).questions()}


@pytest.mark.realdata
def test_steps_are_read_where_there_are(data):
    have = {name: sum(bool(q.steps) for q in benchmark(name).questions()) for name in ("gsm8k", "gsm_hard", "svamp")}
    assert have == {"gsm8k": 1301, "gsm_hard": 0, "svamp": 300}


@pytest.mark.realdata
def test_answers_of_prosqa_end_their_questions(data):
    for split in ("test", "valid"):
        for question in benchmark("prosqa", split=split).questions():
            name, _, kind = question.answer.partition(" is a ")
            asked = question.text.rpartition(". ")[2]
            assert name in asked.lower()
            assert kind in asked
