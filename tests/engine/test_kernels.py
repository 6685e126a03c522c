"""Triton's kernels of the engine: its interpreter says that they are right, its compiler that GPUs take them."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latent_tts.engine import attention
from latent_tts.random import kernel_check

HELPERS = Path(__file__).parents[1] / "helpers"
AGREES = """
from functools import partial
import torch, triton_interpreter
from latent_tts.engine import attention, attention_kernel

cpu, right = torch.device("cpu"), attention_kernel.attend_piece
sizes = {attention_kernel.tile(torch.bfloat16, 64, rows * groups * tokens, questions * heads)[0]
         for questions, rows, heads, groups, tokens, *_ in attention.KERNEL_CASES}
assert sizes == {16, 32}
for dtype in attention.KERNEL_DTYPES:
    for width in (16, 40):
        assert attention.kernel_agrees(cpu, dtype, width), (dtype, width)

def wrong(*arguments, by):
    arguments = list(arguments)
    arguments[by] = arguments[by] + 1
    right(*arguments)

for by in (3, 4):
    attention_kernel.attend_piece = partial(wrong, by=by)
    assert not attention.kernel_agrees(cpu, torch.float32, 16)

class Launched:
    def __getitem__(self, grid):
        self.grid = grid
        return lambda *given, **named: None

attention_kernel._attend = Launched()  # as for beams, where each row has a prompt of its own
rows = 70_000
part, out = torch.zeros(rows, 1, 1, 16), torch.zeros(rows, 1, 1, 16)
lengths = torch.ones(rows, dtype=torch.long)
right(part, (part, part), (part, part), lengths, lengths[:1], None, 1.0, out)
assert attention_kernel._attend.grid[0] == rows and max(attention_kernel._attend.grid[1:]) < 2**16
"""
LOOKS = """
import torch, triton_interpreter
from latent_tts.engine import head, head_kernel

cpu, right = torch.device("cpu"), head_kernel.look
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    assert head.kernel_agrees(cpu, dtype), dtype
for place in range(3):
    def wrong(*given):
        found = [part.clone() for part in right(*given)]
        found[place].flatten()[-1] += 1
        return found
    head_kernel.look = wrong
    assert not head.kernel_agrees(cpu, torch.float32), place


def unscaled(logits_RP, bias_P):  # what blocks before the highest one summed
    wide_RP = logits_RP.float() if bias_P is None else logits_RP.float() + bias_P.float()
    parts = wide_RP.split(head_kernel.BLOCK, 1)
    return *right(logits_RP, bias_P)[:2], sum((part - part.amax(1, keepdim=True)).exp().sum(1) for part in parts)

head_kernel.look = unscaled
assert not head.kernel_agrees(cpu, torch.bfloat16)
head_kernel.look = right

layer = torch.nn.Linear(8, 777).requires_grad_(False)
for rows in (1, 3):
    hidden_RD = torch.randn(rows, 8)
    wanted = head.choose(layer, hidden_RD)
    head.has_kernel, head.VALUES_AT_ONCE = lambda hidden: True, {"cuda": 500, "cpu": 1 << 20}
    found = head.choose(layer, hidden_RD)
    head.has_kernel = lambda hidden: False
    assert found.token_R.equal(wanted.token_R)
    torch.testing.assert_close(found.logprob_R, wanted.logprob_R)
    torch.testing.assert_close(found.margin_R, wanted.margin_R)

inf, nan, block = float("inf"), float("nan"), head_kernel.BLOCK
room_RP = torch.full((2, 2 * block), nan)
logits_RP = room_RP[:, : block + 3].fill_(-inf)
logits_RP[0, block + 1] = 1.0  # the only token that is possible
found = right(logits_RP, None)
assert found[0].tolist() == [[1, -inf], [-inf, -inf]] and found[1].tolist() == [[block + 1, 0], [0, 1]], found
assert found[2].tolist() == [1, 0], found
logits_RP.fill_(0)
logits_RP[:, 5], logits_RP[:, block + 1], logits_RP[:, block] = 1, 1, 2  # of equal second ones the first
assert right(logits_RP, None)[1].tolist() == [[block] * 2, [5] * 2]
for place in (0, 5, block + 2):  # rows of NaN are refused later, and their places are used as indices before
    logits_RP.fill_(nan)
    logits_RP[0, place] = 1.0
    found = right(logits_RP, None)
    assert found[1].min() >= 0 and found[1].max() < block + 3 and found[2].isnan().all(), found

