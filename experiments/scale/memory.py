"""How much memory `ltts run` needs for many rollouts.

    python experiments/scale/memory.py [--questions 20] [--drawn 500] [--rollouts 500,50000] [--missing 0]
                                        [--small] FOLDER

Draws `--drawn` rollouts of each question into FOLDER, and for each number of rollouts writes copies of them under
other numbers, as parts of a cache. Reading and statistics do not know the difference, but equal answers are more
frequent than in real runs. The last `--missing` rollouts of each question are left out, so that the run draws them.
With `--small` an untrained model of one layer makes two latents and two answer tokens, without a scorer: a million
rollouts then take a minute, in the same memory per rollout.

Prints `VmHWM`, the most resident memory that the process ever had, and its processor seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latent_tts.results.cache import KEY_JSON
from latent_tts.results.parts import PartWriter, part_files
from latent_tts.task.arith import words
from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer

CHILD = """
import sys
from latent_tts import cli
code = cli.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def run(questions: int, rollouts: int, cache: Path, output: Path, more: list[str]) -> tuple[float, float]:
    """Run in a process of its own; return its peak in MB and its processor seconds."""
    line = ["run", f"task.limit={questions}", f"n={rollouts}", "sampler=gaussian", "engine.device=cpu", *more]
    places = [f"paths.cache={cache}", f"hydra.run.dir={output}"]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *line, *places], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said)
    return int(said.splitlines()[-1]) * 1024 / 1e6, usage.ru_utime + usage.ru_stime


def copy(drawn: Path, target: Path, per_question: int, rollouts: int) -> None:
    """Write a cache of so many rollouts of each question from one of `per_question`."""
    (entry,) = (path.parent for path in drawn.glob(f"*/{KEY_JSON}"))
    (target / entry.name).mkdir(parents=True)
    for path in entry.glob("*.json"):
        shutil.copy(path, target / entry.name)

    def shifted(table: pa.Table, shift: int) -> Callable[[], pa.Table]:
        place = table.column_names.index("rollout")
        numbers = pc.call_function("add", [table["rollout"], pa.scalar(shift, pa.int32())])
        moved = table.set_column(place, table.field(place), numbers)
        return lambda: moved.filter(pc.call_function("less", [numbers, pa.scalar(rollouts)]))

    with PartWriter(target / entry.name) as writer:
        for path in part_files(entry):
            table = pq.read_table(path)
            for shift in range(0, rollouts, per_question):
                writer.put(shifted(table, shift))


def small_model(folder: Path) -> list[str]:
    """Write an untrained model of one layer; returns the overrides that run it."""
    if not folder.exists():
        folder.mkdir(parents=True)
        backbone = BackboneConfig(layers=1, width=16, heads=2, positions=128, dropout=0.1, number_scale=0.5)
        backbone.create(word_level_tokenizer(words()), folder, seed=3)
    return ["model=demo_coconut", f"model.checkpoint={folder}", "model.latents=2", "max_answer_tokens=2", "scorer=none"]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--drawn", type=int, default=500)
    parser.add_argument("--rollouts", type=lambda text: [int(n) for n in text.split(",")], default=[500, 50_000])
    parser.add_argument("--missing", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    questions, per_question = arguments.questions, arguments.drawn
    more = small_model(arguments.folder.resolve() / "model") if arguments.small else []
    drawn = arguments.folder / f"drawn_{questions}x{per_question}"
    if not drawn.exists():
        run(questions, per_question, drawn, arguments.folder / "output", more)
    print("questions,rollouts_per_question,missing,peak_mb,processor_seconds")
    for rollouts in arguments.rollouts:
        cache = arguments.folder / f"copies_{questions}x{rollouts}"
        shutil.rmtree(cache, ignore_errors=True)
        copy(drawn, cache, per_question, rollouts - arguments.missing)
        peak, seconds = run(questions, rollouts, cache, arguments.folder / "output", more)
        print(f"{questions},{rollouts},{arguments.missing},{peak:.0f},{seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
