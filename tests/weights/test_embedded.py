"""Every embedded reasoner answers questions that it was not trained on, and by its latents."""

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from latent_tts.config import reference
from latent_tts.engine.rollout import Engine
from latent_tts.pipeline.models import rollout_plan
from latent_tts.random.draw import Draw
from latent_tts.sampler.control import Control
from latent_tts.sampler.greedy import Greedy
from latent_tts.task.arith import Arith
from latent_tts.types import Reasoner

FILES = sorted((Path(reference.conf_dir()) / "model").glob("demo_*.yaml"))
QUESTIONS = Arith("valid", 60, None, 0).questions()
LARGEST = 3 * 2**20


def accuracy(adapter, reasoner: Reasoner, sampler, questions=QUESTIONS) -> float:
    written = 64 if adapter.latents == 0 else 4
    engine = Engine(reasoner, rollout_plan(adapter, written, adapter.own_schedule))
    draw = Draw.of(0, [q.id for q in questions], torch.zeros(len(questions), 1, dtype=torch.long), engine.width)
    rollouts = engine.roll([adapter.encode(q) for q in questions], draw, sampler)
    answers = [adapter.decimal_answer(adapter.answer_text(ids)) for ids in rollouts.answer_ids]
    return sum(answer == q.answer for answer, q in zip(answers, questions, strict=True)) / len(questions)


def load(file: Path):
    adapter = instantiate(OmegaConf.load(file), _convert_="all")
    adapter.check()
    return adapter, adapter.load(device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem == "demo_coconut" else pytest.mark.slow, id=file.stem) for file in FILES],
)
def test_an_embedded_reasoner_thinks(file, caplog):
    adapter, reasoner = load(file)
    assert not caplog.records  # T, K and where sweeps begin are those of training
    assert adapter.name == file.stem
    assert sum(path.stat().st_size for path in adapter.folder.iterdir()) < LARGEST
    assert "## Recipe" in (adapter.folder / "README.md").read_text()
    assert accuracy(adapter, reasoner, Greedy()) >= 0.4
    if adapter.latents:
        assert accuracy(adapter, reasoner, Control("zero")) <= 0.1
        assert accuracy(adapter, reasoner, Control("repeat")) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_card_says_how_many_questions_are_answered(file):
    adapter, reasoner = load(file)
    (stated,) = re.findall(r"^\| greedy \| ([\d.]+) \[[^]]+\] \| `", (adapter.folder / "README.md").read_text(), re.M)
    found = 100 * accuracy(adapter, reasoner, Greedy(), Arith("test", 1000, None, 0).questions())
    assert found == pytest.approx(float(stated), abs=0.2)  # the rounding of another processor may turn an answer
