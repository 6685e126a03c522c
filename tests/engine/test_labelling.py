"""Step-wise labels against the oracle, and what must not change them: batches, stops, the number of completions."""

import numpy as np
import pytest
import tiny
import torch
from label_jobs import LENGTHS, M, N, is_right, jobs, labelling
from marks import slow
from oracle import Oracle

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.labelling import MAX_COMPLETIONS, LabelJob, label_batch
from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.errors import RunError
from latent_tts.random.draw import Draw
from latent_tts.random.philox import key_of
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.types import UnmixedQuestion

T = 3
SAMPLERS = {
    "gaussian": Gaussian(1.0, False),
    "dropout in thoughts": Dropout(0.4, "residual", ["thoughts"], "fresh"),
    "dropout everywhere": Dropout(0.3, "residual_embedding", ["prompt", "thoughts", "answer"], "fresh"),
    "locked dropout": Dropout(0.3, "residual", ["thoughts"], "locked"),
    "sampled answers": AnswerSampling(1.5, 0.9).over(Gaussian(1.0, False)),
}
STOPPING = {"gpt2": 34, "qwen3": 44}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def plan(family, stop_id=None, latents=T):
    return tiny.plan(latents, eos_id=tiny.EOS_IDS.get(family, tiny.NEVER), answer=3, stop_id=stop_id)


def expected(oracle, sampler, job, rollout, steps, completions=M):
    """Labels of one rollout by whole rollouts of the oracle that change their random numbers on the way."""
    labels = []
    for step in range(1, steps + 1):
        right = []
        for m in range(completions):
            number = torch.tensor([rollout * MAX_COMPLETIONS + m])
            draw = Draw(torch.tensor([key_of(0, f"{job.question_id} from {step}")]), number, tiny.WIDTH)
            row = oracle.roll(
                job.prompt, sampler, question_id=job.question_id, rollout=rollout, branches=[(step, draw)]
            )
            right.append(is_right(row.answer_ids))
        labels.append(np.mean(right))
    return labels


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *(("gpt2", sampler) for sampler in SAMPLERS.values()),
        ("qwen3", SAMPLERS["dropout in thoughts"]),
        ("mistral", SAMPLERS["dropout everywhere"]),
    ],
    ids=[*SAMPLERS, "grouped queries", "transformers' own cache"],
)
def test_labels_equal_the_oracle(family, sampler):
    reasoner, here = tiny.reasoner(family), plan(family)
    entries, _ = label_batch(jobs(), Engine(tiny.proven(reasoner), here), sampler, labelling())
    oracle = Oracle(reasoner, here)
    for job, entry in zip(jobs(), entries, strict=True):
        for rollout in range(1, N):
            assert entry.labels_NT[rollout].tolist() == pytest.approx(expected(oracle, sampler, job, rollout, T))
            row = oracle.roll(job.prompt, sampler, question_id=job.question_id, rollout=rollout)
            assert entry.corrects_N[rollout] == is_right(row.answer_ids)
            np.testing.assert_allclose(entry.latents_NTD[rollout], row.latents_TD.float(), atol=1e-6)
    assert len({float(x) for entry in entries for x in entry.labels_NT.flatten()}) > 2


@pytest.mark.parametrize("spoiled", [1, 2], ids=["rollouts", "completions"])
def test_log_probabilities_that_are_not_finite_end_the_labelling(monkeypatch, spoiled):
    decode, calls = RolloutState.decode_answers, []

    def decode_one_wrong(self):
        rollouts = decode(self)
        calls.append(self)
        if len(calls) == spoiled:
            rollouts.answer_logprob_R[-1] = float("nan")
        return rollouts

    monkeypatch.setattr(RolloutState, "decode_answers", decode_one_wrong)
    words = f"log-probabilities of answers of question {jobs()[-1].question_id} are not finite"
    with pytest.raises(RunError, match=words):
        label_batch(jobs(), Engine(tiny.reasoner("gpt2"), plan("gpt2")), SAMPLERS["gaussian"], labelling())


