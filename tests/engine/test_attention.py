"""Attention in half precision against the same in float32, with gaps, pieces and grouped queries; forks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine.attention import attend
from latent_tts.engine.state import KeyValueState

LAYER, HALF, WIDE = SimpleNamespace(layer_idx=0), torch.bfloat16, torch.float32


def state_of(rollouts, capacity, lengths, prefix, valid_RC=None):
    """A state of one layer, whose passes no backbone runs."""
    state: Any = KeyValueState(None, rollouts, capacity)  # type: ignore[arg-type]
    state.lengths_Q, state.prefix, state.valid_RC = torch.tensor(lengths), prefix, valid_RC
    return state


def passes(state, inputs, dtype):
    """What a layer attends to in passes one after another."""
    state.prefix = [[tuple(part.to(dtype) for part in piece) for piece in pieces] for pieces in state.prefix]
    attended = []
    for inputs_of_pass in inputs:
        tensors = [part.to(dtype) for part in inputs_of_pass]
        state.reserve(tensors[0].shape[2])
        attended.append(attend(LAYER, *tensors, None, shared_prefix_state=state)[0])
        state.used += tensors[0].shape[2]
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
def test_attention_in_half_precision_is_near_that_in_float32(
    lengths, rollouts, key_heads, groups, width, tokens, gaps, seed
):
    generator = torch.Generator().manual_seed(seed)
    rows, capacity = len(lengths) * rollouts, 10

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(HALF)

    half = len(lengths) // 2
    pieces = [part for part in (lengths[:half], lengths[half:]) if part]
    prefix = [[tuple(random(len(part), key_heads, max(part), width) for _ in range(2)) for part in pieces]]
    heads = key_heads * groups, key_heads, key_heads
    inputs = [[random(rows, count, h, width).transpose(1, 2) for h in heads] for count in tokens]
    valid_RC = torch.rand(rows, capacity, generator=generator) < 0.6 if gaps else None
    if valid_RC is not None:
        valid_RC[:, 0] = True

    def state():
        return state_of(rollouts, capacity, lengths, prefix, valid_RC)

    expected = passes(state(), inputs, WIDE)
    torch.testing.assert_close(passes(state(), inputs, HALF), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("rows", [[2, 0, 4, 3], [4, 3, 2, 0], [5, 0, 4], [0, 1, 4]], ids=str)
def test_forks_go_on_like_their_origins(rows):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(HALF)

    first, second = ([random(6, 2, 4, 8).transpose(1, 2) for _ in range(3)] for _ in range(2))
    prefix = [[(random(1, 4, longest, 8), random(1, 4, longest, 8)) for longest in (5, 3)]]
    state = state_of(3, 4, [5, 3], prefix)
    passes(state, [first], HALF)
    fork = state.fork(torch.tensor(rows))
    again = passes(fork, [[part[rows] for part in second]], HALF)
    torch.testing.assert_close(again, passes(state, [second], HALF)[rows], rtol=0.03, atol=0.03)


def test_a_slot_of_all_rows_lies_in_one_piece_of_memory_on_a_cpu():
    state = state_of(3, 10, [4, 2], [[tuple(torch.zeros(2, 1, 4, 16) for _ in range(2))]])
    passes(state, [[torch.zeros(6, 1, 2, 16)] * 3], WIDE)
    for each in (state, state.fork(torch.tensor([3, 5]))):
        assert all(part[:, :, slot].is_contiguous() for part in each.suffix[0] for slot in range(10))
