"""PCCoT's objective against a slow and plain one, and its training from the command line."""

import json
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from latent_tts.errors import UsageError
from latent_tts.model.pccot import Pccot
from latent_tts.recipe.pccot import Pccot as Recipe
from latent_tts.task.arith import Arith
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.initial import copy_checkpoint, write_initial_checkpoint

VALUES = {
    "written_updates": 2,
    "stage_updates": [1],
    "final_updates": 3,
    "final_dropout": None,
    "latents": 3,
    "sweeps": 2,
    "known_first": False,
    "projection": True,
    "teacher_weight": 0.7,
    "distill_weight": 2.0,
    "distill_loss": "smooth_l1",
    "step_loss": 0.5,
}
FINAL = Stage(1, 3, None)
QUESTIONS = Arith("train", 4, None, 0).questions()


@pytest.fixture(scope="module", params=[True, False], ids=["projection", "hidden states"])
def folder(checkpoint, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("pccot") / "initial"
    recipe = Recipe(**VALUES | {"projection": request.param})
    write_initial_checkpoint(partial(copy_checkpoint, checkpoint), folder, recipe, seed=1)
    return folder


def adapter_of(folder):
    fields = {"name": "pccot", "checkpoint": str(folder), "latents": 3, "recommended": {}}
    return Pccot(**fields, sweeps=2, answer_prompt="")


def objective_of(folder, **changes):
    objective = Recipe(**VALUES | changes).objective(adapter_of(folder))
    objective.lm.eval()
    return objective


def plain_logits(objective, adapter, question, written, sweeps=2, *, known_first=False):
    """Logits of the written tokens, from whole passes over one row for every sweep."""
    lm, embed = objective.lm, objective.lm.get_input_embeddings()
    prompt_LD = embed(torch.tensor(adapter.encode(question)))
    latents_TD = embed(torch.tensor([adapter.latent_id] * 3))

    def hidden(vectors_SD):
        return lm.base_model(inputs_embeds=vectors_SD[None], use_cache=False).last_hidden_state[0]

    if known_first:
        latents_TD = torch.cat([objective.next_latent(hidden(prompt_LD)[-1:]), latents_TD[1:]])
    for _ in range(sweeps):
        states = hidden(torch.cat([prompt_LD, latents_TD]))
        latents_TD = objective.next_latent(states[len(prompt_LD) - 1 : -1])
    states = hidden(torch.cat([prompt_LD, latents_TD, embed(torch.tensor(written))]))
    return lm.lm_head(states[len(prompt_LD) + 3 :])


def written_of(adapter, question):
    ids = adapter.tokenizer.encode(f"### {question.answer}").ids
    return [*adapter.thinking_end_ids, *ids, adapter.eos_id]


@pytest.mark.parametrize("known_first", [False, True])
def test_the_students_loss_equals_one_without_padding_or_cache(folder, known_first):
    adapter = adapter_of(folder)
    zero = {"teacher_weight": 0.0, "distill_weight": 0.0, "step_loss": 0.0}
    objective = objective_of(folder, **zero, sweeps=1 + (not known_first), known_first=known_first)
    losses = []
    for question in QUESTIONS:
        written = written_of(adapter, question)
        logits = plain_logits(
            objective, adapter, question, written[:-1], 1 + (not known_first), known_first=known_first
        )
        losses.append(F.cross_entropy(logits, torch.tensor(written[1:]), reduction="none"))
    torch.testing.assert_close(objective.loss(QUESTIONS, FINAL), torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sweeps", [3, 5])
def test_with_as_many_sweeps_as_latents_each_is_computed_once(folder, sweeps):
    adapter = adapter_of(folder)
    objective = objective_of(folder, teacher_weight=0.0, distill_weight=0.0, step_loss=0.0, sweeps=sweeps)
    losses, right = [], 0
    for question in QUESTIONS:
        written = written_of(adapter, question)
        logits = plain_logits(objective, adapter, question, written[:-1], sweeps=3)
        losses.append(F.cross_entropy(logits, torch.tensor(written[1:]), reduction="none"))
        right += logits.argmax(-1).tolist() == written[1:]
    fed = []
    objective.lm.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(objective.loss(QUESTIONS, FINAL), torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)
    assert fed.count(1) == 2  # h_1 needs the prompt alone, and h_3 runs before the answer
    with torch.no_grad():
        assert objective.exact_matches(QUESTIONS, FINAL) == right


def test_every_part_counts_by_its_weight(folder):
    zero = {"teacher_weight": 0.0, "distill_weight": 0.0, "step_loss": 0.0}
    student = objective_of(folder, **zero).loss(QUESTIONS, FINAL)
    whole = objective_of(folder).loss(QUESTIONS, FINAL) - student
    parts = [objective_of(folder, **zero | {key: VALUES[key]}).loss(QUESTIONS, FINAL) - student for key in zero]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-5)
    assert all(part > 0 for part in parts)


def test_exact_matches_are_those_of_greedy_tokens(folder):
    adapter, objective = adapter_of(folder), objective_of(folder)
    right = 0
    with torch.no_grad():
        for question in QUESTIONS:
            written = written_of(adapter, question)
            right += plain_logits(objective, adapter, question, written[:-1]).argmax(-1).tolist() == written[1:]
        assert objective.exact_matches(QUESTIONS, FINAL) == right


def test_gradients_reach_the_guess_through_the_sweeps(folder):
    objective = objective_of(folder, teacher_weight=0.0)
    objective.lm.get_input_embeddings().weight.requires_grad_(True)
    objective.loss(QUESTIONS, FINAL).backward()
    gradient = objective.lm.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[adapter_of(folder).latent_id].abs().sum() > 0


@pytest.mark.parametrize(
    "wrong",
    [{"sweeps": 0}, {"latents": 0}, {"final_updates": -1}, {"distill_loss": "l2"}, {"projection": None},
     {"step_loss": -1}, {"stage_updates": [-1]}],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused_by_name(wrong):
    key = next(iter(wrong))
    with pytest.raises(UsageError, match=rf"\A(recipe|model)\.{key}="):
        Recipe(**VALUES | wrong)


@pytest.mark.slow
def test_train_reasoner_writes_a_checkpoint_that_runs(ltts, checkpoint, tmp_path):
    own = ["model=pccot", "model.latents=3", "model.sweeps=2", "model.answer_prompt=''", "model.known_first=true"]
    updates = ["recipe.written_updates=1", "recipe.stage_updates=[1]", "recipe.final_updates=1"]
    small = ["optimization.batch=4", "optimization.bf16=false", "valid_questions=4", f"output={tmp_path / 'out'}"]
    trained = ltts("train-reasoner", *own, *updates, *small, f"init={checkpoint}")
    assert trained.code == 0, trained.err
    assert "trained with" not in trained.err
    recorded = json.loads((trained.last / "config.json").read_text())["latent_tts"]
    assert recorded == {"latents": 3, "sweeps": 2, "known_first": True}
    result = ltts("run", *own, f"model.checkpoint={trained.last}", "sampler=greedy", "n=1", "task.limit=3")
    assert result.code == 0, result.err
    assert "trained with" not in result.err
