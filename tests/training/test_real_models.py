"""Training on any causal LM, whole or by an adapter, from the command line; tiny models prove mechanics only."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_gguf
import torch
from places import place_of_its_own
from refusal import check, check_refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latent_tts.checkpoint import files
from latent_tts.model.cot import Cot
from latent_tts.training.states import last_state
from latent_tts.types import Question

ROWS = [
    {
        "question": f"What is {a} plus {b} times 2?",
        "answer": a + 2 * b,
        "steps": [f"<<{b}*2={2 * b}>>", f"<<{a}+{2 * b}={a + 2 * b}>>"],
    }
    for a in range(2, 7)
    for b in range(2, 6)
]
LORA = ["lora.rank=4", "lora.alpha=8"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a tiny GGUF model, and a cache with the checkpoint that it was converted into."""
    folder = tmp_path_factory.mktemp("converted")
    file = tiny_gguf.write(folder / "m.gguf", tiny_gguf.model())
    with place_of_its_own(folder):
        files.resolve(f"gguf:{file}")
    return folder


@pytest.fixture
def train(ltts, place, converted):
    """`ltts train-reasoner` from a tiny GGUF model on twenty questions."""
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    shutil.copytree(converted, place, dirs_exist_ok=True)
    file = place / "m.gguf"

    def line(*more, model="coconut", init=f"gguf:{file}", updates=4):
        stages = {
            "coconut": ["recipe.written_updates=1", "recipe.stage_updates=[1]", f"recipe.final_updates={updates - 2}"],
            "cot": [f"recipe.written_updates={updates}"],
        }
        stages["codi"] = stages["coconut"]
        latents = [] if model == "cot" else ["model.latents=2"]
        return [
            "train-reasoner", f"model={model}", f"init={init}", "task=jsonl", "task.path=rows.jsonl", "device=cpu",
            "output=out", "optimization.batch=4", "optimization.bf16=false", "valid_questions=2", "save_every=2",
            "optimization.warmup=1", "optimization.lr=0.01", *latents, *stages[model], *more,
        ]  # fmt: skip

    def run(*more, **named):
        return ltts(*line(*more, **named))

    run.line = line
    return run


def draw(ltts, model, folder, *more):
    latents = [] if model == "cot" else ["model.latents=2"]
    sampler = ["sampler=greedy", "answer.temperature=0.5"] if model == "cot" else ["sampler=gaussian"]
    return ltts(
        "run", "budget=fixed", f"model={model}", f"model.checkpoint={folder}", "task=jsonl", "task.path=rows.jsonl",
        "task.limit=3", "n=2", "max_answer_tokens=4", *latents, *sampler, *more,
    )  # fmt: skip


SLOW = pytest.mark.slow
CASES = [
    ("coconut", LORA),
    *(
        pytest.param(*case, marks=SLOW)
        for case in [("codi", LORA), ("cot", LORA), ("coconut", []), ("cot", []), ("codi", [])]
    ),
]


@pytest.mark.parametrize(("model", "how"), CASES)
def test_a_model_from_a_gguf_file_is_trained_and_run(train, ltts, model, how):
    done = train(*how, model=model)
    assert done.code == 0, done.err
    assert (done.last / files.ADAPTER).is_file() == bool(how)
    result = draw(ltts, model, done.last)
    assert result.code == 0, result.err
    if how:
        names = " ".join(load_file(done.last / "adapter_model.safetensors"))
        assert ("trainable_tokens_delta" in names) == (model != "cot")
        assert "embed_tokens.weight" not in names


@pytest.mark.slow
def test_a_stopped_adapter_run_resumes_bit_for_bit_with_small_states(train, place, monkeypatch):
    done = train(*LORA)
    assert done.code == 0, done.err
    whole = load_file(last_state(place / "out" / "states") / "model.safetensors")
    base = load_file(place / "out" / "initial" / "model.safetensors")
    assert not set(base) & set(whole)
    (place / "out").rename(place / "first")
    from latent_tts.training.reasoner import train as training

    stop = training.ReasonerTrainer.compute_loss

    def interrupted(self, *arguments, **more):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return stop(self, *arguments, **more)

    monkeypatch.setattr(training.ReasonerTrainer, "compute_loss", interrupted)
    assert train(*LORA).code == 130
    monkeypatch.setattr(training.ReasonerTrainer, "compute_loss", stop)
    assert train(*LORA).code == 0
    again = load_file(last_state(place / "out" / "states") / "model.safetensors")
    assert again.keys() == whole.keys()
    assert all(again[name].equal(whole[name]) for name in whole)


