"""The engine with and without CUDA graphs, in one process: milliseconds of a batch, and which kernels take them.

    python benchmarks/gpu_table.py [--device cuda] [--repeats 5] [--profile 64x64 1x64] [--seconds 95] [--layers 12]
                                   [--width 768]

A case is questions x rollouts in bf16, on random weights in the size of GPT-2 small or Llama-3.2-1B, as in `engine.py`;
`scores` in place of a sampler times the step scores of as many rollouts by a LatentRM of that size. Each is drawn three
times before it is timed (recorded, compared, replayed). `before` is what one H200 took before there were graphs
(docs/gpu.md), `bar` and `aim` are what is to be reached with them; `first` is what the first batch took, which is
recorded; `floor` is the least time that the device needs (`engine/cost.py`, at rates measured here), with its share of
the time taken. On a CPU there are no graphs and no Llama: that only shows that this runs.

A line that begins with `!!` says what was not computed as it should be: a kernel that is not used, batches without
graphs, a case that failed. With `--seconds`, no case begins later.

Prints one line per case, then the kernels of one batch, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from baseline import seconds_of
from engine import ANSWER, LATENTS, SAMPLERS, jobs_of, new_engine, new_model, new_recordings, roll_batch
from latent_tts.engine import attention, head
from latent_tts.engine.cost import RolloutCost, Shape, batch_costs
from latent_tts.engine.device import measured_rates
from latent_tts.engine.graph_scoring import GraphScorer
from latent_tts.engine.packing import RolloutJob, batches, default_rows, max_prompts
from latent_tts.engine.recording import ROLLOUTS_SHARE, SCORES_SHARE, Recordings
from latent_tts.engine.rollout import RolloutPlan
from latent_tts.engine.scoring import LatentScorer
from latent_tts.random import bits
from latent_tts.types import RewardModel

SCORES = "scores"
# model, case, sampler, milliseconds before, bar, aim; the most important ones first
CASES = [
    ("gpt2", "64x64", "gaussian", 299, 100, 62),
    ("gpt2", "1x64", "gaussian", 219, 28, 15),
    ("gpt2", "1x1", "gaussian", 209, 22, 10),
    ("gpt2", "64x64", "dropout", None, 120, None),
    ("gpt2", "64x64", "dropout_prompt", None, 400, None),
    ("llama-1b", "32x64", "gaussian", 525, 220, 150),
    ("llama-1b", "1x64", "gaussian", 402, 65, 40),
    ("gpt2", "64x64", SCORES, None, None, None),
    ("gpt2", "1x64", SCORES, None, None, None),
]
WARM_UPS = 3  # recorded, compared, replayed
MIN_SECONDS = 0.5  # of timed batches, since the clocks of a GPU rise
KERNELS = 10
TRACEBACK = 6  # of its last lines are printed


class Shown(logging.Handler):
    """Prints warnings among the results, where nobody overlooks them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning."""
        say_wrong(record.getMessage())


def say_wrong(text: str) -> None:
    """Print what is not as it should be."""
    print(f"!! {text}", flush=True)


def measure(lm: Any, case: str, sampler: str, arguments: argparse.Namespace, graph: str) -> dict[str, Any]:
    """Median, minimum and maximum of a case, what its first batch took, and its floor."""
    on_gpu = arguments.device == "cuda"
    recordings = new_recordings(lm, SCORES_SHARE if sampler == SCORES else ROLLOUTS_SHARE) if graph == "on" else None
    run = case_of(lm, case, sampler, arguments, recordings)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first = [seconds_of(run, arguments.device) for _ in range(WARM_UPS)]
    taken: list[float] = []
    while len(taken) < arguments.repeats or (on_gpu and sum(taken) < MIN_SECONDS):
        taken.append(seconds_of(run, arguments.device))
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    buckets = [] if recordings is None or recordings.refused else list(recordings.buckets.values())
    replayed = bool(buckets) and all(bucket.trusted for bucket in buckets)
    median = statistics.median(taken)
    return {
        "graph": graph, "replayed": replayed, "ms": 1e3 * median, "min": 1e3 * min(taken), "max": 1e3 * max(taken),
        "first": 1e3 * first[0], "floor": 1e3 * floor_seconds(lm, case, sampler, arguments), "peak_bytes": peak,
    }  # fmt: skip


def case_of(
    lm: Any, case: str, sampler: str, arguments: argparse.Namespace, recordings: Recordings | None
) -> Callable[[], Any]:
    """What draws a case, by graphs if there are recordings."""
    parts, vocabulary = parts_of(lm, case, sampler, arguments), lm.config.get_text_config().vocab_size
    if sampler == SCORES:
        return scoring_of(lm, parts[0], recordings)
    engine = new_engine(lm, RolloutPlan(LATENTS, [vocabulary - 1], None, ANSWER), recordings)
    return lambda: [roll_batch(engine, part, SAMPLERS[sampler]) for part in parts]


def parts_of(lm: Any, case: str, sampler: str, arguments: argparse.Namespace) -> list[list[RolloutJob]]:
    """The batches of a case."""
    questions, rollouts = map(int, case.split("x"))
    config, device = lm.config.get_text_config(), arguments.device
    jobs = jobs_of(questions, rollouts, config.vocab_size)
    if sampler == SCORES:
        return [jobs]
    rows = default_rows(config.hidden_size, device, "prompt" in SAMPLERS[sampler].random_phases)
    return list(batches(jobs, rows, max_prompts(config.hidden_size, device)))


def scoring_of(lm: Any, jobs: list[RolloutJob], recordings: Recordings | None) -> Callable[[], Any]:
    """What scores latents of some jobs."""
    # the mean of a normalized state is 0 but for rounding, and could not be compared
    model = RewardModel(lm.base_model, lambda hidden: hidden[..., 0].float())
    scorer = LatentScorer(model) if recordings is None else GraphScorer(model, recordings)
    rows = sum(len(job.rollouts) for job in jobs)
    latents_RTD = torch.randn(rows, LATENTS, lm.config.get_text_config().hidden_size).to(lm.device, lm.dtype)
    return lambda: scorer.score([job.prompt for job in jobs], latents_RTD)


def floor_seconds(lm: Any, case: str, sampler: str, arguments: argparse.Namespace) -> float:
    """The least time that the device needs for a case."""
    shape, item = Shape.from_config(lm.config.to_dict()), lm.dtype.itemsize
    rates, least = measured_rates(shape.width, str(lm.dtype).removeprefix("torch."), arguments.device), 0.0
    for part in parts_of(lm, case, sampler, arguments):
        prompts_Q = np.array([len(job.prompt) for job in part])
        steps_R = np.full(sum(len(job.rollouts) for job in part), LATENTS)
        if sampler == SCORES:
            costs = shape.scoring_cost(prompts_Q.tolist(), steps_R, item)
        else:  # no token ends an answer here, so its last one is chosen and not fed
            passes = RolloutCost.of(shape, LATENTS, 1, SAMPLERS[sampler].random_phases, (), False)
            costs = batch_costs(passes, item, prompts_Q, steps_R, np.full_like(steps_R, ANSWER - 1))
        least += rates.floor_seconds(costs)
    return least


def look_at_kernels(lm: Any, name: str) -> None:
    """Compile the kernels of a model, compare them with the operators, and say which are used."""
    started, config = time.perf_counter(), lm.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = torch.empty(1, width, dtype=lm.dtype, device=lm.device)
    used = {
        "attention": attention.has_kernel(like), "logits": head.has_kernel(like),
        "random numbers and dropout": bits.has_kernels(like.device),
    }  # fmt: skip
    seconds = time.perf_counter() - started
    good = ", ".join(kernel for kernel, there in used.items() if there) or "none"
    print(f"Triton's kernels for {name}: {good}; {seconds:.1f} s to compile and compare", flush=True)
    for kernel in (kernel for kernel, there in used.items() if not there):
        say_wrong(f"{name}: {kernel} BY OPERATORS")


def kernels(lm: Any, case: str, arguments: argparse.Namespace, graph: str) -> list[dict[str, Any]]:
    """The operations that take most of a batch's time."""
    run = case_of(lm, case, "gaussian", arguments, new_recordings(lm) if graph == "on" else None)
    for _ in range(WARM_UPS):
        run()
    on_gpu = arguments.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    unit, kind = ("self_device_time_total", "CUDA") if on_gpu else ("self_cpu_time_total", "CPU")
    events = [event for event in profiled.key_averages() if event.device_type.name == kind]
    found = sorted(((getattr(event, unit) / 1000, event.count, event.key) for event in events), reverse=True)
    return [{"ms": sum(ms for ms, _, _ in found), "calls": sum(count for _, count, _ in found), "name": "all"}] + [
        {"ms": ms, "calls": count, "name": name} for ms, count, name in found[:KERNELS]
    ]


