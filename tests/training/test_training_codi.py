"""CODI's objective against a slow and plain one, and its training from the command line."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from resumed import check_resume
from safetensors.torch import load_file
from torch.nn import functional as F

from latent_tts.errors import UsageError
from latent_tts.model.codi import Codi
from latent_tts.recipe.coconut import Coconut as CoconutRecipe
from latent_tts.recipe.codi import Codi as Recipe
from latent_tts.task.arith import Arith
from latent_tts.training.reasoner.codi import alignment
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import copy_checkpoint, write_initial_checkpoint

VALUES: dict[str, Any] = {
    "written_updates": 2,
    "stage_updates": [],
    "final_updates": 3,
    "final_dropout": None,
    "latents": 3,
    "teacher_weight": 0.7,
    "distill_weight": 2.0,
    "distill_loss": "smooth_l1",
    "projector_hidden": 24,
    "projector_init": "random",
    "projector_dropout": 0.0,
    "step_loss": 0.5,
}


def recipe_with(changes: dict[str, Any]) -> Recipe:
    return Recipe(**VALUES | changes)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codi") / "initial"
    write_initial_checkpoint(partial(copy_checkpoint, checkpoint), folder, Recipe(**VALUES), seed=1)
    return folder


def adapter_of(folder):
    return Codi(name="codi", checkpoint=str(folder), latents=3, recommended={})


def plain_states(lm, vectors_SD):
    """Every block's outputs (S, D) for one row, without padding or cache; the last one's normalised."""
    outputs = lm.base_model(inputs_embeds=vectors_SD[None], use_cache=False, output_hidden_states=True)
    return [layer[0] for layer in outputs.hidden_states[1:]]


def plain_loss(objective, adapter, questions, values):
    """The loss, one question after the other; means are over all tokens, and distances over all questions."""
    lm, embed, encode = objective.lm, objective.lm.get_input_embeddings(), adapter.tokenizer.encode
    sums = {"student": [], "teacher": [], "steps": []}
    before = {"student": [], "teacher": []}
    for question in questions:
        start = embed(torch.tensor(adapter.encode(question)))
        end = adapter.thinking_end_ids
        thinking, thoughts = start, []
        for _ in range(values["latents"]):
            thoughts.append(plain_states(lm, thinking)[-1][-1])
            thinking = torch.cat([thinking, objective.next_latent(thoughts[-1])[None]])
        steps = "".join(f"{step}\n" for step in question.steps)
        for role, vectors, text in (("student", thinking, "### "), ("teacher", start, f"{steps}### ")):
            forced = [*end, *encode(text).ids]
            ids = [*forced, *encode(question.answer).ids, adapter.eos_id]
            layers = plain_states(lm, torch.cat([vectors, embed(torch.tensor(ids))]))
            predicted = lm.lm_head(layers[-1][len(vectors) + len(end) - 1 : -1])
            sums[role].append(F.cross_entropy(predicted, torch.tensor(ids[len(end) :]), reduction="none"))
            before[role].append([layer[len(vectors) + len(forced) - 1] for layer in layers])
        results = [step.rpartition("=")[2].removesuffix(">>") for step in question.steps] + [question.answer] * 3
        for step, result in enumerate(results[: values["latents"]]):
            ids = torch.tensor(encode(result).ids)
            states = plain_states(lm, torch.cat([thinking[: len(start) + step], embed(ids[:-1])]))[-1]
            predicted = lm.lm_head(states[len(start) + step - 1 :])
            sums["steps"].append(F.cross_entropy(predicted, ids, reduction="none"))
    means = {key: torch.cat(losses).mean() for key, losses in sums.items()}
    distances = []
    for student, teacher in zip(
        zip(*before["student"], strict=True), zip(*before["teacher"], strict=True), strict=True
    ):
        ours, theirs = torch.stack(student), torch.stack(teacher)
        gap = (ours - theirs).abs()
        distances.append(torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean() / theirs.std())
    return (
        means["student"]
        + values["teacher_weight"] * means["teacher"]
        + values["step_loss"] * means["steps"]
        + values["distill_weight"] * torch.stack(distances).mean()
    )


@pytest.mark.parametrize("result", [30, 3000])  # numbers above 200 have several tokens
def test_the_loss_equals_one_without_padding_cache_or_shared_prompts(folder, result):
    adapter, questions = adapter_of(folder), Arith("valid", 5, None, 0).questions()
    questions[0] = replace(questions[0], steps=(f"<<{result}*1={result}>>", *questions[0].steps[1:]))
    recipe = Recipe(**VALUES)
    objective = recipe.objective(adapter)
    objective.lm.double().eval()
    objective.own.double().eval()
    assert len({len(adapter.encode(q)) for q in questions}) > 1  # so that there is padding
    assert len({len(q.steps) for q in questions}) > 1
    fast = objective.loss(questions, recipe.stages()[-1])
    torch.testing.assert_close(fast.double(), plain_loss(objective, adapter, questions, VALUES), rtol=1e-5, atol=1e-5)


def test_the_first_stage_is_the_teacher_alone(folder):
    adapter, questions = adapter_of(folder), Arith("valid", 4, None, 0).questions()
    objective, coconut = Recipe(**VALUES).objective(adapter), CoconutRecipe(1, [], 0, None, 3, 0.0).objective(adapter)
    objective.lm.eval()
    coconut.lm.eval()
    written = Stage(1, 0, 0)
    assert torch.equal(objective.loss(questions, written), coconut.loss(questions, written))


def test_a_projector_can_start_as_the_identity(checkpoint, tmp_path):
    start, wide = partial(copy_checkpoint, checkpoint), {"projector_init": "identity", "projector_hidden": None}
    write_initial_checkpoint(start, tmp_path / "initial", recipe_with(wide), 1)
    projector = adapter_of(tmp_path / "initial").load(device="cpu", dtype="float32").next_latent
    hidden = torch.randn(5, 16)
    assert isinstance(projector, torch.nn.Sequential)
    torch.testing.assert_close(projector[:4](hidden), hidden)
    reasoner = adapter_of(tmp_path / "initial").load(device="cpu", dtype="float32")
    states = reasoner.lm.base_model(torch.arange(40, 72)[None]).last_hidden_state[0]
    torch.testing.assert_close(projector(states), states - states.mean(1, keepdim=True), rtol=0.02, atol=0.02)
    with pytest.raises(UsageError, match=r"recipe\.projector_hidden=24: must be 32 or more"):
        write_initial_checkpoint(
            partial(copy_checkpoint, checkpoint),
            tmp_path / "narrow",
            recipe_with({"projector_init": "identity"}),
            1,
        )


def test_the_teacher_gets_no_gradient_from_the_distance():
    student = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    alignment(student, teacher, "l1").backward()
    assert all(layer.grad is not None for layer in student)
    assert all(layer.grad is None for layer in teacher)
    assert alignment(teacher, teacher, "smooth_l1") == 0


def test_gradients_reach_the_projector_and_the_first_latent(folder):
    adapter, questions = adapter_of(folder), Arith("valid", 3, None, 0).questions()
    recipe = recipe_with({"teacher_weight": 0.0, "step_loss": 0.0})
    objective = recipe.objective(adapter)
    objective.loss(questions, recipe.stages()[-1]).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in objective.own.parameters()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"latents": 0},
        {"final_updates": -1},
        {"written_updates": 1.5},
        {"teacher_weight": -1},
        {"distill_weight": "much"},
        {"distill_loss": "l2"},
        {"projector_hidden": 0},
        {"projector_init": "zero"},
        {"stage_updates": [-1]},
        {"projector_dropout": 1.0},
        {"projector_dropout": None},
        {"final_dropout": -0.1},
    ],
)
def test_bad_values_are_refused_by_name(wrong):
    (key,) = wrong
    with pytest.raises(UsageError, match=rf"(recipe|model)\.{key}="):
        recipe_with(wrong)


@pytest.mark.slow  # the loop is shared: test_training.py has a quick twin
def test_a_stopped_run_resumes_to_the_same_weights(folder, tmp_path):
    check_resume(Recipe(**VALUES), adapter_of(folder), tmp_path, "own.projector.1.weight")


TINY = ("model.latents=2", "optimization.batch=4", "valid_questions=4")


def test_train_reasoner_starts_from_a_plain_lm_and_writes_a_codi_checkpoint_that_runs(ltts, checkpoint, tmp_path):
    line = (
        "train-reasoner", "model=codi", "output=out", f"init={checkpoint}", "recipe.written_updates=1",
        "recipe.stage_updates=[1]",
        "recipe.final_updates=2", *TINY,
    )  # fmt: skip
    result = ltts(*line)
    assert result.code == 0, result.err
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "out/checkpoint/model.safetensors").values())
    config = json.loads((tmp_path / "out/checkpoint/config.json").read_text())
    assert config["latent_tts"] == {"latents": 2}
    assert config["projector_hidden_size"] == 32  # twice the width, for the identity
    run = ltts("run", "model=codi", "model.checkpoint=out/checkpoint", "model.latents=2", "task.limit=2", "n=1")
    assert run.code == 0, run.err


def test_a_start_that_was_left_half_way_is_made_again_and_a_finished_line_does_no_harm(ltts, checkpoint, tmp_path):
    line = (
        "train-reasoner", "model=codi", "output=out", f"init={checkpoint}", "recipe.written_updates=1",
        "recipe.stage_updates=[]", "recipe.final_updates=1", *TINY,
    )  # fmt: skip
    (tmp_path / "out/initial").mkdir(parents=True)
    (tmp_path / "out/initial/config.json").write_text("{}")
    assert ltts(*line).code == 0
    assert ltts(*line).code == 0
    result = ltts(*line, "recipe.distill_weight=3")
    assert result.code == 2
    assert "contains a run with another" in result.err


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["recipe=coconut"], ["recipe=coconut", "CODI"]),
        (["task.split=test"], ["task.split=test", "train"]),
        (["init=nowhere"], ["init=nowhere", "no such folder"]),
        (["recipe.distill_loss=l2"], ["recipe.distill_loss=l2", "smooth_l1 or l1"]),
        (["model.latents=0"], ["model.latents=0", "or more (recipe.stage_updates has"]),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line_or_two(ltts, tmp_path, wrong, said):
    result = ltts("train-reasoner", "model=codi", "output=out", *wrong)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) <= 4
    assert all(part in result.err for part in said)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_recipe_of_its_name_asks_for_one(ltts):
    result = ltts("train-reasoner", "model=demo_coconut", "output=out")
    assert result.code == 2
    assert "recipe=" in result.err
    assert "demo_coconut" in result.err
