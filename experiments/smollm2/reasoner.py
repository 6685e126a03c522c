"""Train a COCONUT reasoner on SmolLM2 on one GPU within eight minutes, and see whether its latents matter.

`make reasoner-smollm2` runs this. Checks come first, so that what is missing is said within the first minute. A trial
measures updates per second and memory, and chooses batch and stages. Then come training by the clock, and the
evaluation on GSM8K's test split: greedy, two controls, eight rollouts. OUT/back holds what is worth keeping, in files
of at most 15 MB: the adapter, its weights in float32, the log of updates, and the figures (`verdict.json`).

    python experiments/smollm2/reasoner.py --split PIECES       cut the base into pieces of at most 35 MB
    python experiments/smollm2/reasoner.py --base PIECES --wheels WHEELS --out OUT

Nothing but the standard library is imported before the packages of WHEELS are installed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
PIECE_MB, BACK_MB, BACK_TOTAL_MB = 35, 15, 60
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "base.json"
EXTRAS = ("convert", "gguf")
# all that the commands below import, so that nothing turns out to be missing after the training
IMPORTED = (
    "matplotlib.pyplot",
    "peft",
    "gguf",
    "hydra",
    "latent_tts.training.reasoner.train",
    "latent_tts.pipeline.running",
)
BATCHES = (32, 64, 128, 256)
MIN_UPDATES = 400  # in the whole training; a larger batch that allows fewer is not taken
MEMORY_SHARE = 0.8  # of the device
RESERVE = 130.0  # seconds that validation, export and evaluation are expected to take
SHARES = 1800  # updates of the recipe, which are shares of the time
LATENTS = 6


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def check(ok: object, what: str) -> None:
    """End the script unless something holds."""
    if not ok:
        say(f"FAILED: {what}")
        raise SystemExit(1)


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(file: Path, folder: Path, size: int, record: str) -> list[Path]:
    """Cut a file into pieces of at most `size` bytes, with a record of its name and digest."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    with file.open("rb") as source:
        for number, content in enumerate(iter(lambda: source.read(size), b"")):
            pieces.append(folder / f"{file.name}.{number:03d}")
            pieces[-1].write_bytes(content)
    content = {"name": file.name, "sha256": sha256(file), "pieces": [piece.name for piece in pieces]}
    (folder / record).write_text(json.dumps(content) + "\n")
    return pieces


def join(folder: Path, models: Path) -> Path:
    """Join the pieces of the base into the folder of fetched models."""
    check((folder / RECORD).is_file(), f"--base={folder}: no {RECORD}; --split writes it")
    record = json.loads((folder / RECORD).read_text())
    missing = [name for name in record["pieces"] if not (folder / name).is_file()]
    check(not missing, f"--base={folder}: {', '.join(missing)} is missing")
    models.mkdir(parents=True, exist_ok=True)
    file = models / record["name"]
    if not file.is_file() or sha256(file) != record["sha256"]:
        with file.open("wb") as target:
            for name in record["pieces"]:
                target.write((folder / name).read_bytes())
    check(sha256(file) == record["sha256"], f"--base={folder}: the pieces are not those of {record['name']}")
    return file


def lacking() -> dict[str, str]:
    """The required packages that this Python lacks or has in another version: their requirements by their names."""
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for name in EXTRAS for line in project["optional-dependencies"][name])]
    found = {}
    for line in [*lines, "antlr4-python3-runtime==4.9.*"]:  # Hydra works with no other one
        wanted = Requirement(line)
        try:
            met = wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            found[canonicalize_name(wanted.name)] = line
    return found


def install(wheels: Path, site: Path) -> None:
    """Install the packages of a folder of wheels that this Python lacks or has in another version than is required."""
    from pip._vendor.packaging.utils import canonicalize_name

    names = {path: canonicalize_name(path.name.split("-")[0]) for path in sorted(wheels.glob("*.whl"))}
    have = {canonicalize_name(each.name or "") for each in metadata.distributions()} - lacking().keys()
    missing = [str(path) for path, name in names.items() if name not in have]
    if missing:
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
        check(subprocess.run([*line, *missing], check=False).returncode == 0, f"pip cannot install {missing}")
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()


