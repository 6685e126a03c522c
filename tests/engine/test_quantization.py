"""`engine.quantize`: which layers, how close, whose numbers depend on whom; and through the command line."""

import json
from dataclasses import make_dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from oracle import Oracle
from refusal import check
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from latent_tts.engine.quantization import as_linear, check_products, quantize
from latent_tts.engine.rollout import Engine
from latent_tts.engine.sites import find_blocks
from latent_tts.errors import UsageError
from latent_tts.pipeline.keys import rollout_key
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.random.draw import Draw
from latent_tts.results.run_folder import LATENTS, read_metrics
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Computation

pytest.importorskip("torchao")
EVERYWHERE = ["prompt", "thoughts", "answer"]
MASKS = Dropout(0.2, "residual_embedding", EVERYWHERE, "fresh")
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def quantised(family, dtype=torch.float32, kind="int8"):
    reasoner = tiny.reasoner(family, dtype)
    quantize(reasoner.lm, kind)
    return reasoner


def linears(lm):
    return [module for module in find_blocks(lm).modules() if isinstance(module, nn.Linear)]


def distance(ours, theirs):
    """Relative, in the Euclidean norm."""
    return float((ours - theirs).norm() / theirs.norm())


def test_a_conv1d_as_a_linear_layer_gives_the_same():
    conv, x_RSD = Conv1D(24, 16), torch.randn(2, 3, 16)
    torch.nn.init.normal_(conv.bias)
    torch.testing.assert_close(as_linear(conv)(x_RSD), conv(x_RSD))


@families
def test_every_matrix_of_the_blocks_is_int8_and_nothing_else_is(family):
    lm = quantised(family).lm
    assert len(linears(lm)) == lm.config.num_hidden_layers * {"gpt2": 4, "llama": 7}[family]
    for layer in linears(lm):
        assert layer.weight.qdata.dtype == torch.int8
        assert layer.weight.scale.numel() == layer.out_features
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        assert type(module.weight) is nn.Parameter
        assert module.weight.dtype == torch.float32


@families
def test_rollouts_are_close_to_those_of_the_model_as_loaded(family):
    plan, prompts = tiny.plan(1), tiny.prompts([9, 5, 14])
    loaded, ours = (
        Engine(reasoner, plan).roll(prompts, tiny.draw(["a", "b", "c"], range(1)), Greedy()).latents_RTD
        for reasoner in (tiny.reasoner(family, torch.float32), quantised(family))
    )
    assert 1e-4 < distance(ours, loaded) < 0.1


@pytest.mark.parametrize(
    ("family", "sampler"), [("llama", Gaussian(0.5, False)), ("gpt2", MASKS)], ids=["noise", "masks"]
)
def test_rollouts_are_those_of_one_row_at_a_time(family, sampler):
    reasoner, plan, prompts = quantised(family), tiny.plan(2, answer=1), tiny.prompts([9, 5])
    drawn = Engine(reasoner, plan).roll(prompts, tiny.draw(["a", "b"], range(2)), sampler)
    oracle = Oracle(reasoner, plan)
    for row in (0, 3):
        wanted = oracle.roll(prompts[row // 2], sampler, question_id="ab"[row // 2], rollout=row % 2).latents_TD
        assert distance(drawn.latents_RTD[row], wanted) < 1e-5
        assert distance(drawn.latents_RTD[row ^ 1], wanted) > 0.2  # the other rollout of the question


def test_a_layer_that_cannot_be_quantised_is_refused_by_name():
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=20, n_layer=1, n_head=4, n_positions=8))
    with pytest.raises(UsageError, match=r"multiples of 16, 0\.attn\.c_attn has \(60, 20\)"):
        quantize(lm, "float8")
    lm = tiny.reasoner("llama", torch.float32).lm
    find_blocks(lm)[1].mlp.gate_proj = nn.Bilinear(8, 8, 8)
    with pytest.raises(UsageError, match=r"1\.mlp\.gate_proj is a Bilinear"):
        quantize(lm, "int8")


