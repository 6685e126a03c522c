"""`model=cot`: an explicit chain of thought, from prompt to costs, and its rollouts against the oracle."""

import json

import pandas as pd
import pytest
import tiny
from against_oracle import check_against_oracle

from latent_tts.engine.cost import Shape
from latent_tts.errors import UsageError
from latent_tts.model.cot import Cot
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Question

QUESTION = Question("q", "Ann has 3 pens. How many pens does Ann have?", "3")


def adapter(folder, **more):
    return Cot(**{"name": "cot", "checkpoint": str(folder), "latents": 0, "recommended": {}} | more)


SAMPLERS = [Greedy(), *(Dropout(0.3, "residual", where, "fresh") for where in (["prompt"], ["answer"]))]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_rollouts_without_latents_or_end_tokens_equal_the_oracle(family, sampler):
    plan = tiny.plan(0, end=0, eos_id=tiny.EOS_IDS[family], answer=5)
    check_against_oracle(family, sampler, [1, 9, 4], 1 if sampler.deterministic else 3, plan)


def test_a_prompt_is_the_question_and_a_newline(checkpoint):
    cot = adapter(checkpoint)
    assert cot.encode(QUESTION) == cot.tokenizer.encode(QUESTION.text + "\n").ids
    assert cot.tokenizer.id_to_token(cot.encode(QUESTION)[-1]) == "\n"
    assert cot.thinking_end_ids == []


@pytest.mark.parametrize(
    ("text", "raw"),
    [("<<3+4=7>>\n<<7*2=14>>\n### 14", "14"), ("### 1\n### 2 ", "2"), ("<<3+4=7>>\n<<7", None), ("", None)],
)
def test_the_answer_stands_after_the_last_sign(checkpoint, text, raw):
    assert adapter(checkpoint).raw_answer(text) == raw


@pytest.mark.parametrize(
    ("more", "words"),
    [({"latents": 2}, r"model\.latents=2: must be 0"), ({"checkpoint": None}, r"model\.checkpoint=null: ")],
)
def test_bad_values_are_named(checkpoint, more, words):
    with pytest.raises(UsageError, match=rf"\A{words}"):
        adapter(checkpoint, **more)


def test_it_needs_no_special_tokens(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "latent" not in token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    adapter(tmp_path).check()


def test_a_run_counts_what_was_written(run, checkpoint):
    result = run("model=cot", "sampler=greedy", "n=1", "max_answer_tokens=9")
    assert result.code == 0, result.err
    table, rollouts = pd.read_csv(result.last), pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert set(rollouts["latent_steps"]) == {0}
    shape, cot = Shape.from_config(adapter(checkpoint).config), adapter(checkpoint)
    from latent_tts.task.arith import Arith

    lengths = [len(cot.encode(question)) for question in Arith("test", 6, None, 0).questions()]
    flops = [
        shape.pass_flops(length + written, 0) + shape.head_flops(written + 1)
        for length, written in zip(lengths, rollouts["answer_tokens"], strict=True)
    ]
    value = table.set_index("metric")["value"]
    assert value["gflops"] == pytest.approx(sum(flops) / 6 / 1e9, rel=1e-6)
    assert value["answer_tokens"] == pytest.approx(rollouts["answer_tokens"].mean(), rel=1e-6)
    assert value["latent_steps"] == 0
    assert "no built-in LatentRM" in result.err


def test_answers_may_be_as_long_as_the_model_recommends(run):
    result = run("model=cot", "--cfg", "job", "--resolve")
    assert "max_answer_tokens: 4" in result.out
    assert "answer_tokens: 128" in result.out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=cot", "sampler=dropout"], ["sampler=dropout", "no latents", "sampler=greedy", "answer.temperature"]),
        (["model=cot", "sampler=gaussian", "sampler.sigma=0.5"], ["sampler=gaussian", "no latents"]),
        (["model=cot", "sampler=control"], ["sampler=control", "no latents"]),
        (["model.latents=0"], ["sampler=dropout", "no latents", "model.latents=0"]),
        (["model=cot", "model.latents=3"], ["model.latents=3", "0"]),
    ],
)
def test_a_sampler_of_latents_needs_latents(refuse, overrides, words):
    refuse(*overrides, words=words)


@pytest.mark.parametrize(
    "override", ["sampler=gaussian sampler.sigma=0", "sampler=dropout sampler.where=[answer] answer.temperature=0.5"]
)
def test_samplers_that_act_elsewhere_run(run, override):
    result = run("model=cot", *override.split())
    assert result.code == 0, result.err