def check_machine(device: str, questions: int, out: Path) -> str:
    """Check packages, device, data and space before anything takes long; returns the device's name."""
    missing = ", ".join(lacking().values())
    check(not missing, f"these packages are missing: {missing}; --wheels takes a folder of wheels")
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            check(False, f"{name} cannot be imported ({error}); --wheels takes a folder of wheels")
    import torch

    check(device == "cpu" or torch.cuda.is_available(), "no GPU is visible to torch; --device cpu is for trials")
    free = shutil.disk_usage(out).free
    check(free > 4000 * MB or device == "cpu", f"{out} has {free / MB:.0f} MB left, and 4000 are needed")
    from latent_tts.errors import UsageError

    found = {}
    for name in ("train", "valid", "test"):
        try:
            found[name] = len(built("task", [f"task.split={name}"]).questions())
        except UsageError as error:
            check(False, f"GSM8K's split {name} cannot be read; LTTS_DATA names the folder of its files: {error}")
    check(found["test"] == questions, f"the test split has {found['test']} questions, not {questions}")
    say(f"checks passed: {found['train']} training, {found['valid']} validation and {found['test']} test questions")
    return device if device == "cpu" else torch.cuda.get_device_name()


def built(group: str, overrides: Sequence[str] = ()) -> Any:
    """What a group of `ltts train-reasoner experiment=smollm2/coconut` describes."""
    from hydra import compose, initialize_config_dir

    from latent_tts.config import build

    build.register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train_reasoner", ["experiment=smollm2/coconut", f"model.latents={LATENTS}", *overrides])
        return build.build(group, cfg[group])


@dataclass(frozen=True)
class Trial:
    """What a batch costs.

    Attributes:
        batch: questions per update.
        written, latent: seconds per update with every step written, and with all latents.
        peak: bytes that were allocated at most; 0 on a CPU.
    """

    batch: int
    written: float
    latent: float
    peak: int

    def updates(self, seconds: float) -> int:
        """How many updates fit in some time: a third is written, the others have latents."""
        return int(seconds / (self.written / 3 + self.latent * 2 / 3))


