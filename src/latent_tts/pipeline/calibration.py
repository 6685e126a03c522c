"""The temperature of the score-weighted vote, chosen on rollouts of the questions that LatentRM was validated on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.pipeline import tables
from latent_tts.pipeline.rollouts import gather
from latent_tts.pipeline.spec import prepare
from latent_tts.results import metrics
from latent_tts.results import statistics as stats
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.results.files import whole_file

log = logging.getLogger(__name__)


def calibrate(cfg: DictConfig, valid: AnnotationFolder, checkpoint: Path) -> float | None:
    """Choose the temperature and write it into the `config.json` of a LatentRM.

    The rollouts are those that were annotated: annotations say which are right, but a vote needs their predictions.

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
    prepared = prepare(run)
    gathered = gather(run, prepared)
    assert gathered.scores is not None
    tables.add_scores(gathered.table, gathered.scores)
    temperature = stats.choose_temperature(metrics.arrays_of(gathered.table, prepared.n))
    path = checkpoint / "config.json"
    record = json.loads(path.read_text())
    record["latent_rm"]["temperature"] = temperature
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    return temperature
