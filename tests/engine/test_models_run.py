"""Models that shared-prefix attention would misread, through the command line."""

import json
import shutil

import pandas as pd
import pytest
import tiny
import torch
from marks import slow
from refusal import check, check_refused
from transformers import AutoModelForCausalLM, GPTNeoConfig, MistralConfig

from latent_tts.checkpoint import files
from latent_tts.engine import proof
from latent_tts.errors import UsageError
from latent_tts.pipeline import models

SIZES = {"hidden_size": 16, "initializer_range": 0.3, "max_position_embeddings": 128, **tiny.OWN_IDS}
LLAMA = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGS = {
    "gpt_neo": lambda size: GPTNeoConfig(
        **SIZES, vocab_size=size, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "mistral": lambda size: MistralConfig(**SIZES, **LLAMA, vocab_size=size, sliding_window=8),
    "mistral_wide": lambda size: MistralConfig(**SIZES, **LLAMA, vocab_size=size, sliding_window=127),
}


@pytest.fixture
def other(checkpoint, tmp_path):
    """The tiny checkpoint's tokenizer with a random model of another family."""

    def write(family, **config):
        folder = tmp_path / family
        shutil.copytree(checkpoint, folder)
        own = json.loads((folder / "config.json").read_text())
        with torch.random.fork_rng():
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(CONFIGS[family](own["vocab_size"])).save_pretrained(folder)
        path = folder / "config.json"
        changes = {key: own[key] for key in ("eos_token_id", "bos_token_id", "latent_tts") if key in own} | config
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return write


def command(folder, tmp_path, name="run", *more):
    return [
        "run", "budget=fixed", "model=coconut", f"model.checkpoint={folder}", "model.latents=2", "sampler=gaussian",
        "sampler.sigma=0.3", "task.limit=3", "n=2", "max_answer_tokens=3", "engine.device=cpu",
        f"paths.cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/{name}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "attention", "reason"),
    [
        slow("gpt_neo", "transformers", "the attention of GPTNeoModel cannot be replaced"),
        ("mistral", "transformers", "see all tokens before them"),
        slow("mistral_wide", "shared-prefix", None),
    ],
)
def test_a_run_says_once_how_it_is_computed_and_keeps_that(ltts, other, tmp_path, family, attention, reason):
    folder = other(family)
    first = ltts(*command(folder, tmp_path))
    assert first.code == 0, first.err
    said = [line for line in first.err.splitlines() if "computed with" in line]
    assert len(said) == (reason is not None)
    again = ltts(*command(folder, tmp_path, "again"))
    assert again.code == 0, again.err
    for name in ("run", "again"):
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert (record["attention"], record["logits"]) == (attention, "head")
        assert (reason or "") in record.get("computation_reason", "")
    alone = ltts(*command(folder, tmp_path, "alone", "engine.rows=1", f"paths.cache={tmp_path}/other"))
    assert alone.code == 0, alone.err
    tables = [pd.read_parquet(tmp_path / name / "rollouts.parquet") for name in ("run", "alone")]
    assert tables[0]["answer_text"].equals(tables[1]["answer_text"])
    assert (tables[0]["answer_logprob"] - tables[1]["answer_logprob"]).abs().max() < 1e-4


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba2"}, ["model.checkpoint=", "mamba2", "running state", "rewound"]),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention"]}, ["keys and values (linear_attention)"]),
        (
            {"model_type": "gemma3n", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 9},
            ["in a gemma3n model every layer looks a token's id up"],
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8}, ["num_key_value_heads=1, must be 2: with kv_lora_rank"]),
        ({"is_encoder_decoder": True}, ["model.checkpoint=", "has an encoder"]),
        ({"model_type": "roberta"}, ["in a roberta model tokens attend to those after them"]),
        ({"model_type": "openai-gpt"}, ["a openai-gpt model keeps no keys and values"]),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 20}},
            ["beyond 20 tokens", "longrope", "depend on the batch"],
        ),
        (
            {"text_config": {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 20}}},
            ["beyond 20 tokens", "longrope", "depend on the batch"],
        ),
    ],
)
def test_models_that_cannot_be_run_latent_by_latent_are_refused_before_they_are_loaded(place, other, config, words):
    folder = other("mistral_wide", **config)
    check_refused(*command(folder, place), words=words)


def test_a_model_that_the_engine_does_not_compute_right_is_a_usage_error(ltts, other, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(proof, "_distance", lambda *_, **__: 0.5)
    folder = other("mistral_wide")
    check(ltts(*command(folder, tmp_path)), f"model.checkpoint={folder}: MistralForCausalLM cannot be run latent by")


def test_decoders_whose_names_begin_like_an_encoder_are_not_taken_for_one(tmp_path):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for kind in ("ernie4_5", "ernie4_5_moe", "modernbert-decoder"):
        files.check_decoder({"model_type": kind, **sizes}, tmp_path)
    with pytest.raises(UsageError, match="in a ernie model tokens attend to those after them"):
        files.check_decoder({"model_type": "ernie"}, tmp_path)
    files.check_shapes({"n_embd": 4, "n_inner": 9}, {"transformer.h.0.mlp.c_fc.weight": [9, 4]}, tmp_path)
    files.check_shapes({"num_hidden_layers": 1}, {"bert.encoder.layer.0.output.dense.weight": [4, 4]}, tmp_path)
    with pytest.raises(UsageError, match="n_inner=10"):
        files.check_shapes({"n_embd": 4, "n_inner": 10}, {"transformer.h.0.mlp.c_fc.weight": [9, 4]}, tmp_path)
