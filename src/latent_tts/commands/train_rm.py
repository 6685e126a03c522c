"""`ltts train-rm`: train LatentRM on annotated rollouts; re-run the command to resume a stopped run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latent_tts.config import build as config
from latent_tts.config.recorded import literal, recorded
from latent_tts.config.requests import annotation_spec, run_request
from latent_tts.errors import bad_value, computing, require
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.annotation import annotate
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.temperature import choose_temperature
from latent_tts.results import report
from latent_tts.results.annotations import SETTINGS, AnnotationFolder
from latent_tts.results.files import whole_file
from latent_tts.training.folder import FINISHED, STATES, claim
from latent_tts.training.optimization import check_device
from latent_tts.training.reward_model.data import open_questions
from latent_tts.training.reward_model.loss import RewardLoss
from latent_tts.training.reward_model.optimization import RewardOptimization

log = logging.getLogger(__name__)
INITS = ("reasoner", "random")
DTYPES = ("float32", "bfloat16")


def main(cfg: DictConfig) -> None:
    """Train, then write the checkpoint folder and print its path.

    Raises:
        UsageError: a value or an annotation folder is not usable, or the output folder holds another run.
        RunError: the loss stopped being finite, or the device failed; the last state is kept.
    """
    require("init", cfg.init, cfg.init in INITS, f"one of {', '.join(INITS)}")
    require("weights_dtype", cfg.weights_dtype, cfg.weights_dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    check_device(cfg.device)
    output = Path(cfg.output).expanduser()
    if output.exists() and not output.is_dir():
        raise bad_value("output", output, "a folder is wanted, this is a file")
    config.build("sampler", cfg.sampler)  # a wrong value is refused even where nothing has to be annotated
    loss: RewardLoss = config.build("loss", cfg.loss)
    optimization: RewardOptimization = config.build("optimization", cfg.optimization)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    keys = ("annotations", "valid_annotations")
    data, valid = (open_questions(annotation_folder(cfg, key), adapter, key) for key in keys)
    annotated = annotated_run(cfg, valid.folder)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    kept = {key: settings[key] for key in ("init", "seed", "bf16", "weights_dtype", "loss", "optimization")}
    identities = {key: questions.identity for key, questions in zip(keys, (data, valid), strict=True)}
    claim(output, {"reasoner": adapter.digest, **identities, **kept})
    # imports torch: everything above has been checked without it
    from latent_tts.training.reward_model.train import read_results, train_latent_rm

    results = read_results(output)
    if results is not None:
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
                seed=cfg.seed,
                bf16=cfg.bf16,
                device=cfg.device,
                weights_dtype=cfg.weights_dtype,
                output=output,
                calibrate=lambda checkpoint: None if annotated is None else calibrate(annotated, checkpoint),
                report=lambda done, figures: report.show(bar, done, note(figures)),
            )
    if results is not None:  # in the first process of a launch
        show(results)
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


def annotated_run(cfg: DictConfig, valid: AnnotationFolder) -> DictConfig | None:
    """The run whose rollouts were annotated, on which the temperature of the weighted vote is to be chosen.

    Args:
        cfg: config of the training command, for the model.
        valid: annotations of the questions to choose on.

    Returns:
        The config of `ltts run`; None for annotations (official shards) that do not say which task they are of.

    Raises:
        UsageError: the settings of the annotations describe no run.
    """
    made = valid.settings
    if "task" not in made:
        log.warning("%s: task unknown, so the temperature of the weighted vote stays 1", valid.path)
        return None
    run = config.compose("run", ["scorer=latent_rm"])
    try:
        run.model = OmegaConf.to_container(cfg.model, resolve=True)
        run.task, run.sampler = recorded("task", made["task"], cfg), recorded("sampler", made["sampler"], cfg)
        run.task.limit = valid.index().num_rows
        run.n, run.seed, run.max_answer_tokens = made["n"], made["seed"], made["max_answer_tokens"]
        run.engine.dtype, run.engine.quantize = made["dtype"], made.get("quantize")
        run.answer = OmegaConf.merge(run.answer, literal(made.get("answer", {})))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        reason = f"has no {error}" if type(error) is KeyError else str(error).splitlines()[0]
        raise bad_value("valid_annotations", valid.path / SETTINGS, reason) from error
    config.build("task", run.task)
    config.build("sampler", run.sampler)
    return run


def calibrate(run: DictConfig, checkpoint: Path) -> float:
    """Choose the temperature of the weighted vote and write it into the `config.json` of a LatentRM.

    Args:
        run: the run to choose on.
        checkpoint: the LatentRM's folder.

    Returns:
        The temperature.
    """
    run.scorer.checkpoint = str(checkpoint)
    temperature = choose_temperature(check_run(run_request(run)))
    path = checkpoint / "config.json"
    record = json.loads(path.read_text())
    record["latent_rm"]["temperature"] = temperature
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    return temperature


def note(figures: Mapping[str, float]) -> str:
    """The text beside the progress bar."""
    accuracy = figures.get("eval_selection_accuracy")
    return f"loss {figures['loss']:.3f}" + (f" valid {100 * accuracy:.1f} %" if accuracy is not None else "")


def show(results: Mapping[str, Any]) -> None:
    """Print the figures on the validation questions as a table."""
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
