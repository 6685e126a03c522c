"""The engine compared with the naive way and with the machine: rollouts per second, peak memory, time per phase.

    python benchmarks/engine.py [--case 4x64 16x16] [--dtype fp32 bf16] [--sampler gaussian dropout dropout_prompt]
                                [--device cpu] [--model gpt2] [--repeats 3] [--layers 12] [--width 768]
                                [--quantize int8] [--graph off]

A case is questions x rollouts. Models have random weights in the size of GPT-2 small, or of Llama-3.2-1B on CUDA. The
lengths of prompts are quantiles of GSM8K's test questions at 1.3 tokens per word, from `gsm8k_test.jsonl` in the folder
LTTS_DATA, or from the list below. Each rollout has 6 latents, one end token and 12 answer tokens.

Each measurement loads the model, warms up with one latent and one answer token, then repeats; the median counts. On a
CPU it runs in its own process, since peak memory is that of the process (on CUDA that of torch), in total and since the
model was loaded. One more call gives the time per phase (on CUDA by events in the stream, so that nothing waits; random
numbers are then noise alone, since masks are drawn where they are used). That of the engine also measures the limits of
the machine: the model's own matrix products for the rows of a batch, and a copy in memory.
`ceiling_share` is the rate of operations in the latent phase divided by the rate of these products. On a CPU,
`baseline.py` draws at most 256 rows at once (more do not fit in memory), and a larger case is timed on a part of its
questions. It masks the prompt in both dropout settings, like the official code.

On CUDA, batches are replayed as CUDA graphs; `--graph off` does without. A batch is drawn three times before it is
timed (recorded, compared, replayed); phases are timed without graphs.

On a busy machine, use LTTS_BENCH_CLOCK=cpu and OMP_NUM_THREADS=1 to count processor seconds.

Prints one line per measurement, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import baseline
from baseline import seconds_of
from command import clock
from latent_tts.engine.backbone import PackedLinear, can_be_packed
from latent_tts.engine.cost import Shape
from latent_tts.engine.device import peak_bytes
from latent_tts.engine.graphs import GraphEngine
from latent_tts.engine.packing import RolloutJob, batches, default_rows, max_prompts
from latent_tts.engine.quantization import quantize
from latent_tts.engine.recording import ROLLOUTS_SHARE, Recordings
from latent_tts.engine.rollout import Engine, RolloutPlan, Rollouts
from latent_tts.engine.sites import find_blocks
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.types import Reasoner

LATENTS, ANSWER, SIGMA, RATE = 6, 12, 0.1, 0.1
CASES = ["1x1", "1x64", "16x16", "4x64", "64x64"]
SAMPLERS: dict[str, Sampler] = {
    "gaussian": Gaussian(SIGMA, False),
    "dropout": Dropout(RATE, "residual", ["thoughts"], "fresh"),
    "dropout_prompt": Dropout(RATE, "residual", ["prompt", "thoughts"], "fresh"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE_ROWS = {"cpu": 256, "cuda": 512}  # few, since the naive way computes logits of whole prompts
# 1.3 tokens per word: quantiles 0, 0.05, ... 1 over GSM8K's 1319 test questions
PROMPT_TOKENS = [20, 31, 35, 38, 40, 43, 46, 48, 51, 53, 56, 58, 61, 65, 68, 72, 77, 82, 91, 107, 213]


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of arbitrary ids, with lengths evenly spaced over the distribution."""
    file = Path(os.environ.get("LTTS_DATA", "")) / "gsm8k_test.jsonl"
    known: list[int] = PROMPT_TOKENS
    if "LTTS_DATA" in os.environ and file.is_file():
        words = [len(json.loads(line)["question"].split()) for line in file.read_text().splitlines()]
        known = [round(1.3 * number) for number in words]
    lengths = np.quantile(known, (np.arange(count) + 0.5) / count).round().astype(int)
    return [[(31 * place + 7 * row) % (vocabulary - 1) for place in range(n)] for row, n in enumerate(lengths)]


def jobs_of(questions: int, rollouts: int, vocabulary: int) -> list[RolloutJob]:
    """The questions of a case."""
    return [
        RolloutJob(str(number), str(number), prompt, list(range(rollouts)))
        for number, prompt in enumerate(prompts(questions, vocabulary))
    ]


def latent_flops(lm: PreTrainedModel, jobs: list[RolloutJob], sampler: Sampler) -> float:
    """Operations of the latent phase."""
    shape, passes = Shape.from_config(lm.config.to_dict()), LATENTS - (not sampler.random_phases)
    return sum(len(job.rollouts) * shape.pass_flops(passes, len(job.prompt)) for job in jobs)


