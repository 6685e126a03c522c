"""`sampler=native` and the Gaussian latent head it draws from."""

import json
import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from against_oracle import TOLERANCE, check_against_oracle
from refusal import check
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import UsageError
from latent_tts.random.draw import Draw
from latent_tts.sampler.native import Native
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.types import Question
from parity import COLAR, colar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published layout with the spread that its conversion dropped."""
    folder = shutil.copytree(COLAR, tmp_path_factory.mktemp("native") / "colar")
    weights = load_file(folder / "model.safetensors")
    width, hidden = weights["lt_head.mean.weight"].shape
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = nn.Linear(hidden, width)
    own = {"lt_head.log_std.weight": layer.weight.detach(), "lt_head.log_std.bias": layer.bias.detach() - 1.0}
    save_file(weights | own, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("temperature", [-1, math.nan, math.inf, "1", None, True])
def test_a_bad_temperature_is_named(temperature):
    with pytest.raises(UsageError, match=r"\Asampler\.temperature="):
        Native(temperature)


def test_a_latent_is_drawn_from_the_models_gaussian():
    draw = Draw.of(0, ["q"], torch.arange(20_000)[None], 3)
    draw.spread_RD = torch.tensor([0.1, 1.0, 3.0]).expand(20_000, -1)
    latents = Native(0.5).latent(torch.tensor([1.0, 2.0, 3.0]).expand(20_000, -1), draw, 2)
    torch.testing.assert_close(latents.mean(0), torch.tensor([1.0, 2.0, 3.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std(0), torch.tensor([0.05, 0.5, 1.5]), rtol=0.03, atol=0)
    assert Native(0).latent(latents, draw, 0) is latents


def test_the_heads_spread_is_that_of_the_original_code(folder):
    model = colar(folder)
    model.check()
    assert model.has_spread
    assert not colar().has_spread
    reasoner = model.load(device="cpu", dtype="float32")
    weights = load_file(folder / "model.safetensors")
    hidden_RD = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def layer(name, x):
        return linear(x, weights[f"lt_head.{name}.weight"], weights[f"lt_head.{name}.bias"])

    inner = layer("fc.2", gelu(layer("fc.0", hidden_RD)))
    inner = layer_norm(inner, inner.shape[-1:], weights["lt_head.fc.3.weight"], weights["lt_head.fc.3.bias"])
    assert reasoner.latent_spread is not None
    torch.testing.assert_close(reasoner.latent_spread(hidden_RD), layer("log_std", inner).exp() * model.latent_std)
    torch.testing.assert_close(reasoner.next_latent(hidden_RD), layer("mean", inner) * model.latent_std)
    assert colar().load(device="cpu", dtype="float32").latent_spread is None


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "more", "sampled"),
    [("gpt2", {}, False), ("llama", {"stop_id": 6}, True), ("qwen3", {"schedule": Jacobi(3, None, "zero")}, False)],
)
def test_the_engine_equals_the_oracle(monkeypatch, family, more, sampled):
    plain = tiny.reasoner
    monkeypatch.setattr(
        tiny, "reasoner", lambda *args, **kw: replace(plain(*args, **kw), latent_spread=lambda hidden: hidden.abs() / 3)
    )
    sampler = AnswerSampling(1.5).over(Native(0.7)) if sampled else Native(0.7)
    result = check_against_oracle(family, sampler, [1, 9], 3, tiny.plan(3, eos_id=tiny.EOS_IDS[family], **more))
    assert not torch.allclose(result.latents_RTD[0], result.latents_RTD[1], **TOLERANCE)


def test_a_head_of_the_wrong_shape(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["lt_head.log_std.bias"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"the latent head lacks lt_head\.log_std\.bias"):
        colar(broken).check()


def test_runs(ltts, folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    question = Question("q", json.loads((COLAR / "expected.json").read_text())["prompts"][0], "1")
    path.write_text(json.dumps({"question": question.text, "answer": "1"}) + "\n")
    line = [
        "run",
        "budget=fixed",
        "model=colar",
        "model.latents=4",
        "task=jsonl",
        f"task.path={path}",
        "max_answer_tokens=3",
        "n=3",
    ]
    result = ltts(*line, f"model.checkpoint={folder}", "sampler=native", "sampler.temperature=2.0")
    assert result.code == 0, result.err
    columns = pd.read_csv(result.last).iloc[0]
    assert (columns["sampler"], columns["sampler_param"], columns["sampler_value"]) == ("native", "temperature", 2.0)
    check(ltts(*line, f"model.checkpoint={COLAR}", "sampler=native"), "sampler=native", "predicts no spread")
