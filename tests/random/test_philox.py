import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from latent_tts.random.philox import MASK32, Dice, Stream, key_of, philox

# counter, key, result: the published vectors of Philox-4x32-10 (Random123, kat_vectors)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = key_of(0, "test")


def as_numpy(value):
    return value if isinstance(value, int) else value.copy()


def as_torch(value):
    return value if isinstance(value, int) else torch.from_numpy(value.copy())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_come_out_for_python_integers(counter, key, expected):
    assert philox(counter, key) == expected


@pytest.mark.parametrize("convert", [as_numpy, as_torch])
def test_known_answers_come_out_for_arrays(convert):
    columns = [np.array(column) for column in zip(*[(*c, *k) for c, k, _ in KNOWN_ANSWERS], strict=True)]
    words = philox(tuple(map(convert, columns[:4])), tuple(map(convert, columns[4:])))
    assert [tuple(int(word[i]) for word in words) for i in range(len(KNOWN_ANSWERS))] == [e for *_, e in KNOWN_ANSWERS]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    shapes=mutually_broadcastable_shapes(num_shapes=6, max_dims=3, max_side=3),
    seed=st.integers(0, 2**32 - 1),
    large=st.booleans(),
)
def test_python_numpy_and_torch_agree_for_any_broadcast_arrangement(shapes, seed, large):
    generator = np.random.default_rng(seed)
    low = 2**32 - 5 if large else 0
    words = [generator.integers(low, 2**32, shape, dtype=np.int64) for shape in shapes.input_shapes]
    if shapes.result_shape:  # the words that are multiplied first are arrays, any other may be a plain integer
        words[0], words[2] = np.atleast_1d(words[0]), np.atleast_1d(words[2])
    words = [int(word) if word.ndim == 0 else word for word in words]
    originals = [np.copy(word) for word in words]

    plain = [np.broadcast_to(word, shapes.result_shape).ravel().tolist() for word in words]
    expected = [philox(row[:4], row[4:]) for row in zip(*plain, strict=True)]
    for convert in (as_numpy, as_torch):
        inputs = [convert(word) for word in words]
        outputs = philox(tuple(inputs[:4]), tuple(inputs[4:]))
        got = [np.broadcast_to(np.asarray(word), shapes.result_shape).ravel().tolist() for word in outputs]
        assert list(zip(*got, strict=True)) == expected
        for word, original in zip(inputs, originals, strict=True):
            np.testing.assert_array_equal(np.asarray(word), original)


@pytest.mark.parametrize("convert", [as_numpy, as_torch])
def test_a_zero_word_and_the_key_may_be_plain_integers(convert):
    item, row = np.arange(3)[None, :], np.arange(2)[:, None]
    words = philox((convert(item), convert(row), 0, int(Stream.SUBSET)), KEY)
    got = [[tuple(int(word[j, i]) for word in words) for i in range(3)] for j in range(2)]
    assert got == [[philox((i, j, 0, int(Stream.SUBSET)), KEY) for i in range(3)] for j in range(2)]


def test_keys_differ_between_seeds_and_names():
    keys = {key_of(seed, name) for seed in range(50) for name in ("a", "b", "a-2", "")}
    assert len(keys) == 200
    assert all(0 <= word <= MASK32 for key in keys for word in key)


def test_streams_items_and_keys_give_different_words():
    dice = [Dice(key_of(0, name), s, item) for name in "ab" for s in Stream for item in (0, 1, 2**32, 2**40)]
    assert len({tuple(d.below(2**32) for _ in range(4)) for d in dice}) == len(dice)


def test_dice_are_the_same_each_time_they_are_made():
    first, second = (Dice(KEY, Stream.PROBLEM, 7) for _ in range(2))
    assert [first.below(1000) for _ in range(50)] == [second.below(1000) for _ in range(50)]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(item=st.integers(0, 2**64 - 1), low=st.integers(-100, 100), size=st.integers(1, 1000))
def test_dice_stay_in_their_ranges(item, low, size):
    dice = Dice(KEY, Stream.PROBLEM, item)
    for _ in range(9):
        assert 0 <= dice.below(size) < size
        assert low <= dice.between(low, low + size - 1) < low + size
        assert dice.pick("abc") in "abc"


def test_dice_are_uniform():
    sides, rolls = 10, 20_000
    dice = Dice(KEY, Stream.PROBLEM, 0)
    counts = np.bincount([dice.below(sides) for _ in range(rolls)], minlength=sides)
    chi_squared = np.sum((counts - rolls / sides) ** 2) / (rolls / sides)
    assert chi_squared < 27.9  # 99.9 % of chi squared with 9 degrees of freedom


def test_both_ends_of_between_are_reached():
    dice = Dice(KEY, Stream.PROBLEM, 1)
    assert {dice.between(3, 5) for _ in range(100)} == {3, 4, 5}
