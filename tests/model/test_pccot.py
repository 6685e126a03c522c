"""`model=pccot`: the engine against the paper's own procedure written down plainly, and what the adapter refuses."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from oracle import pccot_rollout
from refusal import check_refused
from safetensors.torch import load_file, save_file

from latent_tts.checkpoint import loading
from latent_tts.checkpoint.modules import pccot_projection
from latent_tts.engine.rollout import Engine
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.model.pccot import Pccot
from latent_tts.pipeline.models import rollout_plan
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy
from latent_tts.task.arith import Arith

T, K = 4, 2


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    """The tiny reasoner with a random projection beside it."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("pccot") / "pccot")
    width = json.loads((folder / "config.json").read_text())["n_embd"]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        projection = pccot_projection(width)
    edit(folder, {f"prj.{name}": value for name, value in projection.state_dict().items()}, latents=T, sweeps=K)
    return folder


def edit(folder: Path, tensors: dict, **said) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path) | tensors
    save_file({name: value for name, value in weights.items() if value is not None}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_tts": said}))


def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def adapter(folder: Path, **more) -> Pccot:
    fields = {"name": "pccot", "checkpoint": str(folder), "latents": T, "recommended": {}, "sweeps": K}
    return Pccot(**fields | {"answer_prompt": "###"} | more)


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("sweeps", "known_first"), [(1, False), (2, False), (4, False), (6, False), (1, True), (2, True)]
)
@torch.inference_mode()
def test_rollouts_are_those_of_the_papers_procedure(folder, sweeps, known_first):
    model = adapter(folder, sweeps=sweeps, known_first=known_first)
    model.check()
    reasoner = model.load(device="cpu", dtype="float64")
    questions = Arith("test", 3, None, 0).questions()
    prompts = [model.encode(question) for question in questions]
    engine = Engine(reasoner, rollout_plan(model, 5, model.own_schedule))
    draw = Draw.of(0, [q.id for q in questions], torch.zeros(3, 1, dtype=torch.long), engine.width)
    result = engine.roll(prompts, draw, Greedy())
    assert draw.history_RTD is not None
    lm = tiny.plain_copy(reasoner.lm)
    for row, prompt in enumerate(prompts):
        latents_TD, ids = pccot_rollout(
            lm, reasoner.next_latent, prompt, model.latent_id, model.thinking_end_ids, T, sweeps, 5, model.eos_id,
            known_first=known_first,
        )  # fmt: skip
        torch.testing.assert_close(draw.history_RTD[row], latents_TD, rtol=0, atol=1e-9)
        assert result.answer_ids[row] == ids


def test_prompts_and_what_is_forced(folder):
    model, question = adapter(folder), Arith("test", 1, None, 0).questions()[0]
    assert model.encode(question)[-1] == model.start_id
    assert model.encode(question)[:-1] == model.tokenizer.encode(question.text).ids
    assert model.tokenizer.decode(model.thinking_end_ids, skip_special_tokens=False) == "<|end-latent|>###"
    assert model.decimal_answer(" 14 ") == "14"


def test_a_projection_is_not_needed_where_the_config_speaks_of_sweeps(folder, tmp_path):
    plain = copy(folder, tmp_path)
    edit(plain, {f"prj.{name}": None for name in loading.load_tensors(folder, "prj.")}, sweeps=K)
    adapter(plain).check()
    hidden = torch.ones(2, 16)
    assert adapter(plain).load(device="cpu", dtype="float32").next_latent(hidden) is hidden


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sweeps": 0}, r"model\.sweeps=0: "),
        ({"latents": 0}, r"model\.latents=0: "),
        ({"answer_prompt": None}, r"model\.answer_prompt=null: "),
        ({"known_first": 1}, r"model\.known_first=1: "),
        ({"checkpoint": None}, r"model\.checkpoint=null: "),
    ],
)
def test_bad_values_are_named(folder, more, words):
    with pytest.raises(UsageError, match=rf"\A{words}"):
        adapter(folder, **more)


def test_checkpoints_it_cannot_read(folder, checkpoint, tmp_path):
    with pytest.raises(UsageError, match="holds a COCONUT checkpoint"):
        adapter(checkpoint).check()
    with pytest.raises(UsageError, match="holds a PCCoT checkpoint"):
        Coconut("coconut", str(folder), T, {}).check()
    with pytest.raises(UsageError, match=r"model\.answer_prompt=The answer is:: must be words in the vocabulary"):
        adapter(folder, answer_prompt="The answer is:").check()
    broken = copy(folder, tmp_path)
    edit(broken, {"prj.2.bias": None, "prj.3.weight": torch.ones(5)})
    with pytest.raises(UsageError, match=r"prj\.3\.weight has the shape \[5\]"):
        adapter(broken).check()


def test_other_numbers_than_those_of_training_are_warned_of(folder, caplog):
    adapter(folder, latents=3, sweeps=5, known_first=True).check()
    assert "model.latents=3" in caplog.text
    assert "model.sweeps=5" in caplog.text
    assert "model.known_first=true" in caplog.text
    assert "was trained with false" in caplog.text
    assert f"trained with {T}" in caplog.text
    assert f"trained with {K}" in caplog.text


def test_what_is_not_recorded_is_not_warned_of(folder, tmp_path, caplog):
    unknown = copy(folder, tmp_path)
    edit(unknown, {}, sweeps=None)
    adapter(unknown, sweeps=5, known_first=True).check()
    assert not caplog.records


# --- runs


@pytest.fixture
def line(folder, place):
    own = ["model=pccot", f"model.checkpoint={folder}", "model.answer_prompt='###'", f"model.latents={T}"]
    return [*own, f"model.sweeps={K}", "task.limit=4", "max_answer_tokens=3"]


def test_a_run_has_the_models_schedule_and_its_costs(ltts, line):
    result = ltts("run", *line, "sampler=gaussian", "n=3", "budget=fixed")
    assert result.code == 0, result.err
    metrics = pd.read_csv(result.last)
    assert set(metrics["schedule"]) == {"jacobi"}
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert set(rollouts["latent_steps"]) == {T}
    assert "trained with" not in result.err


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("run", ["schedule=sequential"], ["schedule=sequential", "model=pccot", "its own"]),
        ("run", ["schedule=jacobi"], ["schedule=jacobi", "model=pccot", "its own (jacobi sweeps="]),
        ("annotate", ["output=labels"], ["model=pccot", "prefix"]),
        ("run", ["model.sweeps=0"], ["model.sweeps=0", "positive integer"]),
    ],
)
def test_what_a_parallel_model_refuses(line, command, overrides, words):
    check_refused(command, *line, *overrides, words=words)


def test_a_beam_search_has_no_meaning(line, folder, tmp_path):
    scorer = tiny.write_latent_rm(tmp_path / "rm", folder)
    beam = ["search=beam", "n=16", "scorer=latent_rm", f"scorer.checkpoint={scorer}"]
    check_refused("run", *line, *beam, words=["model=pccot", "search=beam"])
