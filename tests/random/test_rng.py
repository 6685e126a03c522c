import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.random import bits
from latent_tts.random import draw as rng
from latent_tts.random.draw import MAX_LAYER, MAX_STEP, Draw
from latent_tts.random.philox import Stream, key_of, philox

IDS = ["0123456789abcdef", "fedcba9876543210", "0123456789abcdef-2"]


def draws(*, seed=0, ids=IDS, rollouts=2, width=8):
    return Draw.of(seed, ids, torch.arange(rollouts).expand(len(ids), rollouts), width)


def largest_correlation(samples, axis):
    """Over all pairs of places along an axis, in standard errors."""
    rows = samples.movedim(axis, 0).flatten(1).double()
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    return float(correlations.abs().max()) * math.sqrt(rows.shape[1])


@pytest.fixture(scope="module")
def normals():
    """(seeds, questions, rollouts, steps, elements)"""
    return torch.stack(
        [
            torch.stack([draws(seed=seed, rollouts=4).normal(step, 600) for step in range(4)], 1).view(3, 4, 4, 600)
            for seed in range(3)
        ]
    )


@pytest.fixture(scope="module")
def kept():
    """(seeds, questions, rollouts, layers, steps, tokens, elements) at rate 1/4"""
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([draws(seed=seed, rollouts=3).keep(layer, step, 3, 100, 16384) for step in range(3)], 1)
                    for layer in range(4)
                ],
                1,
            ).view(3, 3, 4, 3, 3, 100)
            for seed in range(2)
        ]
    )


def test_normals_are_standard_normal():
    values = draws(rollouts=8).normal(3, 8192).flatten().double()
    count = len(values)
    assert abs(float(values.mean())) < 4 / math.sqrt(count)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((values**3).mean())) < 4 * math.sqrt(15 / count)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    distance = (torch.special.ndtr(values.sort().values) - (torch.arange(count) + 0.5) / count).abs().max()
    assert float(distance) * math.sqrt(count) < 1.63  # 99 % of the Kolmogorov distribution


@pytest.mark.parametrize("ahead", [1 << 30, 100])
def test_normals_of_several_steps_at_once_are_those_of_one_step(monkeypatch, ahead):
    monkeypatch.setattr(rng, "NORMALS_AHEAD", ahead)
    one, together = draws(rollouts=3), draws(rollouts=3)
    together.steps = 5
    for step, width in [(0, 10), (1, 10), (3, 10), (7, 10), (2, 6), (4, 10)]:
        torch.testing.assert_close(together.normal(step, width), one.normal(step, width), rtol=0, atol=1e-6)
    assert together.rows(slice(2)).steps == 0


def test_normals_are_float32_and_finite(normals):
    assert normals.dtype == torch.float32
    assert normals.isfinite().all()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("axis", range(4), ids=["seeds", "questions", "rollouts", "steps"])
def test_normals_are_independent_over(normals, axis, power):
    assert largest_correlation(normals**power, axis) < 4


@pytest.mark.parametrize("power", [1, 2])
def test_normals_are_independent_over_elements(power):
    samples = torch.stack([draws(rollouts=50).normal(step, 12) for step in range(50)])
    assert largest_correlation(samples**power, 2) < 4


def test_all_normals_of_different_places_differ(normals):
    assert len(normals.flatten(0, 3).unique(dim=0)) == 3 * 3 * 4 * 4


@pytest.mark.parametrize("threshold", [0, 1, 655, 6554, 32768, 65535])
def test_the_share_dropped_follows_the_threshold(threshold):
    keep = draws(rollouts=16).keep(2, 1, 4, 4096, threshold)
    expected = threshold / 65536
    error = math.sqrt(expected * (1 - expected) / keep.numel())
    assert keep.dtype == torch.bool
    assert keep.shape == (48, 4, 4096)
    assert abs(float((~keep).double().mean()) - expected) <= 4 * error


def test_a_higher_threshold_drops_more_of_the_same_places():
    low, high = (draws().keep(0, 0, 2, 500, threshold) for threshold in (6554, 32768))
    assert not (high & ~low).any()
    assert not torch.equal(low, high)


@pytest.mark.parametrize("axis", range(6), ids=["seeds", "questions", "rollouts", "layers", "steps", "tokens"])
def test_keep_decisions_are_independent_over(kept, axis):
    assert largest_correlation(kept, axis) < 4


def test_keep_decisions_are_independent_over_elements(kept):
    assert largest_correlation(kept[..., :24], 6) < 4


def test_noise_and_dropout_do_not_share_numbers():
    draw = draws(rollouts=50)
    noise, keep = draw.normal(1, 64), draw.keep(0, 1, 1, 64, 32768)[:, 0]
    assert largest_correlation(torch.stack([noise, keep.float()]), 0) < 4


