"""What a user gets wrong: one to four lines with key, value and what is allowed, exit 2, nothing lost."""

import json
import shutil

import pandas as pd
import pytest
import torch
from marks import slow
from records import sign
from refusal import check, check_refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer


def test_unknown_command(ltts):
    check(ltts("rum"), "rum", "run, ask, rescore")


def test_unknown_flag(ltts):
    check(ltts("run", "--fast"), "--fast", "--cfg")


def test_a_sweep_whose_config_is_to_be_shown(ltts):
    check(ltts("run", "-m", "--cfg", "job", "n=1,2"), "--cfg and --info", "leave out -m")


def test_an_argument_that_is_no_override(ltts):
    check(ltts("run", "gaussian"), "gaussian", "key=value")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampler=nosuch"], ["sampler=nosuch", "control, dropout, gaussian, greedy"]),
        (["model=gpt5"], ["model=gpt5", "coconut, codi", "demo_coconut"]),
        (["nn=3"], ["nn", "no such key", "n, "]),
        (["sampler.sgima=1"], ["sampler.sgima", "rate"]),
        (["+foo=1"], ["foo: no such key; one of n, seed", "sampler"]),
        (["++answer.foo=1"], ["answer.foo: no such key; one of temperature, top_p"]),
        (["+task.foo=1"], ["task.foo: no such key; one of split, limit"]),
        (["+aggregator.majority.foo=1"], ["aggregator.majority.foo: no such key; there are none"]),
        slow(["+engine.foo=1"], ["engine.foo: no such key; one of dtype, device"]),
        slow(["+model.foo=1"], ["model.foo: no such key; one of name, checkpoint"]),
        (["n=abc"], ["n=abc", "integer"]),
        (["experiment=nosuch"], ["experiment=nosuch", "smoke"]),
        slow(["n=1.5"], ["n=1.5", "integer"]),
        slow(["seed=x"], ["seed=x", "integer"]),
        slow(["aggregator=[best]"], ["aggregator=best", "likelihood, majority"]),
        slow(["engine.gpu=1"], ["engine.gpu", "device"]),
        (["n=0"], ["n=0", "1 to 1048576"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else None,
)
def test_a_bad_override_on_the_command_line(run, overrides, words):
    check(run(*overrides), *words)


def test_a_refusal_shows_the_number_that_was_typed(run):
    for typed in ("-1", "-1.0", "-1e0"):
        check(run("sampler=gaussian", f"sampler.sigma={typed}"), f"sampler.sigma={typed}: must be a finite number")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["n=0"], ["n=0", "1 to 1048576"]),
        (["n=-1"], ["n=-1", "1 to 1048576"]),
        (["n=1048577"], ["n=1048577", "1 to 1048576"]),
        (["scorer.checkpoint=no/such"], ["scorer.checkpoint=no/such", "is scorer=latent_rm meant?"]),
        (["sampler=gaussian", "sampler.sigma=-1"], ["sampler.sigma=-1", "0 or more"]),
        (["sampler=gaussian", "sampler.sigma=nan"], ["sampler.sigma=nan", "finite"]),
        (["sampler.rate=1"], ["sampler.rate=1", "[0, 1)"]),
        (["sampler.site=nosuch"], ["sampler.site=nosuch", "ffn, residual"]),
        (["sampler.where=[nowhere]"], ["sampler.where=[nowhere]", "prompt, thoughts, answer"]),
        (["sampler=control", "sampler.mode=none"], ["sampler.mode=none", "zero, repeat, shuffle"]),
        (["sampler=control", "sampler.mode=shuffle", "task.limit=1"], ["sampler.mode=shuffle", "two questions"]),
        (["task.split=exam"], ["task.split=exam", "train, valid, test, hard"]),
        (["model.latents=200"], ["model.latents=200", "positions"]),
        (["answer.forced_prefix=zzz"], ["answer.forced_prefix=zzz", "vocabulary of model=demo_coconut"]),
        (["answer.forced_prefix='###'", "max_answer_tokens=1"], ["answer.forced_prefix", "fewer tokens", "=1"]),
        (["engine.dtype=int3"], ["engine.dtype=int3", "float32, bfloat16, float16"]),
        (["engine.device=tpu"], ["engine.device=tpu", "auto, cpu, cuda"]),
        (["task=jsonl"], ["task.path=null", "no such file"]),
        (["task=jsonl", "task.path=nosuch.jsonl"], ["task.path=nosuch.jsonl", "no such file"]),
        (["model.checkpoint=no/such/folder"], ["model.checkpoint=no/such/folder", "no such folder"]),
        (["model.checkpoint=shipped:nosuch"], ["model.checkpoint=shipped:nosuch", "no such built-in checkpoint"]),
        (["sampler=gaussian", "sampler.sigma=inf"], ["sampler.sigma=inf", "finite"]),
        (["sampler=gaussian", "sampler.sigma=big"], ["sampler.sigma=big", "number"]),
        (["sampler.rate=-0.1"], ["sampler.rate=-0.1", "[0, 1)"]),
        (["sampler.mask=old"], ["sampler.mask=old", "fresh or locked"]),
        (["task.limit=0"], ["task.limit=0", "positive"]),
        (["task.steps=[9]"], ["task.steps=[9]", "[2, 3, 4, 5]"]),
        (["model.latents=-1"], ["model.latents=-1", "0 or more"]),
        (["max_answer_tokens=-1"], ["max_answer_tokens=-1", "1 or more"]),
        (["engine.rows=0"], ["engine.rows=0", "positive integer"]),
        (["engine.graph=maybe"], ["engine.graph=maybe", "auto, on, off"]),
        (["engine.graph=on", "engine.device=cpu"], ["engine.graph=on", "graphs need CUDA, this is cpu"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else None,
)
def test_a_bad_value(refuse, overrides, words):
    refuse(*overrides, words=words)


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["collect", "+foo=1"], ["foo: no such key; one of runs, output"]),
        (["train-reasoner", "+backbone.foo=1"], ["backbone.foo: no such key; one of layers, width"]),
        (["train-rm", "+annotate.annotations.foo=1"], ["annotate.annotations.foo: no such key; one of split, limit"]),
        (["train-rm", "+sampler.foo=1"], ["sampler.foo: no such key; one of rate"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[-1] else None,
)
def test_a_key_that_no_command_reads(ltts, line, words):
    check(ltts(*line), *words)


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("foo: 1", ["experiment/mine.yaml: foo: no such key; one of", "sampler"]),
        ("engine: {foo: 1}", ["experiment/mine.yaml: engine.foo: no such key; one of device, dtype"]),
        ("task: {foo: 1}", ["task.foo: no such key; one of split"]),
        ("n: abc", ["experiment/mine.yaml: n=abc", "integer"]),
    ],
)
def test_a_bad_key_of_ones_own_experiment(run, tmp_path, content, words):
    (tmp_path / "config" / "latent_tts" / "experiment").mkdir(parents=True)
    (tmp_path / "config" / "latent_tts" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    check(run("experiment=mine"), *words)


def test_what_a_plus_may_add(run, tmp_path):
    (tmp_path / "config" / "latent_tts" / "mine").mkdir(parents=True)
    (tmp_path / "config" / "latent_tts" / "mine" / "seven.yaml").write_text("# @package _global_\nseed: 7\n")
    result = run("+mine=seven", "+hydra.job.env_set.NOTHING=1", "+model.recommended.more=1")
    assert result.code == 0, result.err
    assert json.loads((result.last.parent / "run.json").read_text())["config"]["seed"] == 7


def test_no_such_device_where_every_rollout_is_there_already(run):
    assert run().code == 0
    check(run("engine.device=banana"), "engine.device=banana", "one of auto, cpu, cuda, cuda:INDEX")


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cpu:1"])
def test_no_such_device(refuse, device):
    refuse(f"engine.device={device}", words=[f"engine.device={device}", "one of auto, cpu, cuda, cuda:INDEX"])


def test_cuda_where_there_is_none(refuse):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refuse("engine.device=cuda", words=["engine.device=cuda", "0 CUDA devices"])


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the tiny checkpoint to be broken."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def test_a_truncated_checkpoint(refuse, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(f"model.checkpoint={broken}", words=["model.safetensors", "truncated"])


def test_a_checkpoint_without_weights(refuse, broken):
    (broken / "model.safetensors").unlink()
    refuse(f"model.checkpoint={broken}", words=["lacks model.safetensors"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_without_a_file(refuse, broken, name):
    (broken / name).unlink()
    refuse(f"model.checkpoint={broken}", words=[f"lacks {name}"])


def test_a_config_that_is_not_json(refuse, broken):
    (broken / "config.json").write_text("{")
    refuse(f"model.checkpoint={broken}", words=["config.json is not JSON"])


def test_a_checkpoint_without_the_latent_tokens(refuse, broken):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|start-latent|>"]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(f"model.checkpoint={broken}", words=["no token <|start-latent|>"])


def test_weights_of_another_shape_than_the_config_says(refuse, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    refuse(f"model.checkpoint={broken}", words=["n_layer=2", "the weights have 1 layers"])
    (broken / "config.json").write_text(json.dumps(config | {"n_layer": 0}))
    refuse(f"model.checkpoint={broken}", words=["fewer layers or biases than the weights", ".h.0."])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_no_plain_numbers(refuse, broken, dtype):
    weights, name = load_file(broken / "model.safetensors"), "transformer.h.0.mlp.c_fc.weight"
    save_file(weights | {name: weights[name].to(dtype)}, broken / "model.safetensors")
    refuse(f"model.checkpoint={broken}", words=[f"{name} is ", "must be one of F64, F32, BF16, F16"])


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n_layer", "four", 'config.json has n_layer="four"; must be an integer, 0 or more'),
        ("n_embd", None, "n_embd=null; must be an integer, 1 or more"),
        ("n_head", 0, "n_head=0"),
        ("vocab_size", "263", 'vocab_size="263"'),
        ("n_positions", 1.5, "n_positions=1.5"),
        ("n_inner", "wide", 'n_inner="wide"'),
        ("n_head", None, "transformers cannot load it: Validation error for field 'n_head'"),
    ],
)
def test_a_config_with_a_value_of_a_wrong_type(refuse, broken, name, value, words):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {name: value}))
    refuse(f"model.checkpoint={broken}", words=[f"model.checkpoint={broken}", words])
    if value is not None:
        check_refused("train_reasoner", f"init={broken}", "valid_questions=2", words=[f"init={broken}", words])


