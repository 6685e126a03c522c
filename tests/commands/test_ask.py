"""`ltts ask`: a question from the argument or standard input, votes, picks, costs, JSON, and what is refused."""

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from refusal import check
from terminal import on_terminal

from latent_tts import cli
from latent_tts.config.reference import read_command
from latent_tts.results.run_folder import last_run

QUESTION = "Ann has 5 apples. She buys 3 more. How many apples does Ann have?"
OTHER = "Ben has 40 pens. He loses 12. How many pens does Ben have?"


@pytest.fixture
def ask(ltts, checkpoint):
    """`ltts ask` on the tiny reasoner."""
    return lambda *arguments: ltts("ask", *arguments, f"model.checkpoint={checkpoint}", "max_answer_tokens=4")


@pytest.fixture
def typed(monkeypatch):
    """Put a text on standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def lines_of(result) -> list[dict]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_question_gets_votes_picks_agreement_and_costs(ask):
    asked = ask(QUESTION, "n=8", "scorer=none")
    assert asked.code == 0, asked.err
    assert asked.last.name == "answers.jsonl"
    [line] = map(json.loads, asked.last.read_text().splitlines())
    rollouts = pd.read_parquet(asked.last.with_name("rollouts.parquet"))
    votes = Counter(rollouts["prediction"].dropna())
    assert asked.out.startswith(QUESTION)
    shown = " ".join(asked.out.split())
    for name, pick in line["picks"].items():
        assert f"{name} {'unreadable' if pick['answer'] is None else pick['answer']}" in shown
    assert set(line["picks"]) == {"majority", "likelihood"}
    assert all(f"{answer} ({count})" in shown for answer, count in votes.items())
    assert f"agreement {100 * max(votes.values(), default=0) / 8:.0f} %" in shown
    assert "8 rollouts: " in shown
    assert "GFLOP" in shown
    assert "right answer" not in shown


def test_costs_are_of_all_rollouts_that_were_drawn(ask):
    budget = ["budget=adaptive", "budget/rule=posterior", "budget.rule.threshold=0.6", "budget.round=4"]
    asked = ask(QUESTION, "n=8", "sampler=gaussian", "sampler.sigma=0.001", "scorer=none", *budget)
    assert asked.code == 0, asked.err
    [line] = map(json.loads, asked.last.read_text().splitlines())
    assert line["rollouts"] < pd.read_parquet(asked.last.with_name("rollouts.parquet"))["rollout"].size
    assert f"4 rollouts ({line['rollouts']} used): " in " ".join(asked.out.split())
    assert line["why"] == "posterior"
    assert "certificate" not in line
    assert "certificate" not in asked.out


def test_a_certificate_stands_beside_its_answer(ask):
    rule = ["budget=adaptive", "budget/rule=certified", "sampler=gaussian", "sampler.sigma=0.001", "scorer=none"]
    for n, certificate in ((2, "not certified"), (32, "error <= 0.5")):
        asked = ask(QUESTION, f"n={n}", *rule, "budget.rule.delta=0.5")
        [line] = map(json.loads, asked.last.read_text().splitlines())
        assert line["certificate"] == certificate
        assert f"certificate: {certificate}\n" in asked.out


def test_standard_input_has_a_question_per_line_and_json_is_all_that_is_printed(ask, typed):
    typed(f"{QUESTION}\n\n  {OTHER}  \n")
    asked = ask("--json", "n=4")
    lines = lines_of(asked)
    assert [line["question"] for line in lines] == [QUESTION, OTHER]
    rollouts = pd.read_parquet(asked_folder("rollouts.parquet")[0])
    metrics = pd.read_csv(asked_folder("metrics.csv")[0]).set_index("metric")["value"]
    for line in lines:
        own = rollouts[rollouts["question_index"] == line["index"]]
        counts = Counter(own["prediction"].dropna())
        assert line["votes"] == counts
        assert line["unreadable"] == own["prediction"].isna().sum() == 4 - sum(counts.values())
        assert line["agreement"] == max(counts.values(), default=0) / 4
        assert "gold" not in line
        assert all(pick["correct"] is None for pick in line["picks"].values())
    for metric in ("agreement", "gflops", "seconds"):
        assert sum(line[metric] for line in lines) / 2 == pytest.approx(metrics[metric])


def asked_folder(name: str) -> list[Path]:
    return sorted(Path("outputs/ask").glob(f"*/{name}"))


def test_unreadable_answers_are_no_votes(ask):
    asked = ask(QUESTION, "--json", "n=8", "sampler=greedy", "answer.temperature=20", "scorer=none")
    (line,) = lines_of(asked)
    rollouts = pd.read_parquet(asked_folder("rollouts.parquet")[0])
    assert 0 < line["unreadable"] == rollouts["prediction"].isna().sum() < 8
    assert line["votes"] == Counter(rollouts["prediction"].dropna())


def test_an_example_is_a_question_of_the_built_in_reasoners_kind(ask):
    [line] = lines_of(ask("--example", "--json", "n=2"))
    assert line["gold"].isdigit()
    shown = ask("--example", "n=2").out
    assert f"right answer: {line['gold']}" in shown
    assert line["question"] in " ".join(shown.split())
    assert "correct" in shown


def test_the_keys_of_a_run_work_and_the_cache_is_shared_with_runs(ask, run):
    [line] = lines_of(ask("task=arith", "task.limit=1", "--json", "n=4", "sampler=gaussian", "seed=3"))
    after = run("task.limit=1", "sampler=gaussian", "seed=3")
    record = json.loads(after.last.with_name("run.json").read_text())
    assert record["rollouts"]["drawn_now"] == 0
    [same] = map(json.loads, after.last.with_name("answers.jsonl").read_text().splitlines())
    assert {name: line[name] for name in same} == same
    [alone] = lines_of(ask(QUESTION, "--json", "n=1", "aggregator=[likelihood]", "keep_latents=true"))
    assert (alone["rollouts"], list(alone["picks"])) == (1, ["likelihood"])
    assert asked_folder("latents.safetensors")


def test_only_picks_are_decoded_and_counted_where_only_they_are_asked_for(ltts):
    [line] = lines_of(ltts("ask", QUESTION, "--json", "n=4", "answer.decode=winners"))
    assert sum(line["votes"].values()) + line["unreadable"] == 1
    assert line["picks"]["best_of_n"]["agree"] is None
    assert line["agreement"] is None
    assert line["seconds"] > 0
    assert "votes" not in ltts("ask", QUESTION, "n=4", "answer.decode=winners").out


def test_a_question_may_look_like_a_key_or_an_interpolation(ask, typed):
    asked = ask("2+2=?", "n=1")
    assert asked.out.startswith("2+2=?"), asked.err
    check(ask("How many ${n} pens?"), "not in the vocabulary")
    typed("How many ${n} pens?\n")
    check(ask(), "not in the vocabulary")


def test_a_word_that_the_reasoner_does_not_know_is_named_with_what_it_knows(ltts):
    asked = ltts("ask", "Ann has 5 unicorns. How many pens does Ann have?")
    named = "question 'Ann has 5 unicorns. How many pens does Ann have?': the word 'unicorns'"
    check(asked, named, "model=demo_coconut", "numbers and Ann Ben", "marbles", "ltts ask --example")
    assert "<|" not in asked.err


def test_no_question_and_two_kinds_of_questions_are_refused(ask, typed):
    check(ask(""), "question='': is empty")
    check(ask("  "), "is empty")
    typed("\n \n")
    check(ask(), "standard input is empty")
    check(ask(QUESTION, "--example"), "has questions of its own")
    check(ask(QUESTION, "--jsno"), "--jsno: no such flag; did you mean", "one of --json, --example")
    check(ask("how", "many"), "'many' is not of the form key=value")
    check(ask(QUESTION, "n=0"), "n=0")


def test_a_run_takes_texts_too_and_refuses_what_is_none(ltts):
    check(ltts("run", "task=asked"), "task.texts", "contains no questions")
    check(ltts("run", "task=asked", "task.texts=5"), "task.texts=5", "must be a list of texts")
    check(ltts("run", "task=asked", "task.texts=['']"), "task.texts", "number 1 has no question")


def test_help_lists_the_keys_of_run_and_its_own(ltts):
    own, of_run = read_command("ask"), read_command("run")
    assert [key.name for key in own.keys] == ["question", "json", *(key.name for key in of_run.keys)]
    assert own.groups == {**of_run.groups, "task": ["asked"], "budget": ["fixed"]}
    shown = ltts("ask", "--help").out
    assert "usage: ltts ask [QUESTION]" in shown
    assert "* task=asked" in shown
    assert all(key.name in shown for key in own.keys)


def test_plot_does_not_take_a_question_for_the_last_run(run, ask):
    folder = run().last.parent
    assert ask(QUESTION, "n=1").code == 0
    assert last_run().resolve() == folder.resolve()


def test_votes_arrive_while_rollouts_are_drawn(place, checkpoint):
    line = ["ask", QUESTION, f"model.checkpoint={checkpoint}", "n=4", "engine.rows=2", "max_answer_tokens=4"]
    codes = []
    shown = on_terminal(lambda _: codes.append(cli.main(line)), columns=100)
    assert codes == [0], shown
    first, second = shown.index("2 rollouts: "), shown.index("4 rollouts: ")
    assert first < second < shown.index("picked by")
    assert "INFO" not in shown


@pytest.mark.every_other
@pytest.mark.parametrize("question", ["x=3+4, what is x?", "n=4 apples. How much?", "-x + 4?", "task=Find x"])
def test_a_question_may_begin_like_a_key_or_a_flag(ask, question):
    check(ask(question, "--json"), "is not in the vocabulary of")  # it was taken for a question


def test_a_word_that_may_be_a_key_says_how_to_ask_it(ask):
    check(ask("x=3+4"), "x: no such key", """to ask it: ltts ask "question='x=3+4'\"""")
    check(ask("question='x=3+4'"), "the word 'x' is not in the vocabulary")
    check(ask("smapler=gaussian", QUESTION), "smapler: no such key; did you mean sampler?")
    assert ask("model.name=my model", QUESTION, "aggregator=[majority, likelihood]", "n=2").code == 0


def test_a_sweep_asks_once_per_job(ask):
    swept = ask(QUESTION, "-m", "n=2,4", "scorer=none", "hydra.sweep.dir=asked")
    assert swept.code == 0, swept.err
    assert [swept.out.count(f"{n} rollouts: ") for n in (2, 4)] == [1, 1]
    assert [len((Path("asked") / job / "answers.jsonl").read_text().splitlines()) for job in "01"] == [1, 1]
