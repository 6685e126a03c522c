"""Calls that hang, break or eat their process, within the limits of a run."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import is_running

from latent_tts.errors import RunError
from latent_tts.text import guard
from latent_tts.text.guard import Guard

MODULE = """
import os, sys, time

def warm_up():
    print("noise on stdout")

def upper(text):
    return text.upper()

def parent(text):
    return os.getppid()

def endless(text):
    while True:
        pass

def deaf(text):
    return 7 ** 10 ** 9  # one operation of the interpreter, that hears no signal

def broken(text):
    os.abort()

def raising(text):
    raise ValueError(text)

def greedy(text):
    return len(bytearray(8 << 30))

def hashes(text):
    return [hash(text), list({"b", "a", text})]
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A guard of a module of its own, with short limits."""
    name = f"guarded_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(guard, "SECONDS", 0.15)
    yield Guard(name)
    if name in guard._processes:
        guard._processes.pop(name).stop()


def test_calls_return_what_the_function_returns(calls):
    assert calls.call("upper", "a\u00fc\u2028\n", otherwise=None) == "A\u00dc\u2028\n"
    assert calls.call("upper", "b", otherwise=None) == "B"
    assert not calls.given_up


@pytest.mark.every_other
@pytest.mark.parametrize("function", ["endless", "deaf", "broken", "raising", "greedy"])
def test_what_hangs_or_breaks_is_given_up_named_once_and_harms_no_later_call(calls, caplog, function):
    for _ in range(2):
        assert calls.call(function, "x+1", otherwise="otherwise") == "otherwise"
    assert calls.call("upper", "a", otherwise=None) == "A"
    assert calls.given_up == {(function, "x+1")}
    assert len(caplog.records) == 1
    assert "x+1: no result within 0.15 s; counted as unreadable or wrong" in caplog.text


def test_the_reply_to_an_interrupted_call_is_not_taken_for_the_next_one(calls, monkeypatch):
    def interrupt(pipe, timeout):
        raise KeyboardInterrupt

    assert calls.call("upper", "a", otherwise=None) == "A"
    with monkeypatch.context() as patched:
        patched.setattr(guard.Connection, "poll", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calls.call("upper", "b", otherwise=None)
    assert calls.call("upper", "c", otherwise=None) == "C"


def test_a_later_run_may_ask_again(calls):
    calls.call("endless", "x", otherwise=None)
    again = Guard(calls.module)
    assert again.call("endless", "x", otherwise=1) == 1
    assert len(again.given_up) == 1


def test_all_calls_of_a_run_have_a_limit_too_and_quick_ones_are_answered_still(calls, caplog, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_PER_RUN", 0.4)
    monkeypatch.setattr(guard, "SECONDS_PER_CALL", 0.02)
    calls = Guard(calls.module)
    calls.call("upper", "start", otherwise=None)
    for number in range(8):
        assert calls.call("endless", str(number), otherwise=None) is None
        assert calls.call("upper", f"a{number}", otherwise=None) == f"A{number}"
    assert calls.seconds < 0.4 + 17 * 0.02  # the endless ones alone would take 1.2 s
    assert len(calls.given_up) == 8
    assert len(caplog.records) == guard.MAX_NAMED
    assert "further ones are not logged" in caplog.text


def test_it_works_in_threads(calls):
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: calls.call("upper", f"a{n}", otherwise=None)}))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"A{n}" for n in range(8)}


def test_a_process_that_somebody_kills_is_started_anew(calls):
    os.kill(calls.call("parent", "a", otherwise=None), signal.SIGKILL)
    guard._processes[calls.module]._running.wait()
    assert calls.call("upper", "b", otherwise=None) == "B"


def test_results_do_not_depend_on_the_order_of_sets(calls, monkeypatch):
    first = calls.call("hashes", "x", otherwise=None)
    guard._processes.pop(calls.module).stop()
    assert calls.call("hashes", "x", otherwise=None) == first


def test_a_process_that_does_not_start_is_an_error_that_says_why(tmp_path, monkeypatch):
    (tmp_path / "guarded_not.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RunError,
        match="cannot start the process for guarded_not: ModuleNotFoundError: No module named 'no_such_module'",
    ):
        Guard("guarded_not").call("upper", "a", otherwise=None)


@pytest.mark.slow
def test_the_process_ends_with_its_owner(tmp_path):
    """Also one that is killed, in the middle of a call."""
    (tmp_path / "guarded_orphan.py").write_text(MODULE)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from latent_tts.text import guard\n"
        "calls = guard.Guard('guarded_orphan')\n"
        "print(calls.call('parent', 'a', otherwise=None), flush=True)\n"
        "guard.SECONDS = 0.2\n"
        "calls.call('endless', 'a', otherwise=None)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ})
    process = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    until = time.monotonic() + 60
    while is_running(process):
        assert time.monotonic() < until, "the process is still there"
        time.sleep(0.1)


def test_decimals_and_words_start_no_process_and_import_no_sympy():
    script = (
        "import sys\n"
        "from latent_tts.text import guard\n"
        "from latent_tts.text.answer import AnswerRule\n"
        "raws = {'decimal': ['1,234', 'x'], 'words': ['A b.'], 'latex': ['18', r'\\frac12', '3 1/2']}\n"
        "for name in raws:\n"
        "    rule = AnswerRule(name)\n"
        "    forms = [form for form in map(rule.parse, raws[name]) if form]\n"
        "    assert all(rule.is_right(a, b) == rule.equal(a, b) == (a == b) for a in forms for b in forms)\n"
        "assert not guard._processes and not {'sympy', 'math_verify'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})