def test_weights_that_give_no_numbers(run, broken):
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, broken / "model.safetensors", {"format": "pt"})
    result = run(f"model.checkpoint={broken}")
    assert result.code == 1
    assert f"model.checkpoint={broken}: the model's own forward pass gives values that are not finite" in result.err
    assert f": its {name} is not" in result.err
    assert "metrics.csv" not in result.out


def test_a_pickle_names_convert_and_converts(run, ltts, broken, checkpoint):
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    check(run(f"model.checkpoint={broken}"), "ltts convert")
    check(run(f"model.checkpoint={broken / 'pytorch_model.bin'}"), "ltts convert")
    assert ltts("convert", broken, "converted").code == 0
    converted = load_file("converted/model.safetensors")
    assert all(torch.equal(converted[name], value) for name, value in weights.items())
    assert run("model.checkpoint=converted").code == 0


def test_convert_refuses_what_is_no_pickle_of_tensors(ltts, broken, tmp_path):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"nothing of the kind")
    check(ltts("convert", broken, "new"), "not a pickle that contains only tensors")
    torch.save({"lr": 0.1}, broken / "pytorch_model.bin")
    check(ltts("convert", broken, "new"), "dict of tensors")
    check(ltts("convert", "nowhere", "new"), "src=nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    check(ltts("convert", broken, "full"), "dst=full", "empty folder")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["contains no questions"]),
        ('{"question": "How many?", "answer": "1"}\n{"answer": "1"}\n', ["line 2", "has no question"]),
        ('{"question": "How many?", "answer": "1"\n', ["line 1", "is not JSON"]),
        ('{"question": "How many?", "answer": "many"}\n', ["line 1", "'many' is not a number"]),
        ("[1, 2]\n", ["row 1", "not a JSON object"]),
        ('{"question": "How many?", "answer": ["1"]}\n', ["line 1", "answer must be a text or a number"]),
    ],
)
def test_a_bad_file_of_questions(refuse, tmp_path, content, words):
    (tmp_path / "q.jsonl").write_text(content)
    refuse("task=jsonl", "task.path=q.jsonl", words=["q.jsonl", *words])


