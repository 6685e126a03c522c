"""COCONUT's curriculum, the latent forward pass with gradients, and a loop that can stop and go on."""

import json
import os
import pickle
import re
import shutil
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import resumed
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.errors import RunError, UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.random.draw import Draw
from latent_tts.recipe.coconut import Coconut as Recipe
from latent_tts.sampler.greedy import Greedy
from latent_tts.task.arith import Arith, words
from latent_tts.training.optimization import ReasonerOptimization
from latent_tts.training.reasoner import coconut
from latent_tts.training.reasoner import train as training
from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer
from latent_tts.training.reasoner.batch import encode_batch, question_batches, token_batches, token_loss
from latent_tts.training.reasoner.curriculum import Stage, written_text
from latent_tts.training.states import last_state, write_digests

CPU = torch.device("cpu")
RECIPE = Recipe(written_updates=3, stage_updates=[2, 2], final_updates=3, final_dropout=None, latents=3, step_loss=0.5)
OPTIMIZATION = ReasonerOptimization(
    batch=4, accumulation=1, lr=1e-2, cosine_updates=10, warmup=2, weight_decay=0.01, clip=1.0, bf16=False
)


def test_a_new_backbone_is_written_without_a_bar_of_transformers(tmp_path, capfd):
    logging.enable_progress_bar()
    backbone = BackboneConfig(layers=1, width=16, heads=2, positions=32, dropout=0.0, number_scale=0.5)
    backbone.create(word_level_tokenizer(words()), tmp_path, seed=3)
    assert capfd.readouterr().err == ""


@pytest.fixture
def adapter(checkpoint):
    return Coconut(name="tiny", checkpoint=str(checkpoint), latents=3, recommended={})


def train(adapter, output, recipe=RECIPE, optimization=OPTIMIZATION, **more):
    return resumed.train(recipe, adapter, output, optimization, **more)


def weights(states):
    return load_file(last_state(states) / "model.safetensors")


