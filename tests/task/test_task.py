import gzip
import json
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice, pairwise

import pandas as pd
import pytest

from latent_tts.errors import UsageError
from latent_tts.random.philox import Dice, Stream
from latent_tts.task import arith as arith_room
from latent_tts.task.arith import HARD, ITEMS, NAMES, SPLITS, STANDARD, Arith, make_problem, split_of, words
from latent_tts.task.jsonl import Jsonl
from latent_tts.types import text_digest

# arith


def arith(split="test", *, limit=None, steps=None, seed=0):
    return Arith(split, limit, steps, seed)


@pytest.fixture(scope="module")
def splits():
    limits = {"train": 16_000}
    with pytest.MonkeyPatch.context() as patch:  # the splits are sieved out of the same problems: make each once
        patch.setattr(arith_room, "Dice", lambda *place: place)
        patch.setattr(arith_room, "make_problem", cache(lambda place, level: make_problem(Dice(*place), level)))
        return {split: list(islice(arith(split).stream(), limits.get(split, 2000))) for split in SPLITS}


@pytest.fixture(scope="module")
def some(splits):
    return [question for questions in splits.values() for question in questions[:1000]]


MEANINGS = [
    (r"(buys|finds|wins) \d+ more\.$|has \d+ more than", "+"),
    (r"(loses|sells|gives away) \d+\.$|has \d+ fewer than", "-"),
    (r"has \d+ times as many", "*"),
    (r"shares them among \d+ and keeps one part\.$", "/"),
]


def solve(text):
    """Answer and equation steps from the words alone."""
    opening, *middle, closing = re.split(r"(?<=[.?]) ", text)
    who, value = opening.split()[0], int(re.search(r"\d+", opening)[0])
    steps = []
    for sentence in middle:
        (operator,) = [sign for pattern, sign in MEANINGS if re.search(pattern, sentence)]
        operand = int(re.search(r"\d+", sentence)[0])
        if comparison := re.fullmatch(r"(\w+) has .* (?:than|as) (\w+)\.", sentence):
            assert comparison[2] == who
            assert comparison[1] != who
            who = comparison[1]
        else:
            assert NAMES[who].lower() in sentence.lower().split()
        result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[operator]
        steps.append(f"<<{value}{operator}{operand}={result}>>")
        value = result
    assert closing.endswith(f"does {who} have?")
    return str(value), tuple(steps)


def test_problems_are_the_same_each_time(splits):
    for split, questions in splits.items():
        assert arith(split, limit=50).questions() == questions[:50]
        assert list(islice(arith(split).stream(), 50)) == questions[:50]


def test_questions_are_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(arith_room, "make_problem", lambda dice, level: made.append(1) or make_problem(dice, level))
    first = arith("hard", limit=5, seed=7).questions()
    assert len(made) == 5
    first.clear()  # a caller's list is its own
    again = arith("hard", limit=5, seed=7).questions()
    assert len(made) == len(again) == 5
    assert all(arith("hard", **other).questions() != again for other in ({"limit": 5}, {"limit": 6, "seed": 7}))


def test_another_seed_gives_other_problems(splits):
    others = {question.id for question in arith(seed=1, limit=200).questions()}
    assert len(others & {question.id for question in splits["test"]}) < 5


def test_answers_and_steps_follow_from_the_words(some):
    for question in some:
        assert solve(question.text) == (question.answer, question.steps), question.text


def test_each_step_goes_on_from_the_last_and_stays_in_range(some):
    for question in some:
        equations = [re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step).groups() for step in question.steps]
        assert all(before[3] == after[0] for before, after in pairwise(equations))
        assert equations[-1][3] == question.answer
        level = STANDARD if len(equations) < 6 else HARD
        for value, operator, operand, result in equations:
            assert {"+": int(value) + int(operand), "-": int(value) - int(operand), "*": int(value) * int(operand)}.get(
                operator, int(value) / int(operand)
            ) == int(result)
            assert 1 <= int(result) <= level.largest