def test_float8_layers_have_a_scale_a_token(monkeypatch):
    """With torch's slow float8 product of a CPU, which torchao refuses to use by itself."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    loaded = tiny.reasoner("gpt2", torch.bfloat16).lm
    for ours, theirs in zip(linears(quantised("gpt2", torch.bfloat16, "float8").lm), convs(loaded), strict=True):
        assert ours.weight.qdata.dtype == torch.float8_e4m3fn
        x_RSD = torch.randn(4, 3, ours.in_features).bfloat16()
        assert 1e-3 < distance(ours(x_RSD).float(), theirs(x_RSD).float()) < 0.1
        large_RSD = torch.cat([x_RSD[:2], 100 * x_RSD[2:]])
        torch.testing.assert_close(ours(large_RSD)[:2], ours(x_RSD)[:2], rtol=0, atol=0)


def convs(lm):
    return [module for module in find_blocks(lm).modules() if isinstance(module, Conv1D)]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.float32), ("float8", torch.bfloat16)])
def test_a_gpu_draws_quantised_rollouts(kind, dtype):
    check_products(kind, "cuda:0")
    loaded, reasoner = tiny.reasoner("gpt2", dtype), tiny.reasoner("gpt2", dtype)
    loaded.lm.cuda()
    quantize(reasoner.lm.cuda(), kind)
    for ours, theirs in zip(linears(reasoner.lm), convs(loaded.lm), strict=True):
        x_RSD = torch.randn(4, 5, ours.in_features, device="cuda", dtype=dtype)
        assert 1e-4 < distance(ours(x_RSD).float(), theirs(x_RSD).float()) < 0.1
    draw = Draw.of(0, ["a", "b"], torch.arange(3, device="cuda").repeat(2, 1), tiny.WIDTH)
    rollouts = Engine(reasoner, tiny.plan(2)).roll(tiny.prompts([9, 5]), draw, Gaussian(0.5, False))
    assert rollouts.latents_RTD.isfinite().all()


def test_a_run_reports_what_int8_gives_and_keeps_it_apart(run):
    loaded, int8 = run("keep_latents=true"), run("engine.quantize=int8", "keep_latents=true")
    assert int8.code == 0, int8.err
    assert set(pd.read_csv(int8.last)["settings"]) == {"engine.quantize=int8,max_answer_tokens=4,task.limit=6"}
    ours, theirs = (read_metrics(done.last).set_index("metric")["value"] for done in (int8, loaded))
    assert ours["gbytes"] < theirs["gbytes"]
    assert ours["gflops"] == theirs["gflops"]
    ours, theirs = (json.loads((done.last.parent / "run.json").read_text()) for done in (int8, loaded))
    assert ours["rollouts"]["drawn_now"] == theirs["rollouts"]["drawn_now"] == 24
    assert ours["cache"] != theirs["cache"]
    assert ours["versions"].keys() - theirs["versions"].keys() == {"torchao"}
    ours, theirs = (load_file(done.last.parent / LATENTS)["latents_RTD"] for done in (int8, loaded))
    assert 1e-5 < distance(ours, theirs) < 0.1


def test_keys_of_runs_without_it_are_those_of_before():
    known = {"digest": "", "prompt_recipe": "", "latents": 6, "eos_id": 0, "eos_ids": (0,)}
    adapter = make_dataclass("Adapter", known)(**known)
    spec: Any = SimpleNamespace(
        adapter=adapter,
        sampler=Greedy(),
        config={"model": {"_target_": "m"}, "sampler": {}, "search": {}},
        seed=0,
        max_answer_tokens=4,
        search=None,
        guided=False,
        schedule=SimpleNamespace(key="sequential"),
        draft=None,
        answers=SimpleNamespace(random=False),
        forced_ids=[],
    )
    keys = []
    for kind in (None, "int8"):
        spec.engine = EngineSettings("float32", "cpu", None, kind)
        keys.append(rollout_key(spec, Computation(), None))
    loaded, int8 = keys
    assert "quantize" not in loaded
    assert int8 == loaded | {"quantize": "int8"}


def test_annotations_hold_it(ltts, checkpoint, tmp_path):
    few = [f"model.checkpoint={checkpoint}", "n=2", "completions=1", "max_answer_tokens=2", "task.limit=1"]
    line = ["annotate", *few, "sampler=gaussian", "sampler.sigma=1", "keep=all", f"output={tmp_path / 'labels'}"]
    assert ltts(*line, "engine.quantize=int8").code == 0
    check(ltts(*line), 'quantize: "int8" there', "null now")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.quantize=int4"], ["engine.quantize=int4", "null, int8 or float8"]),
        (["engine.quantize=float8"], ["engine.quantize=float8", "takes engine.dtype=bfloat16"]),
        (["engine.quantize=int8", "engine.dtype=float16"], ["takes engine.dtype=float32 or bfloat16"]),
        (
            ["engine.quantize=float8", "engine.dtype=bfloat16", "engine.device=cpu"],
            ["engine.quantize=float8", "compute capability 8.9 or more", "int8"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_is_refused(refuse, overrides, words):
    refuse(*overrides, words=words)


def test_without_torchao_the_extra_is_named(refuse, monkeypatch):
    present = find_spec
    monkeypatch.setattr("latent_tts.pipeline.spec.find_spec", lambda name: None if name == "torchao" else present(name))
    refuse("engine.quantize=int8", words=["engine.quantize=int8", "pip install '.[quant]'"])
