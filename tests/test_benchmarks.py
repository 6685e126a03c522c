"""The benchmarks run, on a model of one small layer, and say what they promise."""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from latent_tts.engine.recording import Recordings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def engine_benchmark(monkeypatch):
    """The module, with its measurements in this process: a new one would spend its time on imports."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("engine")

    def here(arguments, what, case, sampler, dtype):
        chosen = {"measure": what, "case": [case], "sampler": [sampler], "dtype": [dtype]}
        return module.measure(argparse.Namespace(**vars(arguments) | chosen))

    monkeypatch.setattr(module, "measure_in_process", here)
    monkeypatch.setattr(module, "copy_rate", lambda device: 1.0)  # copies half a GiB
    return module


def test_the_engine_benchmark_ends_with_its_results(engine_benchmark, capsys):
    engine_benchmark.main(["--layers=1", "--width=32", "--repeats=1", "--case", "1x2", "--dtype", "fp32"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(result["case"], result["sampler"], result["where"]) for result in results] == [
        ("1x2", "gaussian", []),
        ("1x2", "dropout", ["thoughts"]),
        ("1x2", "dropout", ["prompt", "thoughts"]),
    ]
    for result in results:
        assert result["ratio"] == pytest.approx(
            result["rollouts_per_second"] / result["baseline_rollouts_per_second"], rel=0.01
        )
        shares = [result[f"{part}_share"] for part in ("prefill", "latents", "random_numbers", "answers")]
        assert sum(shares) == pytest.approx(1, abs=0.001)
        assert min(*shares, result["ceiling_share"]) > 0
        # memory above the model means nothing here, where all measurements share a process
        assert {"memory_above_model_bytes", "baseline_memory_above_model_bytes"} <= result.keys()
        assert min(result["peak_memory_bytes"], result["baseline_peak_memory_bytes"]) > 0
        assert {"model", "dtype", "device", "product_flops_per_second", "copy_bytes_per_second"} <= result.keys()


@pytest.mark.slow
def test_the_schedules_benchmark_says_when_auto_is_slower(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    schedules = importlib.import_module("schedules")
    schedules.main(["--layers=1", "--width=32", "--questions=2", "--rows", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(",")[0].strip() for line in lines] == [
        "independent latents", "1 rows", "2 rows", "dependent latents", "1 rows", "2 rows",
    ]  # fmt: skip
    assert all("target 1.1: " in line for line in lines if "rows," in line)
    assert "up to 0 rows" in lines[3]  # one commit per sweep


@pytest.mark.slow
def test_the_command_benchmark_says_where_the_time_of_a_run_goes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("LTTS_BENCH_CLOCK", "cpu")  # what imports take depends on what else the machine does
    command = importlib.import_module("command")
    command.main(["--", "task.limit=2", "n=2", "scorer=none", "budget=fixed"])
    empty, full = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (empty["cache"], full["cache"], empty["rollouts"], full["rollouts"]) == ("empty", "full", 4, 4)
    assert full["device"] == 0 < empty["device"]
    for result in (empty, full):
        assert result["imports"] + result["device"] + result["host"] == pytest.approx(result["seconds"], abs=0.01)
        assert result["imports"] > 0 < result["processor_seconds"]
    assert full["imports"] < empty["imports"]  # no torch


def test_prompts_have_the_lengths_of_the_distribution(engine_benchmark, monkeypatch):
    monkeypatch.delenv("LTTS_DATA", raising=False)
    lengths = [len(prompt) for prompt in engine_benchmark.prompts(64, 100)]
    assert lengths == sorted(lengths)
    assert 20 <= lengths[0] < 31
    assert 107 < lengths[-1] <= 213
    assert sum(lengths) / 64 == pytest.approx(60, abs=3)  # the mean over GSM8K's test questions


def test_two_sides_by_turns(engine_benchmark, capsys):
    turns = importlib.import_module("turns")
    turns.main(["--layers=1", "--width=32", "--repeats=1", "--case", "1x2", "--sampler", "gaussian"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1x2 gaussian: seconds of fp32 over bf16"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "all",
        "prefill",
        "latents",
        "answers",
        "fp32",
        "bf16",
    ]


def test_the_benchmark_of_picks_sets_counting_beside_all_pairs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module("picks").main(["--questions=4", "--drawn=8", "--answers=3", "--repeats=1"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["aggregator"] for result in results] == ["majority", "likelihood", "best_of_n", "weighted"]
    for result in results:
        assert result["ratio"] == pytest.approx(result["quadratic_seconds"] / result["seconds"])


@pytest.fixture
def table(engine_benchmark, monkeypatch):
    """The module of the table, which measures each case once."""
    module = importlib.import_module("gpu_table")
    monkeypatch.setattr(module, "MIN_SECONDS", 0)
    return module


LINE = ["--device=cpu", "--layers=1", "--width=32", "--repeats=1", "--case", "1x1"]


def test_the_table_of_a_gpu_ends_on_a_cpu(table, capsys):
    table.main([*LINE, "--profile=1x1"])
    *lines, last = capsys.readouterr().out.splitlines()
    (case,) = json.loads(last)["cases"]
    assert (case["sampler"], case["graph"], case["before"], case["bar"], case["aim"]) == (
        "gaussian",
        "off",
        209,
        22,
        10,
    )
    assert min(case["ms"], case["floor"]) > 0
    assert "before 209, bar 22, aim 10; " in lines[0]
    assert lines[2] == "1x1, gaussian, graph off: milliseconds, calls, operation"
    assert lines[3].endswith(" all")
    table.main([*LINE, "--profile", "--seconds=0"])
    said, last = capsys.readouterr().out.splitlines()
    assert said == "!! not begun within 0 s: gpt2 1x1 gaussian graph off and 0 more"
    assert json.loads(last) == {"cases": []}


def test_a_case_that_fails_is_said_and_the_others_go_on(table, monkeypatch, capsys):
    def fails(lm, case, sampler, *rest):
        logging.getLogger("latent_tts.engine.recording").warning("batches run without CUDA graphs")
        raise RuntimeError(f"no {sampler}\nwith more lines")

    monkeypatch.setattr(table, "measure", fails)
    table.main([*LINE[:-1], "1x64", "1x1", "--profile"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"cases": []}
    for what in ("1x64 gaussian", "1x1 gaussian", "1x64 scores"):
        failed = lines.index(f"!! gpt2 {what} graph off FAILED: no {what.split()[1]}")
        assert lines[failed - 1] == "!! batches run without CUDA graphs"
        assert lines[failed + table.TRACEBACK - 1] == f"!! RuntimeError: no {what.split()[1]}"
    assert all(line.startswith("!! ") for line in lines)


class Runs:
    """Runs passes again in place of replaying them: masks are not drawn by operators here."""

    def record(self, run, tensors):
        return run


@pytest.mark.parametrize("max_bytes", [1e9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_case_of_that_table_is_replayed_or_said_not_to_be(table, engine_benchmark, monkeypatch, max_bytes):
    recordings = partial(Recordings, "cpu", needed=True, new_recorder=Runs, max_bytes=max_bytes)
    monkeypatch.setattr(table, "new_recordings", lambda *given: recordings())
    arguments = argparse.Namespace(device="cpu", model="gpt2", dtype=["bf16"], layers=1, width=64, repeats=1)
    lm = engine_benchmark.new_model(arguments)
    for sampler in dict.fromkeys(sampler for _, _, sampler, *_ in table.CASES):
        assert table.measure(lm, "2x2", sampler, arguments, "on")["replayed"] == (max_bytes > 1)
    # so that rounding is small beside it
    assert table.case_of(lm, "2x2", table.SCORES, arguments, None)().abs().mean() > 0.1


def check_gpu(*arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    line = ["bash", BENCHMARKS / "gpu_check.sh", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_check_of_a_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = check_gpu()
    assert (done.returncode, done.stdout) == (
        2,
        "there is no CUDA device here; --device cpu shows that this script works\n",
    )


@pytest.mark.slow
def test_it_says_which_packages_a_machine_with_a_gpu_may_lack():
    assert check_gpu("--requirements").stdout == ""
    needs = [line.split("==")[0] for line in check_gpu("--needs").stdout.splitlines()]
    assert {"transformers", "hydra-core", "datasets", "dill", "latex2sympy2-extended", "pytest-xdist"} <= set(needs)
    # what torch brings; what has no wheel; an extra of the project
    assert not {"torch", "sympy", "triton", "antlr4-python3-runtime", "gguf"} & set(needs)
