"""`schedule=auto`: it follows the plan of `ltts probe`, and what it chooses takes its place everywhere."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from refusal import check_refused

from latent_tts.model.coconut import Coconut
from latent_tts.pipeline import probing
from latent_tts.pipeline.probing import Probe
from latent_tts.schedule.auto import Plan
from latent_tts.schedule.speculative import Speculative

LATENTS = 4


@pytest.fixture
def write_plan(place, checkpoint):
    """Write a plan for the tiny reasoner: `write_plan(schedule, **changes)`."""
    adapter = Coconut(name="tiny", checkpoint=str(checkpoint), latents=LATENTS, recommended={})

    def write(planned, max_rows=12, **changes):
        keys = None if planned is None else asdict(planned)
        plan = Plan(adapter.digest, LATENTS, "float32", "cpu", max_rows, keys)
        (place / "outputs" / "probe").mkdir(parents=True, exist_ok=True)
        (place / "outputs" / "probe" / "plan.json").write_text(json.dumps(asdict(plan) | changes))

    return write


@pytest.fixture
def drawn(run):
    """A run with a schedule: its record, its metrics, and how many rollouts it drew."""

    def draw(*line):
        result = run(f"model.latents={LATENTS}", "sampler=gaussian", *line)
        assert result.code == 0, result.err
        record = json.loads((result.last.parent / "run.json").read_text())
        return record, pd.read_csv(result.last), record["rollouts"]["drawn_now"]

    return draw


def test_it_is_sequential_where_the_probe_says_so(write_plan, drawn):
    write_plan(None)
    assert drawn("n=2")[2] == 12
    record, metrics, new = drawn("n=2", "schedule=auto")
    assert new == 0
    assert set(metrics["schedule"]) == {"sequential"}
    assert record["config"]["schedule"]["_target_"] == "latent_tts.schedule.sequential.Sequential"


@pytest.mark.slow
def test_it_follows_a_plan_up_to_its_rows(write_plan, drawn):
    write_plan(Speculative(2, 0.3, "zero"))
    explicit = drawn("n=2", "schedule=speculative", "schedule.chunk=2", "schedule.tolerance=0.3", "schedule.guess=zero")
    assert explicit[2] == 12
    record, metrics, new = drawn("n=2", "schedule=auto")
    assert new == 0
    assert set(metrics["schedule"]) == {"speculative"}
    assert metrics["settings"].str.contains("schedule.tolerance=0.3").all()
    assert record["settings"] == explicit[0]["settings"]  # from which `rescore` and `replay` take theirs
    assert metrics["run_id"].tolist() == explicit[1]["run_id"].tolist()
    assert record["config"]["schedule"] == explicit[0]["config"]["schedule"]
    assert set(drawn("n=3", "schedule=auto")[1]["schedule"]) == {"sequential"}
    assert set(drawn("n=3", "schedule=auto", "engine.rows=8")[1]["schedule"]) == {"speculative"}


def test_a_plan_with_a_value_of_another_kind_is_refused(write_plan, refuse):
    write_plan(None, max_rows="8")
    refuse("model.latents=4", "schedule=auto", words=["schedule.probe=", "no plan (max_rows is '8')"])


def test_a_run_is_read_back_without_the_plan(write_plan, run, ltts, place):
    write_plan(Speculative(None, 0.3, "zero"))
    result = run("model.latents=4", "schedule=auto", "n=2", "hydra.run.dir=planned")
    assert result.code == 0, result.err
    (place / "outputs" / "probe" / "plan.json").unlink()
    replayed = ltts("replay", "planned", "budget=adaptive")
    assert replayed.code == 0, replayed.err


def test_a_probe_writes_the_plan_that_it_follows(ltts, run, checkpoint, place):
    line = f"model.checkpoint={checkpoint}", "model.latents=4", "task.limit=3", "max_answer_tokens=4", "directions=1"
    assert ltts("probe", *line, "tolerances=[0]", "guesses=[token]", "output=found").code == 0
    plan = Plan(**json.loads((place / "found" / "plan.json").read_text()))
    assert (plan.latents, plan.dtype, plan.device, plan.schedule) == (4, "float32", "cpu", None)
    result = run("model.latents=4", "schedule=auto", "schedule.probe=found", "n=2")
    assert result.code == 0, result.err
    assert "schedule=auto: sequential" in result.err


def test_auto_before_probe_is_refused_by_name(refuse):
    refuse("schedule=auto", words=["schedule=auto", "ltts probe", "plan.json"])


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reasoner": "0" * 16}, ["schedule.probe=outputs/probe", "other weights"]),
        ({"latents": 3}, ["model.latents (3, not 4)"]),
        ({"dtype": "bfloat16"}, ["engine.dtype (bfloat16, not float32)"]),
        ({"more": 1}, ["schedule.probe=outputs/probe", "no plan"]),
        ({"schedule": {"chunk": 0}}, ["schedule.probe=outputs/probe", "no plan", "schedule.chunk=0"]),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(write_plan, refuse, changes, words):
    write_plan(Speculative(), max_rows=1000, **changes)
    refuse("schedule=auto", f"model.latents={LATENTS}", words=words)


def test_a_plan_is_for_the_device_that_it_was_timed_on(write_plan, run):
    write_plan(Speculative(2, 0.3, "zero"), device="cuda")
    line = f"model.latents={LATENTS}", "schedule=auto", "engine.device=cpu"
    refused = run(*line, "n=2")
    assert refused.code == 2
    assert "schedule=auto: its plan was faster on cuda" in refused.err
    assert run(*line, "n=3").code == 0  # too many rows for the plan: sequential anywhere


def test_a_model_with_sweeps_of_its_own_takes_no_plan(refuse):
    refuse("schedule=auto", "model=demo_pccot", "model.checkpoint=shipped:pccot_arith", words=["schedule=auto", "own"])


def test_annotate_refuses_it(place, checkpoint):
    line = "annotate", f"model.checkpoint={checkpoint}", "output=labels", "schedule=auto"
    check_refused(*line, words=["schedule=auto", "ltts run"])


def test_the_rows_that_pay_end_where_it_is_slower(monkeypatch):
    clock, taken = [0.0], {("sequential", rows): 1.0 for rows in probing.TIMED_ROWS}
    taken |= {("parallel", 1): 0.5, ("parallel", 4): 0.9, ("parallel", 16): 1.2, ("parallel", 64): 0.1}

    class Timed:
        def __init__(self, name):
            self.name, self.device = name, "cpu"

    def roll(engine, prompts, rows):
        clock[0] += taken[engine.name, rows]

    monkeypatch.setattr(probing, "synchronized_seconds", lambda device: clock[0])
    monkeypatch.setattr(probing, "_roll", roll)
    ratios = probing.time_ratios(Timed("sequential"), Timed("parallel"), {"one": [1], "other": [2]})
    assert ratios == pytest.approx({1: 0.5, 4: 0.9, 16: 1.2})
    assert Probe(pd.DataFrame(), np.zeros((1, 1)), [], ratios=ratios).max_rows == 4
    assert Probe(pd.DataFrame(), np.zeros((1, 1)), []).max_rows == 0
