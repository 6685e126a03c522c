"""CoLaR's objective against a slow and plain one, and its training from the command line."""

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from resumed import check_resume
from safetensors.torch import load_file

from latent_tts.errors import UsageError
from latent_tts.model.colar import Colar
from latent_tts.recipe.colar import Colar as Recipe
from latent_tts.task.arith import Arith, words
from latent_tts.training.reasoner.colar import compress, encode_slots
from latent_tts.training.reasoner.initial import copy_checkpoint, write_initial_checkpoint

CPU = torch.device("cpu")
VALUES: dict[str, Any] = {
    "written_updates": 2,
    "final_updates": 3,
    "final_dropout": None,
    "speed": 5,
    "latents": 9,
    "latent_loss": "mse",
    "latent_weight": 0.7,
    "latent_noise": 0.0,
    "head_hidden": 24,
}


def recipe_with(changes: dict[str, Any]) -> Recipe:
    return Recipe(**VALUES | changes)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colar") / "initial"
    write_initial_checkpoint(partial(copy_checkpoint, checkpoint), folder, Recipe(**VALUES), seed=1)
    return folder


def adapter_of(folder, speed=5):
    return Colar(name="colar", checkpoint=str(folder), latents=9, recommended={}, thinking_speed=speed)


def plain_loss(objective, adapter, questions, speed, weight):
    """The loss, one question after the other, without padding; means are over all slots and over all latents."""
    lm, embed, encode = objective.lm, objective.lm.get_input_embeddings(), adapter.tokenizer.encode
    entropies, distances = [], []
    for question in questions:
        steps = encode("".join(f"{step}\n" for step in question.steps)).ids
        written = [*encode(f"###Answer:{question.answer}").ids, adapter.eos_id]
        bags = [steps[start : start + speed] for start in range(0, len(steps), speed)]
        latents = [embed(torch.tensor(bag)).sum(0) / math.sqrt(len(bag)) for bag in bags]
        vectors = torch.cat([embed(torch.tensor(adapter.encode(question))), torch.stack(latents)])
        vectors = torch.cat([vectors, embed(torch.tensor(written))])
        hidden = lm.base_model(inputs_embeds=vectors[None], use_cache=False).last_hidden_state[0]
        first = len(adapter.encode(question)) - 1
        for place, bag in enumerate([*bags, *([token] for token in written)]):
            logprob_V = lm.lm_head(hidden[first + place]).log_softmax(-1)
            entropies.append(-logprob_V[bag].mean())
        for place, latent in enumerate(latents):
            predicted = objective.head["mean"](objective.head["fc"](hidden[first + place]))
            target = latent / adapter.latent_std
            if "log_std" in objective.head:
                spread = objective.head["log_std"](objective.head["fc"](hidden[first + place])).exp()
                likelihood = torch.distributions.Normal(predicted, spread).log_prob(target) + math.log(2 * math.pi) / 2
                distances.append(-likelihood.mean())
            else:
                distances.append(((predicted - target) ** 2).mean())
    return torch.stack(entropies).mean() + weight * torch.stack(distances).mean()


@pytest.mark.parametrize("stage", [0, 1])
def test_the_loss_equals_one_without_padding(folder, stage):
    questions, recipe = Arith("valid", 5, None, 0).questions(), Recipe(**VALUES)
    objective = recipe.objective(adapter_of(folder))
    objective.lm.double().eval()
    objective.own.double().eval()
    speed = recipe.stages()[stage].speed
    assert len({len(q.steps) for q in questions}) > 1  # so that there is padding, and bags that are not full
    slow = plain_loss(objective, adapter_of(folder, speed), questions, speed, weight=0.7)
    fast = objective.loss(questions, recipe.stages()[stage])
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)