def test_a_question_longer_than_the_context(refuse, tmp_path):
    text = "Ann has 3 pens. " + "She buys 2 more. " * 40
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": text, "answer": "83"}))
    refuse("task=jsonl", "task.path=q.jsonl", words=["128 positions", "Ann has 3 pens"])


def test_a_word_outside_a_word_level_vocabulary(refuse, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Ann has 3 zebras.", "answer": "3"}))
    refuse("task=jsonl", "task.path=q.jsonl", words=["'zebras'", "vocabulary"])


def test_an_output_path_below_a_file(run, tmp_path):
    (tmp_path / "file").touch()
    check(run("hydra.run.dir=file/below"), "file")


def test_a_cache_below_a_file(refuse, tmp_path):
    (tmp_path / "file").touch()
    refuse("paths.cache=file/below", words=["paths.cache=file/below"])


def test_in_a_sweep_the_other_jobs_still_run_and_refused_ones_leave_no_folder(run, ltts, no_figures):
    swept = run("n=1,abc,0,2", "budget=fixed", "-m")
    assert swept.code == 2
    assert "n=abc" in swept.err
    assert "n=0" in swept.err
    assert "did not complete" not in swept.err
    assert sorted(path.name for path in swept.last.parent.iterdir() if path.is_dir()) == ["0", "2"]
    assert set(pd.read_csv(swept.last)["n"]) == {1, 2}
    assert "did not complete" not in ltts("collect", "multirun/run").err


def test_a_refused_run_is_none_that_did_not_complete(run, tmp_path):
    for bad in ("n=0", "+foo=1"):
        assert run(bad).code == 2
    assert not list(tmp_path.glob("outputs/run/*"))
    check_refused("collect", "runs=[outputs/run]", words=["runs=outputs/run"])


def test_a_refused_run_leaves_what_was_in_its_folder(run, ltts):
    folder = run("hydra.run.dir=mine").last.parent
    there = {path.name for path in folder.iterdir()}
    assert run("hydra.run.dir=mine", "n=0").code == 2
    assert {path.name for path in folder.iterdir()} == there
    assert ltts("collect", "mine").code == 0


def test_a_refused_run_leaves_the_folder_that_the_user_is_in(run, tmp_path):
    assert run("hydra.run.dir=.", "n=0").code == 2
    assert not list(tmp_path.iterdir())


def test_bad_folders_of_the_other_commands(ltts, run, own_copy):
    check(ltts("collect", "nowhere"), "runs=nowhere")
    check_refused("plot", "runs=[nowhere]", words=["runs=nowhere"])
    check_refused("compare", "a=nowhere", "b=nothere", words=["a=nowhere: no such folder"])
    sides = f"a={own_copy}", f"b={own_copy}"
    check_refused("compare", sides[0], "b=nothere", words=["b=nothere: no such folder"])
    check_refused("compare", sides[0], f"b={run('seed=7').last.parent}", words=["seeds"])
    check_refused("compare", sides[0], f"b={run('task.split=valid').last.parent}", words=["different questions"])
    check_refused("compare", *sides, "b_n=3", words=["b_n=3", "the run reports"])
    check_refused("collect", f"runs=[{own_copy}]", "output=null", words=["output: needs a value"])
    check_refused("collect", f"runs=[{own_copy}]", "output=", words=["output=: must be the path of a CSV file"])
    (own_copy / "run.json").unlink()
    check_refused("compare", *sides, words=["did not complete"])
    check_refused("collect", f"runs=[{own_copy}]", words=[f"runs={own_copy}: no complete run in 1 run folder;"])


def cut(path, left: int = -20) -> None:
    path.write_bytes(path.read_bytes()[:left])


DAMAGES = {
    "cut off": (lambda run: cut(run / "metrics.csv"), "metrics.csv", "is truncated"),
    "without its last digit": (lambda run: cut(run / "metrics.csv", -2), "metrics.csv", "is truncated"),
    "empty": (lambda run: (run / "metrics.csv").write_text(""), "metrics.csv", "cannot be read"),
    "without rows": (lambda run: table_of(run).head(0), "metrics.csv", "has no rows"),
    "without a column": (
        lambda run: table_of(run).drop(columns="value"),
        "metrics.csv",
        "columns missing: value",
    ),
    "without a number": (lambda run: table_of(run).assign(n=""), "metrics.csv", "column n must contain integers"),
    "not of numbers": (lambda run: table_of(run).assign(value="?"), "metrics.csv", "could not convert string to float"),
}


def table_of(folder):
    return pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)


