"""Small random tables of rollouts for property tests."""

from hypothesis import strategies as st

from latent_tts.results.statistics import picked_accuracies


@st.composite
def rollout_lists(draw, values):
    """Predictions (Q, D), -1 if unreadable, and for each one of `values` (Q, D), with ties."""
    questions, drawn = draw(st.integers(1, 4)), draw(st.integers(1, 8))

    def table(elements):
        row = st.lists(elements, min_size=drawn, max_size=drawn)
        return draw(st.lists(row, min_size=questions, max_size=questions))

    return table(st.integers(-1, 3)), table(st.sampled_from(values))


def picked_accuracy(aggregator, rollouts, n):
    """`picked_accuracies` at one budget (Q,)."""
    return picked_accuracies(aggregator, rollouts, [n])[0]