@pytest.mark.slow
def test_convert_joins_an_adapter_with_its_base(train, ltts, place):
    adapter = train(*LORA, updates=2).last
    done = ltts("convert", adapter, "joined")
    assert done.code == 0, done.err
    assert not (place / "joined" / files.ADAPTER).exists()
    assert draw(ltts, "coconut", "joined").code == 0
    check(ltts("convert", adapter, "again", "latents=3"), "latents=3", "must be null", "latent_tts.json")


@pytest.mark.slow
def test_an_adapter_of_a_cut_vocabulary_is_joined_with_the_whole_base(train, ltts, place):
    done = train(*LORA, "init_vocabulary=used")
    assert done.code == 0, done.err
    assert draw(ltts, "coconut", done.last).code == 0
    sizes = [files.load_tokenizer(folder).get_vocab_size() for folder in (done.last, place / "out" / "initial")]
    assert sizes[0] == sizes[1] < len(tiny_gguf.vocabulary()) + 3


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(train, ltts, place):
    first = train(*LORA)
    (place / "out").rename(place / "first")
    second = train(*LORA, init=place / "first" / "checkpoint")
    assert (first.code, second.code) == (0, 0), second.err
    assert draw(ltts, "coconut", second.last).code == 0


@pytest.mark.parametrize("part", ["embed_tokens", pytest.param("lm_head", marks=SLOW)])
def test_wrong_rows_are_found_where_new_tokens_have_rows_among_others(train, ltts, place, part):
    base = place / "base"
    vocabulary = len(tiny_gguf.vocabulary())
    config = tiny_gguf.model(tied=False).config
    config.vocab_size = vocabulary + 3000  # rows without a token
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_gguf.tokenizer().save(str(base / "tokenizer.json"))
    done = train(*LORA, init=base)
    assert done.code == 0, done.err
    settings = json.loads((done.last / files.ADAPTER).read_text())
    assert settings["trainable_token_indices"][part] == [vocabulary, vocabulary + 1, vocabulary + 2]
    path = done.last / "adapter_model.safetensors"
    rows = load_file(path)
    name = next(name for name in rows if "trainable_tokens" in name and part in name)
    save_file(rows | {name: -rows[name]}, path)
    check(draw(ltts, "coconut", done.last), "it computes something else than the trained model did")


BAD = [
    (["lora.rank=0"], ["lora.rank=0", "positive integer"]),
    (["lora.rank=4", "lora.targets=[nosuch]"], ["lora.targets=", "nosuch"]),
    (["lora.rank=4", "lora.dropout=1"], ["lora.dropout=1", "[0, 1)"]),
    (["validation.every=0"], ["validation.every=0", "positive integer"]),
    (["validation.dtype=int8"], ["validation.dtype=int8", "must be one of float32"]),
    (["init_vocabulary=some"], ["init_vocabulary=some", "all or used"]),
    (["recipe.new_tokens=nosuch"], ["recipe.new_tokens=nosuch", "mean, or a token"]),
    (["model.checkpoint=x"], ["model.checkpoint=x", "init="]),
    (["init=null"], ["task=rows", "without init="]),
    (["init=gguf:nosuch.gguf"], ["init=gguf:nosuch.gguf", "no such file"]),
    (["task=math500"], ["task.split=train", "one of test"]),
]  # fmt: skip