def commands_on(folder):
    """Commands that read the table and the record of a run, with what they are given."""
    yield "compare", f"a={folder}", f"b={folder}"
    yield "collect", f"runs=[{folder}]"
    yield "plot", f"runs=[{folder}]"


@pytest.mark.every_other
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_metrics_table(own_copy, damage):
    change, *words = DAMAGES[damage]
    changed = change(own_copy)
    if isinstance(changed, pd.DataFrame):
        changed.to_csv(own_copy / "metrics.csv", index=False)
    *_, plot = commands_on(own_copy)
    check_refused(*plot, words=[str(own_copy / "metrics.csv"), "is damaged"])
    sign(own_copy, "metrics.csv")
    for line in commands_on(own_copy):
        check_refused(*line, words=[str(own_copy), *words])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("[]", "format None, this version reads 3"),
        ('{"config": {"answer": 3}, "aggregators": []}', "format None, this version reads 3"),
    ],
)
def test_a_damaged_record_of_a_run(own_copy, content, words):
    record = own_copy / "run.json"
    if content is None:
        cut(record)
    else:
        record.write_text(content)
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=[str(record), words])
    check_refused("rescore", f"run={own_copy}", "scorer=latent_rm", "scorer.checkpoint=any", words=[str(record), words])


def test_damaged_rollouts(own_copy):
    rollouts = own_copy / "rollouts.parquet"
    cut(rollouts)
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=[str(rollouts), "cannot be read"])
    rollouts.unlink()
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=[str(rollouts), "cannot be read"])


