"""Runs by the clock: what counts, what is logged, and that a log repeats them."""

import json
import re
import signal
import threading
from itertools import count
from types import SimpleNamespace

import pytest
from refusal import check_refused
from safetensors.torch import load_file

from latent_tts.errors import RunError, UsageError
from latent_tts.training.reasoner import pace as module
from latent_tts.training.reasoner.pace import Pace, Timed, pace_of, read_log
from latent_tts.training.reasoner.validation import keep_if_best
from latent_tts.training.states import last_state
from latent_tts.training.trainer import ResumableTrainer

TINY = [
    "train-reasoner", "backbone.layers=1", "backbone.width=16", "backbone.heads=2", "backbone.positions=128",
    "recipe.written_updates=4", "recipe.stage_updates=[2]", "recipe.final_updates=4", "model.latents=2",
    "optimization.batch=4", "optimization.bf16=false", "optimization.warmup=2", "optimization.cosine_updates=10",
    "valid_questions=2", "device=cpu", "save_every=3",
]  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows what a test sets, to runs by the clock alone."""
    now = [0.0]
    show = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=show, monotonic=show))
    return now


def take(pace, clock, seconds, updates):
    for update in updates:
        pace.start()
        clock[0] += seconds
        pace.stop(update, lambda number: number)
        pace.log(update, {})
        clock[0] += 100.0  # validation, saving


def test_the_place_of_an_update_is_the_share_of_the_time_that_updates_took(tmp_path, clock):
    pace = Timed(10, minutes=0.5, path=tmp_path / "log")
    take(pace, clock, 5.0, range(5))
    assert pace.places == pytest.approx([0, 10 / 6, 20 / 6, 5, 40 / 6])
    assert [pace.planned(update) for update in range(5)] == [0, 1, 3, 5, 6]
    assert not pace.finished(5)
    take(pace, clock, 5.0, [5])
    assert pace.finished(6)


def test_time_is_summed_over_resumes_and_later_updates_are_dropped(tmp_path, clock):
    first = Timed(10, minutes=1, path=tmp_path / "log")
    take(first, clock, 6.0, range(5))
    with (tmp_path / "log").open("a") as file:
        file.write('{"update": 5, "pl')  # killed while it wrote
    again = Timed(10, minutes=1, path=tmp_path / "log")
    again.resume(3)
    assert again.places == first.places[:3]
    assert again.place(3) == first.places[3]
    assert len(read_log(tmp_path / "log")) == 3
    take(again, clock, 6.0, [3])
    assert [row["update"] for row in read_log(tmp_path / "log")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"place": 2.0', '"place": 3.0'),
        ('"seconds": 6.0', '"seconds": 7.0'),
        ('"update": 2', '"update": 3'),
        ("{", "["),
    ],
)
def test_a_changed_line_ends_the_log_and_is_not_followed(tmp_path, clock, old, new):
    log = tmp_path / "log"
    take(Timed(10, minutes=0.5, path=log), clock, 6.0, range(4))
    lines = log.read_text().splitlines()
    assert old in lines[2].replace("4.0", "2.0")
    lines[2] = lines[2].replace("4.0", "2.0").replace(old, new)
    log.write_text("\n".join(lines) + "\n")
    assert len(read_log(log)) == Timed(10, minutes=0.5, path=log).known() == 2
    with pytest.raises(UsageError, match=r"optimization\.follow=.*is damaged in line 3"):
        pace_of(10, None, str(log), tmp_path)


def test_states_are_due_every_minute(tmp_path, clock):
    pace = Timed(10, minutes=5, path=tmp_path / "log")
    due = []
    for clock[0] in (30.0, 61.0, 90.0, 122.0):
        due.append(pace.wants_saving())
    assert due == [False, True, False, True]
    assert not Pace(10).wants_saving()


def test_validations_take_a_share_of_the_time_at_most(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    pace = Timed(100, minutes=10, path=tmp_path / "log", share=0.25)
    done = []
    for update in range(40):
        take(pace, clock, 5.0, [update])
        if pace.may_validate(update):
            done.append(update)
            with pace.validating(lambda number: number):
                clock[0] += 10.0
    assert done == [0, 15, 23, 31, 39]  # the first one's time is not known before
    assert 10.0 * len(done) <= 0.25 * sum(pace.seconds)
    assert "validation.share=0.25: no validation after update 2" in caplog.text
    again = Timed(100, minutes=10, path=tmp_path / "log", share=0.25)
    again.resume(40)
    assert again.may_validate(40)
    assert Pace(10).may_validate(0)


def test_minutes_too_few_for_one_update_are_an_error(tmp_path, clock):
    with pytest.raises(RunError, match=r"optimization\.minutes=0\.01: too few for one update, which took 2 s"):
        take(Timed(10, minutes=0.01, path=tmp_path / "log"), clock, 2.0, [0])


def test_a_log_is_followed_to_its_end(tmp_path, clock):
    take(Timed(10, minutes=1, path=tmp_path / "log"), clock, 25.0, range(3))
    pace = pace_of(10, None, str(tmp_path / "log"), tmp_path)
    assert pace.followed == read_log(tmp_path / "log")
    assert [pace.place(update) for update in range(3)] == pytest.approx([0, 25 / 6, 50 / 6])
    assert pace.limit == 3
    with pytest.raises(UsageError, match=r"optimization\.follow=.*longer recipe"):
        pace_of(5, None, str(tmp_path / "log"), tmp_path)


@pytest.mark.slow
def test_a_run_by_the_clock_is_repeated_bit_for_bit_by_its_log(ltts, place, monkeypatch):
    ticks = count()  # every look at the clock is an eighth of a second after the last one
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 8, monotonic=lambda: 0.0))
    timed = ltts(*TINY, "output=timed", "optimization.minutes=0.025")
    assert timed.code == 0, timed.err
    log = place / "timed" / "states" / "updates.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["hidden_steps"] is None  # the last stage was reached
    assert all(row["lr"] > 0 for row in rows)
    assert len(rows) == 12
    assert [row["latents"] for row in rows] == [0] * 5 + [1] * 3 + [2] * 4
    followed = ltts(*TINY, "output=followed", f"optimization.follow={log}")
    assert followed.code == 0, followed.err
    states = [last_state(place / name / "states") for name in ("timed", "followed")]
    one, other = (load_file(state / "model.safetensors") for state in states)
    assert states[0].name == states[1].name == f"checkpoint-{len(rows)}"
    assert all(one[name].equal(other[name]) for name in one)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    again = ltts(*TINY, "output=timed", "optimization.minutes=0.025")
    assert again.code == 0, again.err
    told = "checkpoint-12 is of update 12, but updates.jsonl is whole to 5: it is now damaged-checkpoint-12"
    assert told in again.err.replace("\n", " ")


@pytest.mark.slow
def test_best_weights_of_dropped_updates_do_not_become_the_checkpoint(ltts, place, monkeypatch):
    line = [*TINY, "output=timed", "optimization.minutes=0.05", "validation.every=1", "validation.max_answer_tokens=2"]
    compute_loss, calls = ResumableTrainer.compute_loss, []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return compute_loss(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "compute_loss", interrupted)
        stopped = ltts(*line)
    assert stopped.code == 130, stopped.err
    assert "interrupted: the state after update 3 is saved in timed/states; re-run the command" in stopped.err
    states = place / "timed" / "states"
    weights = load_file(last_state(states) / "model.safetensors")
    assert keep_if_best(states, weights, 10**6, {"eval_greedy_accuracy": 1.0, "eval_coverage_at_8": 1.0})
    done = ltts(*line)
    assert done.code == 0, done.err
    assert "the best weights so far are of update 1000000, which is made anew; they are removed" in done.err
    chosen = re.search(r"weights of update (\d+) of (\d+); on valid", done.err)
    assert chosen, done.err
    assert int(chosen[1]) <= int(chosen[2]) < 10**6


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["validation.share=0.5"], ["validation.share=0.5", "optimization.minutes"]),
        (["validation.share=0", "optimization.minutes=1"], ["validation.share=0", "positive"]),
        (["optimization.batch_tokens=0"], ["optimization.batch_tokens=0", "positive integer"]),
        (["optimization.batch_tokens=20"], ["optimization.batch_tokens=20", "or more: question"]),
        (["optimization.gradient_checkpointing=3"], ["optimization.gradient_checkpointing=3", "true or false"]),
        (["optimization.minutes=0"], ["optimization.minutes=0", "positive"]),
        (["optimization.follow=nosuch"], ["optimization.follow=nosuch", "no log"]),
        (["optimization.follow=nosuch", "optimization.minutes=1"], ["optimization.follow=nosuch", "minutes=null"]),
    ],
)
def test_what_is_no_pace_is_refused(place, more, words):
    check_refused(*TINY, "output=out", *more, words=words)


def test_a_training_that_is_refused_leaves_no_thread_that_writes(place):
    before = set(threading.enumerate())
    check_refused(*TINY, "output=out", "optimization.batch_tokens=20", words=["or more: question"])
    assert set(threading.enumerate()) <= before