def new_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """A model with random weights, made on its device and in its dtype: a large one on a CPU takes a minute."""
    torch.manual_seed(0)
    if arguments.model == "gpt2":
        heads = max(1, arguments.width // 64)
        config = GPT2Config(n_layer=arguments.layers, n_embd=arguments.width, n_head=heads, vocab_size=50_260)
    else:
        config = LlamaConfig(
            num_hidden_layers=16,
            hidden_size=2048,
            intermediate_size=8192,
            vocab_size=128_256,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
        )
    torch.set_default_dtype(DTYPES[arguments.dtype[0]])
    with torch.device(arguments.device):
        lm: nn.Module = GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return cast(PreTrainedModel, lm.eval().requires_grad_(False))


class Stopwatch:
    """A wrapper of a sampler that splits the time of `Engine.roll` into phases, without waiting for the device.

    On a GPU the borders of phases are events in its stream, which are read once everything is done.
    """

    def __init__(self, sampler: Sampler, lm: PreTrainedModel, latents: int, device: str) -> None:
        self._sampler, self._last, self._device = sampler, latents - 1, device
        self._phase, self._started = "prefill", self._now()
        self._spans: list[tuple[str, bool, Any, Any]] = []  # phase, whether random numbers alone, begin, end
        self._hook = lm.base_model.register_forward_pre_hook(self._before_pass, with_kwargs=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def _now(self) -> Any:
        if not self._device.startswith("cuda"):
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, phase: str) -> None:
        now = self._now()
        self._spans.append((self._phase, False, self._started, now))
        self._phase, self._started = phase, now

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = self._now()
        result = call()
        self._spans.append((self._phase, True, started, self._now()))
        return result

    def _before_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        del module, args
        if self._phase == "prefill" and not kwargs["shared_prefix_state"].fills_prefix:
            self._enter("latents")

    def factors(self, *place: Any) -> Tensor | None:
        """Time the factors of the sampler."""
        return self._timed(lambda: self._sampler.factors(*place))

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """Time the latent of the sampler; the last latent ends the phase."""
        latent = self._timed(lambda: self._sampler.latent(h_RD, draw, step))
        if step == self._last:
            self._enter("answers")
        return latent

    def run(self, roll: Callable[[Sampler], object]) -> None:
        """Time one call of `Engine.roll`."""
        self._phase, self._started = "prefill", self._now()
        roll(cast(Sampler, self))
        self._enter("prefill")

    def close(self) -> dict[str, float]:
        """Remove the hook from the model.

        Returns:
            Seconds of prefill, latents and answers, each without random numbers, and of random numbers in the latent
            phase (`random_latents`) and elsewhere (`random`).
        """
        self._hook.remove()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds: dict[str, float] = dict.fromkeys(("prefill", "latents", "answers", "random_latents", "random"), 0.0)
        for phase, drawing, begin, end in self._spans:
            took = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
            seconds[phase] += -took if drawing else took
            if drawing:
                seconds["random_latents" if phase == "latents" else "random"] += took
        return seconds


def product_rate(lm: PreTrainedModel, rows: int, device: str) -> float:
    """Operations per second of the matrix products of all blocks, run one after another.

    Args:
        lm: a model that no engine has prepared; its weights are packed here as the engine would.
        rows: number of rows of the batch.
        device: device of the model.
    """
    layers = [module for module in find_blocks(lm).modules() if isinstance(module, nn.Linear | Conv1D)]
    shapes = [layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1] for layer in layers]
    products = [PackedLinear(layer) if can_be_packed(layer) else layer for layer in layers]
    inputs = {width: torch.randn(rows, width, device=device).to(lm.dtype) for width, _ in shapes}

    def run() -> None:
        for product, (width, _) in zip(products, shapes, strict=True):
            product(inputs[width])

    run()
    seconds = statistics.median(seconds_of(run, device) for _ in range(7))
    return 2.0 * rows * sum(width * out for width, out in shapes) / seconds


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a copy that is too large for any cache."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2.0 * source.nbytes / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def memory(device: str) -> tuple[int, int]:
    """Bytes in use now, and their maximum so far."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), peak_bytes(torch.device(device))


def new_recordings(lm: PreTrainedModel, share: float = ROLLOUTS_SHARE) -> Recordings:
    """What CUDA graphs of a model are kept in: the first batch is recorded, and a failure is an error."""
    return Recordings(lm.device, needed=True, share=share)


def new_engine(lm: PreTrainedModel, plan: RolloutPlan, recordings: Recordings | None) -> Engine:
    """An engine, with CUDA graphs if there are recordings."""
    reasoner = Reasoner(lm, lambda hidden: hidden)
    return Engine(reasoner, plan) if recordings is None else GraphEngine(reasoner, plan, recordings)


def roll_batch(engine: Engine, batch: list[RolloutJob], sampler: Sampler) -> Rollouts:
    """Draw the rollouts of a batch."""
    numbers = torch.tensor([job.rollouts for job in batch], device=engine.device)
    draw = Draw.of(0, [job.question_id for job in batch], numbers, engine.width, engine.blocks)
    return engine.roll([job.prompt for job in batch], draw, sampler)


def timed(arguments: argparse.Namespace, lm: PreTrainedModel, full: Callable, brief: Callable) -> dict[str, float]:
    """Median seconds of a call after a brief one, and its memory."""
    device = arguments.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loaded, _ = memory(device)
    brief()
    seconds = statistics.median(seconds_of(full, device) for _ in range(arguments.repeats))
    peak = memory(device)[1]
    return {"seconds": seconds, "peak": peak, "above_model": peak - loaded}


@torch.inference_mode()
def measure_engine(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the engine, its phases and the machine."""
    lm, device = new_model(arguments), arguments.device
    questions, rollouts = map(int, arguments.case[0].split("x"))
    sampler, width = SAMPLERS[arguments.sampler[0]], lm.config.get_text_config().hidden_size
    vocabulary = lm.config.get_text_config().vocab_size
    if arguments.quantize is not None:
        quantize(lm, arguments.quantize)
    jobs = jobs_of(questions, rollouts, vocabulary)
    rows = default_rows(width, device, "prompt" in sampler.random_phases)
    parts = list(batches(jobs, rows, max_prompts(width, device)))

    plan, brief = (
        RolloutPlan(latents, [vocabulary - 1], None, answer) for latents, answer in ((LATENTS, ANSWER), (1, 1))
    )
    recordings = new_recordings(lm) if arguments.graph == "on" else None
    engine = new_engine(lm, plan, recordings)

    def full() -> None:
        for part in parts:
            roll_batch(engine, part, sampler)

    def warm_up() -> None:
        if recordings is None:
            roll_batch(new_engine(lm, brief, None), parts[0], sampler)
        else:
            for _ in range(3):
                full()

    result = timed(arguments, lm, full, warm_up)
    refused = recordings is not None and bool(recordings.refused)

    watch = Stopwatch(sampler, lm, LATENTS, device)
    for part in parts:
        watch.run(partial(roll_batch, new_engine(lm, plan, None), part))
    spent = watch.close()
    total = sum(spent.values())
    flops = latent_flops(lm, jobs, sampler)
    rate = product_rate(new_model(arguments), sum(len(job.rollouts) for job in parts[0]), device)
    return result | {
        "graphs_refused": refused,
        "rollouts_per_second": questions * rollouts / result["seconds"],
        "prefill_share": spent["prefill"] / total,
        "latents_share": spent["latents"] / total,
        "random_numbers_share": (spent["random_latents"] + spent["random"]) / total,
        "answers_share": spent["answers"] / total,
        "ceiling_share": flops / (spent["latents"] + spent["random_latents"]) / rate,
        "product_flops_per_second": rate,
        "copy_bytes_per_second": copy_rate(device),
    }