def test_a_table_with_a_changed_figure_is_not_drawn(own_copy):
    metrics = own_copy / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("0.", "1.", 1))
    check_refused("plot", f"runs=[{own_copy}]", words=[str(metrics), "is damaged"])


def test_rollouts_with_damaged_metadata(own_copy):
    rollouts = own_copy / "rollouts.parquet"
    content = rollouts.read_bytes()
    assert b"answer_margin" in content
    rollouts.write_bytes(content.replace(b"answer_margin", b"answer_magrin"))
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=[str(rollouts), "cannot be read"])


@pytest.mark.every_other
@pytest.mark.parametrize("content", ["{", "[1]\n", "{}\n", 50_000 * "["])
def test_answers_of_elsewhere_that_are_none(own_copy, content):
    (own_copy / "answers.jsonl").write_text(content)
    sign(own_copy, "answers.jsonl")
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=["answers.jsonl: cannot be read"])


@pytest.mark.parametrize("name", ["rollouts.parquet", "metrics.csv", "answers.jsonl"])
def test_a_table_that_is_missing(own_copy, name):
    (own_copy / name).unlink()
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=[str(own_copy / name)])
    if name == "metrics.csv":
        check_refused("collect", f"runs=[{own_copy}]", words=[str(own_copy / name), "is missing"])


def test_a_record_with_a_changed_byte_is_refused_by_every_command(own_copy, ltts):
    record = own_copy / "run.json"
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 1', 1))
    rescore = "rescore", f"run={own_copy}", "scorer=latent_rm", "scorer.checkpoint=any"
    replay, trace = ("replay", f"run={own_copy}", "budget=adaptive"), ("trace", f"run={own_copy}")
    for line in (*commands_on(own_copy), rescore, replay, trace):
        check_refused(*line, words=[str(record), "is damaged", "draw that run again"])
    assert "damaged" in ltts("list", "runs", own_copy).out


