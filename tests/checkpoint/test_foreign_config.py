"""What a checkpoint's files may ask for: no code from elsewhere, no quantised weights, no sizes beyond its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusal import check_refused
from safetensors.torch import load_file

from latent_tts.checkpoint import files, loading
from latent_tts.errors import UsageError


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "foreign")


def change(folder: Path, **settings) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantization_config", "engine.quantize"]),
        ({"text_config": {"quantization_config": {}}}, ["quantization_config"]),
        ({"_attn_implementation": "owner/kernel"}, ["_attn_implementation", "owner/kernel", "never run"]),
        ({"attn_implementation": {"": "owner/kernel@main:f"}}, ["attn_implementation", "never run"]),
        ({"_attn_implementation_internal": "owner/kernel"}, ["_attn_implementation_internal"]),
        ({"_experts_implementation": "owner/kernel"}, ["_experts_implementation"]),
        ({"transformers_weights": "../other.safetensors"}, ["transformers_weights", "must be model.safetensors"]),
        ({"id": {"num_labels": 10**9}}, ["num_labels=1000000000", "at most"]),
        ({"n_layer": 1000000}, ["n_layer=1000000", "the weights have 1 layers"]),
        ({"n_embd": 1000000}, ["n_embd=1000000", "wte.weight"]),
        ({"vocab_size": 1000000}, ["vocab_size=1000000", "wte.weight"]),
        ({"n_positions": 1000000}, ["n_positions=1000000", "wpe.weight"]),
        ({"n_inner": 1000000}, ["n_inner=1000000", "c_fc.weight"]),
        ({"n_head": 1000000}, ["n_head=1000000", "c_attn.weight"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name_before_anything_is_loaded(refuse, folder, settings, words):
    refuse(f"model.checkpoint={change(folder, **settings)}", words=[str(folder), *words])


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"])
def test_sizes_of_llama_like_models(size):
    config = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 8)
    names = ("embed_tokens", "layers.0.mlp.gate_proj", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")
    shapes = {f"model.{name}.weight": [8, 8] for name in names}
    files.check_shapes({**config, "num_hidden_layers": 1}, shapes, Path("here"))
    with pytest.raises(UsageError, match=f"{size}=1000000"):
        files.check_shapes({**config, "num_hidden_layers": 1, size: 1000000}, shapes, Path("here"))
    files.check_shapes({**config, "hidden_size": 16, "word_embed_proj_dim": 8}, shapes, Path("here"))


@pytest.mark.every_other
@pytest.mark.parametrize(
    "settings", [{"_attn_implementation": "flash_attention_2"}, {"auto_map": {"AutoModel": "m.M"}}]
)
def test_what_is_harmless_is_left_out(run, checkpoint, folder, settings):
    change(folder, **settings)
    result = run(f"model.checkpoint={folder}")
    assert result.code == 0, result.err
    loaded = [loading.load_causal_lm(path, device="cpu", dtype="float32") for path in (checkpoint, folder)]
    assert loaded[0].config._attn_implementation == loaded[1].config._attn_implementation
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(*(lm(ids).logits for lm in loaded))


def test_code_of_a_checkpoint_is_never_run(refuse, folder, tmp_path):
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w').close()\n")
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    change(folder, model_type="own", auto_map=names)
    refuse(f"model.checkpoint={folder}", words=["auto_map", "never run", "model_type=own"])
    assert not (tmp_path / "pwned").exists()


def test_a_dtype_that_torch_does_not_have_is_named(folder):
    with pytest.raises(UsageError, match="transformers cannot load it: module 'torch' has no attribute '__import__'"):
        loading.load_causal_lm(change(folder, dtype="__import__"), device="cpu", dtype="float32")


def test_an_adapter_beside_the_weights_is_not_loaded_instead(run, refuse, folder):
    assert run("task.limit=1", "n=1").code == 0  # the same weights are kept for the next run of the process
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    refuse(f"model.checkpoint={folder}", words=["adapter_config.json", "ltts convert"])


@pytest.fixture
def sharded(checkpoint, tmp_path):
    """The tiny checkpoint as transformers once saved large ones: pickles, and an index."""
    folder = shutil.copytree(checkpoint, tmp_path / "sharded")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(sorted(state))}
    for shard in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_sharded_pickles_are_converted_together(ltts, refuse, checkpoint, sharded, index):
    if not index:
        (sharded / "pytorch_model.bin.index.json").unlink()
    refuse(f"model.checkpoint={sharded}", words=[f"`ltts convert {sharded} NEW_FOLDER`"])
    result = ltts("convert", sharded, "new")
    assert result.code == 0, result.err
    new, old = load_file(result.last / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_some_of_the_shards_are_refused(place, sharded):
    first, second = sorted(sharded.glob("*.bin"))
    line = "convert", f"src={sharded}", "dst=new"
    check_refused("convert", f"src={first}", "dst=new", words=["one of 2 shards", f"src={sharded}"])
    second.unlink()
    check_refused(*line, words=[f"has 1 of 2 shards ({first.name})"])
