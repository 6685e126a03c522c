"""Shared fixtures: a tiny untrained reasoner, and the command line run in process."""

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import compose_once
import pytest
import yaml

from latent_tts import cli

# commands read their own file hundreds of times: libyaml does so eight times as fast, and the same
yaml.SafeLoader = yaml.CSafeLoader


def pytest_configure(config: pytest.Config) -> None:
    """Only tests marked `gpu` see a GPU: the others are to compute the same everywhere."""
    chosen = config.getoption("markexpr")
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests marked `every_other`, the default suite runs every other case."""
    cases: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("every_other"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % 2:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1


@pytest.fixture(scope="session", autouse=True)
def configs_compose_once() -> Iterator[None]:
    """Each choice of options is composed once a process."""
    with pytest.MonkeyPatch.context() as patch:
        compose_once.install(patch)
        yield


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level GPT-2 of one layer with random weights that writes its answers in a word or two."""
    from latent_tts.task.arith import words
    from latent_tts.training.reasoner.backbone import Backbone
    from latent_tts.training.reasoner.vocabulary import word_level_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    backbone = Backbone(layers=1, width=16, heads=2, positions=128, dropout=0.1, number_scale=0.5)
    backbone.create(word_level_tokenizer(words()), folder, seed=3)
    return folder


@dataclass
class Result:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> Path:
        """The path on the last line of stdout."""
        return Path(self.out.splitlines()[-1])


@pytest.fixture
def ltts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """Run `ltts ARGS...` in an empty folder with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LTTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        logging.shutdown()
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    handlers = logging.getLogger().handlers[:]
    yield run
    for handler in set(logging.getLogger().handlers) - set(handlers):
        handler.close()
        logging.getLogger().removeHandler(handler)


@pytest.fixture
def run(ltts: Callable[..., Result], checkpoint: Path) -> Callable[..., Result]:
    """`ltts run` on the tiny reasoner and a few questions."""
    return lambda *arguments: ltts(
        "run", f"model.checkpoint={checkpoint}", "task.limit=6", "n=4", "max_answer_tokens=4", *arguments
    )


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one free MiB."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