def test_a_problem_may_have_more_steps_than_there_are_names():
    for item in range(20):
        question = make_problem(Dice((1, 2), Stream.PROBLEM, item), replace(HARD, steps=(60,)))
        assert solve(question.text) == (question.answer, question.steps)


def test_the_splits_of_seed_0_never_change(splits):
    digests = {split: text_digest(" ".join(q.id for q in splits[split])) for split in ("valid", "test", "hard")}
    assert digests == {"valid": "a26bf5574e96a674", "test": "ff5467b63c7e59d2", "hard": "890cfc3c9bcd12cc"}


def test_a_tenth_of_the_problems_each_is_valid_and_test():
    splits = Counter(split_of(f"{i:016x}") for i in range(1000))
    assert splits == {"train": 800, "valid": 100, "test": 100}


def test_ids_are_digests_of_texts_and_decide_the_split(splits):
    for split, questions in splits.items():
        assert all(question.id == text_digest(question.text) for question in questions)
        if split != "hard":
            assert {split_of(question.id) for question in questions} == {split}


def test_splits_share_no_question(splits):
    texts = {split: {question.text for question in questions} for split, questions in splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


@pytest.mark.parametrize("split", ["valid", "test", "hard"])
def test_evaluation_splits_have_2000_different_questions(splits, split):
    assert len(splits[split]) == len({question.text for question in splits[split]}) == 2000


def test_every_number_of_steps_operator_name_and_item_occurs(splits):
    assert {len(question.steps) for question in splits["test"]} == {2, 3, 4, 5}
    assert {len(question.steps) for question in splits["hard"]} == {6, 7, 8}
    text = " ".join(question.text for question in splits["test"])
    assert {*NAMES, *ITEMS} <= set(re.findall(r"\w+", text))
    assert set("+-*/") <= set("".join(step for question in splits["test"] for step in question.steps))


def test_steps_keeps_the_problems_with_those_numbers_of_steps(splits):
    kept = arith(steps=[2, 4], limit=100).questions()
    assert kept == [question for question in splits["test"] if len(question.steps) in (2, 4)][:100]


def test_every_word_of_problems_is_in_words(splits):
    known = set(words())
    for questions in splits.values():
        for question in questions[:2000]:
            assert set(re.findall(r"[A-Za-z]+|[^\sA-Za-z0-9]", question.text)) <= known
    assert list(words()) == sorted(known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, r"^task\.split=dev: must be one of train, valid, test, hard"),
        ({"split": None}, r"^task\.split=null: "),
        ({"limit": 0}, r"^task\.limit=0: must be a positive integer"),
        ({"limit": 2.5}, r"^task\.limit=2\.5: "),
        ({"limit": True}, r"^task\.limit=true: "),
        ({"limit": "many"}, r"^task\.limit=many: "),
        ({"steps": [1]}, r"^task\.steps=\[1\]: must be a list of \[2, 3, 4, 5\] for task\.split=test"),
        ({"steps": []}, r"^task\.steps=\[\]: "),
        ({"steps": 3}, r"^task\.steps=3: "),
        ({"steps": [2], "split": "hard"}, r"^task\.steps=\[2\]: must be a list of \[6, 7, 8\]"),
    ],
)
def test_bad_values_are_usage_errors_that_name_their_key(changes, message):
    with pytest.raises(UsageError, match=message):
        arith(**changes)


def test_answers_of_arith_are_read_exactly():
    rule = arith().rule
    assert rule.parse(" 18.0 ") == "18"
    assert rule.parse("many") is None
    assert rule.is_right("18", "18")
    assert not rule.is_right("18", "18.0001")


# jsonl


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="good.jsonl"):
        path = tmp_path / name
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return str(path)

    return write


def jsonl(path, *, limit=None, tolerance=None, answer="decimal"):
    return Jsonl(path, None, limit, tolerance, answer)


