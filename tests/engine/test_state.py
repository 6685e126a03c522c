"""The four operations on keys and values against transformers' own forward pass over whole sequences."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.state import open_state
from latent_tts.types import Computation

CAPACITY, TOLERANCE = 12, {"rtol": 0, "atol": 1e-9}


def backbones(family):
    """A prepared backbone, and a copy with transformers' own attention."""
    lm = tiny.reasoner(family).lm
    plain = tiny.plain_copy(lm).base_model
    prepare_backbone(lm)
    return lm.base_model, plain


BACKBONES = {family: backbones(family) for family in ("gpt2", "llama", "qwen3")}
WAYS = ("shared-prefix", "transformers")


def opened(family, way, rollouts, **more):
    """A state without questions."""
    prepared, plain = BACKBONES[family]
    return open_state(prepared if way == "shared-prefix" else plain, Computation(way), rollouts, CAPACITY, **more)


class Sequences:
    """What the rows hold, one list of vectors per row, with positions counted without gaps."""

    def __init__(self, plain, prompts, rollouts, offsets):
        self.plain, self.rollouts = plain, rollouts
        self.rows = [(list(prompt), []) for prompt in prompts for _ in range(rollouts)]
        self.offsets = [offset for offset in offsets for _ in range(rollouts)]

    @torch.inference_mode()
    def hidden(self, row):
        prompt, suffix = self.rows[row]
        vectors = torch.stack(prompt + [vector for vector in suffix if vector is not None])[None]
        positions = self.offsets[row] + torch.arange(vectors.shape[1])[None]
        return self.plain(inputs_embeds=vectors, position_ids=positions, use_cache=False).last_hidden_state[0]

    def fork(self, rows):
        other = Sequences(self.plain, [], 0, [])
        other.rows = [(self.rows[row][0], list(self.rows[row][1])) for row in rows]
        other.offsets = [self.offsets[row] for row in rows]
        return other


def checked_append(state, sequences, seed, tokens, first_valid):
    """Append random tokens to both and compare the hidden states of all that hold something."""
    rows = len(sequences.rows)
    vectors_RSD = torch.randn(rows, tokens, tiny.WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    hidden_RSD = state.append(vectors_RSD, first_valid)
    for row in range(rows):
        left_out = first_valid is not None and not first_valid[row]
        sequences.rows[row][1].extend([None, *vectors_RSD[row, 1:]] if left_out else vectors_RSD[row])
        real = tokens - left_out
        if real:
            torch.testing.assert_close(hidden_RSD[row, left_out:], sequences.hidden(row)[-real:], **TOLERANCE)


@torch.inference_mode()
@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    family=st.sampled_from(sorted(BACKBONES)),
    way=st.sampled_from(WAYS),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    rollouts=st.integers(1, 3),
    pieces=st.integers(1, 3),
    offset=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_order_of_operations_equals_whole_forward_passes(
    family, way, lengths, rollouts, pieces, offset, seed, data
):
    _, plain = BACKBONES[family]
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randn(n, tiny.WIDTH, generator=generator).double() for n in lengths]
    offsets = [3 * i for i in range(len(lengths))] if offset and min(lengths) > 0 else None
    given_offsets = None if offsets is None else torch.tensor(offsets)
    state = opened(family, way, rollouts, position_offset_Q=given_offsets)
    sequences = Sequences(plain, prompts, rollouts, offsets or [0] * len(lengths))
    for start in range(0, len(prompts), pieces):
        part = prompts[start : start + pieces]
        padded = torch.zeros(len(part), max(1, *map(len, part)), tiny.WIDTH).double()
        for place, prompt in enumerate(part):
            padded[place, : len(prompt)] = prompt
        hidden = state.prefill(padded, torch.tensor([len(prompt) for prompt in part]))
        for place, prompt in enumerate(part):
            if len(prompt):
                wanted = sequences.hidden((start + place) * rollouts)
                torch.testing.assert_close(hidden[place, : len(prompt)], wanted, **TOLERANCE)
    for number in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(["append", "append", "rewind", "fork"]))
        rows = len(sequences.rows)
        if action == "append" and state.used + 2 <= CAPACITY:
            first_valid = None
            if min(lengths) > 0 and data.draw(st.booleans()):  # else a row might hold nothing to attend to
                first_valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
            checked_append(state, sequences, 100 * seed + number, data.draw(st.integers(1, 2)), first_valid)
        elif action == "rewind":
            used = data.draw(st.integers(0, state.used))
            state.rewind(used)
            for _, suffix in sequences.rows:
                del suffix[used:]
        elif action == "fork":
            chosen = sorted(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
            before, held = state, sequences
            state, sequences = state.fork(torch.tensor(chosen)), sequences.fork(chosen)
            checked_append(state, sequences, 200 * seed + number, 1, None) if state.used < CAPACITY else None
            if before.used < CAPACITY:  # the one that was forked goes on as if nothing had happened
                checked_append(before, held, 300 * seed + number, 1, None)
    if state.used < CAPACITY:
        checked_append(state, sequences, seed, 1, None)


@torch.inference_mode()
@pytest.mark.parametrize("way", WAYS)
def test_more_tokens_than_the_capacity_are_refused(way):
    state = open_state(BACKBONES["gpt2"][way == "transformers"], Computation(way), 1, 2)
    state.prefill(torch.zeros(1, 1, tiny.WIDTH).double(), torch.tensor([1]))
    state.append(torch.zeros(1, 1, tiny.WIDTH).double())
    with pytest.raises(ValueError, match="1 slots and 2 more exceed the capacity of 2"):
        state.append(torch.zeros(1, 2, tiny.WIDTH).double())
