"""`ltts collect RUNS...`: join the metrics of run folders and say which are missing."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from latent_tts.config.build import is_given
from latent_tts.config.recorded import aggregator_builder
from latent_tts.errors import require
from latent_tts.pipeline.sweep import means_path, write_joined
from latent_tts.results import report
from latent_tts.results.run_folder import read_tables, run_folders

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Write the joined table, and means over seeds where there are several; print the paths, the table's last.

    Raises:
        UsageError: a folder holds no runs, or none of them is complete.
    """
    # a default folder may not exist yet
    chosen = [runs for runs in cfg.runs if is_given("runs") or Path(runs).expanduser().is_dir()] or list(cfg.runs)
    folders = list(dict.fromkeys(folder for runs in chosen for folder in run_folders(Path(runs).expanduser())))
    output = Path(cfg.output).expanduser()
    require("output", cfg.output, not output.is_dir(), "must be the path of a CSV file")
    tables = read_tables(folders)
    completed = {job_config(folder) for folder in tables} - {None}
    for folder in folders:
        if folder not in tables and job_config(folder) not in completed:
            log.warning("%s: incomplete, left out", folder)
    require(
        "runs",
        ",".join(cfg.runs),
        bool(tables),
        f"no complete run in {report.counted(len(folders), 'run folder')}; re-run what was interrupted",
    )
    joined, means = write_joined(output, tables, aggregator_builder(cfg))
    log.info("%d of %d runs, %d rows", len(tables), len(folders), len(joined))
    if means is not None:
        print(means_path(output))
    print(output)


def job_config(folder: Path) -> str | None:
    """The composed config of a run folder, which an interrupted run shares with its repetition; None for none."""
    path = folder / ".hydra" / "config.yaml"
    return path.read_text() if path.is_file() else None
