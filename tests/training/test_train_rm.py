"""Training LatentRM: the packed forward pass, the losses, the loop that can stop and go on, the command."""

import json
import shutil
import signal
from dataclasses import replace

import annotated
import numpy as np
import pytest
import torch
from marks import slow
from refusal import check
from safetensors.torch import load_file, save_file
from tiny import prompts, reasoner
from transformers.trainer_utils import EvalPrediction

from latent_tts.errors import RunError, UsageError
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.training.optimization import RewardOptimization
from latent_tts.training.reward_model import train as reward
from latent_tts.training.reward_model.data import MixedQuestions, collate
from latent_tts.training.reward_model.loss import RewardLoss
from latent_tts.training.reward_model.model import LatentRMModule
from latent_tts.training.states import last_state

OPTIMIZATION = RewardOptimization(
    batch=8, accumulation=1, lr=1e-2, warmup=0.1, epochs=2, weight_decay=0.01, clip=1.0, evaluations=2, patience=10
)


def rm(family: str, **kwargs) -> LatentRMModule:
    lm = reasoner(family).lm
    return LatentRMModule(lm, seed=0, **kwargs).train()


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("annotations")
    adapter = annotated.adapter_of(checkpoint)
    return adapter, annotated.write(path / "train", adapter, 32), annotated.write(path / "valid", adapter, 24, seed=1)


@pytest.fixture
def own_folder(folders, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(folders[1], tmp_path / "own")


# --- the model ---


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_packed_siblings_score_what_plain_rows_score_and_have_their_gradients(family):
    torch.manual_seed(0)
    lengths, n, latents = [3, 9, 5], 4, 5
    ids = prompts(lengths)
    packed, plain = rm(family), rm(family)
    width = packed.classifier.in_features
    latents_QNTD = torch.randn(3, n, latents, width, dtype=torch.float64)
    weight_QNT = torch.randn(3, n, latents, dtype=torch.float64)
    padded_QL = torch.zeros(3, max(lengths), dtype=torch.long)
    for q, row in enumerate(ids):
        padded_QL[q, : len(row)] = torch.tensor(row)
    logits_QNT = packed(padded_QL, torch.tensor(lengths), latents_QNTD)
    (logits_QNT * weight_QNT).sum().backward()
    for q, row in enumerate(ids):
        for i in range(n):
            words = plain.backbone.get_input_embeddings()(torch.tensor([row]))
            rows = torch.cat([words, latents_QNTD[q, i][None]], dim=1)
            hidden = plain.backbone(inputs_embeds=rows, use_cache=False).last_hidden_state
            expected_T = plain.classifier(hidden[0, len(row) :])[:, 0]
            assert (expected_T - logits_QNT[q, i]).abs().max() < 1e-9
            (expected_T * weight_QNT[q, i]).sum().backward()
    for (name, a), (_, b) in zip(packed.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-9 * max(1.0, float(b.grad.abs().max())), name


def test_gradients_of_latent_rm_are_equal_when_activations_are_computed_again():
    module, found = rm("llama"), []
    batch = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2]), torch.randn(2, 3, 2, 32).double()
    for module.recompute in (False, True):
        module.zero_grad()
        module(*batch).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_dropout_stays_off_in_training(checkpoint):
    adapter = annotated.adapter_of(checkpoint)
    assert adapter.config["resid_pdrop"] > 0
    model = reward.initial_model(adapter, "reasoner", 0).train()
    batch = collate([_item(annotated.entry(0, adapter), adapter)])
    first, second = (model(batch["prompt_QL"], batch["lengths_Q"], batch["latents_QNTD"]) for _ in range(2))
    assert torch.equal(first, second)