def test_a_table_of_another_run_beside_those_of_a_run(own_copy):
    pd.DataFrame({"question_id": ["0"]}).to_parquet(own_copy / "budget.parquet")
    words = [str(own_copy / "budget.parquet"), "of another run"]
    check_refused("compare", f"a={own_copy}", f"b={own_copy}", words=words)
    check_refused("replay", f"run={own_copy}", "budget=adaptive", words=words)


def test_training_refuses_bad_values(ltts, place, checkpoint):
    train = ("train_reasoner", "output=out", "valid_questions=2")
    check(ltts("train-reasoner", "output=out", "save_every=0"), "save_every=0")
    check_refused(*train, "backbone.heads=3", words=["backbone.heads=3", "must divide"])
    check_refused(*train, "backbone.dropout=1", words=["backbone.dropout=1", "[0, 1)"])
    check_refused(*train, "optimization.lr=0", words=["optimization.lr=0", "positive"])
    check_refused(*train, "model.latents=2", words=["model.latents=2", "5 stages"])
    check_refused(*train, "task.limit=10", words=["task.limit=10", "new questions"])
    check_refused(*train, f"init={checkpoint}", "backbone.layers=2", words=["backbone.layers=2", f"init={checkpoint}"])
    assert not (place / "out").exists()
    (place / "q.jsonl").write_text(json.dumps({"question": "How?", "answer": "3"}))
    check_refused(*train, "task=jsonl", "task.path=q.jsonl", "task.split=x", words=["task=q", "must be arith"])
    (place / "file").touch()
    check_refused("train_reasoner", "output=file", words=["output=file"])


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("command", "override", "allowed"),
    [
        ("train_reasoner", "optimization.lr=abc", "a positive number"),
        ("train_reasoner", "optimization.batch=0", "a positive integer"),
        ("train_reasoner", "optimization.warmup=1.5", "a positive integer"),
        ("train_reasoner", "optimization.bf16=maybe", "true or false"),
        ("train_reasoner", "optimization.weight_decay=null", "0 or more"),
        ("train_reasoner", "backbone.layers=two", "a positive integer"),
        ("train_reasoner", "backbone.layers=2.5", "a positive integer"),
        ("train_reasoner", "backbone.dropout=some", "[0, 1)"),
        ("train_reasoner", "backbone.number_scale=big", "0 or more"),
        ("train_reasoner", "recipe.stage_updates=100", "a list of numbers of updates"),
        ("train_reasoner", "recipe.final_updates=some", "must be an integer"),
        ("train_reasoner", "model.latents=many", "stages"),
        ("train_rm", "optimization.lr=abc", "a positive number"),
        ("train_rm", "optimization.batch=2.5", "a positive integer"),
        ("train_rm", "optimization.epochs=1.5", "must be an integer"),
        ("train_rm", "optimization.warmup=some", "[0, 1)"),
        ("train_rm", "optimization.weight_decay=null", "0 or more"),
        ("train_rm", "loss.normalize=maybe", "true or false"),
        ("train_rm", "loss.name=3", "contrastive, bce, last_step"),
    ],
)
def test_training_refuses_values_of_a_wrong_type(place, command, override, allowed):
    few = ["valid_questions=2"] if command == "train_reasoner" else []
    check_refused(command, *few, override, words=[override, allowed])


def test_the_traceback_is_there_for_who_asks(run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="n=0"):
        run("n=0")


def test_the_word_level_tokenizer_spells_long_numbers_and_joins_them_again(checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    encoding = tokenizer.encode("### 1234")
    assert encoding.tokens == ["###", "1", "2", "3", "4"]
    assert tokenizer.decode(encoding.ids) == "###1234"
    assert tokenizer.encode("<<120+99=219>>").tokens == ["<<", "120", "+", "99", "=", "2", "1", "9", ">>"]
