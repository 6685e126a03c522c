"""A LatentRM trained as a low-rank adapter: shared weights, equal scores, merging, and what is refused."""

import json
import shutil

import annotated
import pandas as pd
import pytest
import tiny_gguf
import torch
from marks import slow
from places import place_of_its_own
from refusal import check
from safetensors.torch import load_file, save_file

from latent_tts import cli
from latent_tts.checkpoint import files
from latent_tts.checkpoint.modules import LowRank
from latent_tts.engine.proof import prove_reasoner, prove_reward_model
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import UsageError
from latent_tts.pipeline import models
from latent_tts.scorer.latent_rm import LatentRM

LORA = ["lora.rank=3", "lora.alpha=12"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "own.safetensors", "config.json", "tokenizer.json"}


def train_line(checkpoint, train_path, valid_path, *more):
    return [
        "train-rm", f"model.checkpoint={checkpoint}", f"model.latents={annotated.T}", "output=out",
        f"annotations={train_path}", f"valid_annotations={valid_path}", "optimization.batch=8", "device=cpu",
        "optimization.epochs=2", "optimization.lr=2e-2", *LORA, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    path, adapter = tmp_path_factory.mktemp("annotations"), annotated.adapter_of(checkpoint)
    return annotated.write(path / "train", adapter, 32), annotated.write(path / "valid", adapter, 24, seed=1)


@pytest.fixture(scope="module")
def old(checkpoint, folders, tmp_path_factory):
    """The folder of a copy of the tiny reasoner and of a LatentRM trained on it, which no test may change."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(checkpoint, place / "reasoner")
    with place_of_its_own(place):
        assert cli.main(train_line(place / "reasoner", *folders)) == 0
    return place


@pytest.fixture
def trained(old):
    """The checkpoint of the LatentRM."""
    return old / "out" / "checkpoint"


def scorer_of(folder):
    return LatentRM(str(folder), None, "correct")


def drawn(ltts, checkpoint, folder, name, *more):
    result = ltts(
        "run", f"model.checkpoint={checkpoint}", "model.latents=3", "task.limit=6", "n=4", "budget=fixed",
        "max_answer_tokens=4", "scorer=latent_rm", f"scorer.checkpoint={folder}", f"hydra.run.dir={name}", *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    return pd.read_parquet(f"{name}/rollouts.parquet").sort_values(["question_id", "rollout"]).score.to_numpy()


def test_training_learns_and_writes_matrices_and_a_head_alone(old, trained):
    assert {path.name for path in trained.iterdir()} == FILES
    figures = json.loads((old / "out" / "train_rm.json").read_text())
    assert figures["valid_selection_accuracy"] > figures["valid_chance"] + 0.2
    names = set(load_file(trained / "adapter_model.safetensors"))
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    record = json.loads((trained / "config.json").read_text())["latent_rm"]
    assert record["base"] == str(old / "reasoner")
    assert record["reasoner"] == annotated.adapter_of(old / "reasoner").digest


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_scorer_and_reasoner_share_storage_and_score_as_with_weights_of_their_own(trained, checkpoint, dtype):
    adapter, scorer = annotated.adapter_of(checkpoint), scorer_of(trained)
    reasoner = adapter.load(device="cpu", dtype=dtype)
    prove_reasoner(reasoner, 64)  # prepares it, as a run does
    assert scorer.base_digest == adapter.digest
    pair = [scorer.load(device="cpu", dtype=dtype, base=base) for base in (reasoner, None)]
    storages = {value.data_ptr() for value in reasoner.lm.parameters()}
    packed = {id(part._weight) for part in reasoner.lm.modules() if hasattr(part, "_weight")}
    own = {name for name, value in pair[0].backbone.named_parameters() if value.data_ptr() not in storages}
    assert own
    assert all(name.endswith(("down_RD", "up_DR")) for name in own)
    assert {id(part._weight) for part in pair[0].backbone.modules() if hasattr(part, "_weight")} == packed
    assert bool(packed) == (dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    latents = torch.randn(6, 3, 16)
    scores = []
    for model in pair:
        prove_reward_model(model, 64)
        scores.append(LatentScorer(model).score([[5, 6, 7], [8, 9, 10]], latents))
    assert scores[0].equal(scores[1])
    assert not any(isinstance(part, LowRank) for part in reasoner.lm.modules())


def test_a_run_shares_and_scores_as_the_joined_scorer(trained, checkpoint, ltts, place):
    shared = drawn(ltts, checkpoint, trained, "shared")
    lm, backbone = models._loaded["model"][1].lm, models._loaded["scorer"][1].backbone
    ours = {name: value for name, value in backbone.named_parameters() if not name.endswith(("down_RD", "up_DR"))}
    assert {value.data_ptr() for value in ours.values()} <= {value.data_ptr() for value in lm.parameters()}
    converted = ltts("convert", trained, "joined")
    assert converted.code == 0, converted.err
    assert "base" not in json.loads((place / "joined" / "config.json").read_text())["latent_rm"]
    joined = drawn(ltts, checkpoint, place / "joined", "joined_run")
    assert abs(shared - joined).max() < 1e-4 * abs(joined).max()
    assert abs(shared).max() > 0.1
    rescored = ltts("rescore", "shared", "scorer=latent_rm", f"scorer.checkpoint={trained}", "hydra.run.dir=again")
    assert rescored.code == 0, rescored.err


@pytest.mark.slow
def test_in_half_precision_the_sum_is_rounded_once_and_not_the_weights(trained, checkpoint, ltts, place):
    assert ltts("convert", trained, "joined").code == 0
    joined = drawn(ltts, checkpoint, place / "joined", "joined_run")
    half = [drawn(ltts, checkpoint, folder, name, "engine.dtype=bfloat16")
            for folder, name in ((trained, "half"), (place / "joined", "half_joined"))]  # fmt: skip
    assert abs(half[0] - half[1]).max() < 0.1 * abs(joined).max()


def test_the_digest_covers_every_file_and_the_reasoner(trained, place):
    digests = {scorer_of(trained).digest}
    for name in ("adapter_model.safetensors", "own.safetensors"):
        copy = shutil.copytree(trained, place / name.partition(".")[0])
        tensors = load_file(copy / name)
        first = min(tensors)
        save_file(tensors | {first: tensors[first] + 1}, copy / name)
        digests.add(scorer_of(copy).digest)
    for name, key in (("adapter_config.json", "lora_alpha"), ("config.json", "latent_rm")):
        copy = shutil.copytree(trained, place / name.partition(".")[0])
        content = json.loads((copy / name).read_text())
        content[key] = 5 if key == "lora_alpha" else content[key] | {"reasoner": "0" * 16}
        (copy / name).write_text(json.dumps(content))
        digests.add(scorer_of(copy).digest)
    assert len(digests) == 5


@pytest.mark.parametrize("moved", [slow("together"), "beside", "only the adapter"])
def test_an_adapter_is_found_a_reasoner_that_was_moved(old, ltts, place, monkeypatch, moved):
    old, new = shutil.copytree(old, place / "old") / "reasoner", place / "new"
    trained = place / "old" / "out" / "checkpoint"
    config = trained / "config.json"
    record = json.loads(config.read_text())["latent_rm"] | {"base": str(old)}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_rm": record}))
    before = drawn(ltts, old, trained, "before", "cache=off")
    if moved == "together":
        trained = (place / "old").rename(new) / "out" / "checkpoint"
    else:
        new.mkdir()
        trained = trained.rename(new / "rm")
        (place / "far").mkdir()
        old.rename((new if moved == "beside" else place / "far") / "reasoner")
    monkeypatch.setattr(files, "digested", {})  # those of a new process
    if moved == "only the adapter":
        digest = json.loads((trained / "config.json").read_text())["latent_rm"]["reasoner"]
        words = (
            "old/reasoner, which cannot be read: ",
            f"put the one with the digest {digest} at",
            "new/reasoner",
        )
        check(ltts("convert", trained, "joined"), *words, "or pass it as model.checkpoint")
    else:
        assert scorer_of(trained)._backbone_folder == new / "reasoner"
    reasoner = (place / "far" if moved == "only the adapter" else new) / "reasoner"
    assert (drawn(ltts, reasoner, trained, "after", "cache=off") == before).all()


def test_a_damaged_adapter_or_another_reasoner_is_refused(trained, checkpoint, place, ltts, monkeypatch):
    monkeypatch.setattr(files, "digested", {})
    adapter = annotated.adapter_of(checkpoint)

    def spoilt(name):
        return shutil.copytree(trained, place / name)

    def says(folder, words, *, load=False):
        files.digested.clear()
        scorer = scorer_of(folder)
        with pytest.raises(UsageError, match=words):
            scorer.load(device="cpu", dtype="float32") if load else scorer.check(adapter, {})

    (spoilt("headless") / "own.safetensors").unlink()
    says(place / "headless", r"lacks own\.safetensors")
    for name, changes, words in (
        (
            "gone",
            {"base": "/no/such/reasoner", "base_path": "no/such"},
            r"of the reasoner /no/such/reasoner, which can",
        ),
        ("other", {"reasoner": "0" * 16}, r"an adapter of the reasoner .*, but that has the digest .* not 0{16}"),
    ):
        path = spoilt(name) / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"latent_rm": content["latent_rm"] | changes}))
        says(place / name, words)
    path = spoilt("dora") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    says(place / "dora", r"use_dora=True, which is not supported")
    path = spoilt("misfit") / "adapter_model.safetensors"
    save_file({name.replace("h.0", "h.7"): value for name, value in load_file(path).items()}, path)
    says(place / "misfit", r"fits no layer of the reasoner", load=True)
    files.digested.clear()
    check(ltts("convert", place / "gone", "new"), "which cannot be read")
    check(ltts("convert", trained, "new", "latents=3"), "latents=3", "must be null")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["init=random"], ["init=random", "must be reasoner"]),
        (["lora.dropout=0.1"], ["lora.dropout=0.1", "must be 0"]),
        (["lora.rank=0"], ["lora.rank=0", "positive integer"]),
        (["lora.targets=[nosuch]"], ["lora.targets=", "nosuch"]),
    ],
)
def test_what_cannot_be_trained_is_refused(ltts, checkpoint, folders, more, words):
    check(ltts(*train_line(checkpoint, *folders, *more)), *words)


@pytest.mark.slow
def test_a_latent_rm_on_a_reasoner_that_is_an_adapter_itself(ltts, place):
    rows = [{"question": f"What is {a} plus {b}?", "answer": a + b, "steps": [f"<<{a}+{b}={a + b}>>"]}
            for a in range(4) for b in range(5)]  # fmt: skip
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tiny_gguf.write(place / "m.gguf", tiny_gguf.model())
    reasoner = ltts(
        "train-reasoner", "model=coconut", f"init=gguf:{file}", "task=jsonl", "task.path=rows.jsonl", "device=cpu",
        "output=reasoner", "optimization.batch=4", "optimization.bf16=false", "valid_questions=2", "model.latents=3",
        "recipe.written_updates=1", "recipe.stage_updates=[]", "recipe.final_updates=2", "lora.rank=4",
    )  # fmt: skip
    assert reasoner.code == 0, reasoner.err
    from latent_tts.model.coconut import Coconut

    adapter = Coconut(name="tiny", checkpoint=str(place / reasoner.last), latents=3, recommended={})
    folders = (annotated.write(place / name, adapter, 16, seed=seed) for seed, name in enumerate(("train", "valid")))
    result = ltts(*train_line(place / reasoner.last, *folders, "model=coconut"))
    assert result.code == 0, result.err
    scores = drawn(ltts, place / reasoner.last, result.last, "run", "model=coconut", "task=jsonl",
                   "task.path=rows.jsonl", "sampler=gaussian")  # fmt: skip
    lm, backbone = models._loaded["model"][1].lm, models._loaded["scorer"][1].backbone
    assert backbone.embed_tokens.weight.data_ptr() == lm.get_input_embeddings().weight.data_ptr()
    assert len(set(scores)) > 1
