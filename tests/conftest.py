"""Shared fixtures: a tiny untrained reasoner, and the command line run in process."""

import gc
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from places import place_of_its_own, run_line

from latent_tts import cli


def pytest_configure(config: pytest.Config) -> None:
    """Only tests marked `gpu` see a GPU: the others are to compute the same everywhere."""
    gc.disable()  # imports make many objects that stay
    # a busy machine or a measurement of coverage would miss a deadline; the same cases in each run
    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("quick", max_examples=50, derandomize=True, **unhurried)
    settings.load_profile("quick")
    # otherwise Hypothesis also draws constants of the modules that earlier tests of the process have imported
    no_constants = providers.Constants()
    providers._get_local_constants = lambda: no_constants
    chosen = config.getoption("markexpr")
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such tests are not imported: machines with a GPU may lack what the others need."""
    if config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests marked `every_other`, the default suite runs half of the cases.

    Those whose number has an even number of ones in binary: with every second one, a parameter of two values would have
    one value in all of them.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if " at 0x" in item.name:
            raise pytest.UsageError(f"{item.nodeid}: an address, so its name differs between processes")
        if item.get_closest_marker("every_other"):
            name = item.nodeid.partition("[")[0]
            if cases[name].bit_count() % 2:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 100, 100)
    gc.enable()


def _seed_torch() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)  # `torch.manual_seed` also writes down its stack for CUDA


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Torch's random numbers do not depend on which tests ran before in the process."""
    _seed_torch()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    """Nor on which fixtures were there already."""
    _seed_torch()


@pytest.fixture(scope="session", autouse=True)
def without_waiting() -> Iterator[None]:
    """Without what takes longer than a small run or a small training: disks and the Trainer's collection of garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test loses power
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level GPT-2 of one layer with random weights that writes its answers in a word or two."""
    from latent_tts.task.arith import words
    from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    backbone = BackboneConfig(layers=1, width=16, heads=2, positions=128, dropout=0.1, number_scale=0.5)
    backbone.create(word_level_tokenizer(words()), folder, seed=3)
    return folder


@pytest.fixture
def latent_rm(checkpoint: Path, tmp_path: Path) -> Path:
    """A LatentRM with random weights for that reasoner."""
    import tiny

    return tiny.write_latent_rm(tmp_path / "rm", checkpoint)


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
def place(tmp_path: Path) -> Iterator[Path]:
    """The empty folder that a test's commands run in."""
    with place_of_its_own(tmp_path):
        yield tmp_path


@pytest.fixture
def ltts(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `ltts ARGS...` in an empty folder with a cache of its own."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        logging.shutdown()
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def completed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run with a ladder of budgets, which no test may change."""
    folder = tmp_path_factory.mktemp("completed")
    with place_of_its_own(folder):
        assert cli.main(run_line(checkpoint, "budget=ladder", "hydra.run.dir=run")) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def completed_with_latents(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a scorer that kept its latents, which no test may change."""
    folder = tmp_path_factory.mktemp("completed_with_latents")
    with place_of_its_own(folder):
        assert cli.main(run_line(checkpoint, "scorer=none", "keep_latents=true", "hydra.run.dir=run")) == 0
    return folder / "run"


@pytest.fixture
def cached(completed: Path, place: Path) -> Path:
    """That folder, whose rollouts are in the test's own cache: those that `run` without sampler and scorer draws."""
    shutil.copytree(completed.parent / "cache", place / "cache")
    return completed


@pytest.fixture
def own_copy(completed: Path, place: Path) -> Path:
    """A copy of that folder to be changed."""
    return shutil.copytree(completed, place / "completed")


@pytest.fixture
def run(ltts: Callable[..., Result], checkpoint: Path) -> Callable[..., Result]:
    """`ltts run` on the tiny reasoner and a few questions."""
    return lambda *arguments: ltts(*run_line(checkpoint, *arguments))


@pytest.fixture
def refuse(place: Path, checkpoint: Path) -> Callable[..., None]:
    """`ltts run` on the tiny reasoner, which is to refuse what it is given in `words` that name it."""
    from refusal import check_refused  # imports Hydra, which the process that starts the workers does not need

    return lambda *arguments, words: check_refused(*run_line(checkpoint, *arguments), words=words)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and sweeps draw no figure, which takes longer than their tables."""
    monkeypatch.setattr("latent_tts.results.plot.scaling_curve", lambda metrics, path: path)
    monkeypatch.setattr("latent_tts.results.timeline.save_figure", lambda figure, path: path)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one free MiB."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