@pytest.mark.every_other
@pytest.mark.parametrize("family", STOPPING)
@pytest.mark.parametrize("sampler", [SAMPLERS["gaussian"], SAMPLERS["dropout in thoughts"]], ids=["noise", "dropout"])
def test_labels_equal_the_oracle_where_rows_stop_thinking_by_a_token(family, sampler):
    reasoner, here = tiny.reasoner(family), plan(family, STOPPING[family], 4)
    entries, _ = label_batch(jobs(), Engine(reasoner, here), sampler, labelling(rollouts=3))
    oracle, seen = Oracle(reasoner, here), set()
    for job, entry in zip(jobs(), entries, strict=True):
        seen.update((~np.isnan(entry.labels_NT)).sum(1).tolist())
        for rollout in range(1, 3):
            steps = int((~np.isnan(entry.labels_NT[rollout])).sum())
            wanted = expected(oracle, sampler, job, rollout, steps)
            assert entry.labels_NT[rollout, :steps].tolist() == pytest.approx(wanted)
    assert len(seen) > 1


def test_the_last_label_under_noise_is_the_rollouts_own_correctness_and_costs_nothing():
    engine = Engine(tiny.reasoner("gpt2"), plan("gpt2"))
    entries, drawn = label_batch(jobs(), engine, SAMPLERS["gaussian"], labelling())
    assert drawn == len(LENGTHS) * N * (1 + (T - 1) * M)
    for entry in entries:
        np.testing.assert_array_equal(entry.labels_NT[:, -1], entry.corrects_N)


@pytest.mark.every_other
@samplers
@pytest.mark.parametrize("rows", [5, slow(1), slow(1000)])
def test_labels_do_not_depend_on_the_batch(sampler, rows):
    engine = Engine(tiny.reasoner("gpt2"), plan("gpt2"))
    whole, _ = label_batch(jobs(), engine, sampler, labelling())
    size = max(1, rows // N)
    batches = [jobs()[::-1][start : start + size] for start in range(0, len(LENGTHS), size)]
    parts = [label_batch(batch, engine, sampler, labelling(rows=rows)) for batch in batches]
    by_id = {entry.question_id: entry for entries, _ in parts for entry in entries}
    for entry in whole:
        other = by_id.pop(entry.question_id)
        np.testing.assert_array_equal(other.labels_NT, entry.labels_NT)
        np.testing.assert_array_equal(other.input_ids_NL, entry.input_ids_NL)
        np.testing.assert_allclose(other.latents_NTD, entry.latents_NTD, atol=1e-6)
    assert not by_id


def test_questions_without_a_mixed_outcome_are_dropped_unless_all_are_kept():
    engine = Engine(tiny.reasoner("gpt2"), plan("gpt2"))
    some = [
        LabelJob("never", 0, [5, 6], lambda ids: False),
        LabelJob("always", 1, [7], lambda ids: True),
        *[LabelJob(job.question_id, job.index + 2, job.prompt, is_right) for job in jobs()],
    ]
    entries, _ = label_batch(some, engine, SAMPLERS["gaussian"], labelling(keep_all=False, rollouts=8))
    assert entries[0] == UnmixedQuestion("never", 0, "all_wrong", 8)
    assert entries[1] == UnmixedQuestion("always", 1, "all_correct", 8)
    kept = [entry for entry in entries if not isinstance(entry, UnmixedQuestion)]
    assert kept
    assert all(0 < entry.corrects_N.mean() < 1 for entry in kept)


def test_a_label_is_unbiased_by_its_rollout():
    """Completions of the first prefix vary although the rollout itself is right or wrong."""
    engine = Engine(tiny.reasoner("gpt2"), plan("gpt2"))
    entries, _ = label_batch(jobs(), engine, SAMPLERS["gaussian"], labelling(completions=32))
    labels = np.concatenate([entry.labels_NT[:, 0] for entry in entries])
    assert ((labels > 0) & (labels < 1)).any()
