"""`ltts convert`: files in the layouts of the training codes become checkpoints with the source's latents.

Every source here is a tiny random model saved as COCONUT's, CODI's or SIM-CoT's code saves it, and its latents are
computed plainly: the whole sequence again for each vector, LoRA as a product beside the weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import check
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from training_code import ANSWER, FIXTURE, LATENTS, QUESTION, ROWS, VOCABULARY, WIDTH, backbone, plain_rollout
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
)

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.convert.conversion import convert_state
from latent_tts.checkpoint.convert.layouts import PROJECTOR, codi_backbone
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy

RANK, ALPHA = 128, 32
LORA_TARGETS = ("c_attn", "c_proj", "c_fc", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
State = dict[str, Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the model that was fine-tuned: a tokenizer without latent tokens."""
    folder = tmp_path / "base"
    folder.mkdir()
    content = json.loads(FIXTURE.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < VOCABULARY]
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


def write_config(folder: Path, lm: PreTrainedModel, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(lm.config.to_dict() | changes))
    return path


def same_as_source(
    model: CheckpointAdapter, lm: PreTrainedModel, prompt: list[int], end: int, next_latent: Callable = lambda h: h
) -> None:
    """The converted checkpoint gives the source's prompt, latents and answer."""
    model.check()
    assert model.encode(QUESTION) == prompt
    assert model.thinking_end_ids == [end]
    latents, answer = plain_rollout(lm, prompt, end, next_latent)
    reasoner = model.load(device="cpu", dtype="float32")
    draw = Draw.of(0, ["q"], torch.zeros(1, 1, dtype=torch.long), WIDTH)
    rollouts = Engine(reasoner, RolloutPlan(LATENTS, [end], model.eos_id, ANSWER)).roll([prompt], draw, Greedy())
    torch.testing.assert_close(rollouts.latents_RTD[0], latents, rtol=1e-4, atol=1e-4)
    assert rollouts.answer_ids[0] == answer


def adapter(kind: type[CheckpointAdapter], folder: str) -> CheckpointAdapter:
    return kind(name="m", checkpoint=folder, latents=LATENTS, recommended={})