ROWS = [
    {"question": "What is 1 + 1?", "answer": "2.0", "steps": ["<<1+1=2>>"]},
    {"question": "Wie viele Äpfel?", "answer": 1234},
    {"question": "What is 1 + 1?", "answer": "2"},
    {"question": "And zero?", "answer": 0, "other": [1]},
    {"question": "What is 1 + 1?", "answer": "1,000.50"},
]


@pytest.mark.parametrize("name", ["good.jsonl", "good.jsonl.gz"])
def test_a_good_file_is_read_in_order(write, name):
    task = jsonl(write(*ROWS[:2], "", *ROWS[2:], name=name))
    questions = task.questions()
    assert task.name == "good"
    assert [question.text for question in questions] == [row["question"] for row in ROWS]
    assert [question.answer for question in questions] == ["2", "1234", "2", "0", "1000.5"]
    assert [question.steps for question in questions] == [("<<1+1=2>>",), (), (), (), ()]


def test_repeats_of_a_text_get_numbered_ids(write):
    ids = [question.id for question in jsonl(write(*ROWS)).questions()]
    digest = text_digest("What is 1 + 1?")
    assert [ids[0], ids[2], ids[4]] == [digest, f"{digest}-2", f"{digest}-3"]
    assert len(set(ids)) == 5


def test_limit_takes_the_first_questions_and_reads_no_further(write):
    path = write(*ROWS, "not JSON")
    assert jsonl(path, limit=3).questions() == jsonl(write(*ROWS, name="all.jsonl")).questions()[:3]
    assert len(jsonl(path, limit=5).questions()) == 5


def test_limit_may_be_larger_than_the_file(write):
    assert len(jsonl(write(*ROWS), limit=100).questions()) == 5


