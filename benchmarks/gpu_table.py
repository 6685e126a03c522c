"""The engine with and without CUDA graphs, in one process: milliseconds of a batch, and which kernels take them.

    python benchmarks/gpu_table.py [--device cuda] [--repeats 5] [--profile 64x64] [--layers 12] [--width 768]

A case is questions x rollouts in bf16, on random weights in the size of GPT-2 small or Llama-3.2-1B, as in `engine.py`;
`scores` in place of a sampler times the step scores of as many rollouts by a LatentRM of that size. `before` is what
one H200 took before there were graphs (docs/gpu.md); `first` is what the first batch took, which is recorded. On a CPU
there are no graphs and no Llama: that only shows that this runs.

Prints one line per case, then the kernels of one batch, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from engine import (
    ANSWER,
    LATENTS,
    SAMPLERS,
    jobs_of,
    new_engine,
    new_model,
    roll_batch,
)
from latent_tts.engine.graph_scoring import GraphScorer
from latent_tts.engine.packing import RolloutJob, batches, default_rows, max_prompts
from latent_tts.engine.recording import SCORES_SHARE, Recordings
from latent_tts.engine.rollout import RolloutPlan
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import RunError
from latent_tts.types import RewardModel

SCORES = "scores"
# model, case, sampler, milliseconds before
CASES = [
    ("gpt2", "64x64", "gaussian", 299),
    ("gpt2", "64x64", "dropout", None),
    ("gpt2", "64x64", "dropout_prompt", None),
    ("gpt2", "64x64", SCORES, None),
    ("gpt2", "1x64", "gaussian", 219),
    ("gpt2", "1x64", SCORES, None),
    ("gpt2", "1x1", "gaussian", 209),
    ("llama-1b", "32x64", "gaussian", 525),
    ("llama-1b", "1x64", "gaussian", 402),
]
WARM_UPS = 3  # recorded, compared, replayed
KERNELS = 14


def milliseconds(call: Any, device: str) -> float:
    """What a call takes, with all that it queues."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def measure(lm: Any, case: str, sampler: str, arguments: argparse.Namespace, graph: str) -> dict[str, Any]:
    """Median, minimum and maximum of a case, and what its first batch took."""
    run = case_of(lm, case, sampler, arguments, graph)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = [milliseconds(run, arguments.device) for _ in range(WARM_UPS)]
    taken = [milliseconds(run, arguments.device) for _ in range(arguments.repeats)]
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    return {
        "graph": graph, "ms": statistics.median(taken), "min": min(taken), "max": max(taken), "first": first[0],
        "peak_bytes": peak,
    }  # fmt: skip


def case_of(lm: Any, case: str, sampler: str, arguments: argparse.Namespace, graph: str) -> Callable[[], Any]:
    """What draws a case."""
    questions, rollouts = map(int, case.split("x"))
    config = lm.config.get_text_config()
    if sampler == SCORES:
        return scoring_of(lm, jobs_of(questions, rollouts, config.vocab_size), graph)
    made, device = SAMPLERS[sampler], arguments.device
    rows = default_rows(config.hidden_size, device, "prompt" in made.random_phases)
    jobs = jobs_of(questions, rollouts, config.vocab_size)
    parts = list(batches(jobs, rows, max_prompts(config.hidden_size, device)))
    engine = new_engine(lm, RolloutPlan(LATENTS, [config.vocab_size - 1], None, ANSWER), graph)
    return lambda: [roll_batch(engine, part, made) for part in parts]


def scoring_of(lm: Any, jobs: list[RolloutJob], graph: str) -> Callable[[], Any]:
    """What scores latents of some jobs."""
    # the mean of a normalized state is 0 but for rounding, and could not be compared
    model = RewardModel(lm.base_model, lambda hidden: hidden[..., 0].float())
    recordings = Recordings(lm.device, needed=True, share=SCORES_SHARE)
    scorer = GraphScorer(model, recordings) if graph == "on" else LatentScorer(model)
    rows = sum(len(job.rollouts) for job in jobs)
    latents_RTD = torch.randn(rows, LATENTS, lm.config.get_text_config().hidden_size).to(lm.device, lm.dtype)
    return lambda: scorer.score([job.prompt for job in jobs], latents_RTD)


def kernels(lm: Any, case: str, arguments: argparse.Namespace, graph: str) -> list[dict[str, Any]]:
    """The operations that take most of a batch's time."""
    run = case_of(lm, case, "gaussian", arguments, graph)
    for _ in range(WARM_UPS):
        run()
    on_gpu = arguments.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [(getattr(event, unit) / 1000, event.count, event.key) for event in profiled.key_averages()]
    found.sort(reverse=True)
    return [{"ms": sum(ms for ms, _, _ in found), "calls": sum(count for _, count, _ in found), "name": "all"}] + [
        {"ms": ms, "calls": count, "name": name} for ms, count, name in found[:KERNELS]
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs="+", help="only these, of every model and sampler")
    parser.add_argument("--profile", default="64x64", metavar="QxN", help="the case whose kernels are listed")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 shape")
    parser.add_argument("--width", type=int, default=768, help="of the GPT-2 shape")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    arguments.dtype = ["bf16"]
    ways = ["off", "on"] if arguments.device == "cuda" else ["off"]
    if arguments.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    results, listed, loaded = [], {}, ("", None)
    for model, case, sampler, before in CASES:
        if (arguments.case and case not in arguments.case) or (arguments.device == "cpu" and model != "gpt2"):
            continue
        if loaded[0] != model:
            loaded = ("", None)
            loaded = model, new_model(argparse.Namespace(**vars(arguments) | {"model": model}))
        for graph in ways:
            try:
                result = measure(loaded[1], case, sampler, arguments, graph)
            except (RunError, RuntimeError) as error:
                print(
                    f"{model:8} {case:6} {sampler:14} graph {graph:3}: failed: {str(error).splitlines()[0]}", flush=True
                )
                continue
            results.append({"model": model, "case": case, "sampler": sampler, "before": before} | result)
            rate = 1000 * int(case.split("x")[0]) * int(case.split("x")[1]) / result["ms"]
            print(
                f"{model:8} {case:6} {sampler:14} graph {graph:3}: {result['ms']:8.1f} ms ({result['min']:.1f} to "
                f"{result['max']:.1f}), {rate:9.0f} rollouts/s, first {result['first']:.0f} ms, before {before or '-'}",
                flush=True,
            )
        if (model, sampler) == ("gpt2", "gaussian") and case == arguments.profile:
            listed = {graph: kernels(loaded[1], case, arguments, graph) for graph in ways}
    for graph, found in listed.items():
        print(f"\n{arguments.profile}, gaussian, graph {graph}: milliseconds, calls, operation")
        for each in found:
            print(f"{each['ms']:9.2f} {each['calls']:6} {each['name'][:110]}")
    print(json.dumps({"cases": results, "kernels": listed}))


if __name__ == "__main__":
    main()