def question_ids(base: Path, ending: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer.encode(QUESTION.text + ending).ids


def below(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# --- COCONUT's training code: one pickle of the wrapper's state dict, no config, no tokenizer


def coconut_state(lm: PreTrainedModel) -> State:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # a buffer of older versions of transformers
    state = below("base_causallm.", lm.state_dict() | {"transformer.h.0.attn.bias": mask})
    return state | {"embedding.weight": lm.get_input_embeddings().weight.detach()}


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_coconut_training_checkpoint(ltts, base, tmp_path, wrapper):
    lm = backbone("gpt2")
    write_config(base, lm, vocab_size=VOCABULARY)
    torch.save(below(wrapper, coconut_state(lm)), tmp_path / "checkpoint_22")
    result = ltts("convert", "checkpoint_22", "new", f"tokenizer={base}", "latents=3")
    assert result.code == 0, result.err
    assert result.last == Path("new")
    assert set(load_file("new/model.safetensors")) == set(lm.state_dict()) - {"lm_head.weight"}
    model = adapter(Coconut, "new")
    same_as_source(model, lm, [*question_ids(base, "\n"), 600], 601)
    assert model.latent_id == 602
    assert model.config["vocab_size"] == ROWS
    assert model.config["latent_tts"] == {"latents": 3}
    assert AutoTokenizer.from_pretrained("new").convert_tokens_to_ids("<|latent|>") == 602


def test_a_coconut_training_checkpoint_of_an_untied_llama(ltts, base, tmp_path):
    lm = backbone("llama")
    config = write_config(tmp_path, lm)
    torch.save(coconut_state(lm), tmp_path / "old.pt")
    result = ltts("convert", "old.pt", "new", f"tokenizer={base}", f"config={config}")
    assert result.code == 0, result.err
    model = adapter(Coconut, "new")
    assert model.config["eos_token_id"] == [0, 5]  # the tokenizer's config says which
    same_as_source(model, lm, [*question_ids(base, "\n"), 600], 601)


# --- CODI's training code: the PEFT wrapper with LoRA beside the weights, and the projector


class WithLora:
    """A backbone with LoRA products beside its layers, and a projector, as CODI trains them."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, self.state = lm, {}
        weights = lm.state_dict()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, module in lm.named_modules():
                if name.endswith(LORA_TARGETS):
                    self._add_lora(name, module, weights)
            self.projector = nn.Sequential(
                nn.Dropout(0.0), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)
            ).requires_grad_(False)
            self.projector.add_module("ln", nn.LayerNorm(WIDTH).requires_grad_(False))
        self.state |= below("codi.base_model.model.", weights) | below("prj.", self.projector.state_dict())

    def _add_lora(self, name: str, module: nn.Module, weights: State) -> None:
        for part in ("weight", "bias"):
            if f"{name}.{part}" in weights:
                weights[f"{name}.base_layer.{part}"] = weights.pop(f"{name}.{part}")
        outputs, inputs = module.weight.shape
        if name.endswith(("c_attn", "c_proj", "c_fc")):  # GPT-2 keeps its weights as (in, out)
            outputs, inputs = inputs, outputs
        down, up = torch.randn(RANK, inputs) * 0.1, torch.randn(outputs, RANK) * 0.1
        weights |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        module.register_forward_hook(lambda _, args, out: out + args[0] @ down.T @ up.T * (ALPHA / RANK))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_codi_training_checkpoint(ltts, base, tmp_path, kind):
    source = WithLora(backbone(kind))
    old = tmp_path / "old"
    old.mkdir()
    write_config(old, source.lm)
    torch.save(source.state, old / "pytorch_model.bin")
    torch.save({"lr": 1}, old / "training_args.bin")  # which the Trainer leaves beside it
    result = ltts("convert", old, "new", f"tokenizer={base}")
    assert result.code == 0, result.err
    assert not [name for name in load_file("new/model.safetensors") if "lora" in name or "prj" in name]
    model = adapter(Codi, "new")
    assert model.latent_id == 600  # where CODI has its padding token
    same_as_source(model, source.lm, [*question_ids(base, ""), 601], 602, source.projector)


def test_the_lora_scale_is_a_key(ltts, base, tmp_path):
    source = WithLora(backbone("gpt2"))
    config = write_config(tmp_path, source.lm, vocab_size=VOCABULARY)
    torch.save(source.state, tmp_path / "old.bin")
    assert ltts("convert", "old.bin", "new", f"tokenizer={base}", f"config={config}", "lora_alpha=64").code == 0
    module = "transformer.h.1.mlp.c_fc"
    down, up = (source.state[f"codi.base_model.model.{module}.lora_{factor}.default.weight"] for factor in "AB")
    added = load_file("new/model.safetensors")[f"{module}.weight"] - source.lm.state_dict()[f"{module}.weight"]
    torch.testing.assert_close(added, (up @ down).T * 64 / RANK, rtol=1e-4, atol=1e-5)


def test_only_layers_of_the_kind_conv1d_are_transposed():
    factors = {"lora_A.default.weight": torch.randn(2, 8), "lora_B.default.weight": torch.randn(8, 2)}
    state = {}
    for module in ("a.c_proj", "lm_head"):
        tensors = {"base_layer.weight": torch.zeros(8, 8), **factors}
        state |= {f"codi.base_model.model.{module}.{name}": value for name, value in tensors.items()}
    state |= {f"prj.{name}": torch.zeros(8) for name in PROJECTOR}
    product = factors["lora_B.default.weight"] @ factors["lora_A.default.weight"]
    for kind, c_proj in (("gpt2", product.T), ("starcoder2", product)):  # whose layers of that name are not transposed
        tensors, _ = codi_backbone(state, alpha=2, kind=kind)
        assert tensors["a.c_proj.weight"].equal(c_proj)
        assert tensors["lm_head.weight"].equal(product)


# --- SIM-CoT: the same with a decoder that inference does not use, an empty config.json, shards


def test_a_sim_cot_coconut_checkpoint(ltts, base, tmp_path):
    lm = backbone("gpt2")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").touch()
    decoder = below("expainable_llm.", backbone("gpt2", rows=VOCABULARY, seed=5).state_dict())
    torch.save(coconut_state(lm) | decoder, old / "checkpoint_28")
    wants = ("convert", old, "new", f"tokenizer={base}")
    check(ltts(*wants), "empty", "GPT-2 with 2 layers of width 32", "config=FOLDER/config.json")
    assert not Path("new").exists()
    config = write_config(tmp_path, lm, vocab_size=VOCABULARY)
    result = ltts(*wants, f"config={config}")
    assert result.code == 0, result.err
    assert f"left out, because inference does not use them: expainable_llm.* ({len(decoder)})" in result.err
    same_as_source(adapter(Coconut, "new"), lm, [*question_ids(base, "\n"), 600], 601)


def test_a_sharded_sim_cot_codi_checkpoint(ltts, run, base, tmp_path):
    source = WithLora(backbone("gpt2"))
    state = {name: value.clone() for name, value in source.state.items()}
    del state["codi.base_model.model.transformer.wte.weight"]  # safetensors keeps one of two tied tensors
    state |= below("decoder.", {"h.weight": torch.ones(2)}) | {
        "pj_in.weight": torch.ones(2),
        "pj_in.bias": torch.ones(1),
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}\n")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for shard in sorted(set(shards.values())):
        save_file({name: state[name] for name in state if shards[name] == shard}, old / shard)
    (old / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    check(run("model=codi", f"model.checkpoint={old}"), "CODI's training layout", f"ltts convert {old}")
    config = write_config(base, source.lm, vocab_size=VOCABULARY)  # found in the tokenizer's folder
    assert config.parent == base
    result = ltts("convert", old, "new", f"tokenizer={base}")
    assert result.code == 0, result.err
    assert "decoder.* (1), pj_in.* (2)" in result.err
    same_as_source(adapter(Codi, "new"), source.lm, [*question_ids(base, ""), 601], 602, source.projector)


# --- what does not fit together


def broken_sources(state: State) -> dict[str, tuple[State, str]]:
    up = next(name for name in state if ".lora_B." in name)
    weight = up.replace("lora_B.default", "base_layer")
    head = "codi.base_model.model.lm_head.weight"
    return {
        "half a LoRA pair": ({n: v for n, v in state.items() if n != up}, "fits no weight"),
        "LoRA without its weight": ({n: v for n, v in state.items() if n != weight}, "fits no weight"),
        "another LoRA": (state | {up: torch.ones(7, RANK)}, "shape"),
        "no LayerNorm": ({n: v for n, v in state.items() if not n.startswith("prj.ln")}, "prj.*"),
        "two embeddings": (state | {head: state[head] + 1}, "lm_head.weight"),
    }


@pytest.mark.parametrize(
    "fault", ["half a LoRA pair", "LoRA without its weight", "another LoRA", "no LayerNorm", "two embeddings"]
)
def test_a_training_checkpoint_that_is_not_whole(fault):
    source = WithLora(backbone("gpt2"))
    state, word = broken_sources(source.state)[fault]
    with pytest.raises(UsageError, match=re.escape(word)):
        convert_state(state, source.lm.config.to_dict(), Tokenizer.from_file(str(FIXTURE)), "CODI", ALPHA)


def test_a_tokenizer_or_config_of_another_model(ltts, base, tmp_path):
    lm = backbone("gpt2")
    settings = lm.config.to_dict()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    with pytest.raises(UsageError, match="3 layers of width 32; the weights have 2 layers of width 32"):
        convert_state(coconut_state(lm), settings | {"n_layer": 3}, tokenizer, "COCONUT", ALPHA)
    tokenizer.add_tokens(["<|one-more|>"])
    with pytest.raises(UsageError, match=r"has 601 tokens.* 603 rows"):
        convert_state(coconut_state(lm), settings, tokenizer, "COCONUT", ALPHA)
    tokenizer.add_tokens(["<|latent|>"])
    with pytest.raises(UsageError, match=r"the ids \[None, None, 601\]"):
        convert_state(coconut_state(lm), settings, tokenizer, "COCONUT", ALPHA)
    torch.save(coconut_state(lm), tmp_path / "old.pt")
    check(ltts("convert", "old.pt", "new"), "lacks tokenizer.json", "tokenizer=FOLDER")
    check(ltts("convert", "old.pt", "new", f"tokenizer={base}", "config=nosuch.json"), "config=nosuch.json")
    check(ltts("convert", "old.pt", "new", f"tokenizer={base}", "lora_alpha=0"), "lora_alpha=0", "positive")


def test_a_folder_that_needs_no_converting(ltts):
    check(ltts("convert", FIXTURE.parent, "new"), "already in the layout")