def test_the_backbone_begins_as_the_reasoner_or_at_random(checkpoint):
    adapter = annotated.adapter_of(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    ours = reward.initial_model(adapter, "reasoner", 0).backbone.h[0].mlp.c_fc.weight
    assert torch.equal(ours, weights)
    random = [reward.initial_model(adapter, "random", seed) for seed in (0, 0, 1)]
    first, same, other = (model.backbone.h[0].mlp.c_fc.weight for model in random)
    assert torch.equal(first, same)
    assert not torch.equal(first, weights)
    assert not torch.equal(first, other)
    assert not torch.equal(random[0].classifier.weight, random[2].classifier.weight)


def _item(entry, adapter):
    return {
        "prompt": np.array(entry.prompt_ids(adapter.latent_id)),
        "latents_NTD": entry.latents_NTD,
        "labels_NT": entry.labels_NT,
        "correct_N": entry.corrects_N,
    }


# --- the losses ---


def brute_force(name, normalize, logits_QNT, labels_QNT, correct_QN):
    """Loops over questions, steps and rollouts."""
    losses = []
    for logits_NT, labels_NT, correct_N in zip(logits_QNT, labels_QNT, correct_QN, strict=True):
        rollouts = [i for i, row in enumerate(labels_NT) if not np.isnan(row).all()]
        if name == "bce":
            terms = []
            for i in rollouts:
                for r, y in zip(logits_NT[i], labels_NT[i], strict=True):
                    if not np.isnan(y):
                        p = 1 / (1 + np.exp(-r))
                        terms.append(-y * np.log(p) - (1 - y) * np.log(1 - p))
            losses.append(np.mean(terms))
            continue
        softmaxes = []
        if name == "last_step":
            scores = [
                sum(r for r, y in zip(logits_NT[i], labels_NT[i], strict=True) if not np.isnan(y)) for i in rollouts
            ]
            softmaxes.append((scores, [float(correct_N[i]) for i in rollouts]))
        else:
            for t in range(labels_NT.shape[1]):
                there = [i for i in rollouts if not np.isnan(labels_NT[i, t])]
                if there:
                    softmaxes.append(([logits_NT[i, t] for i in there], [labels_NT[i, t] for i in there]))
        terms = []
        for scores, labels in softmaxes:
            p = np.exp(scores) / np.exp(scores).sum()
            total = sum(labels) if normalize and sum(labels) else 1.0
            terms.append(-sum(y / total * np.log(q) for y, q in zip(labels, p, strict=True)))
        losses.append(np.mean(terms))
    return np.mean(losses)


def random_batch(seed, questions=5, n=4, latents=6):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(questions, n, latents)) * 2
    labels = np.round(random.uniform(size=(questions, n, latents)), 1)
    for q in range(questions):
        for i in range(n):
            labels[q, i, random.integers(1, latents + 1) :] = np.nan  # unequal steps
    labels[0, -1] = np.nan  # a rollout fewer
    labels[1, :, 0] = 0.0  # nothing right
    correct = (random.uniform(size=(questions, n)) < 0.5) & ~np.isnan(labels).all(-1)
    return logits, labels, correct


LOSSES = [("contrastive", False), ("contrastive", True), ("bce", False), ("last_step", False), ("last_step", True)]


@pytest.mark.parametrize(("name", "normalize"), LOSSES)
def test_losses_equal_a_brute_force_over_everything(name, normalize):
    for seed in range(5):
        batch = random_batch(seed)
        loss = RewardLoss(name, normalize)(*(torch.from_numpy(part) for part in batch))
        assert loss.item() == pytest.approx(brute_force(name, normalize, *batch), rel=1e-12)


@pytest.mark.parametrize(("name", "normalize"), LOSSES)
def test_a_loss_does_not_see_padding_or_the_other_questions(name, normalize):
    loss = RewardLoss(name, normalize)
    logits, labels, correct = (torch.from_numpy(part) for part in random_batch(3))
    alone = torch.stack([loss(logits[q : q + 1], labels[q : q + 1], correct[q : q + 1]) for q in range(5)])
    torch.testing.assert_close(loss(logits, labels, correct), alone.mean(), rtol=1e-12, atol=0)
    wide = torch.nn.functional.pad(logits, (0, 3, 0, 2), value=7.0).requires_grad_()
    padded = loss(
        wide,
        torch.nn.functional.pad(labels, (0, 3, 0, 2), value=torch.nan),
        torch.nn.functional.pad(correct, (0, 2)),
    )
    torch.testing.assert_close(padded, loss(logits, labels, correct), rtol=1e-12, atol=0)
    padded.backward()
    assert wide.grad.isfinite().all()
    assert (wide.grad[:, 4:] == 0).all()
    assert (wide.grad[:, :, 6:] == 0).all()


