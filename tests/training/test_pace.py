"""Runs by the clock: what counts, what is logged, and that a log repeats them."""

import json
import signal
import threading
from itertools import count
from types import SimpleNamespace

import pytest
from refusal import check_refused
from safetensors.torch import load_file

from latent_tts.errors import RunError, UsageError
from latent_tts.recipe.coconut import Coconut as Recipe
from latent_tts.training.reasoner import pace as module
from latent_tts.training.reasoner import train as training
from latent_tts.training.reasoner.pace import Pace, Timed, read_log
from latent_tts.training.reasoner.validation import Validation
from latent_tts.training.states import last_state

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


def recipe(updates):
    return Recipe(
        written_updates=updates, stage_updates=[], final_updates=0, final_dropout=None, latents=1, step_loss=0
    )


def timed(path, updates=10, rows=(), minutes=1.0, share=1.0):
    return Timed(recipe(updates), 100, None, rows, minutes=minutes, share=share, path=path / "log")


def take(pace, clock, seconds, updates):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    for update in updates:
        pace.on_step_begin(None, None, None)
        clock[0] += seconds
        pace.on_optimizer_step(None, SimpleNamespace(global_step=update), None, optimizer=optimizer)
        clock[0] += 100.0  # validation, saving


def save(pace):
    pace.on_save(None, SimpleNamespace(is_world_process_zero=True), None)
    return pace.path


def control():
    return SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)


def test_the_place_of_an_update_is_the_share_of_the_time_that_updates_took(tmp_path, clock):
    pace = timed(tmp_path, minutes=0.5)
    take(pace, clock, 5.0, range(5))
    assert [row["place"] for row in pace.rows] == pytest.approx([0, 10 / 6, 20 / 6, 5, 40 / 6])
    assert [pace.planned(update) for update in range(5)] == [0, 1, 3, 5, 6]
    assert not pace.finished(5)
    take(pace, clock, 5.0, [5])
    assert pace.finished(6)


def test_time_is_summed_over_resumes_and_later_updates_are_dropped(tmp_path, clock):
    first = timed(tmp_path)
    take(first, clock, 6.0, range(3))
    saved = first.state()["attributes"]["rows"][:]
    take(first, clock, 6.0, range(3, 5))
    save(first)
    again = timed(tmp_path, rows=saved)
    assert again.place(3) == first.rows[3]["place"]
    take(again, clock, 6.0, [3])
    assert read_log(str(save(again)), 10) == again.rows == first.rows[:4]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"place": 2.0', '"place": 3.0'),
        ('"seconds": 6.0', '"seconds": 7.0'),
        ('"update": 2', '"update": 3'),
        ("{", "["),
    ],
)
def test_a_log_with_a_changed_line_is_not_followed(tmp_path, clock, old, new):
    pace = timed(tmp_path, minutes=0.5)
    take(pace, clock, 6.0, range(4))
    lines = save(pace).read_text().replace("4.0", "2.0").splitlines()
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new)
    pace.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"optimization\.follow=.*no undamaged log"):
        read_log(str(pace.path), 10)


def test_states_are_due_every_minute(tmp_path, clock):
    pace, due = timed(tmp_path, minutes=50), []
    take(pace, clock, 0.0, range(5))
    for done, clock[0] in enumerate((530.0, 561.0, 589.0, 622.0), start=1):
        asked = control()
        pace.on_step_end(None, SimpleNamespace(global_step=done), asked)
        due.append(asked.should_save)
        if asked.should_save:
            save(pace)
    assert due == [True, False, False, True]


