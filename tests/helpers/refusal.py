"""Checks of the errors for mistakes of the user."""

import importlib
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from latent_tts import cli
from latent_tts.config import build as config
from latent_tts.config import reference


def check(result, *words: str) -> None:
    """Check a refused command: one to four lines that contain `words`, exit code 2, no table."""
    assert result.code == 2, result.err
    log = ("INFO", "WARNING", "Error executing job")
    lines = [line for line in result.err.splitlines() if line and not line.startswith(log)]
    assert "Traceback" not in result.err
    assert "metrics.csv" not in result.out
    _check_lines(lines, *words)


def check_refused(command: str, *overrides: object, words: list[str]) -> None:
    """Check that a command refuses its config, which is composed once per process and choice of options.

    Composing takes ten times as long as the check, and a value is refused however it came into the config.
    """
    given = [str(override) for override in overrides]
    options = tuple(override for override in given if _is_group(override.partition("=")[0]))
    values = OverridesParser.create().parse_overrides([override for override in given if override not in options])
    with initialize_config_dir(reference.conf_dir(), job_name=command, version_base="1.3"):
        try:
            cfg = deepcopy(_composed(command, options))
            for override in values:
                OmegaConf.update(cfg, override.key_or_group, override.value())
            cfg.hydra.overrides.task = given
            cfg.hydra.runtime.output_dir = mkdtemp(dir=Path.cwd())
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            importlib.import_module(f"latent_tts.commands.{command}").main(cfg)
        except Exception as error:
            lines, code = cli.describe(error)
        else:
            raise AssertionError(f"{given} is not refused")
    assert code == 2, lines
    _check_lines(lines, *words)


@cache
def _composed(command: str, options: tuple[str, ...]) -> DictConfig:
    config.register_schemas()
    return compose(command, list(options), return_hydra_config=True)


def _is_group(key: str) -> bool:
    return (Path(reference.conf_dir()) / key).is_dir()


def _check_lines(lines: list[str], *words: str) -> None:
    assert 1 <= len(lines) <= 4, lines
    for word in words:
        assert word in " ".join(lines), f"{word!r} not in {lines}"