@pytest.mark.parametrize("name", ["contrastive", "bce", "last_step"])
def test_a_rollout_or_a_question_without_a_step_teaches_nothing(name):
    loss = RewardLoss(name, False)
    logits, labels, correct = (torch.from_numpy(part) for part in random_batch(5))
    labels[2], labels[3, 0] = torch.nan, torch.nan
    logits.requires_grad_()
    value = loss(logits, labels, correct)
    value.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[3, 0] == 0).all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(value, loss(logits[others], labels[others], correct[others]) * 4 / 5)


def test_labels_count_as_they_are_unless_normalised():
    logits, labels, correct = (torch.from_numpy(part) for part in random_batch(4))
    plain, normalized = RewardLoss("contrastive", False), RewardLoss("contrastive", True)
    torch.testing.assert_close(plain(logits, labels / 2, correct), plain(logits, labels, correct) / 2)
    torch.testing.assert_close(normalized(logits, labels / 2, correct), normalized(logits, labels, correct))


def test_collating_marks_what_is_not_there(checkpoint):
    adapter = annotated.adapter_of(checkpoint)
    items = [
        _item(annotated.entry(0, adapter, steps=[3, 2, 1, 3]), adapter),
        _item(annotated.entry(3, adapter, n=2), adapter),
    ]
    batch = collate(items)
    assert batch["lengths_Q"].tolist() == [5, 8]
    assert (~batch["labels_QNT"].isnan()).sum(-1).tolist() == [[3, 2, 1, 3], [3, 3, 0, 0]]
    assert batch["prompt_QL"][1].tolist() == items[1]["prompt"].tolist()
    assert not batch["correct_QN"][1, 2:].any()
    assert (batch["latents_QNTD"][1, 2:] == 0).all()


def test_selection_takes_the_highest_score_and_of_equals_the_first():
    correct = np.array([[False, True, False], [True, False, False], [False, True, False]])
    scores = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, -np.inf]])
    found = reward.selection_accuracy(EvalPrediction(scores, correct))
    assert found == {"selection_accuracy": pytest.approx(2 / 3)}


# --- the loop ---


def train(adapter, train_path, valid_path, output, report=lambda *_: None, bf16=False, **changed):
    data, valid = (
        MixedQuestions(AnnotationFolder(path), adapter, adapter.latent_id, "annotations")
        for path in (train_path, valid_path)
    )
    model = reward.initial_model(adapter, "reasoner", 0)
    optimization = replace(OPTIMIZATION, **changed)
    arguments = reward.trainer_arguments(optimization, len(data), output, seed=0, bf16=bf16, device="cpu")
    loss = RewardLoss("contrastive", False)
    trainer = reward.train(model, loss, data, valid, optimization, arguments, report=report)
    return model, trainer


def test_a_few_updates_choose_better_than_chance(folders, tmp_path):
    _, trainer = train(*folders, tmp_path / "out", epochs=3)
    figures = trainer.evaluate()
    assert figures["eval_selection_accuracy"] > 0.85  # chance is about a half
    best = [entry for entry in trainer.state.log_history if "eval_selection_accuracy" in entry]
    assert figures["eval_selection_accuracy"] == max(entry["eval_selection_accuracy"] for entry in best)


def test_bfloat16_autocast_runs_and_keeps_the_weights_in_float32(folders, tmp_path):
    model, trainer = train(*folders, tmp_path / "out", bf16=True, epochs=1, gradient_checkpointing=True)
    assert model.recompute
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    whole, _ = train(*folders, tmp_path / "whole", epochs=1)
    difference = (model.classifier.weight - whole.classifier.weight).abs().max()
    assert 0 < difference < 0.1 * whole.classifier.weight.abs().max()
    assert trainer.evaluate()["eval_loss"] > 0