@pytest.mark.parametrize("blocks_ahead", [1, 48, 65536])
def test_keep_is_the_same_whether_or_not_layers_are_announced(monkeypatch, blocks_ahead):
    monkeypatch.setitem(rng.BLOCKS_AHEAD, "cpu", blocks_ahead)  # one layer, two, or all drawn together
    announced, silent, layers = draws(), draws(), [5, 0, 1, 9, 2]
    in_order = [(layer, 3, 2, 10) for layer in layers]
    next_step = [(layer, 4, 1, 10) for layer in layers]
    out_of_order = [(2, 4, 1, 10), (5, 4, 1, 10), (7, 4, 1, 10), (0, 4, 1, 10), (0, 4, 1, 10), (0, 4, 1, 11)]
    for place in in_order + next_step + out_of_order:
        assert torch.equal(announced.keep(*place, 20000, expected=layers), silent.keep(*place, 20000)), place


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def words_of(row, place, count):
    """The decisions' 16-bit words, signed, out of Philox over plain integers: each token's words 0 and 1, then 2, 3."""
    id_, rollout = IDS[row // 3], row % 3
    blocks = [philox((element, place, rollout, int(Stream.DROPOUT)), key_of(0, id_)) for element in range(count)]
    halves = [[word for block in blocks for word in block[half : half + 2]] for half in (0, 2)]
    unsigned = [part for half in halves for word in half for part in (word & 0xFFFF, word >> 16)]
    return [value - 65536 if value >= 32768 else value for value in unsigned]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("blocks_at_once", [1, 20, 65536])  # pieces of one row, of rows of two questions, all rows
def test_decisions_are_philox_words_whatever_the_pieces_and_threads(monkeypatch, blocks_at_once):
    monkeypatch.setattr(bits, "BLOCKS_AT_ONCE", {"cpu": blocks_at_once})
    keep = draws(rollouts=3).keep(7, 2, 1, 32, 20000)[:, 0]
    expected = [[word >= 20000 - 32768 for word in words_of(row, (7 << 16) | 2, 4)] for row in range(9)]
    assert keep.tolist() == expected


@pytest.mark.parametrize(("tokens", "width", "threshold"), [(3, 20, 0), (1, 8, 65535), (2, 33, 1), (1, 768, 32768)])
def test_tokens_of_a_pass_follow_one_another(tokens, width, threshold):
    """Decisions of token s are those of blocks s*B on, B blocks a token."""
    keep, per_token = draws(rollouts=3).keep(7, 2, tokens, width, threshold), -(-width // 8)
    for row in (0, 8):
        words = np.array(words_of(row, (7 << 16) | 2, tokens * per_token)).reshape(2, tokens, 4 * per_token)
        expected = np.concatenate([words[0], words[1]], axis=1)[:, :width] >= threshold - 32768
        assert keep[row].tolist() == expected.tolist()


def test_a_threshold_may_change_between_layers_drawn_together():
    announced, silent = draws(), draws()
    for layer, threshold in ((0, 1000), (1, 60000)):
        kept = announced.keep(layer, 0, 1, 64, threshold, expected=[0, 1])
        assert torch.equal(kept, silent.keep(layer, 0, 1, 64, threshold))


@pytest.mark.parametrize("index", [torch.tensor([4, 0, 0, 3]), torch.tensor([True, False, False, True, True, False])])
def test_rows_gives_the_draws_of_those_rows(index):
    draw = draws()
    some = draw.rows(index)
    assert some.width == draw.width
    assert torch.equal(some.normal(2, 9), draw.normal(2, 9)[index])
    for layer in range(3):
        assert torch.equal(some.keep(layer, 2, 3, 9, 30000), draw.keep(layer, 2, 3, 9, 30000, expected=range(3))[index])


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    questions=st.lists(st.integers(0, 4), min_size=1, unique=True),
    rollouts=st.lists(st.integers(0, 7), min_size=1, unique=True),
    seed=st.integers(0, 3),
)
def test_draws_do_not_depend_on_the_batch(questions, rollouts, seed):
    ids = [f"question {i}" for i in range(5)]
    everything = Draw.of(seed, ids, torch.arange(8).expand(5, 8), 6)
    part = Draw.of(seed, [ids[i] for i in questions], torch.tensor(rollouts).expand(len(questions), -1), 6)
    place = (torch.tensor(questions)[:, None], torch.tensor(rollouts)[None, :])
    assert torch.equal(part.normal(3, 6), everything.normal(3, 6).view(5, 8, 6)[place].flatten(0, 1))
    keep_part, keep_all = part.keep(1, 2, 2, 6, 32768), everything.keep(1, 2, 2, 6, 32768)
    assert torch.equal(keep_part, keep_all.view(5, 8, 2, 6)[place].flatten(0, 1))


@pytest.mark.parametrize("n", [1, 4, 16])
def test_n_rollouts_are_the_first_of_four_times_as_many(n):
    few, many = draws(rollouts=n), draws(rollouts=4 * n)
    assert torch.equal(few.normal(1, 7), many.normal(1, 7).view(3, 4 * n, 7)[:, :n].flatten(0, 1))
    keep = many.keep(0, 1, 2, 7, 9000).view(3, 4 * n, 2, 7)
    assert torch.equal(few.keep(0, 1, 2, 7, 9000), keep[:, :n].flatten(0, 1))


def test_rollouts_of_a_question_may_differ_from_those_of_another():
    mixed = Draw.of(0, IDS[:2], torch.tensor([[5, 2], [0, 7]]), 4).normal(0, 4)
    all_normals = draws(rollouts=8).normal(0, 4).view(3, 8, 4)
    assert torch.equal(mixed, torch.stack([all_normals[0, 5], all_normals[0, 2], all_normals[1, 0], all_normals[1, 7]]))


def test_a_width_that_is_no_multiple_of_a_block_takes_the_start_of_its_last_one():
    assert torch.equal(draws().normal(0, 5), draws().normal(0, 8)[:, :5])
    assert torch.equal(draws().keep(0, 0, 1, 5, 30000), draws().keep(0, 0, 1, 8, 30000)[..., :5])


def test_a_step_or_layer_beyond_its_bits_is_refused():
    draw = draws()
    draw.normal(MAX_STEP - 1, 4)
    draw.keep(MAX_LAYER - 1, MAX_STEP - 1, 1, 4, 1)
    with pytest.raises(ValueError, match="step 65536"):
        draw.normal(MAX_STEP, 4)
    with pytest.raises(ValueError, match="step 65536"):
        draw.keep(0, MAX_STEP, 1, 4, 1)
    with pytest.raises(ValueError, match="layer 65536"):
        draw.keep(MAX_LAYER, 0, 1, 4, 1)