layer = torch.nn.Linear(8, block + 70).requires_grad_(False)
layer.bias[:block] = -inf
hidden_RD = torch.randn(3, 8)
head.VALUES_AT_ONCE = {"cuda": 3 * block, "cpu": 3 * block}  # nothing is possible in the first piece
wanted = head.choose(layer, hidden_RD)
assert wanted.logprob_R.isfinite().all()
head.has_kernel = lambda hidden: True
found = head.choose(layer, hidden_RD)
assert found.token_R.equal(wanted.token_R)
torch.testing.assert_close(found.logprob_R, wanted.logprob_R)
layer, hidden_RD = layer.bfloat16(), hidden_RD.bfloat16()
hidden_RD[1] = nan
assert head.choose(layer, hidden_RD).logprob_R.isfinite().tolist() == [True, False, True]
"""
ROLLS = """
import torch, triton_interpreter, tiny
from latent_tts.engine import attention
from latent_tts.random import kernel_check
from latent_tts.engine.graphs import GraphEngine
from latent_tts.engine.recording import Recordings
from latent_tts.engine.rollout import Engine
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.types import Reasoner

class Runs:
    def record(self, run, tensors):
        return run

prompt = Dropout(0.2, "residual", ["prompt"], "fresh")
for family, sampler, stop_id in (("llama", Gaussian(0.3, False), 6), ("gpt2", prompt, None)):
    made = tiny.reasoner(family)
    reasoner = Reasoner(made.lm.float(), made.next_latent)
    plan, prompts = tiny.plan(2, eos_id=tiny.EOS_IDS[family], answer=2, stop_id=stop_id), tiny.prompts([9, 1])
    found = []
    for kernel in (False, True):
        attention.has_kernel = lambda like, kernel=kernel: kernel
        engines = [Engine(reasoner, plan)]
        if kernel:
            recordings = Recordings("cpu", needed=True, new_recorder=Runs, max_bytes=1e9)
            engines.append(GraphEngine(reasoner, plan, recordings))
        for engine in engines:
            for _ in range(3 if engine is engines[-1] and kernel else 1):
                found.append(engine.roll(prompts, tiny.draw(["a", "b"], range(2)), sampler))
    for other in found[1:]:
        torch.testing.assert_close(other.latents_RTD, found[0].latents_RTD, rtol=1e-3, atol=1e-3)
        assert other.answer_ids == found[0].answer_ids and other.steps_R.equal(found[0].steps_R)
"""
COMPILES = """
from itertools import product
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from latent_tts.engine import attention_kernel as kernels, head_kernel

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHARED = 99 * 1024  # of what Triton supports, GPUs of compute capability 8.6 and 8.9 have the least
of_dtype = "query", "prefix_keys", "prefix_values", "keys", "values", "out"
aligned = *of_dtype, *[f"{a}_{b}" for a in ("query", "prefix", "suffix") for b in ("row", "head", "token", "slot")]
names = kernels._attend.arg_names
for (dtype, short), padded, (count, generation) in product(NAMES.items(), kernels.TILES, ((1, 90), (64, 80), (64, 90))):
    if dtype == torch.float16 and padded != 64:  # as bfloat16
        continue
    queries, tokens = kernels.tile(dtype, padded, count, kernels.MANY_TILES)
    valid = count > 1
    sizes = {"WIDTH": padded if valid else padded * 5 // 8, "PADDED": padded, "QUERIES": queries, "TOKENS": tokens}
    sizes |= {"HAS_VALID": valid, "SLOT_STAGES": kernels.slot_stages(dtype)}
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(of_dtype, "*" + short) | dict.fromkeys(sizes, "constexpr")
    kinds |= {"lengths": "*i64", "used": "*i64", "valid": "*u8" if valid else "*i64", "scale": "fp32"}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in aligned}
    source = ASTSource(kernels._attend, kinds, sizes, attributes)
    options = {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES}
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= SHARED, (short, padded, generation, made.metadata.shared)
    over_slots = made.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "async_copy" in over_slots and "convert_layout" not in over_slots, (short, padded, generation)