class Crash(Exception):
    pass


@pytest.mark.parametrize(("stop", "saved"), [slow(Crash, 4), (KeyboardInterrupt, 5)], ids=["crash", "ctrl-c"])
def test_a_stopped_run_resumes_to_the_same_weights(folders, tmp_path, stop, saved):
    def stop_at_5(done, figures):
        if done == 5 and stop is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        elif done == 5:
            raise stop

    with pytest.raises(stop):
        train(*folders, tmp_path / "stopped", report=stop_at_5)
    assert last_state(tmp_path / "stopped").name == f"checkpoint-{saved}"
    (tmp_path / "stopped" / "checkpoint-9").mkdir()  # cut off while it was written
    seen = []
    resumed, _ = train(*folders, tmp_path / "stopped", report=lambda done, logged: seen.append(done))
    whole, _ = train(*folders, tmp_path / "whole")
    assert seen == list(range(saved + 1, 9))
    a, b = (dict(model.named_parameters()) for model in (resumed, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)
    states = [
        json.loads((tmp_path / name / "checkpoint-8/trainer_state.json").read_text()) for name in ("stopped", "whole")
    ]
    figures = [[e.get("eval_selection_accuracy") for e in state["log_history"] if "eval_loss" in e] for state in states]
    assert figures[0] == figures[1]
    seen.clear()
    _, trainer = train(*folders, tmp_path / "stopped", report=lambda done, logged: seen.append(done))
    assert seen == []
    assert trainer.state.global_step == 8
    assert trainer.state.best_global_step == states[1]["best_global_step"]


@pytest.mark.parametrize("name", ["optimizer.pt", slow("model.safetensors")])
def test_damaged_states_are_named_and_set_aside(folders, tmp_path, caplog, name):
    whole, _ = train(*folders, tmp_path / "out")
    best = json.loads((tmp_path / "out/checkpoint-8/trainer_state.json").read_text())["best_global_step"]
    path = tmp_path / f"out/checkpoint-{best}" / name
    path.write_bytes(path.read_bytes()[:-9])
    again, _ = train(*folders, tmp_path / "out")
    assert f"checkpoint-{best} is damaged: it is now damaged-checkpoint-{best}" in caplog.text
    a, b = (dict(model.named_parameters()) for model in (again, whole))
    assert all(torch.equal(a[each], b[each]) for each in b)


def test_micro_batches_make_the_same_update(folders, tmp_path, monkeypatch):
    sizes, real = {1: [], 2: []}, RewardLoss.__call__
    trained = {}
    for accumulation, seen in sizes.items():

        def counted(self, logits, *args, seen=seen):
            seen.extend([len(logits)] if torch.is_grad_enabled() else [])
            return real(self, logits, *args)

        monkeypatch.setattr(RewardLoss, "__call__", counted)
        trained[accumulation], _ = train(*folders, tmp_path / str(accumulation), epochs=1, accumulation=accumulation)
    assert sizes == {1: [8] * 4, 2: [4] * 8}
    for (name, a), (_, b) in zip(trained[1].named_parameters(), trained[2].named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3, msg=name)


def test_questions_of_an_unequal_last_micro_batch_weigh_as_much(folders, tmp_path):
    losses = {1: [], 2: []}
    for accumulation, seen in losses.items():
        output, few = tmp_path / str(accumulation), {"batch": 12, "lr": 1e-9, "epochs": 1}
        train(
            *folders,
            output,
            lambda _, figures, seen=seen: seen.append(figures["loss"]),
            accumulation=accumulation,
            **few,
        )
    assert len(losses[1]) == 3  # of 12, 12 and 8 questions; the last micro-batches have 6 and 2
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_training_stops_when_the_choice_gets_no_better(folders, tmp_path):
    _, trainer = train(*folders, tmp_path / "out", lr=1e-9, epochs=20, patience=2)
    assert trainer.state.global_step == 3 * 2  # a first figure, and two that are no better
    seen = []
    train(*folders, tmp_path / "out", lr=1e-9, epochs=20, patience=2, report=lambda done, logged: seen.append(done))
    assert seen == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(folders, tmp_path, monkeypatch):
    calls = []
    real = RewardLoss.__call__

    def sometimes_nan(self, *args):
        calls.append(torch.is_grad_enabled())
        return real(self, *args) * (torch.nan if calls.count(True) == 6 else 1.0)

    monkeypatch.setattr(RewardLoss, "__call__", sometimes_nan)
    with pytest.raises(RunError, match=r"loss is nan at update 5; the last saved state is .*checkpoint-4"):
        train(*folders, tmp_path / "out")
    assert (tmp_path / "out/checkpoint-4/model.safetensors").is_file()


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(folders, tmp_path, monkeypatch):
    real = RewardLoss.__call__

    def rooted(self, logits, *args):  # finite, with an infinite slope
        return real(self, logits, *args) + (logits - logits.detach()).sum().abs().sqrt()

    monkeypatch.setattr(RewardLoss, "__call__", rooted)
    with pytest.raises(RunError, match=r"gradient's norm is nan at update 0; no state was saved"):
        train(*folders, tmp_path / "out")


# --- the command ---


@pytest.fixture
def command(ltts, checkpoint, folders):
    _, train_path, valid_path = folders
    return lambda *arguments: ltts(
        "train-rm", f"model.checkpoint={checkpoint}", f"model.latents={annotated.T}", "output=out",
        f"annotations={train_path}", f"valid_annotations={valid_path}", "optimization.batch=8",
        "optimization.epochs=1", "optimization.lr=1e-2", *arguments,
    )  # fmt: skip


def test_the_command_writes_the_published_layout(command, checkpoint, tmp_path):
    result = command("weights_dtype=bfloat16")
    assert result.code == 0, result.err
    assert result.last.name == "checkpoint"
    assert "32 questions with right and wrong rollouts; dropped: 1 with all right, 1 with all wrong" in result.err
    weights = load_file(tmp_path / "out/checkpoint/model.safetensors")
    lm = load_file(checkpoint / "model.safetensors")
    backbone = {name for name in weights if not name.startswith("classifier.")}
    assert backbone == {name for name in lm if name.startswith("transformer.")}
    assert weights["classifier.weight"].shape == (1, 16)
    assert weights["classifier.bias"].shape == (1,)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out/checkpoint/config.json").read_text())
    record = config.pop("latent_rm")
    assert record == {
        "reasoner": annotated.adapter_of(checkpoint).digest,
        "reasoner_name": checkpoint.name,
        "sampler": {"name": "dropout", "rate": 0.1},
        "loss": "contrastive",
        "init": "reasoner",
        "reduce": "sum",
    }
    assert config == json.loads((checkpoint / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert (tmp_path / "out/checkpoint/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert list((tmp_path / "out/states/tensorboard").glob("events*"))
    assert not (tmp_path / "runs").exists()
    state = json.loads((last_state(tmp_path / "out/states") / "trainer_state.json").read_text())
    assert f"weights of update {state['best_global_step']} of {state['global_step']}" in result.out
    again = command("weights_dtype=bfloat16")
    assert again.out == result.out  # finished: told again, not trained again
    other = command("weights_dtype=bfloat16", "seed=1")
    assert (other.code, "another seed" in other.err) == (2, True)


def test_no_epochs_write_the_untrained_latent_rm(command, checkpoint, tmp_path):
    result = command("optimization.epochs=0", "loss.name=bce")
    assert result.code == 0, result.err
    weights = load_file(tmp_path / "out/checkpoint/model.safetensors")
    lm = load_file(checkpoint / "model.safetensors")
    assert torch.equal(weights["transformer.wpe.weight"], lm["transformer.wpe.weight"])
    figures = json.loads((tmp_path / "out/train_rm.json").read_text())
    assert (figures["updates"], figures["chosen_update"]) == (0, 0)
    assert "weights of update 0 of 0" in result.out


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["valid_annotations=nosuch"], ["valid_annotations=nosuch", "no such folder"]),
        (["init=zeros"], ["init=zeros", "reasoner or random"]),
        (["weights_dtype=int8"], ["weights_dtype=int8", "float32 or bfloat16"]),
        (["loss.name=mse"], ["loss.name=mse", "contrastive, bce, last_step"]),
        (["optimization.lr=0"], ["optimization.lr=0", "positive"]),
        (["model.checkpoint=shipped:coconut_arith"], ["annotations=", "annotated with the reasoner tiny"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else None,
)
def test_bad_values(command, overrides, words):
    check(command(*overrides), *words)


def test_values_out_of_range_are_refused():
    for key, wrong in {"epochs": -1, "warmup": 1.0, "batch": 0, "patience": 0, "weight_decay": -0.1}.items():
        with pytest.raises(UsageError, match=rf"^optimization\.{key}={wrong}: "):
            replace(OPTIMIZATION, **{key: wrong})
    with pytest.raises(UsageError, match="bce has no softmax"):
        RewardLoss("bce", True)


def test_annotations_of_fewer_latents_are_refused(command):
    check(command("model.latents=5"), "annotations=", "made with model.latents=3, not 5")


def test_annotations_of_another_option_of_the_model_are_refused(command, folders, tmp_path):
    adapter = folders[0]
    own = annotated.write(tmp_path / "own", adapter, 8, eos=[1], fields={"projected": True})
    check(command(f"annotations={own}"), f"annotations={own}: its rollouts were made with model.eos=[1], not")
    fields = annotated.write(tmp_path / "fields", adapter, 8, fields={"eos": 7})
    check(
        command(f"valid_annotations={fields}"), f"valid_annotations={fields}: its rollouts were made with model.eos=7"
    )


def test_no_mixed_outcome(command, checkpoint, tmp_path):
    adapter = annotated.adapter_of(checkpoint)
    folder = annotated.write(tmp_path / "none", adapter, 0)
    check(command(f"annotations={folder}"), "annotations=", "none of its 2 questions has both right and wrong")


def test_one_rollout_a_question(command, checkpoint, tmp_path):
    adapter = annotated.adapter_of(checkpoint)
    folder = AnnotationFolder(tmp_path / "single", annotated.settings_of(adapter) | {"n": 1})
    folder.add([annotated.UnmixedQuestion("a", 0, "all_correct", 1), annotated.UnmixedQuestion("b", 1, "all_wrong", 1)])
    folder.finish()
    check(command(f"annotations={tmp_path / 'single'}"), "annotations=", "one rollout", "n=2 or more")


def test_a_shard_that_is_cut_off_or_has_another_bit(command, own_folder):
    shard = own_folder / "1_on0.safetensors"
    good = shard.read_bytes()
    for bad in (good[:-100], good[:-1] + bytes([good[-1] ^ 1])):
        shard.write_bytes(bad)
        check(command(f"annotations={own_folder}"), "1_on0.safetensors: is damaged")


def test_a_loss_that_is_not_finite_is_exit_1(command, monkeypatch):
    monkeypatch.setattr(RewardLoss, "__call__", lambda self, logits, *args: logits.sum() * torch.nan)
    result = command()
    assert result.code == 1
    assert "the loss is nan at update 0" in result.err
    assert "Traceback" not in result.err


def test_a_prompt_of_ours_may_begin_with_the_end_token(folders, monkeypatch):
    adapter, path = folders[:2]

    def first_ids() -> list[int]:
        questions = MixedQuestions(AnnotationFolder(path), adapter, adapter.latent_id, "annotations")
        return questions[0]["prompt"].tolist()

    prompt = first_ids()
    monkeypatch.setattr(type(adapter), "eos_id", prompt[0])
    assert first_ids() == prompt


def test_official_shards_can_be_trained_on(command, folders, tmp_path):
    official = tmp_path / "official"
    official.mkdir()
    for shard in folders[1].glob("*.safetensors"):
        save_file(load_file(shard), official / shard.name)  # without our record
    result = command(f"annotations={official}", "optimization.epochs=0")
    assert result.code == 0, result.err
    assert "do not name their reasoner" in result.err
    assert "annotations: 32 questions\n" in result.err
