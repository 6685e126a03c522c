"""Training LatentRM on an annotation folder with transformers' Trainer, by selection accuracy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging as transformers_logging

from latent_tts.errors import RunError, bad_value
from latent_tts.model import ModelAdapter
from latent_tts.training.reward_model.data import MixedQuestions, collate
from latent_tts.training.reward_model.loss import RewardLoss, summed
from latent_tts.training.reward_model.model import LatentRM
from latent_tts.training.reward_model.optimization import RewardOptimization

METRIC = "selection_accuracy"
WEIGHTS = "model.safetensors"


def selection_accuracy(score_QN: np.ndarray, correct_QN: np.ndarray) -> float:
    """Share of questions whose rollout of the highest score is right; the lowest number wins a tie."""
    return float(np.take_along_axis(correct_QN, score_QN.argmax(1)[:, None], 1).mean())


class RewardTrainer(Trainer):
    """The Trainer with LatentRM's loss, its scores as predictions, and an end when something is not finite."""

    def __init__(self, loss: RewardLoss, rollouts: int, **arguments: Any) -> None:
        """Take the loss, and the most rollouts of a question, to which predictions are padded."""
        super().__init__(**arguments)
        self.reward_loss, self.rollouts = loss, rollouts
        self.model_accepts_loss_kwargs = False  # the loss is a mean already: accumulated gradients are averaged

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; with outputs the scores (Q, N) too.

        Raises:
            RunError: it is not finite.
        """
        logits_QNT = model(inputs["prompt_QL"], inputs["lengths_Q"], inputs["latents_QNTD"])
        loss = self.reward_loss(logits_QNT, inputs["labels_QNT"], inputs["correct_QN"])
        if not math.isfinite(loss.item()):
            raise self.not_finite(f"loss is {loss.item()}")
        return (loss, summed(logits_QNT, ~inputs["labels_QNT"].isnan())) if return_outputs else loss

    def not_finite(self, what: str) -> RunError:
        """The error for a figure that is not finite."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last good state is {last}" if last else "no state had been kept yet"
        return RunError(
            f"the {what} at update {self.state.global_step}; {kept}\n"
            "a smaller optimization.lr, or bf16=false, may help (in another output folder)"
        )

    def prediction_step(self, model: nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, scores and outcomes, of the same width in every batch so that they can be joined."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, score_QN = self.compute_loss(model, inputs, return_outputs=True)
        pad = (0, self.rollouts - score_QN.shape[1])
        score_QN = nn.functional.pad(score_QN.float(), pad, value=-torch.inf)
        return loss, score_QN, nn.functional.pad(inputs["correct_QN"], pad)


class _Watch(TrainerCallback):
    """Reports progress, and stops a step whose gradient is not finite before it spoils the weights."""

    def __init__(self, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self.report, self.last = report, {}
        self.trainer: RewardTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.get_total_norm(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        if not math.isfinite(norm.item()):
            assert self.trainer is not None
            raise self.trainer.not_finite(f"gradient's norm is {norm.item()}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, self.last)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.last = {**self.last, **(logs or {})}


def initial_model(adapter: ModelAdapter, init: str, seed: int) -> LatentRM:
    """LatentRM before training, in float32: the reasoner's weights, or with `init=random` fresh ones of its shape."""
    lm = adapter.load(device="cpu", dtype="float32").lm
    if init == "random":
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(lm.config).float()
    return LatentRM(lm, seed)


def train(
    model: LatentRM,
    loss: RewardLoss,
    data: MixedQuestions,
    valid: MixedQuestions,
    optimization: RewardOptimization,
    *,
    seed: int,
    bf16: bool,
    output: Path,
    report: Callable[[int, Mapping[str, float]], None],
) -> RewardTrainer:
    """Train until the epochs or the patience end, going on from the last checkpoint in `output`.

    Args:
        model: initial weights; holds the best at the end, by selection accuracy on `valid`; of equals the earliest.
        loss: what is minimised.
        data: to train on.
        valid: to choose by.
        optimization: batch, learning rate and the like.
        seed: of the order of the questions.
        bf16: run the forward pass under bfloat16 autocast.
        output: folder of Trainer's checkpoints and `tensorboard/`.
        report: called as `report(updates_done, last_logged)` after every update.

    Returns:
        The trainer, whose `evaluate` measures the model.

    Raises:
        RunError: the loss or a gradient is not finite; the last checkpoint stays.
        UsageError: the batch cannot be shared by the processes.
    """
    transformers_logging.set_verbosity_error()
    watch = _Watch(report)
    arguments = trainer_arguments(optimization, len(data), seed=seed, bf16=bf16, output=output)
    trainer = RewardTrainer(
        loss,
        max(data.rollouts, valid.rollouts),
        model=model,
        args=arguments,
        train_dataset=cast(Dataset, data),
        eval_dataset=cast(Dataset, valid),
        data_collator=collate,
        compute_metrics=_selection,
        callbacks=[EarlyStoppingCallback(optimization.patience), watch],
    )
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    if not optimization.epochs:
        return trainer
    for path in output.glob("checkpoint-*"):
        if not _state(path):  # cut off while it was written; the Trainer would count it among those it keeps
            shutil.rmtree(path, ignore_errors=True)  # every process of a launch comes here
    last = last_checkpoint(output)
    if last is None or not _has_ended(last, optimization):
        log = TensorBoardCallback(
            SummaryWriter(str(output / "tensorboard")) if trainer.is_world_process_zero() else None
        )
        trainer.add_callback(log)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.remove_callback(log)
        last = last_checkpoint(output)
    assert last is not None
    best = output / f"checkpoint-{_state(last)['best_global_step']}"
    if not (best / WEIGHTS).is_file():
        raise RunError(f"the best state {best} is gone; train in another output folder")
    model.load_state_dict(load_file(best / WEIGHTS))
    return trainer


def last_checkpoint(folder: Path) -> Path | None:
    """The latest of Trainer's checkpoints that was written whole, None if there is none."""
    whole = [path for path in folder.glob("checkpoint-*") if _state(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _state(checkpoint: Path) -> dict[str, Any]:
    """Trainer's state, which it writes last; empty where that did not happen."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return {}


def _has_ended(checkpoint: Path, optimization: RewardOptimization) -> bool:
    """Whether training had no update left when it was stopped."""
    state = _state(checkpoint)
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    return waited >= optimization.patience or state["global_step"] >= state["max_steps"]


def trainer_arguments(
    optimization: RewardOptimization, questions: int, *, seed: int, bf16: bool, output: Path
) -> TrainingArguments:
    """Trainer's settings; an evaluation keeps a checkpoint, of which the best and the last stay."""
    an_epoch = optimization.updates_an_epoch(questions)
    every = max(1, an_epoch // optimization.evaluations)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=optimization.batch,
        per_device_eval_batch_size=optimization.batch,
        num_train_epochs=optimization.epochs,
        learning_rate=optimization.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(optimization.warmup * an_epoch * optimization.epochs),
        weight_decay=optimization.weight_decay,
        max_grad_norm=optimization.clip,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # said, since Trainer refuses bf16 where it finds no accelerator
        seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        logging_steps=min(every, 10),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels_QNT"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.world_size == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer would use DataParallel; several GPUs are `accelerate launch`'s
    if optimization.batch % arguments.world_size:
        raise bad_value("optimization.batch", optimization.batch, f"a multiple of the {arguments.world_size} processes")
    arguments.per_device_train_batch_size = optimization.batch // arguments.world_size
    return arguments


def _selection(prediction: EvalPrediction) -> dict[str, float]:
    scores, corrects = prediction.predictions, prediction.label_ids
    assert isinstance(scores, np.ndarray)
    assert isinstance(corrects, np.ndarray)
    return {METRIC: selection_accuracy(scores, corrects)}