for short, generation, bias in product(NAMES.values(), (80, 90), (False, True)):
    sizes = {"HAS_BIAS": bias, "BLOCK": head_kernel.BLOCK}
    kinds = {"logits": "*" + short, "bias": "*" + short, "highest": "*fp32", "places": "*i64", "total": "*fp32"}
    kinds |= {"stride": "i32", "tokens": "i32"} | dict.fromkeys(sizes, "constexpr")
    attributes = {(place,): [["tt.divisibility", 16]] for place in (0, 5)}  # logits and their stride
    kinds = {name: kinds[name] for name in head_kernel._look.arg_names}
    source = ASTSource(head_kernel._look, kinds, sizes, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": head_kernel.WARPS})
    assert made.asm["cubin"] and ".v4.b32" in made.asm["ptx"], short  # values are loaded 16 bytes at once
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, as CUDA builds of torch bring it")
@pytest.mark.parametrize(
    ("code", "interpret"),
    [(AGREES, "1"), (LOOKS, "1"), (ROLLS, "1"), (COMPILES, "0")],
    ids=["attention agrees", "the visit to logits agrees", "attention makes the same rollouts", "all compile"],
)
def test_kernels(tmp_path, code, interpret):
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def by_operators(query, prefix, suffix, lengths_Q, used_1, valid_RC, scale, out, *, causal=True):
    """What the kernel does, token by token."""
    rows, heads, tokens, _ = query.shape
    groups, siblings = heads // prefix[0].shape[1], rows // len(lengths_Q)
    for row in range(rows):
        length, used = int(lengths_Q[row // siblings]), int(used_1)
        for token in range(tokens):
            end = used + (token + 1 if causal else tokens)
            seen = torch.ones(end, dtype=torch.bool) if valid_RC is None else valid_RC[row, :end]
            keys, values = (
                torch.cat([before[row // siblings, :, :length], own[row, :, :end][:, seen]], 1).repeat_interleave(
                    groups, 0
                )
                for before, own in zip(prefix, suffix, strict=True)
            )
            weights = (keys @ query[row, :, token, :, None] * scale).softmax(1)
            out[row, token] = (weights * values).sum(1)


def wrong(*arguments):
    by_operators(*arguments)
    arguments[-1][-1, -1] += 0.1


def seeing_what_comes_later(*arguments):
    by_operators(*arguments, causal=False)


def raising(*arguments):
    raise RuntimeError("out of resource: shared memory\nmore")


@pytest.fixture
def asked(monkeypatch):
    """Ask whether a kernel is usable, on the CPU."""

    def ask(attend_piece, width=32):
        kernel = SimpleNamespace(attend_piece=attend_piece)
        monkeypatch.setitem(sys.modules, "latent_tts.engine.attention_kernel", kernel)
        monkeypatch.setattr(kernel_check, "find_spec", lambda name: name == "triton")
        where = torch.device("cpu"), torch.float32, width
        return kernel_check.is_usable.__wrapped__("attention", attention.kernel_agrees, *where)

    return ask


def test_a_kernel_that_agrees_is_used(asked, caplog):
    assert asked(by_operators)
    assert not caplog.records


@pytest.mark.parametrize(
    ("kernel", "width", "why"),
    [
        (wrong, 32, "differ from those of torch"),
        (seeing_what_comes_later, 64, "differ from those of torch"),
        (raising, 32, "RuntimeError: out of resource"),
        (wrong, 8, "width 8"),
    ],
)
def test_one_that_fails_or_differs_is_not_used_and_that_is_said(asked, caplog, kernel, width, why):
    with caplog.at_level(logging.WARNING):
        assert not asked(kernel, width)
    assert [why in record.getMessage() for record in caplog.records] == [True]


def test_that_triton_is_missing_is_said_and_nothing_tried(caplog, monkeypatch):
    monkeypatch.setattr(kernel_check, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not kernel_check.is_usable.__wrapped__("attention", raising, "cuda")
    assert ["it is not installed" in record.getMessage() for record in caplog.records] == [True]
