"""`ltts train-rm`: train LatentRM on annotated rollouts; re-run the command to resume a stopped run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latent_tts.checkpoint import joining
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.config import build as config
from latent_tts.config.requests import annotated_run, default_annotation_spec, plain, run_request
from latent_tts.errors import DEVICE, SEED, check_fields, computing, require
from latent_tts.pipeline.annotation import annotate
from latent_tts.pipeline.keys import model_key
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.temperature import choose_temperature, write_temperature
from latent_tts.results import report
from latent_tts.results.files import locked_folder
from latent_tts.training.optimization import RewardOptimization
from latent_tts.training.reward_model.data import open_questions
from latent_tts.training.reward_model.loss import RewardLoss
from latent_tts.training.states import FINISHED, STATES, claim, log_once_per_launch
from latent_tts.types import read_object

log = logging.getLogger(__name__)
INITS = ("reasoner", "random")
DTYPES = ("float32", "bfloat16")


def main(cfg: DictConfig) -> None:
    """Train, then write the checkpoint folder and print its path.

    Raises:
        UsageError: a value or an annotation folder is not usable, or the output folder holds another run or is another
            process's.
        RunError: the loss stopped being finite, or the device failed; the last state is kept.
    """
    with locked_folder(Path(cfg.output).expanduser(), "output"):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """The command, in a folder that no other process writes to."""
    check_fields("", cfg, init=INITS, weights_dtype=DTYPES, seed=SEED, device=DEVICE)
    output = Path(cfg.output).expanduser()
    config.build("sampler", cfg.sampler)  # a wrong value is refused even where nothing has to be annotated
    loss: RewardLoss = config.build("loss", cfg.loss)
    optimization: RewardOptimization = config.build("optimization", cfg.optimization)
    lora = config.build("lora", cfg.lora)
    if lora.rank is not None:
        require(
            "init",
            cfg.init,
            cfg.init == "reasoner",
            "must be reasoner with lora.rank: an adapter shares the reasoner's weights",
        )
        require("lora.dropout", lora.dropout, lora.dropout == 0, "must be 0: a LatentRM is trained without dropout")
    adapter: CheckpointAdapter = config.build("model", cfg.model)
    adapter.check()
    keys = ("annotations", "valid_annotations")
    of_model = model_key(adapter)
    named = {name: of_model[name] for name in ("latents", "eos", "prompt")} | of_model["fields"]
    data, valid = (
        # without a folder the default questions, annotated now
        open_questions(
            annotate(default_annotation_spec(cfg, key)) if cfg[key] is None else Path(cfg[key]).expanduser(),
            adapter, named, key,
        )
        for key in keys
    )  # fmt: skip
    log_once_per_launch()  # from here on: while the first process annotates, the others say that they wait
    annotated = annotated_run(cfg, valid.folder)
    settings = plain(cfg)
    kept = {key: settings[key] for key in ("init", "seed", "bf16", "weights_dtype", "loss", "optimization", "lora")}
    identities = {key: questions.identity for key, questions in zip(keys, (data, valid), strict=True)}
    claim(output, {"reasoner": adapter.digest, **identities, **kept})
    # imports torch: everything above has been checked without it
    from latent_tts.training.reward_model.train import RESULTS, train_latent_rm

    results = read_object(output / RESULTS)
    if results:
        log.info("%s is finished", output)
    else:
        updates = optimization.updates_per_epoch(len(data)) * optimization.epochs
        with (
            report.progress_bar(updates, "updates") as bar,
            computing("training", f"the states in {output / STATES} are kept"),
        ):
            results = train_latent_rm(
                adapter,
                data,
                valid,
                loss,
                optimization,
                init=cfg.init,
                lora=lora,
                base=joining.lasting_name(str(cfg.model.checkpoint)),
                seed=cfg.seed,
                bf16=cfg.bf16,
                device=cfg.device,
                weights_dtype=cfg.weights_dtype,
                output=output,
                set_temperature=lambda checkpoint: (
                    None if annotated is None else set_temperature(annotated, checkpoint, valid.folder.present())
                ),
                report=lambda done, figures: bar.show(done, note(figures)),
            )
    if results:  # in the first process of a launch
        show(results)
        print(output / FINISHED)


def set_temperature(run: DictConfig, checkpoint: Path, ids: Collection[str]) -> float:
    """Choose the temperature of the weighted vote on a run, and write it into the `config.json` of a LatentRM.

    Args:
        run: the run to choose on.
        checkpoint: the LatentRM's folder.
        ids: of the questions to choose on.
    """
    run.scorer.checkpoint = str(checkpoint)
    temperature = choose_temperature(check_run(run_request(run)), ids)
    write_temperature(checkpoint, temperature)
    return temperature


def note(figures: Mapping[str, float]) -> str:
    """The text beside the progress bar."""
    accuracy = figures.get("eval_selection_accuracy")
    return f"loss {figures['loss']:.3f}" + (f" valid {100 * accuracy:.1f} %" if accuracy is not None else "")


def show(results: Mapping[str, Any]) -> None:
    """Print the figures on the validation questions as a table."""
    shares = {
        "chosen by LatentRM": results["valid_selection_accuracy"],
        "random choice": results["valid_chance"],
        "chosen by LatentRM, with the questions that leave no choice": results["valid_selection_accuracy_of_all"],
    }
    rows = [[what, f"{100 * share:.1f}"] for what, share in shares.items() if share is not None]
    report.print_table(
        f"right on valid ({results['valid_questions']} questions with both right and wrong rollouts), "
        f"weights of update {results['chosen_update']} of {results['updates']}",
        ["", "%"],
        rows,
    )