def test_a_head_with_a_spread_is_trained_by_its_likelihood(folder, tmp_path):
    recipe = recipe_with({"latent_loss": "nll"})
    write_initial_checkpoint(
        partial(copy_checkpoint, folder), tmp_path / "initial", recipe, seed=1
    )  # the head is there, its spread not
    questions, adapter = Arith("valid", 4, None, 0).questions(), adapter_of(tmp_path / "initial")
    objective = recipe.objective(adapter)
    objective.lm.double().eval()
    objective.own.double().eval()
    for parameter in objective.head["log_std"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    slow = plain_loss(objective, adapter, questions, 5, weight=0.7)
    fast = objective.loss(questions, recipe.stages()[-1])
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    kept = load_file(folder / "model.safetensors")["lt_head.mean.weight"]
    assert torch.equal(load_file(tmp_path / "initial/model.safetensors")["lt_head.mean.weight"], kept)


def test_a_compressed_embedding_keeps_the_spread_of_embeddings():
    embeddings_QSCD = torch.randn(50, 2, 8, 64)
    mask_QSC = torch.ones(50, 2, 8, dtype=torch.long)
    mask_QSC[:, 1, 3:] = 0
    result_QSD = compress(embeddings_QSCD, mask_QSC)
    assert result_QSD[:, 0].std() == pytest.approx(1.0, abs=0.05)
    assert result_QSD[:, 1].std() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(result_QSD[:, 1], embeddings_QSCD[:, 1, :3].sum(1) / math.sqrt(3))


def test_the_slots_are_the_steps_in_stretches_then_the_end_then_the_answer(folder):
    question = next(q for q in Arith("valid", None, [2], 0).stream())
    slots = encode_slots(adapter_of(folder), [question], 5, CPU)
    bags = [ids[: int(mask.sum())].tolist() for ids, mask in zip(slots.bag_QSC[0], slots.bag_mask_QSC[0], strict=True)]
    decoded = [adapter_of(folder).answer_text(bag) for bag in bags]
    assert "".join(decoded[: int(slots.latent_QS.sum())]) == "".join(f"{step}\n" for step in question.steps)
    assert [len(bag) for bag in bags[:4]] == [5, 5, 5, 1]  # two steps of eight tokens
    assert decoded[4:] == ["###", "Answer", ":", question.answer, "<|endoftext|>"]


def test_the_targets_of_the_head_get_no_gradient_and_the_head_does(folder):
    recipe = Recipe(**VALUES)
    objective, questions = recipe.objective(adapter_of(folder)), Arith("valid", 3, None, 0).questions()
    objective.loss(questions, recipe.stages()[-1]).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in objective.own.parameters()
    )
    noisy = recipe_with({"latent_noise": 0.5}).objective(adapter_of(folder))
    noisy.lm.eval()
    objective.lm.eval()
    torch.manual_seed(0)
    assert noisy.loss(questions, recipe.stages()[-1]) != objective.loss(questions, recipe.stages()[-1])


def test_validation_leaves_the_training_attention_as_it_was(folder):
    recipe = Recipe(**VALUES)
    objective, questions = recipe.objective(adapter_of(folder)), Arith("valid", 4, None, 0).questions()
    objective.lm.eval()
    before = objective.loss(questions, recipe.stages()[-1])
    with torch.no_grad():
        assert objective.exact_matches(questions, recipe.stages()[-1]) in range(5)
    assert torch.equal(before, objective.loss(questions, recipe.stages()[-1]))


def test_a_word_level_vocabulary_gets_the_words_of_the_prompt_and_keeps_its_own(checkpoint, folder):
    old, new = (Colar("c", str(path), 9, {}).tokenizer for path in (checkpoint, folder))
    question = Arith("valid", 1, None, 0).questions()[0]
    adapter = adapter_of(folder)
    assert new.token_to_id("<|unknown|>") not in adapter.encode(question)
    assert adapter.tokenizer.encode("Answer:42").tokens == ["Answer", ":", "42"]
    a = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"]
    b = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    for token in [*words(), "42", "###", "<|endoftext|>", "<|latent|>"]:
        assert torch.equal(a[old.token_to_id(token)], b[new.token_to_id(token)])
    assert b.shape[0] == new.get_vocab_size() > a.shape[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"speed": 0},
        {"latents": 0},
        {"written_updates": -1},
        {"final_updates": 1.5},
        {"latent_weight": -1},
        {"latent_loss": "l1"},
        {"latent_noise": "some"},
        {"head_hidden": 0},
        {"final_dropout": 1},
    ],
)
def test_bad_values_are_refused_by_name(wrong):
    (key,) = wrong
    with pytest.raises(UsageError, match={"speed": "model.thinking_speed=", "latents": "model.latents="}.get(key, key)):
        recipe_with(wrong)


@pytest.mark.slow  # the loop is shared: test_training.py has a quick twin
def test_a_stopped_run_resumes_to_the_same_weights(folder, tmp_path):
    recipe = recipe_with({"latent_noise": 0.3})
    check_resume(recipe, adapter_of(folder), tmp_path, "own.lt_head.mean.weight")


@pytest.mark.slow
def test_train_reasoner_from_scratch_writes_a_colar_checkpoint_that_runs(ltts, tmp_path):
    line = (
        "train-reasoner", "model=colar", "output=out", "recipe.written_updates=1", "recipe.final_updates=2",
        "model.latents=3", "model.thinking_speed=8", "backbone.layers=1", "backbone.width=16", "backbone.heads=2",
        "optimization.batch=4", "valid_questions=4",
    )  # fmt: skip
    result = ltts(*line)
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "out/checkpoint/config.json").read_text())
    assert config["latent_tts"] == {"thinking_speed": 8}
    assert config["latent_embedding_std"] > 0
    run = ltts(
        "run", "budget=fixed", "model=colar", "model.checkpoint=out/checkpoint", "model.latents=3",
        "model.thinking_speed=8", "task.limit=2", "n=2", "max_answer_tokens=3",
    )  # fmt: skip
    assert run.code == 0, run.err
