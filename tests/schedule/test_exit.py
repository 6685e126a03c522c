"""`schedule.exit` on the command line: fewer latents, said and costed; what cannot exit is refused."""

import pandas as pd
import pytest

EXIT = ("schedule.exit=0.999",)  # the prefix is the built-in reasoner's


def test_rollouts_have_fewer_latents_which_is_said_and_a_curve_of_its_own(run):
    whole, early = run("sampler=gaussian"), run("sampler=gaussian", *EXIT)
    assert early.code == 0, early.err
    assert "schedule.exit=0.999, per rollout: 2.00 of at most 6 latents; 100 % have fewer" in early.out
    rollouts = pd.read_parquet(early.last.parent / "rollouts.parquet")
    assert set(rollouts["latent_steps"]) == {2}
    tables = [pd.read_csv(result.last) for result in (whole, early)]
    assert "schedule.exit=0.999" in tables[1]["settings"].iloc[0]
    gflops = [table.loc[table["metric"] == "gflops", "value"].iloc[0] for table in tables]
    assert gflops[1] != gflops[0]


BEAM = ("search=beam", "n=16", "sampler=gaussian", "model.checkpoint=shipped:coconut_arith")
BAD = [
    (["schedule.exit=1"], ["schedule.exit=1", "[0, 1)"]),
    (["schedule.exit=0.1", "schedule.exit_prefix=null"], ["schedule.exit_prefix=null", "'###'"]),
    (["schedule.exit=0.1", "schedule.exit_prefix=unheard-of"], ["schedule.exit_prefix=unheard-of", "vocabulary"]),
    ([*EXIT, "schedule.exit_prefix='###12'", "max_answer_tokens=1"], ["schedule.exit_prefix=###12", "at most"]),
    ([*EXIT, *BEAM], ["schedule.exit=0.999", "equally many"]),
    ([*EXIT, "model.latents=0", "sampler=greedy", "n=1"], ["schedule.exit=0.999", "no latents"]),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_what_cannot_exit_is_refused(refuse, arguments, words):
    refuse(*arguments, words=words)


def test_a_model_with_a_schedule_of_its_own_refuses_it(ltts):
    result = ltts(
        "run", "budget=fixed", "model=demo_pccot", "schedule.exit=0.1", "schedule.exit_prefix=x", "n=2", "task.limit=2"
    )
    assert result.code == 2
    assert "schedule.exit=0.1: must be null: model=demo_pccot has a schedule of its own" in result.err