def test_tolerance_decides_equality(write):
    path = write(*ROWS)
    assert not jsonl(path).rule.is_right("2", "2.05")
    assert jsonl(path, tolerance=0.1).rule.is_right("2", "2.05")
    assert not jsonl(path, tolerance=0).rule.is_right("2", "2.05")
    assert jsonl(path).rule.parse("1,234.0") == "1234"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "a"}, "has no answer, the rows before it have one"),
        ({"question": "a", "answer": None}, "has no answer"),
        ({"question": "a", "answer": " "}, "has no answer"),
        ({"question": "a", "answer": True}, "answer must be a text or a number"),
        ({"answer": 1}, "has no question"),
        ({"question": "", "answer": 1}, "has no question"),
        ('{"question": "a", "answer": 1', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ({"question": "a", "answer": "blue"}, "the answer 'blue' is not a number"),
        ({"question": "a", "answer": "1,8"}, "the answer '1,8' is not a number"),
        ({"question": "a", "answer": "0,5"}, "the answer '0,5' is not a number"),
        ({"question": "a", "answer": "3 4"}, "the answer '3 4' is not a number"),
        ({"question": "a", "answer": "So.\n#### 18"}, "the answer .* is not a number; task=gsm8k reads"),
        ({"problem": "a", "answer": "1"}, "has no question; .* this one has 'problem', 'answer'"),
        ({"question": "a" * 1_000_000, "answer": "1"}, "has more than 1,000,000 characters"),
        ({"question": "a", "answer": "x" * 10_000}, "the answer 'x{99}\\.\\.\\. is not a number"),
        ('{"question": "a", "answer": 1, "answer": 2}', "has the key 'answer' twice"),
        ('{"question": "a", "answer": NaN}', "the answer 'nan' is not a number"),
        ('{"question": "a", "answer": "\\frac{1}{2}"}', r"answer .* has lost a backslash; JSON needs two"),
        ('{"question": "x \\times 3", "answer": "1"}', r"question .* has lost a backslash; JSON needs two"),
        ({"question": "a", "correct": "B"}, r"has no answer; did you mean answer by 'correct'\?"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write, bad, message):
    path = write(ROWS[0], "", bad)
    with pytest.raises(UsageError, match=rf"^task\.path={re.escape(path)}: line 3:? {message}"):
        jsonl(path).questions()


@pytest.mark.parametrize("rule", ["latex", "words"])
@pytest.mark.parametrize("answer", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_no_answer_by_any_rule(write, answer, rule):
    path = write(f'{{"question": "a", "answer": {answer}}}')
    with pytest.raises(UsageError, match=r"line 1: the answer .-?(nan|inf). is not a"):
        jsonl(path, answer=rule).questions()


@pytest.mark.parametrize(
    ("answer", "rule", "gold"),
    [
        ("0.1234567890123456789", "decimal", "0.1234567890123456789"),
        ("12345678901234567891.0", "decimal", "12345678901234567891"),
        ("18.0", "words", "18"),
        ("1e2", "words", "100"),
    ],
)
def test_a_number_keeps_its_digits_and_is_its_value_by_every_rule(write, answer, rule, gold):
    path = write(f'{{"question": "a", "answer": {answer}}}')
    assert [question.answer for question in jsonl(path, answer=rule).questions()] == [gold]


def test_a_key_twice_is_refused_at_once_in_a_long_list_and_left_alone_in_what_nobody_reads(write):
    row = '{"question": "a", "answer": 1, "about": {"x": 1, "x": 2}}'
    assert len(jsonl(write(f"[{row}]", name="list.json")).questions()) == 1
    rest = ", ".join([row] * 40_000)  # more than a row may have
    path = write(f'[{{"question": "a", "answer": 1, "answer": 2}}, {rest}]', name="list.json")
    with pytest.raises(UsageError, match="row 1 has the key 'answer' twice"):
        jsonl(path).questions()


ENCODINGS = {
    "good.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "bom.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8-sig"),
    "windows.jsonl": lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig"),
    "list.json": lambda rows: json.dumps(rows).encode(),
    "wide.json": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False).encode("utf-8-sig"),
    "named.jsonl": lambda rows: (" \n" + json.dumps(rows) + "\n\n").encode(),
    "packed.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_lists_and_byte_order_marks_are_read_too(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ENCODINGS[name](ROWS))
    expected = [("2", ("<<1+1=2>>",)), ("1234", ()), ("2", ()), ("0", ()), ("1000.5", ())]
    questions = jsonl(str(path)).questions()
    assert [(question.answer, question.steps) for question in questions] == expected
    assert [question.text for question in questions] == [row["question"] for row in ROWS]
    assert jsonl(str(path), limit=2).questions() == questions[:2]
    assert jsonl(str(path)).name == name.partition(".")[0]


def test_a_list_is_read_in_pieces_and_no_further_than_the_limit(tmp_path):
    path = tmp_path / "list.json"
    rows = [{"question": f"{number} {'a' * (number * 997 % 20_000)}", "answer": number} for number in range(200)]
    path.write_text(json.dumps(rows))
    questions = jsonl(str(path)).questions()
    assert [(q.text, q.answer) for q in questions] == [(row["question"], str(row["answer"])) for row in rows]
    path.write_text(json.dumps(rows)[:-30])
    assert jsonl(str(path), limit=199).questions() == questions[:199]
    with pytest.raises(UsageError, match=r"list\.json: row 200 is not JSON"):
        jsonl(str(path)).questions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", ": contains no questions"),
        ("[", ": row 1 is not JSON"),
        ('[{"question": "a", "answer": 1}', ": row 1 is not JSON"),
        ('[{"question": "a", "answer": 1},', r": row 2 is not JSON \(the closing bracket is missing"),
        ('[{"question": "a", "answer": 1} {"question": "b", "answer": 1}]', ": row 1 is not JSON"),
        ('[{"question": "a", "answer": 1}] more', ": row 2: there is text after the list"),
        ('[{"question": "a", "answer": 1}, 2]', ": row 2 is not a JSON object"),
        ("[" * 100_000, ": row 1 is not JSON"),
        ('["' + "a" * 2_000_000 + '"]', ": row 1 has more than 1,000,000 characters"),
    ],
)
def test_a_bad_list_is_named_by_file_and_row(tmp_path, text, message):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"^task\.path={re.escape(str(path))}{message}"):
        jsonl(str(path)).questions()


