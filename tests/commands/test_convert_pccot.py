"""`ltts convert` of PCCoT's published layout: a LoRA adapter of PEFT, its own tokens, its two files of settings."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from marks import slow
from oracle import pccot_rollout
from refusal import check, check_refused
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from training_code import ANSWER, FIXTURE, QUESTION, VOCABULARY, WIDTH, backbone, edit_json
from transformers import PreTrainedModel

from latent_tts.checkpoint.modules import pccot_projection
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.model.pccot import Pccot
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy

peft = pytest.importorskip("peft")
T, K = 5, 3
TARGETS = {"gpt2": ["c_attn", "c_fc", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}


def train(kind: str, folder: Path, base: Path, *, projection: bool, embeddings: bool = False) -> PreTrainedModel:
    """The folders of a base and of what PCCoT's code would save; returns the model, not merged."""
    lm = backbone(kind, rows=VOCABULARY)
    lm.save_pretrained(base)
    tokenizer = Tokenizer.from_file(str(FIXTURE))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < VOCABULARY]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(f"<pcot.{name}>", special=True) for name in ("bot", "eot", "latent")])
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<pcot.{name}>") for name in ("bot", "eot", "latent")}
    lm.resize_token_embeddings(tokenizer.get_vocab_size(with_added_tokens=True), mean_resizing=False)
    if projection:
        lm.prj = pccot_projection(WIDTH)
    model = peft.get_peft_model(
        lm,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2",
            trainable_token_indices={"wte" if kind == "gpt2" else "embed_tokens": [*ids.values(), 0]},
            modules_to_save=["prj"] if projection else None,
        ),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "additional_special_tokens": ["<pcot.bot>"]})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": f"pccot-{kind}", "num_iterations": K}))
    (folder / "pccot_args.json").write_text(json.dumps({**ids, "num_latent_tokens": T, "answer_prompt": "###"}))
    return model.eval()


# with the embeddings of all tokens in its file, as PEFT saves them where it sees that their number grew, or without
KINDS = [("gpt2", True, True), ("llama", False, True), slow(("gpt2", False, False)), slow(("llama", True, False))]


@pytest.fixture(params=KINDS, ids=str)
def trained(request, tmp_path):
    kind, projection, embeddings = request.param
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        sides = tmp_path / "adapter", tmp_path / "base"
        return train(kind, *sides, projection=projection, embeddings=embeddings), projection


def adapter(folder: str) -> Pccot:
    return Pccot(name="m", checkpoint=folder, latents=T, recommended={}, sweeps=K, answer_prompt="###")


@torch.inference_mode()
def test_the_merged_adapter_thinks_as_the_one_beside_its_weights(trained, ltts, tmp_path):
    source, projection = trained
    result = ltts("convert", "adapter", "new")
    assert result.code == 0, result.err
    assert "model=pccot model.latents=5 model.sweeps=3" in result.out + result.err
    model = adapter("new")
    model.check()
    lm = source.get_base_model()
    own = lm.prj if projection else torch.nn.Identity()
    prompt, end_ids = model.encode(QUESTION), model.thinking_end_ids
    latent_id = model.tokenizer.token_to_id("<|latent|>")
    assert latent_id == VOCABULARY + 2
    wanted, answer = pccot_rollout(lm, own, prompt, latent_id, end_ids, T, K, ANSWER, model.eos_id)
    plan = RolloutPlan(T, end_ids, model.eos_id, ANSWER, schedule=model.own_schedule, latent_id=latent_id)
    draw = Draw.of(0, ["q"], torch.zeros(1, 1, dtype=torch.long), WIDTH)
    rollouts = Engine(model.load(device="cpu", dtype="float32"), plan).roll([prompt], draw, Greedy())
    assert draw.history_RTD is not None
    torch.testing.assert_close(draw.history_RTD[0], wanted, rtol=1e-4, atol=1e-4)
    assert rollouts.answer_ids[0] == answer
    said = json.loads((tmp_path / "new" / "config.json").read_text())["latent_tts"]
    assert said == {"latents": T, "sweeps": K}
    assert "pcot" not in "".join(path.read_text() for path in (tmp_path / "new").glob("*.json"))


@pytest.fixture(scope="module")
def gpt2_trained(tmp_path_factory) -> Path:
    """An adapter that no test may change; its base is beside it."""
    folder = tmp_path_factory.mktemp("gpt2")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        train("gpt2", folder / "adapter", folder / "base", projection=False, embeddings=True)
    return folder / "adapter"


@pytest.fixture
def gpt2(gpt2_trained, place) -> Path:
    return shutil.copytree(gpt2_trained, place / "adapter")


def test_whole_weights_need_no_merging(gpt2, ltts, tmp_path):
    assert ltts("convert", "adapter", "merged").code == 0
    whole = shutil.copytree(tmp_path / "merged", tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json", "pccot_args.json"):
        shutil.copyfile(gpt2 / name, whole / name)
    edit_json(whole / "config.json", model_type="pccot-gpt2", num_iterations=K)
    result = ltts("convert", "whole", "again")
    assert result.code == 0, result.err
    merged, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    adapter("again").check()


def test_an_adapter_that_is_not_of_pccot_is_merged(gpt2, ltts, tmp_path):
    (gpt2 / "pccot_args.json").unlink()
    result = ltts("convert", "adapter", "new")
    assert result.code == 0, result.err
    assert "latent_tts" not in json.loads((tmp_path / "new" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert tokenizer.token_to_id("<pcot.latent>") == VOCABULARY + 2


def test_an_adapter_is_no_checkpoint_and_the_line_says_what_to_do(gpt2, ltts):
    result = ltts("run", "model=pccot", f"model.checkpoint={gpt2}", "task.limit=1")
    check(result, "holds an adapter (adapter_config.json)", f"ltts convert {gpt2} NEW_FOLDER")


def test_without_peft_the_line_says_how_to_get_it(gpt2, ltts, monkeypatch):
    monkeypatch.setattr("latent_tts.checkpoint.convert.peft.find_spec", lambda name: None)
    check(ltts("convert", "adapter", "new"), "not installed", "pip install peft")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("adapter_config.json", {"base_model_name_or_path": None}, ["base=null", "does not name the base model"]),
        ("adapter_config.json", {"base_model_name_or_path": "nowhere"}, ["base=nowhere", "no such folder"]),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "gpt2"},
            ["base=openai-community/gpt2", "the download from the hub failed"],
        ),
        ("adapter_config.json", {"target_modules": ["c_attn"]}, ["does not fit", "exists only in one of them"]),
        ("adapter_config.json", {"target_modules": ["q_proj"]}, ["does not fit", "q_proj"]),
        ("adapter_config.json", {"r": 3}, ["does not fit", "size mismatch"]),
        ("pccot_args.json", {"num_latent_tokens": None}, ["do not contain the number of latents"]),
        ("pccot_args.json", {"latent_token_id": 17}, ["latent_token_id=17", "not an added token"]),
        ("config.json", {"use_projection": True}, ["use_projection", "no weights prj"]),
        ("config.json", {"num_iterations": "three"}, ["do not contain the number of sweeps"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(gpt2, file, changes, words):
    edit_json(gpt2 / file, **changes)
    check_refused("convert", "src=adapter", "dst=new", words=words)
    assert not Path("new").exists()


def test_a_truncated_adapter_is_refused(gpt2, ltts):
    file = gpt2 / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check(ltts("convert", "adapter", "new"), "adapter_model.safetensors")
    file.unlink()
    check(ltts("convert", "adapter", "new"), "adapter_model.safetensors")
