"""Machine code against what it stands for: torch's operators, in float32."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine.attention import AttentionState, attend
from latent_tts.random import cpu

numba = pytest.importorskip("numba")

from latent_tts.random import machine_code  # noqa: E402

LAYER, HALF, WIDE = SimpleNamespace(layer_idx=0), torch.bfloat16, torch.float32


@pytest.fixture
def threads(request):
    """As many threads of torch's as said."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@machine_code.compiled
def count_visits(pointer):
    numbers = machine_code.numbers_at(pointer)
    visits = machine_code.array_at(numbers[2], (numbers[1],), np.int64)
    while True:
        piece = machine_code.next_piece(pointer)
        if piece >= numbers[1]:
            return
        visits[piece] += numbers[3]


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("pieces", [0, 1, 2, 1000])
@pytest.mark.parametrize("team", ["torch's", "none"])
def test_every_piece_is_done_once(threads, pieces, team, monkeypatch):
    if team == "none":
        monkeypatch.setattr(cpu, "_in_parallel", lambda: None)
    visits = torch.zeros(pieces, dtype=torch.long)
    for _ in range(20):
        cpu.run(count_visits, pieces, visits, 3)
    assert visits.tolist() == [60] * pieces


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@on_linux
def test_torch_itself_offers_its_threads():
    """What else would be slow without a word; a torch without GNU's OpenMP has no such threads to offer."""
    assert (cpu._in_parallel() is not None) == ("libgomp" in loaded_libraries())


def loaded_libraries():
    torch.ones(2) @ torch.ones(2)
    with open("/proc/self/maps") as maps:
        return maps.read()


def test_exponentials_are_those_of_numpy():
    x = np.linspace(-87, 0, 20001, dtype=np.float32)
    found = numba.njit(lambda x: [machine_code.exp(value) for value in x])(x)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=2.5e-7)


@settings(derandomize=True, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120))
def test_bfloat16_is_rounded_as_torch_rounds_it(value):
    expected = torch.tensor(value).to(HALF)
    assert narrowed(np.float32(value)) == expected.view(torch.int16).item() & 0xFFFF
    assert widened(np.uint16(expected.view(torch.int16).item() & 0xFFFF)) == expected.item()


@numba.njit
def narrowed(value):
    return machine_code.narrow(value)


@numba.njit
def widened(bits):
    return machine_code.wide(bits)


def passes(state, inputs, dtype):
    """What a layer attends to in passes one after another."""
    state.prefix = [[tuple(part.to(dtype) for part in piece) for piece in pieces] for pieces in state.prefix]
    attended = []
    for query, key, value in inputs:
        attended.append(attend(LAYER, *(part.to(dtype) for part in (query, key, value)), None, state=state)[0])
        state.used += query.shape[2]
    return torch.cat(attended, 1).float()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    rollouts=st.integers(1, 5),
    key_heads=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
    width=st.sampled_from([8, 20, 64]),
    tokens=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    gaps=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_operators(lengths, rollouts, key_heads, groups, width, tokens, gaps, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, capacity = len(lengths) * rollouts, 10

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(HALF)

    half = len(lengths) // 2
    pieces = [part for part in (lengths[:half], lengths[half:]) if part]
    prefix = [[tuple(random(len(part), key_heads, max(part), width) for _ in range(2)) for part in pieces]]
    heads = key_heads * groups, key_heads, key_heads
    inputs = [[random(rows, count, h, width).transpose(1, 2) for h in heads] for count in tokens]
    valid_RS = torch.rand(rows, capacity, generator=generator) < 0.6 if gaps else None
    if valid_RS is not None:
        valid_RS[:, 0] = True

    def state():
        return AttentionState(torch.tensor(lengths), rollouts, capacity, prefix, valid_RS=valid_RS, reads_prefix=True)

    assert cpu.suits_machine_code(inputs[0][0])
    expected = passes(state(), inputs, WIDE)
    torch.testing.assert_close(passes(state(), inputs, HALF), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("questions", "rows"), [([0, 1], [2, 0, 4, 3]), ([1, 0], [4, 3, 2, 0]), ([1, 0, 1], [5, 0, 4])], ids=str
)
def test_forks_go_on_like_their_origins(questions, rows):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(HALF)

    first, second = ([random(6, 2, 4, 8).transpose(1, 2) for _ in range(3)] for _ in range(2))
    prefix = [[(random(1, 4, longest, 8), random(1, 4, longest, 8)) for longest in (5, 3)]]
    state = AttentionState(torch.tensor([5, 3]), 3, 4, prefix, reads_prefix=True)
    passes(state, [first], HALF)
    fork = state.fork(torch.tensor(questions), torch.tensor(rows))
    again = passes(fork, [[part[rows] for part in second]], HALF)
    assert torch.equal(again, passes(state, [second], HALF)[rows])


@on_linux
def test_a_peak_of_memory_can_be_forgotten():
    block = bytearray(1 << 27)
    high = cpu.peak_bytes()
    assert high >= len(block)
    del block
    cpu.forget_peak()
    assert cpu.peak_bytes() <= high - (1 << 26)


@on_linux
def test_free_memory_can_be_given_back():
    cpu.give_memory_back()
    assert (cpu._trim() is not None) == ("libc.so.6" in loaded_libraries())  # GNU's has a call for it