def test_stages_hide_one_step_more_each_and_end_without_any():
    stages = RECIPE.stages()
    assert [(s.updates, s.latents, s.hidden_steps) for s in stages] == [(3, 0, 0), (2, 1, 1), (2, 2, 2), (3, 3, None)]
    assert [RECIPE.stage_at(update).latents for update in range(10)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert RECIPE.updates == 10


def test_written_text_leaves_out_the_hidden_steps():
    steps = ("<<1+2=3>>", "<<3*4=12>>")
    assert written_text(steps, "12", Stage(1, 0, 0)) == "<<1+2=3>>\n<<3*4=12>>\n### 12"
    assert written_text(steps, "12", Stage(1, 1, 1)) == "<<3*4=12>>\n### 12"
    assert written_text(steps, "12", Stage(1, 2, None)) == "### 12"


@pytest.mark.parametrize(
    "wrong", [{"latents": 1}, {"final_updates": -1}, {"stage_updates": [-1]}, {"step_loss": -1}, {"final_dropout": 1.0}]
)
def test_a_recipe_refuses_bad_values(wrong):
    values = {
        "written_updates": 1,
        "stage_updates": [1, 1],
        "final_updates": 1,
        "final_dropout": None,
        "latents": 2,
        "step_loss": 0.5,
    }
    values |= wrong
    with pytest.raises(UsageError):
        Recipe(**values)


@pytest.mark.parametrize("latents", [0, 1, 3])
def test_the_padded_batch_computes_what_the_engine_computes(adapter, latents):
    questions = Arith("valid", 5, None, 0).questions()
    stage = Stage(1, latents, None)
    objective = coconut.CoconutObjective(adapter, 0.0)
    objective.lm.eval()
    batch = encode_batch(adapter, questions, stage, CPU)
    assert batch.prompt_mask_QL.sum(1).unique().numel() > 1  # prompts of unequal length
    predicted = objective.logits(batch, latents)[0].argmax(-1)[:, 0].tolist()
    engine = Engine(
        adapter.load(device="cpu", dtype="float32"),
        RolloutPlan(latents, adapter.thinking_end_ids, eos_id=-1, max_answer_tokens=1),
    )
    draw = Draw.of(0, [q.id for q in questions], torch.zeros(5, 1, dtype=torch.long), engine.width)
    rollouts = engine.roll([adapter.encode(q) for q in questions], draw, Greedy())
    assert predicted == [ids[0] for ids in rollouts.answer_ids]


@pytest.mark.every_other
@pytest.mark.parametrize("scale", [1, 1000])  # numbers above 200 have several tokens
@pytest.mark.parametrize("latents", [0, 1, 4])
def test_passes_over_the_cache_lose_what_whole_passes_lose(adapter, latents, scale):
    """The loss and its gradients, beside a pass over the whole row for every latent, one question after the other."""
    questions, stage = Arith("valid", 5, None, 0).questions(), Stage(1, latents, min(latents, 1))
    questions[0] = replace(questions[0], steps=(f"<<{scale}*3={scale * 3}>>", *questions[0].steps[1:]))
    objective = coconut.CoconutObjective(adapter, 0.5)
    lm, embed, encode = objective.lm.double().eval(), objective.lm.get_input_embeddings(), adapter.tokenizer.encode
    loss = objective.loss(questions, stage)
    loss.backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    written, results = [], []
    for question in questions:
        row, thoughts = embed(torch.tensor([adapter.encode(question)])), []
        for _ in range(latents):
            thoughts.append(lm.base_model(inputs_embeds=row, use_cache=False).last_hidden_state[0, -1])
            row = torch.cat([row, thoughts[-1][None, None]], dim=1)
        text = encode(written_text(question.steps, question.answer, stage)).ids
        ids = torch.tensor([*adapter.thinking_end_ids, *text, adapter.eos_id])
        hidden = lm.base_model(inputs_embeds=torch.cat([row, embed(ids)[None]], 1), use_cache=False).last_hidden_state
        end = len(adapter.thinking_end_ids)
        logits = lm.lm_head(hidden[0, row.shape[1] + end - 1 : -1])
        written.append(F.cross_entropy(logits, ids[end:], reduction="none"))
        if thoughts:
            named = [*(step.rpartition("=")[2].removesuffix(">>") for step in question.steps), *[question.answer] * 4]
            prompt = len(adapter.encode(question))
            for step, result in enumerate(named[:latents]):
                ids = torch.tensor(encode(result).ids)
                inputs = torch.cat([row[:, : prompt + step], embed(ids[None, :-1])], 1)
                hidden = lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
                logits = lm.lm_head(hidden[prompt + step - 1 :])
                results.append(F.cross_entropy(logits, ids, reduction="none"))
    plain = torch.cat(written).mean() + (0.5 * torch.cat(results).mean() if results else 0.0)
    plain.backward()
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=0)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_prompt_through_every_latent(adapter):
    questions = Arith("valid", 3, None, 0).questions()
    objective = coconut.CoconutObjective(adapter, 0.0)
    batch = encode_batch(adapter, questions, Stage(1, 3, None), CPU)
    token_loss(objective.logits(batch, 3)[0], batch.targets_QA).backward()
    word = int(batch.prompt_QL[0, -3])
    assert objective.lm.transformer.wte.weight.grad[word].abs().sum() > 0


def test_each_latent_is_asked_for_its_steps_result_and_then_for_the_answer(adapter):
    question = next(q for q in Arith("valid", 50, [2], 0).stream())
    batch = encode_batch(adapter, [question], Stage(1, 4, None), CPU)
    first = question.steps[0].rpartition("=")[2].removesuffix(">>")
    assert adapter.tokenizer.decode(batch.results_QTR[0, :, 0].tolist()) == first + question.answer * 3
    with_steps, without = (coconut.CoconutObjective(adapter, weight) for weight in (1.0, 0.0))
    with_steps.lm.eval()
    without.lm.eval()
    losses = [objective.loss([question], Stage(1, 4, None)) for objective in (with_steps, without)]
    assert losses[0] > losses[1]


def test_updates_are_those_of_the_loop_before_it_was_shared_by_families(adapter, tmp_path):
    """Losses of the first published loop, which trained the shipped reasoner, on this tiny one."""
    losses = []
    train(
        adapter,
        tmp_path / "out",
        replace(RECIPE, final_dropout=0.3),
        report=lambda done, figures: losses.append(figures["loss"]),
    )
    published = [7.62381, 7.09488, 6.68808, 9.02281, 8.57428, 9.12849, 9.74959, 9.78673, 9.6843, 9.35716]
    assert losses == pytest.approx(published, rel=1e-3)


