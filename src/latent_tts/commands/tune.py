"""`ltts tune`: measure which engine settings suit this machine, and keep them as `engine=tuned`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from omegaconf import DictConfig

from latent_tts.config.reference import user_conf_dir
from latent_tts.config.requests import drawing_options, engine_settings
from latent_tts.errors import SEED, bad_value, check_fields, require
from latent_tts.pipeline import environment
from latent_tts.pipeline.spec import BYTES_PER_NUMBER, SHORT_DTYPES, encode_prompts, reserved_positions
from latent_tts.results import report
from latent_tts.results.files import write_text

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Measure, print a table, write the settings, and print their path.

    Raises:
        UsageError: a value is not usable, or the file cannot be written.
        RunError: a failure while drawing.
    """
    engine, dtypes = engine_settings(cfg.engine), check_values(cfg)
    sampler, task, adapter = drawing_options(cfg)
    prompts = encode_prompts(adapter, task.questions(), reserved_positions(adapter, cfg.max_answer_tokens))
    path = writable_path(cfg.output)
    from latent_tts.pipeline.engine_tuning import measure

    measurements = measure(
        adapter, sampler, prompts, [replace(engine, dtype=dtype) for dtype in dtypes],
        n=cfg.n, seed=cfg.seed, max_answer_tokens=cfg.max_answer_tokens, seconds=cfg.seconds,
    )  # fmt: skip
    best = max(measurements, key=lambda measured: measured.rate)
    lines = [[m.dtype, m.rows, f"{m.rate:.0f}", f"{m.rate / best.rate:.2f}", f"{m.same:.1%}"] for m in measurements]
    report.print_table(
        f"{adapter.name}, sampler {sampler.name}, n={cfg.n}",
        ["engine.dtype", "engine.rows", "rollouts/s", "of the best", f"answers as in {measurements[0].dtype}"],
        lines,
    )
    if best.dtype != engine.dtype:
        log.warning(
            "engine=tuned uses engine.dtype=%s instead of %s: with the same random numbers, rounding changed %.1f %% "
            "of the answers measured here; `ltts tune dtypes=[%s]` keeps the dtype",
            best.dtype, engine.dtype, 100 * (1 - best.same), engine.dtype,
        )  # fmt: skip
    machine = environment.machine()
    write_text(
        path,
        f"# by `ltts tune` on {date.today()}, {machine.get('gpu', machine['processor'])}: "
        f"{best.rate:.0f} rollouts/s with model {adapter.name}, sampler {sampler.name}, n={cfg.n}\n"
        "defaults: [default, _self_]\n"
        f"dtype: {best.dtype}\ndevice: {engine.device}\nrows: {best.rows}\nquantize: {engine.quantize or 'null'}\n"
        f'graph: "{engine.graph}"\n',
    )
    print(path)


def check_values(cfg: DictConfig) -> Sequence[str]:
    """Check the command's own keys; returns the dtypes to try by their long names.

    Raises:
        UsageError: a value is not allowed.
    """
    check_fields("", cfg, n="a positive integer", seconds="a positive number", seed=SEED)
    allowed = f"must be a list out of {', '.join(BYTES_PER_NUMBER)}"
    require("dtypes", "[]", len(cfg.dtypes) > 0, allowed)
    dtypes = [SHORT_DTYPES.get(dtype, dtype) for dtype in map(str, cfg.dtypes)]
    for dtype in dtypes:
        require("dtypes", dtype, dtype in BYTES_PER_NUMBER, allowed)
    return dtypes


def writable_path(output: str | None) -> Path:
    """The file to write, once it is known that it can be written: measuring takes minutes.

    Raises:
        UsageError: it cannot, or none is named and this user has no home folder.
    """
    folder = user_conf_dir()
    default = folder and folder / "engine" / "tuned.yaml"
    path = Path(output).expanduser() if output else default
    if path is None:
        raise bad_value("output", None, "this user has no home folder; name the YAML file to write")
    require("output", path, not path.is_dir(), "must be the path of a YAML file, this is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise bad_value("output", path, f"cannot be written ({error.strerror})") from error
