"""`ltts train-rm`: train LatentRM on annotated rollouts; the same line resumes a stopped run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.config.requests import annotation_spec, run_request
from latent_tts.engine.cost import Shape
from latent_tts.errors import bad_value, computing
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.annotation import annotate
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.temperature import choose_temperature
from latent_tts.results import report
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.results.files import locked_folder, settings_digest, whole_file
from latent_tts.training.reward_model.data import MixedQuestions
from latent_tts.training.reward_model.loss import RewardLoss
from latent_tts.training.reward_model.optimization import RewardOptimization

if TYPE_CHECKING:
    from latent_tts.training.reward_model.model import LatentRM

log = logging.getLogger(__name__)
SETTINGS, STATES, FINISHED, RESULTS = "settings.json", "states", "checkpoint", "train_rm.json"
INITS = ("reasoner", "random")
DTYPES = ("float32", "bfloat16")


def main(cfg: DictConfig) -> None:
    """Train, then write the checkpoint folder and print its path.

    Raises:
        UsageError: a value or an annotation folder is not usable, or the output folder holds another run or is another
            process's.
        RunError: the loss stopped being finite, or the device failed; the last checkpoint is kept.
    """
    with locked_folder(Path(cfg.output).expanduser(), "output"):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """The command, in a folder that no other process writes to."""
    config.require("init", cfg.init, cfg.init in INITS, f"one of {', '.join(INITS)}")
    config.require("weights_dtype", cfg.weights_dtype, cfg.weights_dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    output = Path(cfg.output).expanduser()
    if output.exists() and not output.is_dir():
        raise bad_value("output", output, "a folder is wanted, this is a file")
    config.build("sampler", cfg.sampler)  # wrong is wrong, also where there is nothing to annotate
    loss: RewardLoss = config.build("loss", cfg.loss)
    optimization: RewardOptimization = config.build("optimization", cfg.optimization)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    data, valid = (questions(annotation_folder(cfg, key), adapter, key) for key in ("annotations", "valid_annotations"))
    claim(output, run_settings(cfg, adapter, data, valid))
    results = output / RESULTS
    if results.is_file():
        log.info("%s is finished", output)
        show(json.loads(results.read_text()))
        print(output / FINISHED)
        return
    trained = train_and_write(cfg, adapter, data, valid, loss, optimization, output)
    if trained is not None:
        show(trained)
        print(output / FINISHED)


def annotation_folder(cfg: DictConfig, key: str) -> Path:
    """The folder named by `annotations` or `valid_annotations`; without one the default questions, annotated now."""
    if cfg[key] is not None:
        return Path(cfg[key]).expanduser()
    part, wanted = config.compose("annotate"), cfg.annotate[key]
    part.model, part.sampler = (OmegaConf.to_container(cfg[group], resolve=True) for group in ("model", "sampler"))
    part.seed, part.output = cfg.seed, str(Path(cfg.output).expanduser() / key)
    part.task.split, part.task.limit = wanted.split, wanted.limit
    part.n, part.completions = wanted.n, wanted.completions
    return annotate(annotation_spec(part))


def questions(path: Path, adapter: ModelAdapter, key: str) -> MixedQuestions:
    """The usable questions of an annotation folder; says how many are left out.

    Raises:
        UsageError: the folder is of another reasoner, its shards are not usable, or no question has a mixed outcome.
    """
    folder = AnnotationFolder(path, key=key)
    found = folder.settings.get("reasoner")
    if folder.official:
        log.warning("%s=%s: official shards do not say which reasoner they are of", key, path)
    elif found != adapter.digest:
        of = f"{folder.settings.get('reasoner_name')} ({found})"
        raise bad_value(
            key, path, f"rollouts of the reasoner {of}, model.checkpoint is {adapter.name} ({adapter.digest})"
        )
    if not folder.complete:
        log.warning("%s=%s: `ltts annotate` has not finished it; what is there is used", key, path)
    latent_id = folder.settings.get("latent_id", getattr(adapter, "latent_id", None))
    if latent_id is None:
        raise bad_value(key, path, f"neither its settings nor {adapter.name} have a latent_id")
    folder.width = Shape.from_config(adapter.config).width
    mixed = MixedQuestions(folder, adapter, latent_id, key)
    if mixed.unmixed is None:
        log.info("%s: %d questions", key, len(mixed))
    else:
        log.info(
            "%s: %d questions with right and wrong rollouts; dropped: %d all right, %d all wrong",
            key,
            len(mixed),
            mixed.unmixed["all_correct"],
            mixed.unmixed["all_wrong"],
        )
    return mixed


def run_settings(cfg: DictConfig, adapter: ModelAdapter, data: MixedQuestions, valid: MixedQuestions) -> dict[str, Any]:
    """What has to be the same for a stopped run to go on."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    kept = {str(key): values[key] for key in ("init", "seed", "bf16", "weights_dtype", "loss", "optimization")}
    identities = {
        key: settings_digest({"settings": part.folder.settings, "questions": part.rows})
        for key, part in (("annotations", data), ("valid_annotations", valid))
    }
    return {"reasoner": adapter.digest, **identities, **kept}


def claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the output folder one of these settings.

    Raises:
        UsageError: it holds a run with others.
    """
    path = output / SETTINGS
    if path.is_file():
        found = json.loads(path.read_text())
        for key in [*settings, *found]:
            if found.get(key) != settings.get(key):
                raise bad_value(
                    "output", output, f"holds a run with other settings ({key}); choose another folder or remove it"
                )
        return
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n")


def train_and_write(
    cfg: DictConfig,
    adapter: ModelAdapter,
    data: MixedQuestions,
    valid: MixedQuestions,
    loss: RewardLoss,
    optimization: RewardOptimization,
    output: Path,
) -> dict[str, Any] | None:
    """Train and write the checkpoint; the results, or None in a process that is not the first.

    Raises:
        RunError: the loss is not finite, or the device fails.
    """
    import torch

    from latent_tts.training.reward_model import train as reward

    model = reward.initial_model(adapter, cfg.init, cfg.seed)
    started = time.perf_counter()
    updates = optimization.updates_an_epoch(len(data)) * optimization.epochs
    with report.progress_bar(updates, "updates") as bar:
        with computing("training", f"the states in {output / STATES} are kept"):
            trainer = reward.train(
                model,
                loss,
                data,
                valid,
                optimization,
                seed=cfg.seed,
                bf16=cfg.bf16,
                output=output / STATES,
                report=lambda done, logged: report.show(bar, done, note(logged)),
            )
            dtype = getattr(torch, cfg.weights_dtype)
            model.round_to(dtype)
            figures = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return None
    write(model, adapter, cfg, data, loss.name, dtype, output / FINISHED)
    temperature = calibrate(cfg, valid.folder, output / FINISHED)
    accuracy = figures[f"eval_{reward.METRIC}"]
    results = {
        "updates": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": len(data),
        "valid_questions": len(valid),
        "temperature": temperature,
        "valid_loss": figures["eval_loss"],
        "valid_chance": valid.chance,
        "valid_selection_accuracy": accuracy,
        "valid_selection_accuracy_of_all": valid.accuracy_of_all(accuracy),
    }
    with whole_file(output / RESULTS) as partial:  # last of all: its presence means finished
        partial.write_text(json.dumps(results, indent=1) + "\n")
    return results


def calibrate(cfg: DictConfig, valid: AnnotationFolder, checkpoint: Path) -> float | None:
    """Choose the temperature of the weighted vote and write it into the `config.json` of a LatentRM.

    Args:
        cfg: config of the training command, for the model.
        valid: annotations of the questions to choose on.
        checkpoint: the LatentRM's folder.

    Returns:
        The temperature; None, and nothing written, for annotations (official shards) that do not say what they are of.
    """
    made = valid.settings
    if "task" not in made:
        log.warning("%s does not say which task it is of: the temperature of the weighted vote stays 1", valid.path)
        return None
    run = config.compose("run", ["scorer=latent_rm"])
    run.model = OmegaConf.to_container(cfg.model, resolve=True)
    run.task = made["task"] | {"limit": valid.index().num_rows}
    run.sampler, run.n, run.seed = made["sampler"], made["n"], made["seed"]
    run.max_answer_tokens, run.engine.dtype = made["max_answer_tokens"], made["dtype"]
    run.engine.quantize = made.get("quantize")
    run.answer = OmegaConf.merge(run.answer, made.get("answer", {}))
    run.scorer.checkpoint = str(checkpoint)
    temperature = choose_temperature(check_run(run_request(run)))
    path = checkpoint / "config.json"
    record = json.loads(path.read_text())
    record["latent_rm"]["temperature"] = temperature
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    return temperature


def write(
    model: LatentRM, adapter: ModelAdapter, cfg: DictConfig, data: MixedQuestions, loss: str, dtype: Any, folder: Path
) -> None:
    """Write the checkpoint with what it was trained for."""
    record = {
        "reasoner": adapter.digest,
        "reasoner_name": adapter.name,
        "sampler": data.folder.settings.get("sampler"),
        "loss": loss,
        "init": cfg.init,
        "reduce": "sum",
    }
    model.write(folder, adapter, dtype, record)


def note(logged: Mapping[str, float]) -> str:
    """What the bar shows beside the updates."""
    parts = [f"loss {logged['loss']:.3f}"] if "loss" in logged else []
    accuracy = logged.get("eval_selection_accuracy")
    return " ".join(parts + ([f"valid {100 * accuracy:.1f} %"] if accuracy is not None else []))


def show(results: Mapping[str, Any]) -> None:
    """The figures on valid, as a table."""
    rows = [["chosen by LatentRM", percent(results["valid_selection_accuracy"])]]
    rows.append(["chosen blindly", percent(results["valid_chance"])])
    everything = results["valid_selection_accuracy_of_all"]
    if everything is not None:
        rows.append(["chosen by LatentRM, with the questions that leave no choice", percent(everything)])
    title = f"right on valid ({results['valid_questions']} questions with a choice), {results['updates']} updates"
    report.print_table(title, ["", "%"], rows)


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}"
