"""Checks of the errors for mistakes of the user."""

import importlib
from pathlib import Path
from tempfile import mkdtemp

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from omegaconf import open_dict

from latent_tts.config.build import conf_dir, register_schemas
from latent_tts.config.error_text import describe
from latent_tts.config.jobs import Loader


def check(result, *words: str) -> None:
    """Check a refused command: one to four lines that contain `words`, exit code 2, no table."""
    assert result.code == 2, result.err
    log = ("INFO", "WARNING", "Error executing job")
    lines = [line for line in result.err.splitlines() if line and not line.startswith(log)]
    assert "Traceback" not in result.err
    assert "metrics.csv" not in result.out
    _check_lines(lines, *words)


def check_refused(command: str, *overrides: object, words: list[str]) -> None:
    """Check that a command refuses its config, by a call of its function and without a job of Hydra's around it."""
    name, given = command.replace("-", "_"), [str(override) for override in overrides]
    register_schemas()
    version.setbase("1.3")
    JobRuntime().set("name", name)
    GlobalHydra.instance().initialize(Hydra(name, Loader(create_config_search_path(conf_dir()))))
    try:
        cfg = GlobalHydra.instance().config_loader().load_configuration(name, given, RunMode.RUN)
        cfg.hydra.runtime.output_dir = mkdtemp(dir=Path.cwd())
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        importlib.import_module(f"latent_tts.commands.{name}").main(cfg)
    except Exception as error:
        lines, code = describe(error)
    else:
        raise AssertionError(f"{given} is not refused")
    finally:
        GlobalHydra.instance().clear()
    assert code == 2, lines
    _check_lines(lines, *words)


def _check_lines(lines: list[str], *words: str) -> None:
    assert 1 <= len(lines) <= 4, lines
    for word in words:
        assert word in " ".join(lines), f"{word!r} not in {lines}"
