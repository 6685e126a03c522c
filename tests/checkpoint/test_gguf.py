"""GGUF files as checkpoints: converted once, with the weights and the tokens of the model that they were made of."""

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM

from latent_tts.checkpoint import files
from latent_tts.checkpoint import gguf as gguf_files
from latent_tts.checkpoint.model_cache import kept_models
from latent_tts.errors import UsageError

TEXTS = ["a  12\n\n3.", "the 2026 heads", "\n\n", "é ☕"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LTTS_CACHE", str(tmp_path / "cache"))


@pytest.mark.every_other
@pytest.mark.parametrize("architecture", gguf_files.ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_what_the_original_does(tmp_path, tied, architecture):
    lm = tiny_gguf.model(tied=tied, architecture=architecture)
    folder = files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'model.gguf', lm, architecture=architecture)}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)
    eos_ids = files.special_ids("eos", folder, files.read_config(folder), files.load_tokenizer(folder))
    assert eos_ids["config.json"] == [2]


def test_quantised_weights_are_those_of_the_reference_dequantiser(tmp_path):
    lm, kind = tiny_gguf.model(), gguf.GGMLQuantizationType.Q4_1
    folder = files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'model.gguf', lm, kind=kind)}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = gguf.quants.dequantize(gguf.quants.quantize(lm.state_dict()[name].numpy(), kind), kind)
    torch.testing.assert_close(loaded[name], torch.from_numpy(wanted))


def test_each_digit_stands_alone_where_the_file_says_so(tmp_path):
    """transformers leaves the splitting out, and then line breaks before a digit are other tokens."""
    lm = tiny_gguf.model()
    split = files.load_tokenizer(files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'a.gguf', lm)}"))
    whole = files.load_tokenizer(files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'b.gguf', lm, splitting='gpt-2')}"))
    assert split.encode("\n\n3").tokens == ["ĊĊ", "3"]
    assert whole.encode("\n\n3").tokens == ["Ċ", "Ċ", "3"]
    for text in TEXTS:
        assert split.decode(split.encode(text).ids) == text


def test_another_splitting_is_said(tmp_path, caplog):
    files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'a.gguf', tiny_gguf.model(), splitting='tekken')}")
    assert "the file asks for 'tekken'" in caplog.text


def test_a_second_start_converts_nothing_and_another_file_is_another_model(tmp_path, monkeypatch):
    file = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.model())
    first = files.resolve(f"gguf:{file}")
    tiny_gguf.write(tmp_path / "other.gguf", tiny_gguf.model(seed=1)).rename(file)
    second = files.resolve(f"gguf:{file}")
    assert first != second
    monkeypatch.setattr(gguf_files, "convert", None)
    assert files.resolve(f"gguf:{file}") == second
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}


def test_a_damaged_model_is_removed_and_converted_again(tmp_path, caplog):
    file = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.model())
    folder = files.resolve(f"gguf:{file}")
    digest = files.digest(folder)
    for name in ("model.safetensors", "tokenizer_config.json"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        assert files.digest(files.resolve(f"gguf:{file}")) == digest
        assert f"{name} is damaged: its folder is removed, and made anew" in caplog.text
        assert [model.folder for model in kept_models(tmp_path / "cache")] == [folder]
        caplog.clear()
    (folder / "model.safetensors").write_bytes(good[:100])
    assert files.digest(files.resolve(f"gguf:{file}")) == digest
    assert "model.safetensors is damaged" in caplog.text


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    file = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.model())

    def fail(file, folder, key):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        files.resolve(f"gguf:{file}")
    assert list(gguf_files.models_folder().iterdir()) == []


def damaged(file):
    file.write_bytes(file.read_bytes()[:700])
    return file


BAD = {
    "no such file": lambda folder: folder / "nosuch.gguf",
    "`make smollm2` fetches it": lambda folder: folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
    "of the architecture mamba; must be one of llama": lambda folder: tiny_gguf.write(
        folder / "model.gguf", tiny_gguf.model(), architecture="mamba"
    ),
    "lacks the weight model.layers.1.mlp.up_proj.weight": lambda folder: tiny_gguf.write(
        folder / "model.gguf", tiny_gguf.model(), without="blk.1.ffn_up.weight"
    ),
    "transformers does not read llama.rope.scaling.type=linear, so": lambda folder: tiny_gguf.write(
        folder / "model.gguf",
        tiny_gguf.model(),
        more=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    ),
    # frequencies of Llama 3.1, of which the file has no field
    "transformers does not read the weight rope_freqs.weight, so": lambda folder: tiny_gguf.write(
        folder / "model.gguf",
        tiny_gguf.model(),
        more=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32)),
    ),
    "transformers does not read the weight blk.0.attn_q.bias, so": lambda folder: tiny_gguf.write(
        folder / "model.gguf",
        tiny_gguf.model(),
        more=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, dtype=np.float32)),
    ),
    "value_length=8 llama.rope.dimension_count=4": lambda folder: tiny_gguf.write(
        folder / "model.gguf", tiny_gguf.model(), rotated=4
    ),
    "truncated or not GGUF": lambda folder: damaged(tiny_gguf.write(folder / "model.gguf", tiny_gguf.model())),
}


@pytest.mark.parametrize("words", BAD)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, words):
    file = BAD[words](tmp_path)
    with pytest.raises(UsageError, match=rf"\Amodel\.checkpoint=gguf:{file}: .*{words}") as refused:
        files.resolve(f"gguf:{file}")
    assert "\n" not in str(refused.value)
