"""What a sweep prints: one table over all jobs, each warning once, a row for a job that failed."""

import logging
import re

import pytest
import tiny
from hydra.core.plugins import Plugins

from latent_tts.pipeline.sweep import SweepJob
from latent_tts.results.run_folder import read_metrics


def test_a_sweep_prints_one_table_and_each_warning_once(run, checkpoint, tmp_path, no_figures):
    trained = {"reasoner": "0123", "sampler": {"_target_": "latent_tts.sampler.dropout.Dropout", "rate": 0.05}}
    latent_rm = tiny.write_latent_rm(tmp_path / "rm", checkpoint, trained)
    scored = ["scorer=latent_rm", f"scorer.checkpoint={latent_rm}"]
    swept = run("sampler=gaussian", "sampler.sigma=0.1,-1", "n=2,4", *scored, "-m")
    assert swept.code == 2
    assert swept.out.count("best_of_n %") == 1
    rows = [line.split()[:2] for line in swept.out.splitlines() if line.startswith("sigma=")]
    assert rows == [[f"sigma={sigma}", str(n)] for sigma in ("0.1", "-1") for n in (2, 4)]
    failed = [line for line in swept.out.splitlines() if line.startswith("sigma=-1")]
    assert all("failed" in line for line in failed)
    assert swept.out.splitlines()[-1].endswith("metrics.csv")
    assert not re.search(r"/[0-5]/metrics.csv", swept.out)
    warnings = [line for line in swept.err.splitlines() if line.startswith("WARNING scorer")]
    assert len(warnings) == 2
    assert "was trained on dropout 0.05 and scores gaussian 0.1 here" in warnings[1]
    assert "_target_" not in swept.err
    # the log of each job has all its warnings
    logs = [path.read_text() for path in swept.last.parent.glob("*/run.log")]
    assert sorted(log.count("was trained on dropout 0.05") for log in logs) == [1, 1]
    alone = run("sampler=gaussian", "sampler.sigma=0.1", *scored)
    assert alone.err.count("WARNING scorer") == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_jobs_that_are_one_run_have_a_row_each(run):
    swept = run("engine.rows=1,4", "cache=off", "-m")
    assert swept.code == 0, swept.err
    rows = [line.split() for line in swept.out.splitlines() if line.startswith("rows=")]
    assert [row[0] for row in rows] == ["rows=1", "rows=4"]
    tables = [
        read_metrics(path).set_index("metric")["value"] for path in sorted(swept.last.parent.glob("*/metrics.csv"))
    ]
    assert [float(row[-1].replace(",", "")) for row in rows] == pytest.approx(
        [table["rollouts_per_second"] for table in tables], abs=0.51
    )
    assert "the same run as" in swept.err


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_a_sweep_over_budgets_has_a_row_of_each(run):
    swept = run("budget=adaptive,ladder", "scorer=none", "-m")
    assert swept.code == 0, swept.err
    used = [line.split() for line in swept.out.splitlines() if "used)" in line]
    assert [row[0] for row in used] == ["budget=adaptive"]


@pytest.mark.usefixtures("no_figures")
def test_a_launcher_that_gives_up_on_all_jobs_leaves_a_row_of_each(run, place, monkeypatch):
    """As submitit does where one of them was killed."""
    real = Plugins.instantiate_launcher

    def instantiate(self, **arguments):
        launcher = real(self, **arguments)
        run_all = launcher.launch

        def launch(*arguments, **more):
            run_all(*arguments, **more)
            (place / "swept/1/run.json").unlink()
            raise RuntimeError("job 1 was killed")

        launcher.launch = launch
        return launcher

    def refuse(*arguments, **more):
        raise RuntimeError("no such queue")

    def refusing(self, **arguments):
        launcher = real(self, **arguments)
        launcher.launch = refuse
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
    swept = run("sampler=gaussian", "sampler.sigma=0.1,0.2", "hydra.sweep.dir=swept", "-m")
    assert swept.code == 1
    assert "job 1 was killed" in swept.err
    rows = [line.split() for line in swept.out.splitlines() if line.startswith("sigma=")]
    assert [(row[0], "failed" in row) for row in rows] == [("sigma=0.1", False), ("sigma=0.2", True)]
    assert "job 1 was killed" in (place / "swept/run.log").read_text()
    monkeypatch.setattr(Plugins, "instantiate_launcher", refusing)
    other = run("sampler=gaussian", "sampler.sigma=0.3,0.2", "hydra.sweep.dir=swept", "-m")
    assert (other.code, other.out) == (1, ""), other.out
    assert "no such queue" in other.err


def test_the_log_of_a_refused_job_is_closed(run):
    before = logging.getLogger().handlers[:]
    assert run("sampler=gaussian", "sampler.sigma=-1").code == 2
    left = [handler for handler in logging.getLogger().handlers if handler not in before]
    assert not [handler for handler in left if isinstance(handler, logging.FileHandler)]


@pytest.mark.parametrize(
    ("overrides", "label", "row"),
    [
        (["sampler=gaussian", "sampler.sigma=0.1"], "sampler=gaussian sigma=0.1", {"n": ""}),
        (["n=4", "seed=1", "model=codi"], "model=codi", {"label": "model=codi seed=1", "n": "4"}),
        (["n=4", "budget=fixed"], "", {"label": "", "n": "4"}),
        (["budget=adaptive", "seed=1"], "budget=adaptive", {"label": "budget=adaptive seed=1", "n": ""}),
    ],
)
def test_a_job_is_called_by_what_only_it_has(overrides, label, row):
    job = SweepJob(overrides, None)
    assert job.label == label
    assert job.row == {"label": label} | row
