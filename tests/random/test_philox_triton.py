"""Random numbers by Triton's kernels: its interpreter says that they are right, its compiler that GPUs take them."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from latent_tts.engine.rollout import Engine
from latent_tts.random import bits, kernel_check
from latent_tts.random.draw import Draw
from latent_tts.sampler.dropout import Dropout

HELPERS = Path(__file__).parents[1] / "helpers"
INTERPRETED = """
import torch, triton_interpreter
from latent_tts.random import bits, triton_kernels as kernels
from latent_tts.random.philox import philox

zero, ones, cpu = torch.zeros(1, 2, dtype=torch.long), 2**32 - 1, torch.device("cpu")
found = [
    kernels.words(key, rollout, 1, place, stream)[0, :, 0].tolist()
    for key, rollout, place, stream in (
        (zero, torch.tensor([0]), 0, 0), (zero + ones, torch.tensor([ones]), ones, ones)
    )
]
assert found[0] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], found
assert found[1] == list(philox((0, ones, ones, ones), (ones, ones))), found
assert bits.kernels_agree(cpu)

right, place = kernels.drop, 5  # of the threshold
kernels.drop = lambda *arguments: right(*arguments[:place], arguments[place] + 300, *arguments[place + 1:])
assert not bits.kernels_agree(cpu)

keys, rollouts = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 9])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    values = torch.tensor([0.0, -0.0, 1e-8, 3.0, -7e3, 6e4, float("inf")]).repeat(6).view(2, 3, 7).to(dtype)
    for threshold in (0, 1, 65_535):  # of which the last takes float16 beyond its largest value
        for first in (None, 0, 5):
            given = values, keys, rollouts, 7, 1, threshold, first
            found, wanted = right(*given), bits.drop_by_operators(*given)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)

class Launched:
    def __getitem__(self, grid):
        self.grid = grid
        return lambda *given, **named: None

kernels._drop = Launched()  # prompts of many tokens of a wide model
right(torch.empty(1, 20_000, 4096, dtype=torch.bfloat16), keys[:1], rollouts[:1], 7, 1, 9, 0)
assert max(kernels._drop.grid[1:], default=1) < 2**16
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from latent_tts.random import triton_kernels as kernels

numbers = dict.fromkeys(("blocks", "tokens", "stream", "threshold", "width", "first"), "i32") | {"scale": "fp32"}
pointers = {"keys": "*i64", "rollouts": "*i64", "out": "*i64"}
pointers |= {"output": "*bf16", "made": "*bf16"}
for kernel, constants in (
    (kernels._words, {"LANES": 256}),
    (kernels._drop, {"LANES": 128, "ONE_MASK": True}), (kernels._drop, {"LANES": 128, "ONE_MASK": False}),
):
    for place in ("i32", "i64"):  # a place beyond 2**31 is passed as the latter
        kinds = pointers | numbers | {"place": place} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, constants)
        for generation in (75, 80, 90, 100):
            assert triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, as CUDA builds of torch bring it")
@pytest.mark.parametrize(("code", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"])
def test_kernels_are_philox_and_compile_for_gpus(tmp_path, code, interpret):
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Ask whether kernels are usable, on the CPU."""

    def asked(kernels):
        monkeypatch.setattr(kernel_check, "find_spec", lambda name: name == "triton")
        monkeypatch.setitem(sys.modules, "latent_tts.random.triton_kernels", kernels)
        monkeypatch.setattr("latent_tts.random.triton_kernels", kernels, raising=False)
        return kernel_check.is_usable.__wrapped__("drawing", bits.kernels_agree, torch.device("cpu"))

    return asked


OPERATORS = SimpleNamespace(words=bits.words_by_operators, drop=bits.drop_by_operators)


def test_kernels_that_agree_are_used(as_on_a_gpu, caplog):
    assert as_on_a_gpu(OPERATORS)
    assert not caplog.records


def raising(*arguments):
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (raising, "RuntimeError: Failed to find C compiler"),
        (lambda *a: OPERATORS.words(*a) ^ 1, "differ from those of"),
    ],
)
def test_kernels_that_fail_or_differ_are_not_used_and_that_is_said_once(as_on_a_gpu, caplog, words, why):
    with caplog.at_level(logging.WARNING):
        assert not as_on_a_gpu(SimpleNamespace(words=words, drop=OPERATORS.drop))
    assert [why in record.getMessage() for record in caplog.records] == [True]


def test_where_they_are_usable_all_words_come_from_them(monkeypatch):
    taken = []
    kernels = SimpleNamespace(words=lambda *arguments: (taken.append(arguments), OPERATORS.words(*arguments))[1])
    monkeypatch.setitem(sys.modules, "latent_tts.random.triton_kernels", kernels)
    monkeypatch.setattr("latent_tts.random.triton_kernels", kernels, raising=False)
    draw = Draw.of(0, ["question"], torch.arange(2)[None], 8)
    expected = draw.normal(0, 8), draw.uniform(0)
    assert not taken
    monkeypatch.setattr(bits, "has_kernels", lambda device: True)
    found = draw.normal(0, 8), draw.uniform(0)
    assert len(taken) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("site", "where", "mask"),
    [
        ("residual_embedding", ["prompt", "thoughts", "answer"], "fresh"),
        ("residual", ["thoughts", "answer"], "locked"),
        ("ffn", ["thoughts"], "fresh"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rollouts_are_those_of_factors_where_a_kernel_drops(monkeypatch, family, site, where, mask):
    engine, prompts = Engine(tiny.reasoner(family, torch.float32), tiny.plan(3, answer=4)), tiny.prompts([5, 1, 9])

    def rolled():
        return engine.roll(prompts, tiny.draw(["a", "b", "c"], range(3)), Dropout(0.3, site, where, mask))

    expected, dropped = rolled(), []
    kernels = SimpleNamespace(**vars(OPERATORS))
    kernels.drop = lambda *arguments: (dropped.append(arguments[-1]), OPERATORS.drop(*arguments))[1]
    monkeypatch.setitem(sys.modules, "latent_tts.random.triton_kernels", kernels)
    monkeypatch.setattr("latent_tts.random.triton_kernels", kernels, raising=False)
    monkeypatch.setattr(bits, "has_kernels", lambda device: True)
    found = rolled()
    assert dropped
    assert torch.equal(found.latents_RTD, expected.latents_RTD)
    assert found.answer_ids == expected.answer_ids
    assert torch.equal(found.answer_logprob_R, expected.answer_logprob_R)