def try_batches(file: Path, folder: Path, device: str, seconds: float) -> list[Trial]:
    """Measure updates of growing batches, until the time or the device's memory is used up."""
    import torch

    from latent_tts.checkpoint import files, joining
    from latent_tts.training.reasoner import train as training
    from latent_tts.training.reasoner.initial import copy_checkpoint, write_initial_checkpoint
    from latent_tts.training.reasoner.questions import epochs, select_usable
    from latent_tts.training.trainer import resolve_device, trained_parameters

    recipe, lora, task = built("recipe"), built("lora"), built("task", ["task.split=train"])
    source = joining.join_once(files.resolve(f"gguf:{file}", key="init"), "init")
    tokens = recipe.tokens, recipe.new_tokens
    write_initial_checkpoint(lambda to: copy_checkpoint(source, to, *tokens), folder, recipe, 0)
    adapter = built("model", [f"model.checkpoint={folder}"])
    new_tokens = training.lacking_tokens(training.Start(file.name, source), recipe, adapter)
    place = torch.device(resolve_device("--device", device))
    module = training.ReasonerModule(recipe.objective(adapter), lora, new_tokens).to(place)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained_parameters(module)], lr=1e-5)
    questions = epochs(select_usable(task.questions(), task, step_results=False), seed=0)
    stages = recipe.stages()[0], recipe.stages()[-1]
    memory = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else 0
    trials: list[Trial] = []

    def update(batch: int, stage: Any) -> float:
        """Seconds of an update of new questions."""
        chosen, started = [next(questions) for _ in range(batch)], time.perf_counter()
        with torch.autocast(place.type, torch.bfloat16):
            loss = module(chosen, stage)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        check(bool(torch.isfinite(loss.detach()).item()), f"the loss of the trial is {loss.item()}")
        return time.perf_counter() - started  # `item` has waited for the device

    started = time.perf_counter()
    for batch in BATCHES:
        left = seconds - (time.perf_counter() - started)
        if trials and (left <= 0 or 2 * trials[-1].peak > MEMORY_SHARE * memory > 0):
            break
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        try:
            costs = []
            for stage in stages:
                update(batch, stage)  # the first one allocates
                taken, until = [update(batch, stage)], time.perf_counter() + left / 8
                while time.perf_counter() < until:
                    taken.append(update(batch, stage))
                costs.append(sorted(taken)[len(taken) // 2])
        except torch.OutOfMemoryError:
            break
        peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0
        trials.append(Trial(batch, costs[0], costs[1], peak))
        say(f"batch {batch}: {1 / costs[0]:.2f} updates/s written, {1 / costs[1]:.2f} with latents, {peak / MB:.0f} MB")
    check(trials, f"not even a batch of {BATCHES[0]} fits the device")
    return trials


def chosen(trials: Sequence[Trial], seconds: float) -> tuple[Trial, list[str]]:
    """The batch, and the overrides of the recipe's stages.

    The batch is the one of most questions per second among those that allow `MIN_UPDATES`, else the smallest. With few
    updates, fewer stages are learnt well.
    """
    enough = [trial for trial in trials if trial.updates(seconds) >= MIN_UPDATES]
    best = max(enough, key=lambda trial: trial.batch * trial.updates(seconds), default=trials[0])
    updates = best.updates(seconds)
    middle = [SHARES // 9] * 3 if updates >= 900 else [SHARES // 3] if updates >= 300 else []
    written = SHARES // 3
    final = SHARES - written - sum(middle)
    return best, [
        f"recipe.written_updates={written}", f"recipe.stage_updates={json.dumps(middle).replace(' ', '')}",
        f"recipe.final_updates={final}", f"optimization.cosine_updates={SHARES}", f"optimization.batch={best.batch}",
    ]  # fmt: skip


def ltts(*arguments: str) -> None:
    """Run a command in this process, so that nothing is imported twice."""
    import torch

    from latent_tts import cli

    code = cli.main(list(arguments))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    check(code == 0, f"ltts {arguments[0]} ended with {code}")


def evaluate(checkpoint: Path, out: Path, device: str, limit: float, dtype: str) -> dict[str, Any]:
    """Accuracies with intervals, and paired differences with the controls; what the time does not allow is left out."""
    model = ["model=coconut", f"model.checkpoint={checkpoint}", f"model.latents={LATENTS}", "task=gsm8k"]
    model += [f"engine.device={device}", f"engine.dtype={dtype}", "scorer=none"]
    runs = {
        "greedy": ["sampler=greedy", "n=1"],
        "shuffle": ["sampler=control", "sampler.mode=shuffle", "n=1"],
        "repeat": ["sampler=control", "sampler.mode=repeat", "n=1"],
        "dropout": ["sampler=dropout", "n=8", "budget=ladder"],
    }
    found: dict[str, Any] = {"figures": {}, "skipped": []}
    for name, more in runs.items():
        if time.monotonic() - STARTED > limit:
            found["skipped"].append(name)
            say(f"SKIPPED for want of time: ltts run {' '.join([*model, *more])}")
            continue
        folder = out / "runs" / name
        ltts("run", *model, *more, f"hydra.run.dir={folder}")
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] in ("accuracy", "coverage")]
        for row in rows:
            key = f"{name} n={row['n']} {row['metric']} {row['aggregator']}".strip()
            found["figures"][key] = [float(row["value"]), float(row["ci_low"]), float(row["ci_high"])]
        say(f"{name}: done")
    lower = {}
    for control in ("shuffle", "repeat"):
        if {"greedy", control} & set(found["skipped"]):
            continue
        table = out / f"greedy-{control}.csv"
        ltts("compare", str(out / "runs/greedy"), str(out / "runs" / control), "a_figure=majority", f"output={table}")
        with table.open() as file:
            row = next(csv.DictReader(file))
        found[f"greedy - {control}"] = [float(row[key]) for key in ("difference", "ci_low", "ci_high")]
        lower[control] = float(row["ci_low"])
    found["thinks"] = None if len(lower) < 2 else min(lower.values()) > 0
    return found


def pack(training: Path, out: Path, record: dict[str, Any]) -> None:
    """Put what is worth keeping into `back`, in files of at most `BACK_MB`."""
    back = out / "back"
    shutil.rmtree(back, ignore_errors=True)
    back.mkdir()
    (back / "verdict.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copyfile(training / "states" / "updates.jsonl", back / "updates.jsonl")
    states = [path for path in (training / "states").glob("checkpoint-*") if path.is_dir()]
    last = max(states, key=lambda path: int(path.name.rpartition("-")[2]))
    sources = {"adapter": training / "checkpoint", "state": last}
    for name, folder in sources.items():
        for file in sorted(folder.iterdir()):
            if name == "state" and file.name not in ("model.safetensors", "trainer_state.json"):
                continue  # AdamW's moments would take most of the room; training goes on from the adapter without them
            target = back / f"{name}.{file.name}"
            if file.stat().st_size <= BACK_MB * MB:
                shutil.copyfile(file, target)
            else:
                split(file, back, int(BACK_MB * MB), f"{target.name}.json")
    sizes = {path.name: path.stat().st_size for path in back.iterdir()}
    check(max(sizes.values()) <= BACK_MB * MB, f"{back}: a file is larger than {BACK_MB} MB")
    check(sum(sizes.values()) <= BACK_TOTAL_MB * MB, f"{back}: more than {BACK_TOTAL_MB} MB in all")
    say(f"{back}: {len(sizes)} files, {sum(sizes.values()) / MB:.1f} MB")


def main() -> None:
    """Check, try, train, evaluate, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the GGUF file, or a folder of its pieces; default: as fetched")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, of which those that are missing are installed")
    parser.add_argument("--out", type=Path, default=Path("outputs/reasoner_smollm2"))
    parser.add_argument("--split", type=Path, help="only cut the base into pieces in this folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trial", type=float, default=20.0, help="seconds")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, at most")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds of the whole command")
    parser.add_argument("--questions", type=int, default=1319, help="of the test split")
    parser.add_argument("overrides", nargs="*", help="further settings of ltts train-reasoner")
    options = parser.parse_args()
    models = Path(os.environ.get("LTTS_CACHE") or ".cache/latent_tts").expanduser() / "models"
    base = options.base or models / NAME
    check(base.exists(), f"{base}: no such file or folder; `make smollm2` fetches the base")
    if options.split:
        pieces = split(base, options.split, PIECE_MB * MB, RECORD)
        say(f"{options.split}: {len(pieces)} pieces")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        check(options.wheels.is_dir(), f"--wheels={options.wheels}: no such folder")
        install(options.wheels, options.out / "site")
    sys.path.insert(0, str(ROOT / "src"))
    file = join(base, models) if base.is_dir() else base
    record: dict[str, Any] = {"base": file.name, "base_sha256": sha256(file)}
    record["device"] = check_machine(options.device, options.questions, options.out)
    record["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    trials = try_batches(file, options.out / "trial", options.device, options.trial)
    shutil.rmtree(options.out / "trial")
    left = options.limit - RESERVE - (time.monotonic() - STARTED)
    seconds = min(60 * options.minutes, left)
    check(seconds > 0, f"no time is left to train: {options.limit:g} s less {RESERVE:g} s for what follows")
    best, stages = chosen(trials, seconds)
    say(f"{seconds:.0f} s of training in batches of {best.batch}: about {best.updates(seconds)} updates; {stages}")
    training = options.out / "training"
    ltts(
        "train-reasoner", "experiment=smollm2/coconut", f"model.latents={LATENTS}", f"init=gguf:{file}",
        f"device={options.device}", f"output={training}", f"optimization.minutes={seconds / 60}", "valid_questions=100",
        "validation.every=100", "validation.share=0.05", "save_every=1000000", *stages, *options.overrides,
    )  # fmt: skip
    say("trained")
    with (training / "states" / "updates.jsonl").open() as log:
        updates = sum(1 for _ in log)
    record |= {"trials": [vars(trial) for trial in trials], "batch": best.batch, "stages": stages, "updates": updates}
    record["seconds"] = seconds
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    pack(training, options.out, record)  # whatever becomes of the evaluation
    record |= evaluate(training / "checkpoint", options.out, options.device, options.limit - 10, dtype)
    pack(training, options.out, record)
    words = {True: "it thinks", False: "it does not think", None: "the controls were not drawn"}[record["thinks"]]
    say(f"{words}: {json.dumps({key: record[key] for key in record if key.startswith('greedy -')})}")


if __name__ == "__main__":
    main()
