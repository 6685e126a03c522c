"""A whole `ltts run`, from its start to the path that it prints: what the device, the imports and the host took.

    python benchmarks/command.py [--repeats 1] [-- sampler=gaussian,dropout n=64 task.limit=1000 -m]

The overrides behind `--` are those of `ltts run`; without any, two samplers draw 64,000 rollouts each. The line runs
with an empty cache, then again with everything cached. Each time:

- `seconds`: wall-clock time of the process; `processor_seconds`: user and system time of all its threads;
- `imports`: what loading modules took, torch and transformers included;
- `device`: what drawing and scoring the batches took by the clock that waits for the device, from `run.json`. With
  everything cached that is 0, although `run.json` still says what drawing took when it was done;
- `host`: the rest: configs, tokenization, loading and proving models, statistics, tables, figures;
- `peak_bytes`: the most memory that the process held, looked at every 50 ms.

On a CPU the batches are the host's work too; `device` is what the rollouts themselves took. On a busy machine
`processor_seconds` is the figure to compare; LTTS_BENCH_CLOCK=cpu gives `imports` in processor seconds, and then `host`
means nothing.

Prints one line per measurement, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

SECONDS_BETWEEN_LOOKS = 0.05
DEFAULT = ["-m", "sampler=gaussian,dropout", "n=64", "task.limit=1000"]


def clock() -> float:
    """Wall-clock seconds, or processor seconds of this process if LTTS_BENCH_CLOCK=cpu."""
    return time.process_time() if os.environ.get("LTTS_BENCH_CLOCK") == "cpu" else time.perf_counter()


def run_command(overrides: list[str], report: Path) -> int:
    """Run `ltts run` in this process, and write what its imports took.

    Args:
        overrides: of the command.
        report: a file that gets the seconds as JSON.

    Returns:
        The exit code.
    """
    bootstrap: Any = sys.modules["_frozen_importlib"]
    find_and_load, depth, seconds = bootstrap._find_and_load, 0, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal depth, seconds
        started, depth = clock(), depth + 1
        try:
            return find_and_load(*arguments)
        finally:
            depth -= 1
            if depth == 0:
                seconds += clock() - started

    bootstrap._find_and_load = timed
    from latent_tts import cli

    code = cli.main(["run", *overrides])
    bootstrap._find_and_load = find_and_load
    report.write_text(json.dumps({"imports": seconds}))
    return code


def measure(overrides: list[str], folder: Path) -> dict[str, float]:
    """Time one command in a process of its own.

    Args:
        overrides: of `ltts run`.
        folder: where its cache and its output are.
    """
    report = folder / "imports.json"
    output = folder / f"run{time.time_ns()}"
    places = [f"paths.cache={folder / 'cache'}", f"hydra.run.dir={output}", f"hydra.sweep.dir={output}"]
    line = [sys.executable, __file__, f"--child={report}", "--", *overrides, *places]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = 0
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(psutil.Error):  # it has just ended
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        sys.exit(process.returncode)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    records = [json.loads(path.read_text()) for path in output.rglob("run.json")]
    device = sum(
        sum(took for name, took in record["seconds"].items() if name != "this_command")
        for record in records
        if record["rollouts"]["drawn_now"]
    )
    imports = json.loads(report.read_text())["imports"]
    return {
        "rollouts": sum(record["rollouts"]["total"] for record in records),
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "imports": imports,
        "device": device,
        "host": seconds - imports - device,
        "peak_bytes": peak,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    if arguments.child:
        sys.exit(run_command(arguments.overrides, arguments.child))
    results = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "full"):
                result = measure(arguments.overrides or DEFAULT, Path(folder))
                results.append({"cache": cache} | {name: round(value, 3) for name, value in result.items()})
                shares = ", ".join(f"{name} {result[name]:.1f} s" for name in ("imports", "device", "host"))
                print(
                    f"{cache} cache, {result['rollouts']} rollouts: {result['seconds']:.1f} s "
                    f"({result['processor_seconds']:.1f} s of processor time, "
                    f"{result['peak_bytes'] / 1e6:.0f} MB): {shares}",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
