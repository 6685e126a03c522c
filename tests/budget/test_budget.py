import pytest

from latent_tts.budget.fixed import Fixed
from latent_tts.budget.ladder import Ladder


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


def test_names_are_those_of_the_options():
    assert (Fixed.name, Ladder.name) == ("fixed", "ladder")
