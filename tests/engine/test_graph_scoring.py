"""Recorded passes of a scorer: one batch is recorded, and what is recorded gives the scores of other batches."""

from __future__ import annotations

import pytest
import tiny
import torch
from marks import slow
from recorders import Recording, Tracer

from latent_tts.engine import graph_scoring
from latent_tts.engine.graph_scoring import GraphScorer
from latent_tts.engine.recording import CudaRecorder, Recordings
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import RunError
from latent_tts.types import Computation, RewardModel

N, STEPS = 2, 4
LENGTHS = [[9, 3], [2, 7], [1, 1], [4, 8]]
SHIFTS = [[0, 5], [3, 0], [1, 9], [7, 7]]


def both(family="gpt2", recorder=Recording, device="cpu", *, needed=True):
    """A scorer, one that records, and the recorders that it has made."""
    made, recorders = tiny.reward_model(family), []
    model = RewardModel(made.backbone.to(device), lambda hidden: hidden[..., 0])

    def new_recorder():
        recorders.append(recorder())
        return recorders[-1]

    recordings = Recordings(device, needed=needed, new_recorder=new_recorder, max_bytes=1e9)
    return LatentScorer(model), GraphScorer(model, recordings), recorders


def batch(number, lengths, shifts=None, device="cpu"):
    """Prompts and latents of their own, some of fewer steps."""
    rows = len(lengths) * N
    latents_RTD = torch.randn(rows, STEPS, tiny.WIDTH, generator=torch.Generator().manual_seed(number)).double()
    steps_R = 1 + (torch.arange(rows) + number) % STEPS
    latents_RTD[torch.arange(STEPS) >= steps_R[:, None]] = 0
    offset_Q = None if shifts is None else torch.tensor(shifts, device=device)
    arguments = tiny.prompts([length + number for length in lengths]), latents_RTD.to(device)
    return arguments, {"steps_R": steps_R, "position_offset_Q": offset_Q}


def check(family, recorder=Recording, *, device="cpu", tolerance=1e-9):
    eager, graphed, recorders = both(family, recorder, device)
    for number, lengths in enumerate(LENGTHS):
        arguments, settings = batch(number, lengths, None, device)
        found, wanted = (scorer.score(*arguments, **settings) for scorer in (graphed, eager))
        torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=0, atol=tolerance, equal_nan=True)
    assert len(recorders) == 1
    return graphed, recorders[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", slow("qwen3")])
def test_a_recorded_batch_gives_the_scores_of_others(family):
    graphed, recorder = check(family)
    assert recorder.recorded == 2
    (bucket,) = graphed._recordings.buckets.values()
    assert len(bucket.trusted) == 2
    assert bucket.bytes > 2 * STEPS * len(LENGTHS[0]) * N * tiny.WIDTH * 8


@pytest.mark.slow
def test_so_does_a_traced_one():
    check("gpt2", Tracer)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_does_a_graph_of_kernels(family):
    check(family, CudaRecorder, device="cuda:0", tolerance=1e-6)


def test_long_prompts_are_not_recorded(monkeypatch):
    monkeypatch.setattr(graph_scoring, "PROMPT_TOKENS", 0)
    assert check("gpt2")[1].recorded == 1


def test_official_positions_are_scored_as_usual():
    eager, graphed, recorders = both()
    for number, lengths in enumerate(LENGTHS):
        arguments, settings = batch(number, lengths, SHIFTS[number])
        found, wanted = (scorer.score(*arguments, **settings) for scorer in (graphed, eager))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not recorders


def test_batches_of_other_sizes_have_their_own_recordings():
    _, graphed, recorders = both(needed=False)
    for number, (lengths, made) in enumerate([([9, 3], 0), ([40, 3], 0), ([2, 7], 1), ([33, 9], 2), ([5], 2)]):
        arguments, settings = batch(number, lengths)
        graphed.score(*arguments, **settings)
        assert len(recorders) == made


class RecordsNothing(Recording):
    """As where kernels were launched beside the stream that was recorded."""

    def record(self, run, tensors):
        super().record(run, tensors)
        return lambda: None


def test_a_recording_that_gives_something_else_is_not_used(caplog):
    eager, graphed, _ = both(recorder=RecordsNothing, needed=False)
    for number, lengths in enumerate(LENGTHS):
        arguments, settings = batch(number, lengths)
        found, wanted = (scorer.score(*arguments, **settings) for scorer in (graphed, eager))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9, equal_nan=True)
    (said,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert "differ when they are replayed" in said


def test_a_model_with_its_own_attention_is_scored_as_usual():
    model = tiny.reward_model("llama")
    own = type(model)(model.backbone, model.classifier, Computation("transformers", reason="it has windows"))
    arguments, settings = batch(0, [9, 3])
    wanted = LatentScorer(own).score(*arguments, **settings)
    recordings = Recordings("cpu", new_recorder=Recording, max_bytes=1e9)
    for _ in range(3):
        found = GraphScorer(own, recordings).score(*arguments, **settings)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not recordings.buckets
    with pytest.raises(RunError, match=r"engine\.graph=on: not with transformers' own attention \(it has windows\)"):
        GraphScorer(own, Recordings("cpu", needed=True))
