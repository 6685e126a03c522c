import pytest
from marks import slow

from latent_tts.budget.fixed import Fixed
from latent_tts.budget.ladder import Ladder
from latent_tts.results.run_folder import read_metrics


@pytest.mark.parametrize("n", [1, 5, 64])
def test_fixed_reports_n_alone(n):
    assert Fixed().reported(n) == [n]


@pytest.mark.parametrize(
    ("n", "reported"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_ladder_reports_powers_of_two_and_n(n, reported):
    assert Ladder().reported(n) == reported


@pytest.mark.parametrize("budget", [Fixed(), Ladder()], ids=lambda budget: budget.name)
def test_budgets_ascend_from_at_least_one_to_n(budget):
    for n in range(1, 130):
        reported = budget.reported(n)
        assert reported == sorted(set(reported))
        assert reported[0] >= 1
        assert reported[-1] == n


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (["n=6"], [1, 2, 4, 6]),
        slow(["n=6", "budget=fixed"], [6]),
        (["n=2,6", "-m"], [2, 6]),
        slow(["n=2,6", "budget=ladder", "-m"], [1, 2, 4, 6]),
        slow(["n=6", "seed=0,1", "-m"], [1, 2, 4, 6]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_run_reports_its_curve_and_a_sweep_over_n_each_n_once(ltts, checkpoint, overrides, reported):
    result = ltts("run", f"model.checkpoint={checkpoint}", "task.limit=2", "max_answer_tokens=4", *overrides)
    assert result.code == 0, result.err
    metrics = read_metrics(result.last)
    assert sorted(set(metrics["n"])) == reported
    once = metrics[(metrics["metric"] == "coverage") & (metrics["seed"] == "0")]["n"]
    assert "budget=ladder" in overrides or once.is_unique
    assert (result.last.parent / "scaling.png").is_file() == (len(reported) > 1)


@pytest.mark.slow
def test_a_budget_of_a_file_is_kept_in_a_sweep_over_n(ltts, checkpoint, place, no_figures):
    (place / "mine/experiment").mkdir(parents=True)
    (place / "mine/experiment/few.yaml").write_text("# @package _global_\ndefaults:\n  - override /budget: other\n")
    (place / "mine/budget").mkdir()
    (place / "mine/budget/other.yaml").write_text("_target_: latent_tts.budget.ladder.Ladder\n")
    line = [f"model.checkpoint={checkpoint}", "task.limit=2", "max_answer_tokens=4", "experiment=few", "n=1,2", "-m"]
    result = ltts("run", "--config-dir", place / "mine", *line)
    assert result.code == 0, result.err
    assert set(read_metrics(result.last)["budget"]) == {"ladder"}


def test_names_are_those_of_the_options():
    assert (Fixed.name, Ladder.name) == ("fixed", "ladder")