def test_validations_take_a_share_of_the_time_at_most(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    pace, done = timed(tmp_path, updates=100, minutes=10, share=0.25), []
    pace.validate_every = 1
    for update in range(40):
        take(pace, clock, 5.0, [update])
        asked = control()
        pace.on_step_end(None, SimpleNamespace(global_step=update + 1), asked)
        if asked.should_evaluate:
            done.append(update)
            clock[0] += 10.0
            pace.on_evaluate(None, None, None)
    assert done == [0, 15, 23, 31, 39]  # the first one's time is not known before
    assert 10.0 * len(done) <= 0.25 * pace.seconds
    assert "validation.share=0.25: no validation after update 2" in caplog.text
    followed = Pace(recipe(100), 100, 1, pace.rows)
    assert [update for update in range(40) if followed.may_validate(update)] == done


def test_minutes_too_few_for_one_update_are_an_error(tmp_path, clock):
    with pytest.raises(RunError, match=r"optimization\.minutes=0\.01: too few for one update, which took 2 s"):
        take(timed(tmp_path, minutes=0.01), clock, 2.0, [0])


def test_a_log_is_followed_to_its_end(tmp_path, clock):
    pace = timed(tmp_path)
    take(pace, clock, 25.0, range(3))
    rows = read_log(str(save(pace)), 10)
    assert rows == pace.rows
    followed = Pace(recipe(10), 100, None, rows)
    assert [followed.place(update) for update in range(3)] == pytest.approx([0, 25 / 6, 50 / 6])
    assert followed.limit == 3
    with pytest.raises(UsageError, match=r"optimization\.follow=.*longer recipe"):
        read_log(str(pace.path), 5)


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
    assert ltts(*TINY, "output=timed", "optimization.minutes=0.025").code == 0
    assert last_state(place / "timed" / "states") == states[0]  # finished: not trained again


@pytest.mark.slow
def test_a_run_by_the_clock_resumes_with_the_best_weights_so_far(ltts, place, monkeypatch):
    line = [*TINY, "output=timed", "optimization.minutes=0.05", "validation.every=1", "validation.max_answer_tokens=2"]
    line = [word for word in line if "stage_updates" not in word] + ["recipe.stage_updates=[]", "validation.share=9"]
    measure, compute_loss, calls = Validation.measure, training.ReasonerTrainer.compute_loss, []
    ticks = count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 8, monotonic=lambda: 0.0))

    def best_early(self, *arguments):
        figures = measure(self, *arguments)
        return figures | {"eval_greedy_accuracy": 1.0 if len(calls) == 15 else 0.0}

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 17:
            signal.raise_signal(signal.SIGINT)
        return compute_loss(*arguments, **more)

    monkeypatch.setattr(Validation, "measure", best_early)
    with monkeypatch.context() as patch:
        patch.setattr(training.ReasonerTrainer, "compute_loss", interrupted)
        stopped = ltts(*line)
    assert stopped.code == 130, stopped.err
    assert "interrupted: the state after update 17 is saved in timed/states; re-run the command" in stopped.err
    done = ltts(*line)
    assert done.code == 0, done.err
    assert "weights of update 15 of 24; on valid: greedy accuracy 1.000" in done.err
    states = place / "timed" / "states"
    assert {path.name for path in states.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-24"}
    weights = states / "checkpoint-15" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = ltts(*line)
    assert again.code == 0, again.err
    for told in (
        "checkpoint-15 is damaged",
        "checkpoint-24 needs checkpoint-15, the best state so far, which is missing",
    ):
        assert told in again.err.replace("\n", " ")


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
        (["optimization.follow=nosuch"], ["optimization.follow=nosuch", "no undamaged log"]),
        (["optimization.follow=nosuch", "optimization.minutes=1"], ["optimization.follow=nosuch", "minutes=null"]),
    ],
)
def test_what_is_no_pace_is_refused(place, more, words):
    check_refused(*TINY, "output=out", *more, words=words)


def test_a_training_that_is_refused_leaves_no_thread_that_writes(place):
    before = set(threading.enumerate())
    check_refused(*TINY, "output=out", "optimization.batch_tokens=20", words=["or more: question"])
    assert set(threading.enumerate()) <= before
