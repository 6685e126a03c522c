"""The loop that trains reasoners of every family: fresh batches, a state to resume from, the finished checkpoint.

Everything random is keyed by the update number (problems by the counter generator, torch's dropout by a seed drawn
from it), so a run that was stopped and resumed is the run that was never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import RunError, bad_value, check_positive, is_number
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.training.reasoner.batch import question_batches
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage
from latent_tts.training.reasoner.initial import add_tensors
from latent_tts.types import Question

log = logging.getLogger(__name__)
VALID_BATCH = 250
STATE = "state.safetensors"


@dataclass(frozen=True)
class Optimization:
    """How the weights are updated.

    Attributes:
        batch: questions an update.
        lr: peak learning rate of AdamW; linear warm-up, then a cosine to a twentieth.
        cosine_updates: length of the cosine, warm-up included; a curriculum may stop before its end.
        warmup: updates of warm-up.
        weight_decay: on matrices, as AdamW does it.
        clip: largest gradient norm.
        bf16: run the forward pass under bfloat16 autocast.
    """

    batch: int
    lr: float
    cosine_updates: int
    warmup: int
    weight_decay: float
    clip: float
    bf16: bool

    def __post_init__(self) -> None:
        check_positive("optimization", self, whole=("batch", "cosine_updates", "warmup"), real=("lr", "clip"))
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise bad_value("optimization.weight_decay", self.weight_decay, "0 or more")
        if not isinstance(self.bf16, bool):
            raise bad_value("optimization.bf16", self.bf16, "true or false")

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = min(1.0, (update - self.warmup) / max(1, self.cosine_updates - self.warmup))
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def parameters(objective: Objective) -> dict[str, nn.Parameter]:
    """Everything that is trained, by name."""
    return dict(objective.lm.named_parameters()) | {
        f"{prefix}.{name}": parameter
        for prefix, module in objective.own.items()
        for name, parameter in module.named_parameters()
    }


def set_dropout(objective: Objective, rate: float) -> None:
    """Give every dropout module that is in use another rate."""
    for module in [*objective.lm.modules(), *objective.own.modules()]:
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = rate


@torch.no_grad()
def exact_match(objective: Objective, questions: list[Question], stage: Stage) -> float:
    """Share of questions answered exactly, with dropout off."""
    objective.lm.eval()
    objective.own.eval()
    starts = range(0, len(questions), VALID_BATCH)
    hits = sum(objective.exact_matches(questions[start : start + VALID_BATCH], stage) for start in starts)
    objective.lm.train()
    objective.own.train()
    return hits / len(questions)


def train(
    recipe: Recipe,
    adapter: CheckpointAdapter,
    stream: Iterator[Question],
    valid: list[Question],
    optimization: Optimization,
    *,
    seed: int,
    output: Path,
    settings: dict,
    save_every: int,
    report: Callable[[int, dict], None],
) -> dict:
    """Train until the recipe's stages end, going on from `output` if an earlier run stopped there.

    Args:
        recipe: the stages and the objective.
        adapter: the initial checkpoint (its config's dropout is in force while training).
        stream: endless training questions, the same ones every time it is opened.
        valid: questions for the accuracy in the log.
        optimization: batch, learning rate and the like.
        seed: keys torch's dropout.
        output: folder of `state.safetensors`, `loss.jsonl` and, at the end, the checkpoint.
        settings: what has to be the same for a stopped run to go on.
        save_every: updates between two saved states.
        report: called as `report(updates_done, record)` after every update.

    Returns:
        The last log record.

    Raises:
        RunError: the loss is not finite; the last saved state stays.
    """
    objective = recipe.objective(adapter)
    trained = parameters(objective)
    decayed = [p for p in trained.values() if p.dim() >= 2]
    others = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optimization.lr, betas=(0.9, 0.98))
    done, seconds = _resume(trained, optimizer, output, settings)
    batches = islice(question_batches(stream, optimization.batch), done, None)
    key, updates, started, record = key_of(seed, "training"), recipe.updates, time.perf_counter(), {}
    lines = [line for line in _lines(output / "loss.jsonl") if json.loads(line)["update"] <= done]
    (output / "loss.jsonl").write_text("".join(lines))
    if lines:
        record = json.loads(lines[-1])
    with (output / "loss.jsonl").open("a") as loss_log:
        for update in range(done, updates):
            stage = recipe.stage_at(update)
            if stage.dropout is not None:
                set_dropout(objective, stage.dropout)
            torch.manual_seed(philox((update, 0, 0, int(Stream.TRAINING)), key)[0])
            questions = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=optimization.bf16):
                loss = objective.loss(questions, stage)
            if not math.isfinite(loss.item()):
                raise RunError(f"the loss is {loss.item()} at update {update}; the last state is {output}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), optimization.clip)
            for group in optimizer.param_groups:
                group["lr"] = optimization.lr_at(update)
            optimizer.step()
            optimizer.zero_grad()
            record = {"update": update + 1, "loss": round(loss.item(), 5), "latents": stage.latents}
            last_of_stage = update + 1 == updates or recipe.stage_at(update + 1) != stage
            if (update + 1) % save_every == 0 or last_of_stage:
                record["valid_exact_match"] = exact_match(objective, valid, stage)
                record["seconds"] = round(seconds + time.perf_counter() - started, 1)
                loss_log.write(json.dumps(record) + "\n")
                loss_log.flush()
                _save(trained, optimizer, output, settings, update + 1, record["seconds"])
            elif (update + 1) % 25 == 0:
                loss_log.write(json.dumps(record) + "\n")
            report(update + 1, record)
    return record | {"parameters": sum(p.numel() for p in trained.values())}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.is_file() else []


def _save(
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    output: Path,
    settings: dict,
    update: int,
    seconds: float,
) -> None:
    tensors = {f"weight.{name}": p.detach().clone() for name, p in trained.items()}
    for name, parameter in trained.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            # a parameter that no stage has used so far has no moments
            moments = optimizer.state[parameter].get(moment) if parameter in optimizer.state else None
            if moments is not None:
                tensors[f"{moment}.{name}"] = moments.clone()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in trained.items() if p in optimizer.state}
    metadata = {
        "update": str(update),
        "seconds": str(seconds),
        "settings": json.dumps(settings, sort_keys=True),
        "steps": json.dumps(steps),
    }
    partial = output / "state.partial"
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, output / STATE)


def _resume(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, output: Path, settings: dict
) -> tuple[int, float]:
    path = output / STATE
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as state, torch.no_grad():
        metadata = state.metadata()
        if json.loads(metadata["settings"]) != json.loads(json.dumps(settings)):
            raise bad_value("output", output, "holds a run with other settings; choose another folder or remove it")
        steps = json.loads(metadata["steps"])
        for name, parameter in trained.items():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
            if name in steps:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps[name])),
                    "exp_avg": state.get_tensor(f"exp_avg.{name}"),
                    "exp_avg_sq": state.get_tensor(f"exp_avg_sq.{name}"),
                }
    log.info("going on from update %s of %s", metadata["update"], path)
    return int(metadata["update"]), float(metadata["seconds"])


def export(recipe: Recipe, output: Path, adapter: CheckpointAdapter, folder: Path) -> None:
    """Write the trained weights of `output` as a checkpoint folder in bfloat16, with the initial one's tokenizer."""
    objective = recipe.objective(adapter)
    with safe_open(output / STATE, "pt") as state, torch.no_grad():
        for name, parameter in parameters(objective).items():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
    lm = objective.lm
    lm.config.latent_tts = recipe.trained_with(adapter)
    lm.bfloat16().save_pretrained(folder)
    for prefix, module in objective.own.items():
        add_tensors(folder, f"{prefix}.", module.bfloat16())
    shutil.copyfile(adapter.folder / "tokenizer.json", folder / "tokenizer.json")
