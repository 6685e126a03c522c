"""Packing rollouts into batches: nothing lost, nothing twice, never too large."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import RolloutJob, batches, default_rows, row_bytes, rows_that_fit

SHAPE = Shape(layers=2, width=64, vocabulary=600, attention=64, keys=32, block_weights=40_000)
GIBIBYTE = 1 << 30


@st.composite
def job_lists(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40), st.integers(0, 8)), max_size=12))
    return [
        RolloutJob(f"row {i}", f"question {i % 3}", [1] * prompt, list(range(first, first + count)), donor=[i])
        for i, (prompt, count, first) in enumerate(sizes)
    ]


@settings(deadline=None)
@given(jobs=job_lists(), rows=st.integers(1, 50))
def test_every_rollout_of_every_question_is_in_exactly_one_batch(jobs, rows):
    packed = Counter((job.row_key, number) for batch in batches(jobs, rows) for job in batch for number in job.rollouts)
    assert packed == Counter((job.row_key, number) for job in jobs for number in job.rollouts)


@settings(deadline=None)
@given(jobs=job_lists(), rows=st.integers(1, 50))
def test_a_batch_has_at_most_so_many_rows_and_equal_counts(jobs, rows):
    for batch in batches(jobs, rows):
        assert 1 <= sum(len(job.rollouts) for job in batch) <= rows
        assert len({len(job.rollouts) for job in batch}) == 1


@settings(deadline=None)
@given(jobs=job_lists(), rows=st.integers(1, 50))
def test_pieces_keep_their_questions_prompt_and_donor(jobs, rows):
    whole = {job.row_key: job for job in jobs}
    for piece in (job for batch in batches(jobs, rows) for job in batch):
        job = whole[piece.row_key]
        assert (piece.question_id, piece.prompt, piece.donor) == (job.question_id, job.prompt, job.donor)
        assert piece.rollouts == sorted(piece.rollouts)


@settings(deadline=None)
@given(jobs=job_lists(), rows=st.integers(1, 50))
def test_among_like_counts_the_longest_prompts_come_first(jobs, rows):
    pieces = [job for batch in batches(jobs, rows) for job in batch]
    keys = [(-len(piece.rollouts), -len(piece.prompt)) for piece in pieces]
    assert keys == sorted(keys)


def test_a_batch_is_as_full_as_it_may_be():
    jobs = [RolloutJob(str(i), str(i), [1], [0, 1, 2], None) for i in range(7)]
    assert [len(batch) for batch in batches(jobs, 10)] == [3, 3, 1]
    assert [len(batch) for batch in batches(jobs, 10, 2)] == [2, 2, 2, 1]
    assert [len(batch) for batch in batches(jobs, 10, 5)] == [3, 3, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_wider_models_never_get_more_rows_and_all_get_a_power_of_two(device):
    rows = [default_rows(width, device) for width in range(16, 9000, 8)]
    assert rows == sorted(rows, reverse=True)
    assert all(count >= 64 and count & (count - 1) == 0 for count in rows)


def test_a_gpu_gets_at_least_as_many_rows_as_a_cpu():
    assert all(default_rows(width, "cuda") >= default_rows(width, "cpu") for width in (64, 768, 4096))


@pytest.fixture
def free_gibibyte(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=GIBIBYTE))


@pytest.mark.usefixtures("free_gibibyte")
@pytest.mark.parametrize(
    ("bytes_per_row", "rows"),
    [(1, 512), (GIBIBYTE // 1024, 512), (GIBIBYTE // 1024 + 1, 256), (GIBIBYTE // 100, 32), (GIBIBYTE, 1)],
)
def test_rows_are_halved_until_they_fit_half_of_the_free_memory(bytes_per_row, rows):
    assert rows_that_fit(512, bytes_per_row, "cpu") == rows


def test_a_row_takes_more_bytes_the_longer_it_is_and_with_a_prompt_of_its_own():
    least = row_bytes(SHAPE, 50, 10, 4, own_prompt=False)
    assert row_bytes(SHAPE, 51, 10, 4, own_prompt=False) > least
    assert row_bytes(SHAPE, 50, 11, 4, own_prompt=False) > least
    assert row_bytes(SHAPE, 50, 10, 4, own_prompt=True) > least
