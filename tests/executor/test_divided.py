"""Questions whose rollouts several workers draw at the same time: tables are those of `executor=local`.

The workers are simulated in this process. Each has sums of directions of its own, and the one that got its shard last
is done first.
"""

import json
import pickle

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from marks import slow

from latent_tts.engine.diversity import DirectionSums
from latent_tts.executor import Finished
from latent_tts.executor.ray import Ray
from latent_tts.pipeline import worker as drawing_worker
from latent_tts.results.parts import part_files, write_part


class Workers:
    """A pool in this process; what goes to a worker and comes back is pickled."""

    def __init__(self, work, count, dies=()):
        self._workers = {number: pickle.loads(pickle.dumps(work))() for number in range(count)}
        self._sums = {number: DirectionSums() for number in self._workers}
        self._running, self._dies, self.shards = [], list(dies), []

    @property
    def workers(self):
        return list(self._workers)

    def describe(self):
        return [worker.describe() for worker in self._workers.values()]

    def submit(self, worker, shard):
        self._running.append((worker, pickle.dumps(shard)))
        self.shards.append((worker, shard))

    def next_finished(self):
        worker, shard = self._running.pop()
        if worker in self._dies:
            del self._workers[worker]
            return Finished(worker, None, 0.0, lost=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drawing_worker, "directions_of", lambda latents: self._sums[worker])
            result = self._workers[worker].compute(pickle.loads(shard))
        seconds = sum(len(job.rollouts) for job in pickle.loads(shard).jobs) * (worker + 1) / 10
        return Finished(worker, pickle.loads(pickle.dumps(result)), seconds)


@pytest.fixture
def pools(monkeypatch):
    """The pools that commands open; the next one has `count` workers, those in `dies` lost at their first shard."""
    opened, wanted = [], {"count": 2, "dies": ()}

    def open_pool(executor, work, device):
        opened.append(Workers(work, **wanted))
        return opened[-1]

    drawing_worker.directions_of.cache_clear()  # of the runs before, which the same process drew
    monkeypatch.setattr(Ray, "check", lambda executor, device: None)
    monkeypatch.setattr(Ray, "open", open_pool)
    return opened, wanted


def table(folder):
    return pd.read_parquet(folder / "rollouts.parquet")


def diversities(folder):
    metrics = pd.read_csv(folder / "metrics.csv")
    return metrics[metrics["metric"] == "diversity"].drop(columns="run_id").reset_index(drop=True)


def check_equal(one, other, *, exact):
    tolerance = {} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for read in (table, diversities):
        pd.testing.assert_frame_equal(read(one), read(other), check_exact=exact, **tolerance)


def early_shards(pool):
    return [shard for _, shard in pool.shards if shard.early]


LINE = ("sampler=gaussian", "n=44", "engine.rows=8", "keep_latents=true", "budget=fixed", "sampler.sigma=0.7")


@pytest.mark.every_other
@pytest.mark.parametrize("shard", ["fixed", "measured"])
@pytest.mark.parametrize(("questions", "workers", "dies"), [(1, 2, ()), slow(3, 4, ()), (2, 3, (2,))])
@pytest.mark.usefixtures("no_figures")
def test_tables_equal_those_of_one_worker(run, place, pools, shard, questions, workers, dies):
    opened, wanted = pools
    line = (*LINE, f"task.limit={questions}", "cache=off", "budget=ladder")
    assert run(*line, "hydra.run.dir=local").code == 0
    wanted |= {"count": workers, "dies": dies}
    assert run(*line, "executor=ray", f"executor.shard={shard}", "hydra.run.dir=ray").code == 0
    pool = next(pool for pool in opened if pool.shards)
    assert early_shards(pool)
    assert {worker for worker, _ in pool.shards} == set(range(workers))
    check_equal(place / "local", place / "ray", exact=shard == "fixed")
    if shard == "fixed":
        ours, theirs = [(place / name / "latents.safetensors").read_bytes() for name in ("local", "ray")]
        assert ours == theirs
    record = json.loads((place / "ray" / "run.json").read_text())
    assert record["executor"]["lost"] == len(dies)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_what_comes_after_cached_rollouts_is_compared_with_them(run, place, pools):
    opened, _ = pools
    line = (*LINE, "task.limit=1", "executor=ray", "executor.shard=measured")
    assert run(*line, "cache=off", "hydra.run.dir=whole").code == 0
    assert run(*line, "n=12", "hydra.run.dir=first").code == 0
    opened.clear()
    assert run(*line, "hydra.run.dir=second").code == 0
    assert any(early_shards(pool) for pool in opened)
    check_equal(place / "whole", place / "second", exact=False)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_what_comes_after_a_gap_is_drawn_again(run, place, pools):
    opened, _ = pools
    line = (*LINE, "keep_latents=false", "task.limit=1", "executor=ray")
    assert run(*line, "cache=off", "hydra.run.dir=whole").code == 0
    assert run(*line, "n=12", "hydra.run.dir=middle").code == 0
    (entry,) = (path.parent for path in (place / "cache").rglob("key.json") if any(part_files(path.parent)))
    for path in part_files(entry):
        rows = pq.read_table(path)
        path.unlink()
        write_part(entry, rows.filter(pc.field("rollout") >= 8))
    opened.clear()
    assert run(*line, "hydra.run.dir=again").code == 0
    (pool,) = (pool for pool in opened if pool.shards)
    drawn = sorted(number for _, shard in pool.shards for job in shard.jobs for number in job.rollouts)
    assert drawn == list(range(44))
    check_equal(place / "whole", place / "again", exact=False)


@pytest.mark.usefixtures("no_figures")
def test_workers_recompute_latents_of_one_question_together(run, place, pools):
    opened, _ = pools
    line = (*LINE, "task.limit=1", "executor=ray")
    assert run(*line, "hydra.run.dir=drawn").code == 0
    opened.clear()
    assert run(*line, "hydra.run.dir=kept").code == 0
    (pool,) = (pool for pool in opened if pool.shards)
    assert {worker for worker, _ in pool.shards} == {0, 1}
    assert not early_shards(pool)
    ours, theirs = [(place / name / "latents.safetensors").read_bytes() for name in ("drawn", "kept")]
    np.testing.assert_allclose(
        np.frombuffer(ours[-999 * 4 :], "f4"), np.frombuffer(theirs[-999 * 4 :], "f4"), rtol=1e-4, atol=1e-5
    )


def test_a_guided_search_divides_no_question(run, place, pools, latent_rm):
    opened, _ = pools
    scorer = ("scorer=latent_rm", f"scorer.checkpoint={latent_rm}")
    result = run("sampler=gaussian", "n=16", "search=beam", *scorer, "task.limit=1", "executor=ray")
    assert result.code == 0, result.err
    (pool,) = (pool for pool in opened if pool.shards)
    assert len(pool.shards) == 1
    assert (result.last.parent / "timeline.png").is_file()
