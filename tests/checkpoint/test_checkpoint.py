"""Checkpoint folders and hub ids: what is checked before any weight is loaded, and that what passes loads."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from refusal import check, check_refused
from safetensors.torch import load_file, save_file
from tiny import SHAPE
from training_code import ANSWER, LATENTS, edit_json, plain_rollout
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from latent_tts.checkpoint import files, loading
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi

PARITY = Path(__file__).parents[1] / "parity"
FAMILIES = {"coconut": Coconut, "codi": Codi}


def adapter(kind: str, folder: Path, latents: int = 6, **more) -> CheckpointAdapter:
    return FAMILIES[kind](name=kind, checkpoint=str(folder), latents=latents, recommended={}, **more)


@pytest.fixture(params=["coconut", "codi"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    """A copy of a published layout."""
    return shutil.copytree(PARITY / kind, tmp_path / kind, ignore=shutil.ignore_patterns("expected*", "sampling*"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whether there is a network changes nothing."""
    monkeypatch.setattr("latent_tts.errors._answers", lambda *_: False)


@pytest.fixture
def nothing_loads(monkeypatch):
    """Loading weights is a failure."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_causal_lm", fail)
    monkeypatch.setattr(loading, "load_tensors", fail)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split the weights of a folder into shards with an index; returns its weight_map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % count}-of-0000{count}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in sorted(set(places.values())):
        save_file({name: weights[name] for name in places if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


# --- what is wrong


@pytest.mark.parametrize(
    ("model", "folder", "words"),
    [
        ("coconut", "codi", ["CODI", "with projector.*", "COCONUT"]),
        ("codi", "coconut", ["COCONUT", "without projector.*", "CODI"]),
    ],
)
def test_a_checkpoint_of_another_family(place, nothing_loads, model, folder, words):
    check_refused("run", f"model={model}", f"model.checkpoint={PARITY / folder}", words=words)


def test_a_latent_rm_or_a_colar_checkpoint_is_no_reasoner_of_these_families(kind, folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("projector.")}
    for prefix, family in (("classifier.", "LatentRM"), ("lt_head.mean.", "CoLaR")):
        save_file(weights | {f"{prefix}weight": torch.ones(1, 64)}, folder / "model.safetensors")
        with pytest.raises(UsageError, match=f"holds a {family} checkpoint"):
            adapter(kind, folder).check()


def test_a_projector_of_another_width(place, nothing_loads, tmp_path):
    folder = shutil.copytree(PARITY / "codi", tmp_path / "codi")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"projector.1.weight": torch.ones(48, 32)}, folder / "model.safetensors")
    words = ["projector.1.weight", "[48, 32]", "[48, 64]"]
    check_refused("run", "model=codi", f"model.checkpoint={folder}", words=words)


def test_a_projector_that_is_not_whole(tmp_path):
    folder = shutil.copytree(PARITY / "codi", tmp_path / "codi")
    weights = load_file(folder / "model.safetensors")
    del weights["projector.4.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"lacks projector\.4\.bias"):
        adapter("codi", folder).check()


@pytest.mark.parametrize("token", ["<|latent|>", "<|start-latent|>", "<|end-latent|>"])
def test_a_missing_special_token(kind, folder, nothing_loads, token):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    kept = [added for added in tokenizer["added_tokens"] if added["content"] != token]
    edit_json(folder / "tokenizer.json", added_tokens=kept)
    with pytest.raises(UsageError) as error:
        adapter(kind, folder).check()
    assert token in str(error.value)
    assert error.value.exit_code == 2


def test_a_truncated_file(kind, folder, nothing_loads):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="truncated"):
        adapter(kind, folder).check()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("a shard cut off", "truncated"), ("no shard", "lacks model-00002"), ("another shard", "lacks .*, which model"),
     ("no map", "no weight_map"), ("a path", "no file of the folder")],
)  # fmt: skip
def test_shards_that_are_not_whole(folder, kind, nothing_loads, fault, words):
    places = shard(folder)
    index, second = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    if fault == "a shard cut off":
        second.write_bytes(second.read_bytes()[:-1])
    elif fault == "no shard":
        second.unlink()
    elif fault == "another shard":
        shutil.copyfile(folder / "model-00001-of-00003.safetensors", second)
    elif fault == "no map":
        index.write_text("{}")
    else:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(places, "../model.safetensors")}))
    with pytest.raises(UsageError, match=words):
        adapter(kind, folder).check()


@pytest.mark.parametrize("content", ["", "{}\n"])
def test_an_empty_config(folder, kind, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json is empty; copy the config\.json of the model that was"):
        adapter(kind, folder).check()


def test_another_number_of_latents_than_in_training(folder, kind, caplog):
    def warnings(latents: int, **more) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            adapter(kind, folder, latents, **more).check()
        return [record.getMessage() for record in caplog.records]

    assert warnings(4) == []  # nobody knows
    known = {str(folder): 6}
    assert warnings(6, trained_latents=known) == []
    assert warnings(4, trained_latents=known) == [f"model.latents=4: {folder} was trained with 6"]
    edit_json(folder / "config.json", latent_tts={"latents": 4})  # its own word counts more
    assert warnings(4, trained_latents=known) == []
    assert warnings(6) == [f"model.latents=6: {folder} was trained with 4"]


def test_the_shipped_reasoner_says_how_many_latents_it_was_trained_with(ltts):
    result = ltts("run", "model.latents=3", "n=1", "task.limit=1")
    assert result.code == 0, result.err
    assert "model.latents=3: shipped:coconut_arith was trained with 6" in result.err


# --- hub ids


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub\nand more"),
        OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled"),
        RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)),
        ConnectionError(""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_id_without_a_network(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UsageError) as raised:
        Coconut(name="m", checkpoint="owner/name", latents=6, recommended={}).check()
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert "hf download owner/name --local-dir FOLDER" in lines[1]
    assert "model.checkpoint=FOLDER" in lines[1]


def test_the_published_models_say_how_to_get_them(ltts, monkeypatch, nothing_loads):
    def fail(*_, **__):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    check(ltts("run", "model=codi"), "hf download ModalityDance/latent-tts-codi --local-dir FOLDER")


def test_a_hub_id_with_a_network(monkeypatch, folder, kind):
    asked = {}

    def snapshot(name, **arguments):
        asked.update(arguments, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = FAMILIES[kind](name="m", checkpoint="owner/name", latents=6, recommended={}, revision="abc")
    model.check()
    assert model.folder == folder
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])


# --- what is right


def test_shards_are_the_same_model(folder, kind):
    whole = adapter(kind, folder)
    whole.check()
    before = whole.load(device="cpu", dtype="float32")
    shard(folder)
    model = adapter(kind, folder)
    model.check()
    after = model.load(device="cpu", dtype="float32")
    for name, value in before.lm.state_dict().items():
        assert torch.equal(after.lm.state_dict()[name], value)
    hidden_RD = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.next_latent(hidden_RD), after.next_latent(hidden_RD))


def test_a_whole_file_counts_more_than_an_index_beside_it(folder, kind):
    (folder / "model.safetensors.index.json").write_text("{}")  # as transformers has it
    assert files.weight_files(folder) == [folder / "model.safetensors"]
    adapter(kind, folder).check()


def test_padding_and_truncation_left_in_a_tokenizer_change_no_prompt(folder, kind):
    from latent_tts.types import Question

    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    )  # fmt: skip
    expected = json.loads((PARITY / kind / "expected.json").read_text())
    text = expected["prompts"][0].removesuffix("<|start-latent|>").removesuffix("\n")
    assert adapter(kind, folder).encode(Question("q", text, "")) == expected["prompt_ids"][0]


def test_of_several_eos_the_tokenizers_ends_an_answer(folder, kind):
    edit_json(folder / "config.json", eos_token_id=[3, 0])
    assert adapter(kind, folder).eos_id == 0
    assert adapter(kind, folder).eos_ids == (0, 3)


def backbones() -> dict[str, PreTrainedModel]:
    """Tied and untied heads, learned and rotary positions, grouped queries."""
    shape = SHAPE | {"vocab_size": 603, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3, vocab_size=603, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return {
        "gpt2_untied": GPT2LMHeadModel(gpt2),  # tied as GPT-2 is: tests/parity
        "llama_untied": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)),
        "llama_tied": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)),
        "qwen3_tied": Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)),
    }


@pytest.mark.slow
def test_any_causal_lm_can_carry_coconut(ltts, tmp_path):
    questions = ["A robe takes 2 bolts.", "James runs 3 sprints 3 times a week. How many?"]
    lines = [json.dumps({"question": text, "answer": "1"}) for text in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {name: lm.eval() for name, lm in backbones().items()}
    for name, lm in models.items():
        lm.save_pretrained(tmp_path / name)
        shutil.copyfile(PARITY / "coconut" / "tokenizer.json", tmp_path / name / "tokenizer.json")
    result = ltts(
        "run", "-m", "model=coconut", f"model.checkpoint={','.join(models)}", "task=jsonl", "task.path=q.jsonl",
        f"model.latents={LATENTS}", f"max_answer_tokens={ANSWER}", "sampler=greedy", "n=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    tokenizer = files.load_tokenizer(PARITY / "coconut")
    answers = set()
    for job, (name, lm) in enumerate(models.items()):
        rollouts = pd.read_parquet(result.last.parent / str(job) / "rollouts.parquet")
        for text, ids in zip(questions, rollouts["answer_ids"], strict=True):
            plain = plain_rollout(lm, [*tokenizer.encode(text + "\n").ids, 600], 601, lambda hidden: hidden)[1]
            assert list(ids) == plain, name
            answers.add(tuple(plain))
    assert len(answers) > len(models)  # they do not all write the same
