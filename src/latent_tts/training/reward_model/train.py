"""Trains LatentRM on an annotation folder and keeps the weights with the best selection accuracy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.results.files import write_text
from latent_tts.training.optimization import RewardOptimization
from latent_tts.training.reasoner.lora import FULL, Lora
from latent_tts.training.reward_model.data import MixedQuestions, collate
from latent_tts.training.reward_model.loss import RewardLoss, rollout_scores
from latent_tts.training.reward_model.model import LatentRMModule
from latent_tts.training.states import FINISHED, STATES, best_state, last_state, read_state, resumable_state
from latent_tts.training.trainer import (
    Report,
    ResumableTrainer,
    load_parameters,
    trained_parameters,
    training_arguments,
)

METRIC = "selection_accuracy"
RESULTS = "train_rm.json"


def train_latent_rm(
    adapter: CheckpointAdapter,
    data: MixedQuestions,
    valid: MixedQuestions,
    loss: RewardLoss,
    optimization: RewardOptimization,
    *,
    init: str,
    lora: Lora,
    base: str,
    seed: int,
    bf16: bool,
    device: str,
    weights_dtype: str,
    output: Path,
    set_temperature: Callable[[Path], float | None],
    report: Report,
) -> dict[str, Any] | None:
    """Train LatentRM and write its checkpoint and `train_rm.json`; resumes a run that was stopped.

    Args:
        adapter: that of the reasoner.
        data: training questions.
        valid: validation questions, by which the best weights are chosen.
        loss: the loss to minimise.
        optimization: batch, learning rate and so on.
        init: initial weights of the backbone, `reasoner` or `random`.
        lora: the low-rank adapter that is trained in place of the weights, if it has a rank.
        base: the reasoner's checkpoint, as an adapter's record is to name it.
        seed: seed of the head's weights and of the order of questions.
        bf16: whether the forward pass runs under bfloat16 autocast.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        weights_dtype: dtype of the checkpoint, `float32` or `bfloat16`.
        output: folder for the states and the finished checkpoint.
        set_temperature: chooses the temperature of the weighted vote and writes it into the checkpoint.
        report: called as `report(updates_done, figures)` after every update.

    Returns:
        The content of `train_rm.json`; None in all processes of a launch except the first.

    Raises:
        RunError: a loss or gradient is not finite; the last state is kept.
        UsageError: the machine does not have the device, or the batch cannot be divided among the processes.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    started = time.perf_counter()
    arguments = trainer_arguments(optimization, len(data), output / STATES, seed=seed, bf16=bf16, device=device)
    model = initial_model(adapter, init, seed, lora)
    trainer = train(model, loss, data, valid, optimization, arguments, report=report)
    dtype = getattr(torch, weights_dtype)
    with torch.no_grad():  # so that the figures are those of the saved, rounded weights
        for _, parameter in trained_parameters(model):
            parameter.copy_(parameter.to(dtype))
    figures = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return None
    record = {
        "reasoner": adapter.digest,
        "reasoner_name": adapter.name,
        "sampler": data.folder.settings.get("sampler"),
        "loss": loss.name,
        "init": init,
        "reduce": "sum",
    } | ({} if lora.rank is None else {"base": base})
    model.write(output / FINISHED, adapter, dtype, record)
    accuracy = figures[f"eval_{METRIC}"]
    results = {
        "updates": trainer.state.global_step,
        "chosen_update": trainer.state.best_global_step or 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": len(data),
        "valid_questions": len(valid),
        "temperature": set_temperature(output / FINISHED),
        "valid_loss": figures["eval_loss"],
        "valid_chance": valid.chance,
        "valid_selection_accuracy": accuracy,
        "valid_selection_accuracy_of_all": valid.accuracy_of_all(accuracy),
        "seconds": round(time.perf_counter() - started, 1),
    }
    # written last: the training is finished if it exists
    write_text(output / RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def initial_model(adapter: CheckpointAdapter, init: str, seed: int, lora: Lora = FULL) -> LatentRMModule:
    """LatentRM before training, in float32: with the reasoner's weights, or with random ones if `init=random`."""
    lm = adapter.load(device="cpu", dtype="float32").lm
    if init == "random":
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(lm.config).float()
    return LatentRMModule(lm, seed, lora)


def train(
    model: LatentRMModule,
    loss: RewardLoss,
    data: MixedQuestions,
    valid: MixedQuestions,
    optimization: RewardOptimization,
    arguments: TrainingArguments,
    *,
    report: Report,
) -> RewardTrainer:
    """Train until the epochs or the patience are used up, from the last saved state if there is one.

    Args:
        model: the initial model; afterwards it has the weights with the best selection accuracy on `valid` (the
            earliest of equal ones).
        loss: the loss to minimise.
        data: training questions.
        valid: validation questions.
        optimization: batch, learning rate and so on.
        arguments: result of `trainer_arguments`.
        report: called as `report(updates_done, figures)` after every update.

    Returns:
        The trainer, whose `evaluate` measures the model.

    Raises:
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    model.recompute = optimization.gradient_checkpointing
    trainer = RewardTrainer(
        loss,
        max(data.rollouts, valid.rollouts),
        model=model,
        args=arguments,
        train_dataset=cast(Dataset, data),
        eval_dataset=cast(Dataset, valid),
        data_collator=collate,
        compute_metrics=selection_accuracy,
        callbacks=[EarlyStoppingCallback(optimization.patience)],
        report=report,
    )
    if not optimization.epochs:
        return trainer
    states = Path(str(arguments.output_dir))
    with arguments.main_process_first():
        last = resumable_state(states)
    if last is None or not _has_ended(last, optimization):
        trainer.fit(last)
        last = last_state(states)
    assert last is not None
    load_parameters(model, best_state(last))
    return trainer


class RewardTrainer(ResumableTrainer):
    """The Trainer for LatentRM; its predictions are scores of rollouts."""

    def __init__(self, loss: RewardLoss, rollouts: int, **more: Any) -> None:
        """Create a trainer from a loss and the most rollouts of a question, to which predictions are padded."""
        super().__init__(**more)
        self.reward_loss, self.rollouts = loss, rollouts

    def get_batch_samples(self, *arguments: Any, **more: Any) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of an update, each with its weight: the last one of an epoch may have fewer questions."""
        batches, items = super().get_batch_samples(*arguments, **more)
        sizes = [len(batch["lengths_Q"]) for batch in batches]
        weighted = zip(batches, sizes, strict=True)
        return [batch | {"weight": size * len(sizes) / sum(sizes)} for batch, size in weighted], items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and on request the scores (Q, N) of its rollouts."""
        logits_QNT = model(inputs["prompt_QL"], inputs["lengths_Q"], inputs["latents_QNTD"])
        loss = self.reward_loss(logits_QNT, inputs["labels_QNT"], inputs["correct_QN"])
        loss = self.checked(loss * inputs.get("weight", 1.0))
        return (loss, rollout_scores(logits_QNT, ~inputs["labels_QNT"].isnan())) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, scores and outcomes, padded to the same width in every batch so that they can be concatenated."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, score_QN = self.compute_loss(model, inputs, return_outputs=True)
        pad = (0, self.rollouts - score_QN.shape[1])
        score_QN = nn.functional.pad(score_QN.float(), pad, value=-torch.inf)
        return loss, score_QN, nn.functional.pad(inputs["correct_QN"], pad)


def trainer_arguments(
    optimization: RewardOptimization, questions: int, states: Path, *, seed: int, bf16: bool, device: str
) -> TrainingArguments:
    """The settings of the Trainer; every evaluation saves a state, and the best and the last state are kept."""
    updates = optimization.updates_per_epoch(questions)
    every = max(1, updates // optimization.evaluations)
    return training_arguments(
        optimization,
        states,
        seed=seed,
        bf16=bf16,
        device=device,
        num_train_epochs=optimization.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=round(optimization.warmup * updates * optimization.epochs),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=min(every, 10),
        label_names=["labels_QNT"],
    )


def selection_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of questions whose rollout with the highest score is right; the lowest rollout number wins a tie."""
    chosen_Q1 = np.asarray(prediction.predictions).argmax(1)[:, None]
    return {METRIC: float(np.take_along_axis(np.asarray(prediction.label_ids), chosen_Q1, 1).mean())}


def _has_ended(folder: Path, optimization: RewardOptimization) -> bool:
    """Whether training was over when a state was saved."""
    state = read_state(folder)
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    return waited >= optimization.patience or state["global_step"] >= state["max_steps"]
