"""Dissimilarities of latents, summed up batch by batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine import diversity
from latent_tts.engine.diversity import DirectionSums


def by_pairs(latents_NTD):
    """The same by a double loop over rollouts."""
    vectors = np.asarray(latents_NTD, dtype=np.float64)
    summed = np.zeros(vectors.shape[:2])
    for i, t in np.ndindex(summed.shape):
        for j in range(i):
            norms = np.linalg.norm(vectors[i, t]) * np.linalg.norm(vectors[j, t])
            summed[i, t] += 1 - (vectors[i, t] @ vectors[j, t] / norms if norms else 0.0)
    return summed


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    questions=st.integers(1, 3),
    steps=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_batches_of_any_size_give_what_a_double_loop_gives(counts, questions, steps, seed):
    latents_QNTD = np.random.default_rng(seed).normal(size=(questions, sum(counts), steps, 5)).astype(np.float32)
    latents_QNTD[0, 0] = 0
    sums, start, found = DirectionSums(), 0, []
    for count in counts:
        batch = torch.from_numpy(latents_QNTD[:, start : start + count]).flatten(0, 1)
        summed_RT = sums.add(list("abc"[:questions]), batch, first=[start] * questions)
        found.append(summed_RT.unflatten(0, (questions, count)))
        start += count
        assert sums.counted("a") == start
    expected = np.stack([by_pairs(latents) for latents in latents_QNTD])
    np.testing.assert_allclose(torch.cat(found, 1).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_small_distances_keep_their_precision():
    base = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).double()
    latents_RTD = base + 1e-5 * torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(1)).double()
    found = DirectionSums().add(["a"], latents_RTD, first=[0]).numpy()
    np.testing.assert_allclose(found, by_pairs(latents_RTD.numpy()), rtol=1e-3)
    assert (DirectionSums().add(["a"], base.expand(8, -1, -1), first=[0]).abs() < 1e-12).all()


def test_sums_of_questions_seen_long_ago_are_dropped(monkeypatch):
    monkeypatch.setattr(diversity, "MAX_KEPT_BYTES", 3 * 8 * 2 * 4)
    sums = DirectionSums()
    for key in "abcad":
        sums.add([key], torch.ones(1, 2, 4), first=[sums.counted(key)])
    assert [sums.counted(key) for key in "abcd"] == [2, 0, 1, 1]


def test_sums_of_the_questions_being_compared_are_kept(monkeypatch):
    monkeypatch.setattr(diversity, "MAX_KEPT_BYTES", 8 * 2 * 4)
    sums = DirectionSums()
    for key in "abc":
        sums.add([key], torch.ones(1, 2, 4), first=[0], kept="abc")
    assert [sums.counted(key) for key in "abc"] == [1, 1, 1]
    sums.add(list("abc"), torch.ones(3, 2, 4), first=[1, 1, 1])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "put", "forget"]), st.lists(st.sampled_from("abcdefg"), unique=True)),
        max_size=12,
    ),
    kept=st.sets(st.sampled_from("abcdefg")),
    most=st.integers(1, 5),
)
def test_sums_are_those_of_a_dictionary_from_which_the_oldest_go(steps, kept, most):
    sums, expected, numbers = DirectionSums(), {}, iter(range(1000))

    def expect(key, count, value):
        if expected.pop(key, None) is None:
            while len(expected) >= most and (oldest := next((each for each in expected if each not in kept), None)):
                del expected[oldest]
        expected[key] = count, value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "MAX_KEPT_BYTES", most * 8 * 2)
        for what, keys in steps:
            if what == "add" and keys:
                before = [expected.get(key, (0, 0)) for key in keys]
                latents_R1D = torch.tensor([1.0, 0.0]).expand(len(keys), 1, 2)
                sums.add(keys, latents_R1D, first=[count for count, _ in before], kept=kept)
                for key, (count, value) in zip(keys, before, strict=True):
                    expect(key, count + 1, value + 1)
            for key in keys if what == "put" else ():
                expect(key, 7, next(numbers))
                sums.put(key, 7, torch.tensor([[expected[key][1], 0.0]], dtype=torch.float64), kept=kept)
            for key in keys if what == "forget" else ():
                expected.pop(key, None)
                sums.forget(key)
    there = {key: sums.get(key) for key in "abcdefg" if sums.get(key) is not None}
    assert {key: (count, float(sums_TD[0, 0])) for key, (count, sums_TD) in there.items()} == expected
    assert len({sums_TD.untyped_storage().data_ptr() for _, sums_TD in there.values()}) <= 1


@pytest.mark.parametrize(("keys", "first"), [(["a"], [2]), (["a"], [0]), (["b"], [1]), (["b", "b"], [0, 0])])
def test_rollouts_are_not_compared_with_others_than_those_before_them(keys, first):
    sums = DirectionSums()
    sums.add(["a"], torch.ones(1, 2, 4), first=[0])
    with pytest.raises(ValueError, match="needed"):
        sums.add(keys, torch.ones(len(keys), 2, 4), first=first)
