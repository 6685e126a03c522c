"""Training a COCONUT reasoner: fresh batches, the latent forward pass with gradients, a resumable loop.

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
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from latent_tts.errors import RunError, bad_value
from latent_tts.model.coconut import Coconut
from latent_tts.philox import Stream, key_of, philox
from latent_tts.training.curriculum import Curriculum, Stage, step_results, written_text
from latent_tts.types import Question

log = logging.getLogger(__name__)
POOL = 8  # updates whose questions are drawn together and grouped by length, so that little is padding


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
        for key in ("batch", "lr", "cosine_updates", "warmup", "clip"):
            if not getattr(self, key) > 0:
                raise bad_value(f"optimization.{key}", getattr(self, key), "a positive number")
        if not self.weight_decay >= 0:
            raise bad_value("optimization.weight_decay", self.weight_decay, "0 or more")

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = min(1.0, (update - self.warmup) / max(1, self.cosine_updates - self.warmup))
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Batch:
    """Token ids of a batch: prompts padded on the left, what is written after thinking padded on the right.

    Attributes:
        prompt_QL, written_QA: ids (int64); `written` begins with the end-of-thinking token.
        prompt_mask_QL, written_mask_QA: 1 on real tokens.
        results_QT: the first token of each latent's step's result; past the last step, of the answer.
    """

    prompt_QL: torch.Tensor
    prompt_mask_QL: torch.Tensor
    written_QA: torch.Tensor
    written_mask_QA: torch.Tensor
    results_QT: torch.Tensor


def encode_batch(adapter: Coconut, questions: list[Question], stage: Stage) -> Batch:
    """Tokens of a stage of the curriculum."""
    prompts = [adapter.encode(question) for question in questions]
    written = [
        [*adapter.thinking_end_ids, *adapter.tokenizer.encode(written_text(q.steps, q.answer, stage)).ids]
        for q in questions
    ]
    prompt_QL, prompt_mask_QL = _pad(prompts, adapter.eos_id, left=True)
    written_QA, written_mask_QA = _pad([[*ids, adapter.eos_id] for ids in written], adapter.eos_id, left=False)
    results = [[*step_results(q.steps), *[q.answer] * stage.latents][: stage.latents] for q in questions]
    results_QT = torch.tensor([[adapter.tokenizer.encode(result).ids[0] for result in row] for row in results])
    return Batch(prompt_QL, prompt_mask_QL, written_QA, written_mask_QA, results_QT)


def _pad(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def training_logits(lm: PreTrainedModel, batch: Batch, latents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (Q, A-1, V) of every written token after the first, and (Q, T, V) of what each latent would write.

    Gradients flow through the latents.
    """
    cache = DynamicCache()
    mask = batch.prompt_mask_QL
    position_Q1 = mask.sum(1, keepdim=True)
    embeddings = lm.get_input_embeddings()(batch.prompt_QL)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    backbone, head = lm.base_model, lm.get_output_embeddings()
    assert head is not None
    thoughts = []
    for _ in range(latents):
        hidden = backbone(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        embeddings = hidden[:, -1:]
        thoughts.append(embeddings)
        mask = torch.cat([mask, torch.ones_like(position_Q1)], dim=1)
        positions, position_Q1 = position_Q1, position_Q1 + 1
    # The last latent (or the prompt, where there is none) shares a pass with everything written.
    embeddings = torch.cat([embeddings, lm.get_input_embeddings()(batch.written_QA[:, :-1])], dim=1)
    written = batch.written_QA.shape[1] - 1
    mask = torch.cat([mask, batch.written_mask_QA[:, :-1]], dim=1)
    positions = torch.cat([positions, position_Q1 + torch.arange(written)], dim=1)
    hidden = backbone(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return head(hidden[:, -written:]), head(torch.cat([*thoughts, hidden[:, :0]], dim=1))


def loss_of(lm: PreTrainedModel, batch: Batch, latents: int, step_loss: float) -> torch.Tensor:
    """Mean cross-entropy over the written tokens, plus `step_loss` times that of the latents on their steps' results.

    The forced end-of-thinking token is not predicted. The second part asks of each latent what its hidden step would
    have come to; inference never reads it. It is a light form of the step-level supervision of SIM-CoT (Wei et al.
    2025, arXiv 2509.20317), with the model's own head for a decoder.
    """
    written, thoughts = training_logits(lm, batch, latents)
    targets = batch.written_QA[:, 1:].masked_fill(batch.written_mask_QA[:, 1:] == 0, -100)
    loss = F.cross_entropy(written.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
    if latents and step_loss:
        loss = loss + step_loss * F.cross_entropy(thoughts.float().flatten(0, 1), batch.results_QT.flatten())
    return loss


@torch.no_grad()
def exact_match(lm: PreTrainedModel, adapter: Coconut, questions: list[Question], stage: Stage) -> float:
    """Share of questions whose written tokens are all the argmax.

    With no written steps left this is greedy accuracy: greedy decoding keeps to gold tokens that are the argmax.
    """
    lm.eval()
    hits = 0
    for start in range(0, len(questions), 250):
        batch = encode_batch(adapter, questions[start : start + 250], stage)
        predicted = training_logits(lm, batch, stage.latents)[0].argmax(-1)
        right = (predicted == batch.written_QA[:, 1:]) | (batch.written_mask_QA[:, 1:] == 0)
        hits += int(right.all(1).sum())
    lm.train()
    return hits / len(questions)


def set_dropout(lm: PreTrainedModel, rate: float) -> None:
    """Give every dropout module that is in use another rate."""
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.p = rate


def question_batches(stream: Iterator[Question], batch: int) -> Iterator[list[Question]]:
    """Batches of like length: `POOL` batches are drawn at once, sorted by length and handed out in a fixed order."""
    for pool in iter(lambda: list(islice(stream, POOL * batch)), []):
        pool.sort(key=lambda question: len(question.text.split()))
        for index in (3, 6, 0, 5, 2, 7, 1, 4):  # long and short batches in turn
            yield pool[index * batch : (index + 1) * batch]


def train(
    adapter: Coconut,
    stream: Iterator[Question],
    valid: list[Question],
    curriculum: Curriculum,
    optimization: Optimization,
    *,
    seed: int,
    output: Path,
    settings: dict,
    save_every: int,
    report: Callable[[int, dict], None],
) -> dict:
    """Train until the curriculum ends, going on from `output` if an earlier run stopped there.

    Args:
        adapter: the initial checkpoint (its config's dropout is in force while training).
        stream: endless training questions, the same ones every time it is opened.
        valid: questions for the accuracy in the log.
        curriculum: the stages.
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
    config = AutoConfig.from_pretrained(adapter.folder, attn_implementation="eager")
    lm = AutoModelForCausalLM.from_pretrained(adapter.folder, config=config, dtype=torch.float32).train()
    decayed = [p for p in lm.parameters() if p.dim() >= 2]
    others = [p for p in lm.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optimization.lr, betas=(0.9, 0.98))
    done, seconds = _resume(lm, optimizer, output, settings)
    batches = islice(question_batches(stream, optimization.batch), done, None)
    key, updates, started, record = key_of(seed, "training"), curriculum.updates, time.perf_counter(), {}
    lines = [line for line in _lines(output / "loss.jsonl") if json.loads(line)["update"] <= done]
    (output / "loss.jsonl").write_text("".join(lines))
    if lines:
        record = json.loads(lines[-1])
    with (output / "loss.jsonl").open("a") as loss_log:
        for update in range(done, updates):
            stage = curriculum.stage_at(update)
            if stage.hidden_steps is None and curriculum.final_dropout is not None:
                set_dropout(lm, curriculum.final_dropout)
            torch.manual_seed(philox((update, 0, 0, int(Stream.TRAINING)), key)[0])
            batch = encode_batch(adapter, next(batches), stage)
            with torch.autocast("cpu", torch.bfloat16, enabled=optimization.bf16):
                loss = loss_of(lm, batch, stage.latents, curriculum.step_loss)
            if not math.isfinite(loss.item()):
                raise RunError(f"the loss is {loss.item()} at update {update}; the last state is {output}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), optimization.clip)
            for group in optimizer.param_groups:
                group["lr"] = optimization.lr_at(update)
            optimizer.step()
            optimizer.zero_grad()
            record = {"update": update + 1, "loss": round(loss.item(), 5), "latents": stage.latents}
            last_of_stage = update + 1 == updates or curriculum.stage_at(update + 1) != stage
            if (update + 1) % save_every == 0 or last_of_stage:
                record["valid_exact_match"] = exact_match(lm, adapter, valid, stage)
                record["seconds"] = round(seconds + time.perf_counter() - started, 1)
                loss_log.write(json.dumps(record) + "\n")
                loss_log.flush()
                _save(lm, optimizer, output, settings, update + 1, record["seconds"])
            elif (update + 1) % 25 == 0:
                loss_log.write(json.dumps(record) + "\n")
            report(update + 1, record)
    return record | {"parameters": sum(p.numel() for p in lm.parameters())}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.is_file() else []


def _save(lm, optimizer, output: Path, settings: dict, update: int, seconds: float) -> None:
    tensors = {f"weight.{name}": p.detach().clone() for name, p in lm.named_parameters()}
    for name, parameter in lm.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].clone()
    metadata = {"update": str(update), "seconds": str(seconds), "settings": json.dumps(settings, sort_keys=True)}
    partial = output / "state.partial"
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, output / "state.safetensors")


def _resume(lm, optimizer, output: Path, settings: dict) -> tuple[int, float]:
    path = output / "state.safetensors"
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as state, torch.no_grad():
        metadata = state.metadata()
        if json.loads(metadata["settings"]) != json.loads(json.dumps(settings)):
            raise bad_value("output", output, "holds a run with other settings; choose another folder or remove it")
        for name, parameter in lm.named_parameters():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(metadata["update"])),
                "exp_avg": state.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": state.get_tensor(f"exp_avg_sq.{name}"),
            }
    log.info("going on from update %s of %s", metadata["update"], path)
    return int(metadata["update"]), float(metadata["seconds"])


def export(output: Path, adapter: Coconut, folder: Path) -> None:
    """Write the trained weights of `output` as a checkpoint folder in bfloat16, with the initial one's tokenizer."""
    lm = AutoModelForCausalLM.from_pretrained(adapter.folder, dtype=torch.float32)
    with safe_open(output / "state.safetensors", "pt") as state, torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
    lm.config.latent_tts = {"latents": adapter.latents}  # so that a run with another number can be warned
    lm.bfloat16().save_pretrained(folder)
    shutil.copyfile(adapter.folder / "tokenizer.json", folder / "tokenizer.json")
