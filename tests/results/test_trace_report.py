"""A trace in a terminal: it fits the width, in ASCII where the encoding needs it, and plain in a pipe."""

import re
from dataclasses import replace

import pytest
from terminal import on_terminal
from traces import made

from latent_tts.results.trace_report import print_trace


@pytest.mark.parametrize(("columns", "encoding"), [(80, "ascii"), (100, "utf-8"), (80, "utf-8"), (100, "ascii")])
def test_it_fits_the_terminal(columns, encoding):
    trace = made("a question")
    twice = replace(trace, questions=trace.questions * 2)
    shown = on_terminal(lambda _: print_trace(twice), columns=columns, encoding=encoding)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    tables = [
        line for line in plain.splitlines() if not re.search("drift, spread:|dependencies of|PCA|sweeps of|model", line)
    ]
    assert max(map(len, tables)) <= columns
    assert ("C" in plain.split()) == (encoding == "ascii")
    assert ("\u2713" in plain.split()) == (encoding == "utf-8")
    assert "\x1b[" in shown
    assert len(re.findall("a question [01]: (?:drift|spread)", plain)) == 8
    assert plain.count("side by side") == 1


def test_it_says_what_each_latent_and_rollout_has(capsys):
    print_trace(made("0"))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    latents = [line for line in lines if line[1:3] == ["0", "75"]]
    assert [line[0] for line in latents] == ["1", "2", "3"]
    assert all(line[3:8] == ["0", "of", "step", "1:", "100"] for line in latents)
    assert latents[2][-2:] == ["1", "2"]  # depends on
    rollouts = [line[:3] for line in lines if line[2:3] in (["yes"], ["no"])]
    assert rollouts[-4:] == [["0", "0", "yes"], ["1", "1", "no"], ["2", "0", "yes"], ["3", "1", "no"]]
    assert "right answer: 0; votes: 0 (2), 1 (2)" in out
    assert "critical path 3 of 3 latents, parallel potential 1.00, growth -0.50 per latent" in out


def test_many_rollouts_are_cut_and_missing_things_left_out(capsys):
    trace = made("0", gold=None, scored=False)
    own = trace.questions[0].samplers

    question = replace(trace.questions[0], dependencies=None, maps=[], results=[], samplers=[own[0], own[-1]])
    print_trace(replace(trace, questions=[question], scorer=None, no_dependencies="directions=0"))
    out = capsys.readouterr().out
    assert "score" not in out
    assert "right" not in out
    assert "no dependency graph: directions=0" in out
