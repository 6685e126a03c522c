"""Adapters as checkpoints: joined with their base, right or refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_gguf
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latent_tts.checkpoint import files, joining
from latent_tts.checkpoint.joining import PROBE, RECORD, WEIGHTS, join_once, probe, write_adapter
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.training.reasoner.initial import copy_checkpoint
from latent_tts.training.reasoner.lora import Lora

KEY = "model.checkpoint"
PROMPTS = torch.arange(16).reshape(4, 4) + 250


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def written(request, tmp_path_factory):
    """A folder with a base and its adapter, which no test may change, and PEFT's model that both were written of."""
    place = tmp_path_factory.mktemp("written")
    file = tiny_gguf.write(place / "m.gguf", tiny_gguf.model(tied=request.param))
    initial = place / "initial"
    initial.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LTTS_CACHE", str(place / "cache"))
        copy_checkpoint(files.resolve(f"gguf:{file}"), initial, files.LATENT_TOKENS)
    lm = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32).eval()
    size = lm.config.vocab_size
    adapted = Lora(rank=4, alpha=8, targets=None, dropout=0.0).attach(lm, list(range(size - 3, size)), seed=0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.copy_((torch.randn(parameter.shape) * 0.3).bfloat16())
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    settings = adapted.peft_config["default"].to_dict()
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    write_adapter(
        place / "adapter", f"gguf:{file}", initial / "tokenizer.json",
        {name: value.bfloat16() for name, value in state.items()}, settings,
        {}, probe(lm, PROMPTS, 2, torch.arange(size)), {"latent_tts": {"latents": 2}}, KEY,
    )  # fmt: skip
    return place, lm


@pytest.fixture
def made(written, tmp_path, monkeypatch):
    """A copy of the adapter beside one of its base, and PEFT's model."""
    place, lm = written
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LTTS_CACHE", str(tmp_path / "cache"))
    change_json(tmp_path / "adapter" / RECORD, base=f"gguf:{tmp_path / 'm.gguf'}")
    return tmp_path / "adapter", lm


def test_the_join_computes_what_the_adapter_did_beside_its_base_and_has_its_rows(made):
    folder, lm = made
    joined = AutoModelForCausalLM.from_pretrained(join_once(folder, KEY), dtype=torch.float32).eval()
    ids = torch.arange(240, 266)[None]
    with torch.no_grad():
        torch.testing.assert_close(joined(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)
    rows = joined.get_input_embeddings().weight[-3:]
    assert torch.equal(rows, lm.get_input_embeddings()(torch.arange(263, 266)))
    if lm.config.tie_word_embeddings:
        assert torch.equal(joined.get_output_embeddings().weight[-3:], rows)


def test_it_is_run_as_any_checkpoint_and_made_once(made, monkeypatch):
    folder, _ = made
    adapter = Coconut(name="own", checkpoint=str(folder), latents=2, recommended={})
    adapter.check()
    assert adapter.config["latent_tts"] == {"latents": 2}
    lm = adapter.load(device="cpu", dtype="bfloat16").lm
    exact = load_file(adapter.folder / files.WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    assert exact[name].dtype == torch.float32
    assert torch.equal(lm.state_dict()[name], exact[name].bfloat16())  # cast once
    monkeypatch.setattr(joining, "join", None)
    assert join_once(folder, KEY) == adapter.folder


def change_json(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def change_weights(path, change):
    save_file(change(load_file(path)), path)


def swap_rows(tensors):
    return {
        name: value.flip(0).contiguous() if "trainable_tokens" in name else value for name, value in tensors.items()
    }


def other_base(folder):
    file = json.loads((folder / RECORD).read_text())["base"].removeprefix("gguf:")
    tied = "lm_head" not in " ".join(load_file(folder / WEIGHTS))
    tiny_gguf.write(folder.parent / "other.gguf", tiny_gguf.model(seed=1, tied=tied)).rename(file)


def unnoticed_other_base(folder):
    other_base(folder)
    base = json.loads((folder / RECORD).read_text())["base"]
    change_json(folder / RECORD, base_digest=joining.base_digest(base, KEY))


PLANTED = {
    "another scale": (lambda folder: change_json(folder / files.ADAPTER, lora_alpha=16), "computes something else"),
    "another order of rows": (lambda folder: change_weights(folder / WEIGHTS, swap_rows), "computes something else"),
    "another base, recorded": (unnoticed_other_base, "computes something else"),
    "another base": (other_base, "an adapter of the base .* but that has the digest"),
    "no base": (
        lambda folder: change_json(folder / RECORD, base="gguf:nosuch.gguf", base_path="no/such.gguf"),
        "cannot be read: .*; put the one with the digest [0-9a-f]{16} at .*/no/such.gguf or .*/nosuch.gguf",
    ),
    "no record of a base": (lambda folder: change_json(folder / RECORD, base=None), "names no base"),
    "no probe": (lambda folder: (folder / PROBE).unlink(), "lacks probe.safetensors"),
    "a kind that is not supported": (
        lambda folder: change_json(folder / files.ADAPTER, use_rslora=True), "use_rslora=True, which is not supported"
    ),
    "no rank": (lambda folder: change_json(folder / files.ADAPTER, r=0), "has r=0 and lora_alpha="),
    "a scale that is no number": (
        lambda folder: change_json(folder / files.ADAPTER, lora_alpha=[1]), r"lora_alpha=\[1\], must be"
    ),
    "a tensor that fits nothing": (
        lambda folder: change_weights(folder / WEIGHTS, lambda found: found | {"x.lora_A.weight": torch.zeros(4, 4)}),
        "x.lora_A.weight fits no weight",
    ),
    "ids beyond the embedding": (
        lambda folder: change_json(
            folder / files.ADAPTER, trainable_token_indices={"embed_tokens": [263, 264, 999], "lm_head": [1, 2, 999]}
        ),
        "fits no weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_adapter_and_base_are_found_where_both_have_been_moved(made, tmp_path, beside):
    folder, _ = made
    before = join_once(folder, KEY)
    base = Path(json.loads((folder / RECORD).read_text())["base"].removeprefix("gguf:"))
    change_json(folder / RECORD, base_path=os.path.relpath(base, folder))
    if beside:
        change_json(folder / RECORD, base_path="elsewhere.gguf")
    moved = tmp_path / "elsewhere" / folder.relative_to(base.parent)
    moved.parent.mkdir()
    folder.rename(moved)
    base.rename(tmp_path / "elsewhere" / base.name)
    change_json(moved / RECORD, base="gguf:/no/such/" + base.name)
    assert {path.name for path in join_once(moved, KEY).iterdir()} == {path.name for path in before.iterdir()}


@pytest.mark.every_other
@pytest.mark.parametrize("fault", PLANTED)
def test_an_adapter_that_is_not_what_was_written_is_refused_and_leaves_no_join(made, fault):
    folder, _ = made
    change, words = PLANTED[fault]
    change(folder)
    with pytest.raises(UsageError, match=rf"\A{KEY}={folder}: .*{words}"):
        join_once(folder, KEY)
    assert not list((folder.parent / "cache" / "models").glob("joined*"))
    assert not list((folder.parent / "cache" / "models").glob("partial*"))


@pytest.mark.every_other
def test_the_digest_covers_the_adapter(made):
    folder, _ = made
    copy = shutil.copytree(folder, folder.parent / "copy")
    change_weights(copy / WEIGHTS, lambda found: {name: value.float() * (1 + 1e-6) for name, value in found.items()})
    assert files.digest(join_once(folder, KEY)) != files.digest(join_once(copy, KEY))