@pytest.mark.slow  # the losses of the test above are exact
def test_the_loss_falls(adapter, tmp_path):
    long = Recipe(written_updates=60, stage_updates=[], final_updates=0, final_dropout=None, latents=3, step_loss=0.0)
    losses = []
    slower = replace(OPTIMIZATION, cosine_updates=60)
    train(
        adapter,
        tmp_path / "out",
        long,
        slower,
        save_every=60,
        report=lambda done, figures: losses.append(figures["loss"]),
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Crash(Exception):
    pass


@pytest.mark.parametrize(("stop", "saved"), [(Crash, 4), slow(KeyboardInterrupt, 5)], ids=["crash", "ctrl-c"])
def test_a_stopped_run_resumes_to_the_same_weights(adapter, tmp_path, stop, saved):
    def stop_at_5(done, figures):
        if done == 5 and stop is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        elif done == 5:
            raise stop

    with pytest.raises(stop) as stopped:
        train(adapter, tmp_path / "stopped", report=stop_at_5)
    assert last_state(tmp_path / "stopped").name == f"checkpoint-{saved}"
    if stop is KeyboardInterrupt:
        assert str(stopped.value) == (
            f"the state after update 5 of 10 is saved in {tmp_path / 'stopped'}; re-run the command to resume"
        )
    (tmp_path / "stopped/checkpoint-9").mkdir()  # cut off while it was written
    losses = {"stopped": {}, "whole": {}}
    for name, seen in losses.items():
        train(adapter, tmp_path / name, report=lambda done, figures, seen=seen: seen.update({done: figures["loss"]}))
    assert list(losses["stopped"]) == list(range(saved + 1, 11))
    assert losses["stopped"].items() <= losses["whole"].items()
    a, b = (weights(tmp_path / name) for name in ("stopped", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "digests.json"])
def test_a_damaged_state_is_named_and_set_aside(adapter, tmp_path, caplog, name):
    def stop_at_5(done, figures):
        if done == 5:
            raise Crash

    with pytest.raises(Crash):
        train(adapter, tmp_path / "stopped", report=stop_at_5)
    path = tmp_path / "stopped/checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-9])
    train(adapter, tmp_path / "stopped")
    assert f"{path.parent} is damaged: it is now damaged-checkpoint-4" in caplog.text
    train(adapter, tmp_path / "whole")
    a, b = (weights(tmp_path / each) for each in ("stopped", "whole"))
    assert all(torch.equal(a[each], b[each]) for each in b)


def no_pickle(state):
    (state / "optimizer.pt").write_bytes(pickle.dumps(os.getcwd, protocol=2))


def no_weights(state):
    save_file(
        {name: value[:1] for name, value in load_file(state / "model.safetensors").items()}, state / "model.safetensors"
    )


@pytest.mark.parametrize("spoil", [no_pickle, no_weights])
def test_a_state_that_is_none_is_named_though_its_digests_fit(adapter, tmp_path, spoil):
    def stop_at_5(done, figures):
        if done == 5:
            raise Crash

    with pytest.raises(Crash):
        train(adapter, tmp_path / "stopped", report=stop_at_5)
    state = tmp_path / "stopped" / "checkpoint-4"
    spoil(state)
    write_digests(state)
    with pytest.raises(UsageError, match=r"checkpoint-4: cannot be resumed from .*\nremove it to resume"):
        train(adapter, tmp_path / "stopped")


def test_a_finished_run_is_not_trained_again(adapter, tmp_path):
    train(adapter, tmp_path / "out")
    updates = []
    train(adapter, tmp_path / "out", report=lambda done, figures: updates.append(done))
    assert updates == []


def test_an_update_in_micro_batches_has_the_mean_of_their_gradients(adapter, tmp_path):
    recipe = replace(RECIPE, written_updates=1, stage_updates=[], final_updates=0, final_dropout=None)
    adapter = replace(adapter, checkpoint=str(shutil.copytree(adapter.folder, tmp_path / "no dropout")))
    config = json.loads((adapter.folder / "config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    (adapter.folder / "config.json").write_text(json.dumps(config))
    optimization, losses = replace(OPTIMIZATION, accumulation=2), []
    seen = train(
        adapter, tmp_path / "out", recipe, optimization, report=lambda done, figures: losses.append(figures["loss"])
    )
    assert seen.state.global_step == 1
    objective = recipe.objective(adapter)
    questions = next(question_batches(Arith("train", None, None, 0).stream(), 4))
    parts = [objective.loss(half, Stage(1, 0, 0)) for half in (questions[:2], questions[2:])]
    assert losses == [pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-6)]
    (sum(parts) / 2).backward()
    named = dict(objective.lm.named_parameters())
    torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=5e-3,
        betas=(0.9, 0.98),
    )
    optimizer.step()
    for name, value in weights(tmp_path / "out").items():
        torch.testing.assert_close(value, named[name.removeprefix("lm.")].data, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(adapter, tmp_path, monkeypatch):
    real = coconut.CoconutObjective.loss
    calls = []

    def sometimes_nan(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(coconut.CoconutObjective, "loss", sometimes_nan)
    with pytest.raises(RunError, match=r"loss is nan at update 3; the last saved state is .*checkpoint-3"):
        train(adapter, tmp_path / "out")
    assert weights(tmp_path / "out")


def test_batches_are_of_like_length_and_lose_no_question():
    stream = Arith("train", None, None, 0).stream()
    first = list(islice(Arith("train", None, None, 0).stream(), 64))
    batches = list(islice(question_batches(stream, 8), 8))
    assert sorted(q.id for batch in batches for q in batch) == sorted(q.id for q in first)
    spread = [max(len(q.text) for q in batch) - min(len(q.text) for q in batch) for batch in batches]
    assert max(spread) < max(len(q.text) for q in first) - min(len(q.text) for q in first)


def lengths(question):
    words = len(question.text.split())
    return words, 3 + 4 * len(question.steps)


def by_tokens(seed=0, parts=1, tokens=200, most=100):
    stream = Arith("train", None, None, 0).stream()
    return token_batches(stream, questions=most, tokens=tokens, parts=parts, lengths=lengths, seed=seed)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(tokens=st.integers(250, 600), parts=st.integers(1, 3), most=st.integers(3, 20))
def test_batches_by_tokens_stay_below_their_limits_and_lose_no_question(tokens, parts, most):
    batches = list(islice(by_tokens(0, parts, tokens, most), 50))
    for batch in batches:
        assert parts <= len(batch) <= most
        micro_batches = training.MicroBatches(iter([batch]), parts, 1)
        questions = [micro_batches[part]["questions"] for part in range(parts)]
        assert [question for piece in questions for question in piece] == batch
        pieces = [list(map(lengths, piece)) for piece in questions]
        assert sum(len(piece) * sum(map(max, zip(*piece, strict=True))) for piece in pieces) <= tokens
    drawn = [question.id for batch in batches for question in batch]
    assert len(set(drawn)) == len(drawn)
    first = [q.id for q in islice(Arith("train", None, None, 0).stream(), len(drawn) // 2)]
    assert set(first) <= set(drawn)


def test_batches_by_tokens_are_keyed_and_of_like_length():
    one, again, other = ([[q.id for q in b] for b in islice(by_tokens(seed), 8)] for seed in (0, 0, 1))
    assert one == again != other
    batches = list(islice(by_tokens(), 16))
    filled = [len(b) * sum(map(max, zip(*map(lengths, b), strict=True))) for b in batches]
    real = [sum(sum(lengths(q)) for q in b) for b in batches]
    assert sum(real) > 0.85 * sum(filled)
    assert sum(filled) > 0.7 * 200 * len(batches)


def test_a_question_that_fills_an_update_alone_is_refused_where_it_has_micro_batches():
    with pytest.raises(UsageError, match=r"optimization\.batch_tokens=60: must be \d+ or more: question .* 4 micro"):
        next(by_tokens(parts=4, tokens=60))


def test_an_update_by_tokens_weighs_its_questions_alike(adapter, tmp_path):
    recipe = replace(RECIPE, written_updates=1, stage_updates=[], final_updates=0, step_loss=0.0)
    optimization = replace(OPTIMIZATION, accumulation=2, batch=8, batch_tokens=500)
    sizes, losses, real = [], [], coconut.CoconutObjective.loss

    def loss(self, questions, stage):
        sizes.append(len(questions))
        losses.append(real(self, questions, stage))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coconut.CoconutObjective, "loss", loss)
        told = []
        train(adapter, tmp_path / "out", recipe, optimization, report=lambda done, figures: told.append(figures))
    assert sizes[0] + 1 == sizes[1]
    mean = (sizes[0] * losses[0] + sizes[1] * losses[1]).item() / sum(sizes)
    assert told[0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_train_reasoner_writes_a_checkpoint_that_runs(ltts, tmp_path):
    line = (
        "train-reasoner", "output=out", "recipe.written_updates=2", "recipe.stage_updates=[1]",
        "recipe.final_updates=1", "backbone.layers=1", "backbone.width=16", "backbone.heads=2",
        "optimization.batch=4", "valid_questions=4",
    )  # fmt: skip
    result = ltts(*line)
    assert result.code == 0, result.err
    assert result.last.name == "checkpoint"
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "out/checkpoint/model.safetensors").values())
    assert json.loads((tmp_path / "out/checkpoint/config.json").read_text())["latent_tts"] == {"latents": 6}
    run = ltts("run", "model.checkpoint=out/checkpoint", "task.limit=2", "n=2", "budget=fixed", "max_answer_tokens=3")
    assert run.code == 0, run.err
    assert ltts(*line).code == 0  # finished: re-running does no harm
    assert ltts(*line, "seed=1").code == 2  # another run in the same folder


SMALL = (
    "recipe.written_updates=2", "recipe.stage_updates=[]", "recipe.final_updates=1", "backbone.layers=1",
    "backbone.width=16", "backbone.heads=2", "optimization.batch=4", "valid_questions=4",
)  # fmt: skip


@pytest.mark.slow
def test_questions_that_a_run_resumes_with_are_told_from_their_texts(ltts, place, checkpoint):
    def write(answer):
        rows = [{"question": f"{n} + 1 ?", "steps": [f"{n} + 1 = {n + 1}"], "answer": n + answer} for n in range(20)]
        Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(answer=1)
    Path("link.jsonl").symlink_to("q.jsonl")
    own = [word for word in SMALL if not word.startswith("backbone")]
    line = ["train-reasoner", "output=out", *own, f"init={checkpoint}", "task=jsonl", "task.split=train"]
    for path in ("q.jsonl", "link.jsonl", place / "q.jsonl"):
        done = ltts(*line, f"task.path={path}")
        assert done.code == 0, done.err
    write(answer=2)
    done = ltts(*line, "task.path=q.jsonl")
    assert (done.code, "contains a run with another question_set" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("model.checkpoint=somewhere", "init=somewhere"),
        ("device=gpu", "one of auto, cpu, cuda, cuda:INDEX"),
        ("device=cuda:64", "CUDA devices; device=cpu works"),
        ("optimization.accumulation=3", "must divide optimization.batch=4"),
    ],
)
def test_what_cannot_be_trained_is_refused(ltts, tmp_path, wrong, said):
    result = ltts("train-reasoner", "output=out", *SMALL, wrong)
    assert result.code == 2
    assert wrong in result.err
    assert said in result.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_weights(ltts, monkeypatch, tmp_path):
    def command(output):
        return ltts("train-reasoner", *SMALL, "recipe.written_updates=10", f"output={output}", "device=cpu")

    compute_loss, calls = training.ReasonerTrainer.compute_loss, []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return compute_loss(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training.ReasonerTrainer, "compute_loss", interrupted)
        stopped = command("stopped")
    assert stopped.code == 130, stopped.err
    told = r"interrupted: the state after update (\d+) of 11 is saved in .*; re-run the command"
    found = re.search(told, stopped.err)
    assert found, stopped.err
    assert last_state(tmp_path / "stopped/states").name == f"checkpoint-{found[1]}"
    for output in ("stopped", "whole"):
        done = command(output)
        assert done.code == 0, done.err
    assert 1 <= int(found[1]) < 11
    a, b = (weights(tmp_path / name / "states") for name in ("stopped", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_accelerate_is_configured_for_does_not_change_a_training(monkeypatch, tmp_path):
    def arguments(**more):
        return training.trainer_arguments(replace(OPTIMIZATION, **more), tmp_path, seed=0, device="cpu")

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert arguments().mixed_precision == "no"
    assert arguments(bf16=True).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate launch with FSDP: each process has to hold the whole model"):
        arguments()