def measure_baseline(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the naive way."""
    lm = new_model(arguments)
    questions, rollouts = map(int, arguments.case[0].split("x"))
    questions_at_once = min(questions, max(1, BASELINE_ROWS[arguments.device] // rollouts))
    vocabulary = lm.config.get_text_config().vocab_size
    # a part of a larger case, with evenly spaced lengths too
    texts = prompts(questions, vocabulary)[:: questions // questions_at_once][:questions_at_once]
    noise = {"sigma": SIGMA} if arguments.sampler[0] == "gaussian" else {"rate": RATE}
    roll = partial(baseline.roll, lm, texts, rollouts, end_id=vocabulary - 1, **noise)
    result = timed(
        arguments,
        lm,
        lambda: roll(latents=LATENTS, answer_tokens=ANSWER),
        lambda: roll(latents=1, answer_tokens=1),
    )
    return result | {"rollouts_per_second": len(texts) * rollouts / result["seconds"]}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run the measurement that `measure_in_process` asked for."""
    return (measure_engine if arguments.measure == "engine" else measure_baseline)(arguments)


def measure_in_process(
    arguments: argparse.Namespace, what: str, case: str, sampler: str, dtype: str
) -> dict[str, float]:
    """Run one measurement, on a CPU in its own process."""
    if arguments.device == "cuda":
        one = {"measure": what, "case": [case], "sampler": [sampler], "dtype": [dtype]}
        return measure(argparse.Namespace(**vars(arguments) | one))
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("model", "device", "repeats", "layers", "width")]
    sizes += [f"--graph={arguments.graph}"]
    sizes += [] if arguments.quantize is None else [f"--quantize={arguments.quantize}"]
    chosen = [f"--measure={what}", f"--case={case}", f"--sampler={sampler}", f"--dtype={dtype}"]
    done = subprocess.run([sys.executable, __file__, *sizes, *chosen], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=CASES, metavar="QxN")
    parser.add_argument("--sampler", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=BASELINE_ROWS)
    parser.add_argument("--model", default="gpt2", choices=["gpt2", "llama-1b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 shape")
    parser.add_argument("--width", type=int, default=768, help="of the GPT-2 shape")
    parser.add_argument(
        "--quantize", choices=["int8", "float8"], help="quantize the engine's blocks; the naive way stays in --dtype"
    )
    parser.add_argument("--graph", choices=["on", "off"], help="CUDA graphs; on with --device cuda, off otherwise")
    parser.add_argument("--measure", choices=["engine", "baseline"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.model == "llama-1b" and arguments.device == "cpu":
        parser.error("--model llama-1b: needs --device cuda")
    arguments.graph = arguments.graph or ("on" if arguments.device == "cuda" else "off")
    if arguments.graph == "on" and arguments.device == "cpu":
        parser.error("--graph on: needs --device cuda")
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    results = []
    for dtype in arguments.dtype:
        for case in arguments.case:
            naive: dict[str, dict[str, float]] = {}  # both dropout settings share one measurement
            for sampler in arguments.sampler:
                ours = measure_in_process(arguments, "engine", case, sampler, dtype)
                kind = sampler.split("_")[0]
                if kind not in naive:
                    naive[kind] = measure_in_process(arguments, "baseline", case, sampler, dtype)
                results.append(row(arguments, case, sampler, dtype, ours, naive[kind]))
                print(line(results[-1]), flush=True)
    print(json.dumps(results))


def row(
    arguments: argparse.Namespace, case: str, sampler: str, dtype: str, ours: dict[str, float], naive: dict[str, float]
) -> dict[str, Any]:
    """A result, as in the JSON."""
    where = sorted(SAMPLERS[sampler].random_phases)
    shares = {key: round(value, 4) for key, value in ours.items() if key.endswith("_share")}
    rates = {key: round(value) for key, value in ours.items() if key.endswith("_per_second") and "roll" not in key}
    return {
        "case": case,
        "model": arguments.model,
        "sampler": sampler.split("_")[0],
        "where": where,
        "dtype": dtype,
        "quantize": arguments.quantize,
        "device": arguments.device,
        "graph": "refused" if ours["graphs_refused"] else arguments.graph,
        "threads": torch.get_num_threads(),
        "clock": "cpu" if os.environ.get("LTTS_BENCH_CLOCK") == "cpu" else "wall",
        "rollouts_per_second": round(ours["rollouts_per_second"], 3),
        "baseline_rollouts_per_second": round(naive["rollouts_per_second"], 3),
        "ratio": round(ours["rollouts_per_second"] / naive["rollouts_per_second"], 3),
        "peak_memory_bytes": ours["peak"],
        "baseline_peak_memory_bytes": naive["peak"],
        "memory_above_model_bytes": ours["above_model"],
        "baseline_memory_above_model_bytes": naive["above_model"],
        **shares,
        **rates,
    }


def line(result: dict[str, Any]) -> str:
    """A result as a line of text."""
    case = f"{result['case']:6} {result['dtype']} {result['sampler']} {'+'.join(result['where'])}"
    case += " WITHOUT CUDA GRAPHS, which were refused" if result["graph"] == "refused" else ""
    shares = "  ".join(
        f"{name} {100 * result[f'{name}_share']:.0f} %" for name in ("prefill", "latents", "random_numbers", "answers")
    )
    return (
        f"{case}: {result['rollouts_per_second']:.1f} rollouts/s, "
        f"{result['ratio']:.2f} times {result['baseline_rollouts_per_second']:.1f}; peak "
        f"{result['peak_memory_bytes'] / 2**30:.2f} of {result['baseline_peak_memory_bytes'] / 2**30:.2f} GiB; "
        f"{100 * result['ceiling_share']:.0f} % of the products' rate; {shares}"
    )


if __name__ == "__main__":
    main()