@pytest.mark.every_other
@pytest.mark.parametrize(("more", "words"), BAD, ids=lambda value: value[0])
def test_what_cannot_be_trained_is_refused(train, more, words, monkeypatch, place):
    (place / "data").mkdir()
    (place / "data" / "math500.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    monkeypatch.setenv("LTTS_DATA", str(place / "data"))
    check_refused(*train.line(*more), words=words)
    assert not (place / "out" / "checkpoint").exists()


def test_the_engine_validates_the_joined_weights_and_the_best_become_the_checkpoint(train, ltts, place, monkeypatch):
    from latent_tts.training.reasoner.validation import Validation

    measure, seen = Validation.measure, []

    def scored(self, reasoner, adapter, stage, *rest):
        figures = measure(self, reasoner, adapter, stage, *rest)
        assert not any("lora" in name for name, _ in reasoner.lm.named_parameters())
        assert reasoner.lm.dtype == torch.bfloat16
        seen.append((stage.latents, figures))
        best = {"eval_greedy_accuracy": 1.0 if len(seen) == 4 else 0.0, "eval_coverage_at_3": 0.0}
        return figures | best

    monkeypatch.setattr(Validation, "measure", scored)
    whole = train(*LORA, "validation.every=1", "validation.rollouts=3", "validation.max_answer_tokens=4", updates=5)
    assert whole.code == 0, whole.err
    assert "weights of update 4 of 5; on valid: greedy accuracy 1.000, coverage at 3 0.000" in whole.err
    assert [latents for latents, _ in seen] == [0, 1, 2, 2, 2]
    assert {path.name for path in (place / "out" / "states").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    best = load_file(place / "out" / "states" / "checkpoint-4" / "model.safetensors")
    written = load_file(whole.last / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_B"
    assert written[f"base_model.model.{name}.weight"].equal(best[f"lm.{name}.default.weight"].bfloat16())
    state = json.loads((last_state(place / "out" / "states") / "trainer_state.json").read_text())
    assert any("eval_coverage_at_3" in entry for entry in state["log_history"])


@pytest.mark.parametrize("how", [LORA, pytest.param([], marks=SLOW)], ids=["adapter", "whole"])
def test_a_trained_chat_model_keeps_its_template_and_its_special_tokens(train, place, how):
    done = train(*how, "model.prompt=chat", model="cot", updates=1)
    assert done.code == 0, done.err
    trained = Cot("own", str(done.last), 0, {}, prompt="chat")
    begun = Cot("own", str(place / "out" / "initial"), 0, {}, prompt="chat")
    question = Question("q", "2+2?", "4")
    assert trained.encode(question) == begun.encode(question)
    assert trained.prompt_recipe == begun.prompt_recipe
    assert trained.eos_ids == begun.eos_ids


def test_the_last_stage_of_a_validated_training_may_have_no_updates(train):
    done = train(*LORA, "validation.every=1", "validation.rollouts=3", "validation.max_answer_tokens=4", updates=2)
    assert done.code == 0, done.err
    assert "weights of update 2 of 2; on valid: greedy accuracy" in done.err


def test_a_stream_has_no_vocabulary_of_its_own(ltts, place):
    file = tiny_gguf.write(place / "m.gguf", tiny_gguf.model())
    done = ltts("train-reasoner", f"init=gguf:{file}", "init_vocabulary=used", "output=out")
    check(done, "init_vocabulary=used", "no finite set")


@pytest.mark.slow
@pytest.mark.parametrize("more", [LORA, [*LORA, "optimization.batch_tokens=400", "optimization.batch=8"]])
def test_two_processes_make_the_updates_of_one_with_two_micro_batches(train, place, more):
    """On gloo; sums of gradients are rounded in another order."""
    more = [*more, "lora.dropout=0.1", "optimization.lr=1e-3", "optimization.gradient_checkpointing=true"]
    alone = train(*more, "optimization.accumulation=2")
    assert alone.code == 0, alone.err
    (place / "out").rename(place / "alone")
    # as `accelerate launch` starts processes; its own --cpu --num_processes 2 starts one
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    line = [*train.line(*more), "validation.every=2", "validation.max_answer_tokens=4"]
    done = subprocess.run([*launch, "latent_tts", *line], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/checkpoint"]
    assert done.stderr.count("2 questions are held out") == 1
    one, two = (last_state(place / name / "states") for name in ("alone", "out"))
    losses = [
        [row["loss"] for row in json.loads((state / "trainer_state.json").read_text())["log_history"] if "loss" in row]
        for state in (one, two)
    ]
    assert one.name == two.name == "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads((two / "digests.json").read_text()).keys()
    before = load_file(place / "alone" / "states" / one.name / "model.safetensors")
    after = load_file(two / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