def line(result: dict[str, Any]) -> str:
    """A result as a line of text."""
    questions, rollouts = map(int, result["case"].split("x"))
    goals = ", ".join(f"{name} {result[name]}" for name in ("before", "bar", "aim") if result[name])
    return (
        f"{result['model']:8} {result['case']:6} {result['sampler']:14} graph {result['graph']:3}: "
        f"{result['ms']:7.1f} ms ({result['min']:.1f} to {result['max']:.1f}); {goals or 'no bar'}; "
        f"{1e3 * questions * rollouts / result['ms']:.0f} rollouts/s; floor {result['floor']:.1f} ms "
        f"({100 * result['floor'] / result['ms']:.0f} %); {result['peak_bytes'] / 2**30:.1f} GiB; "
        f"first {result['first']:.0f} ms"
    )


def say_failed(what: str, error: Exception) -> None:
    """Say what failed, with the end of where."""
    where = "".join(traceback.format_exception(error.__cause__ or error)).splitlines()
    for text in (f"{what} FAILED: {str(error).partition(chr(10))[0]}", *where[-TRACEBACK:]):
        say_wrong(text)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs="+", help="only these, of every model and sampler")
    parser.add_argument(
        "--profile", nargs="*", default=["64x64", "1x64"], metavar="QxN", help="whose kernels are listed"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 shape")
    parser.add_argument("--width", type=int, default=768, help="of the GPT-2 shape")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    started, on_gpu = time.perf_counter(), arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    arguments.dtype = ["bf16"]
    logging.getLogger("latent_tts").addHandler(Shown(logging.WARNING))
    ways = ["on", "off"] if on_gpu else ["off"]
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    results: list[dict[str, Any]] = []
    loaded: tuple[str, Any] = ("", None)

    def model_of(name: str) -> Any:
        nonlocal loaded
        if loaded[0] != name:
            loaded = ("", None)
            loaded = name, new_model(argparse.Namespace(**vars(arguments) | {"model": name}))
            if on_gpu:
                look_at_kernels(loaded[1], name)
        return loaded[1]

    def compute(model: str, case: str, sampler: str, goals: dict[str, Any], graph: str, listed: bool) -> None:
        if listed:
            print(f"\n{case}, {sampler}, graph {graph}: milliseconds, calls, operation", flush=True)
            for each in kernels(model_of(model), case, arguments, graph):
                print(f"{each['ms']:9.2f} {each['calls']:6} {each['name'][:90]}", flush=True)
            return
        result = measure(model_of(model), case, sampler, arguments, graph)
        results.append({"model": model, "case": case, "sampler": sampler} | goals | result)
        print(line(results[-1]), flush=True)
        if graph == "on" and not result["replayed"]:
            say_wrong("the line above ran WITHOUT CUDA GRAPHS, at least in part")

    jobs = []
    for model, case, sampler, *goals in CASES:
        if (not arguments.case or case in arguments.case) and (on_gpu or model == "gpt2"):
            named = dict(zip(("before", "bar", "aim"), goals, strict=True))
            jobs += [(model, case, sampler, named, graph, False) for graph in ways]
    jobs += [("gpt2", case, "gaussian", {}, graph, True) for case in arguments.profile for graph in ways]
    try:
        for number, job in enumerate(jobs[arguments.skip :], arguments.skip + 1):
            what = f"{' '.join(job[:3])} graph {job[4]}"
            if time.perf_counter() - started > arguments.seconds:
                say_wrong(f"not begun within {arguments.seconds:.0f} s: {what} and {len(jobs) - number} more")
                break
            try:
                compute(*job)
            except Exception as error:  # a kernel may raise anything, and the others are to be measured
                say_failed(what, error)
            else:
                continue
            gc.collect()
            if on_gpu and not cuda_works():
                left = arguments.seconds - (time.perf_counter() - started)
                say_wrong("CUDA is of no use to this process; the rest is measured in another one")
                print(json.dumps({"cases": results}), flush=True)
                given = sys.argv[1:] if argv is None else argv
                os.execv(sys.executable, [sys.executable, __file__, *given, f"--skip={number}", f"--seconds={left}"])
    finally:
        print(json.dumps({"cases": results}), flush=True)


def cuda_works() -> bool:
    """Whether this process can still use its GPU: some errors end that."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()
        torch.ones(1, device="cuda").item()
        return True
    return False


if __name__ == "__main__":
    main()