@pytest.mark.every_other
@pytest.mark.parametrize("start", ['{"question": "', '[{"question": "', "", "["])
def test_a_small_file_of_one_huge_row_takes_little_memory(tmp_path, start):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start.encode())
        for _ in range(6):
            file.write((b"a" if start.endswith('"') else b" ") * 5_000_000)
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"(line|row) 1 (has more than 1,000,000 characters|is not JSON)|no questions"):
        jsonl(str(path)).questions()
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("path", ["~nobody_of_that_name/q.jsonl", "a" * 5000, "a\0b"])
def test_a_name_that_can_be_no_file_is_refused(path):
    with pytest.raises(UsageError, match=r"^task\.path=.*: no such file"):
        jsonl(path)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_questions_is_refused(write, lines):
    path = write(*lines)
    with pytest.raises(UsageError, match=rf"^task\.path={re.escape(path)}: contains no questions"):
        jsonl(path).questions()


def test_a_missing_file_a_folder_and_null_are_refused(tmp_path):
    for path in (str(tmp_path / "missing.jsonl"), str(tmp_path), None):
        with pytest.raises(UsageError, match=rf"^task\.path={re.escape(path or 'null')}: no such file"):
            jsonl(path)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    not_gzip, cut, not_text = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl"
    not_gzip.write_bytes(b'{"question": "a", "answer": 1}\n')
    cut.write_bytes(gzip.compress(b'{"question": "a", "answer": 1}\n' * 100)[:-12])
    not_text.write_bytes(b"\xff\xfe\x00{")
    others = {name: tmp_path / f"{name}.jsonl" for name in ("parquet", "compressed", "table")}
    pd.DataFrame({"question": ["a"], "answer": [1]}).to_parquet(others["parquet"])
    others["compressed"].write_bytes(gzip.compress(b'{"question": "a", "answer": 1}\n'))
    others["table"].write_bytes(b"\xef\xbb\xbfquestion;answer\r\na;1\r\n")
    for path, why in (
        (not_gzip, "cannot be read"), (cut, "cannot be read"), (not_text, "is no text in UTF-8 .*; save it as UTF-8"),
        (others["parquet"], "is no text in UTF-8 .*; each line must be"),
        (others["compressed"], "is no text in UTF-8 .*; if it is compressed, its name must end in .gz"),
        (others["table"], "line 1 is not JSON .*\neach line must be .*\npandas writes"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=rf"^task\.path={re.escape(str(path))}: {why}"):
            jsonl(str(path)).questions()


@pytest.mark.parametrize(
    ("before", "words"), [("", "line 100001: "), ('{"question": "a", "answer": 1}', "line 100002: ")]
)
def test_blank_lines_without_end_are_refused(tmp_path, before, words):
    path = tmp_path / "blank.jsonl.gz"
    path.write_bytes(gzip.compress(before.encode() + b"\n" * 200_000))
    with pytest.raises(UsageError, match=f"{words}.*more than 100,000 blank lines"):
        jsonl(str(path)).questions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, r"^task\.limit=0: "),
        ({"limit": "all"}, r"^task\.limit=all: "),
        ({"tolerance": -0.1}, r"^task\.tolerance=-0\.1: "),
        ({"tolerance": float("nan")}, r"^task\.tolerance=nan: "),
    ],
)
def test_bad_numbers_are_refused_before_the_file_is_read(write, changes, message):
    with pytest.raises(UsageError, match=message):
        jsonl(write("not JSON"), **changes)
