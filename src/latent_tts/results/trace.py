"""What `ltts trace` shows of some questions, as plain arrays that the terminal and the page read.

Letters beyond the legend of `types.py`: K tokens of a lens, G written steps whose result is one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_tts.types import Bools, Float32, Float64, Floats, Int64

MAPS = ("pca", "tsne")
MAX_PERPLEXITY = 30.0
UNREADABLE = "unreadable"
# of rollouts: with a gold answer the first two, else the others
KINDS = {"right": "right", "wrong": "wrong", "voted": "most frequent answer", "other": "another answer"}


@dataclass(frozen=True)
class Lens:
    """Latents read through the LM head (logit lens).

    Attributes:
        token_NTK: ids of the most probable tokens, the first one the head's argmax; -1 beyond a rollout's latents.
        probability_NTK: their probabilities; NaN beyond a rollout's latents.
        rank_NTG: how many tokens are more probable than the result of each written step; -1 beyond a rollout's latents.
    """

    token_NTK: Int64
    probability_NTK: Float32
    rank_NTG: Int64

    @property
    def spells_NTG(self) -> Bools:
        """Whether a latent's most probable token is the result of a step."""
        return self.rank_NTG == 0


@dataclass(frozen=True)
class TracedRollouts:
    """Rollouts of a question under one sampler.

    Attributes:
        sampler: its name and parameter, as in `dropout 0.05`.
        latents_NTD: zeros beyond a rollout's own.
        steps_N: latents of each rollout.
        predictions: None where the answer cannot be read, or was not decoded.
        correct_N: None without a gold answer.
        texts: what the model wrote.
        answer_logprob_N: NaN where the answer was not decoded.
        step_scores_NT: None without a scorer; NaN beyond a rollout's latents.
        score_N: None without a scorer.
        counts: `sweeps`, `commits` and `conflicts` of each rollout.
        sweeps_3NS: `first`, `stop` and `final` of the sweeps of the schedule, S of them (`schedule.Sweep`): the
            latents first..stop-1, counted from 0, were computed, none where both are equal; afterwards so many latents
            were final.
        lens: of the latents.
    """

    sampler: str
    latents_NTD: Float32
    steps_N: Int64
    predictions: list[str | None]
    correct_N: list[bool] | None
    texts: list[str]
    answer_logprob_N: Floats
    step_scores_NT: Float32 | None
    score_N: Floats | None
    counts: dict[str, list[int]]
    sweeps_3NS: Int64
    lens: Lens

    @property
    def latents(self) -> int:
        """The most latents of a rollout."""
        return int(self.steps_N.max(initial=0))

    @property
    def spelled_TG(self) -> Float64:
        """Share of the rollouts that have a latent in which it says the result of a step; NaN where none has it."""
        with np.errstate(invalid="ignore"):
            return self.lens.spells_NTG.sum(0) / own_latents(self.steps_N, self.latents_NTD.shape[1]).sum(0)[:, None]


@dataclass(frozen=True)
class LatentMap:
    """Latents of all samplers in a plane.

    Attributes:
        method: one of `MAPS`.
        step: the latent whose values are on the map, from 0; None for all latents.
        points: for each sampler (N, T, 2), or (N, 1, 2) with one step; NaN beyond a rollout's latents.
        explained_2: shares of the variance along both axes; None for t-SNE.
    """

    method: str
    step: int | None
    points: list[Float64]
    explained_2: Float64 | None


@dataclass(frozen=True)
class DependencyGraph:
    """How the latents of the deterministic rollout depend on each other.

    Attributes:
        relative_TT: row t, column s: relative change of latent t per relative change of latent s.
        threshold: from which one counts as depending on another.
        path: the latents, from 0, of the longest chain of dependencies.
        growth: mean log growth of a perturbation per latent; NaN for fewer than two latents.
    """

    relative_TT: Float64
    threshold: float
    path: list[int]
    growth: float

    @property
    def potential(self) -> float:
        """Latents per latent of the critical path."""
        return len(self.relative_TT) / max(len(self.path), 1)


@dataclass(frozen=True)
class TracedQuestion:
    """One question.

    Attributes:
        id, text, gold: as in `types.Question`.
        steps: its written steps.
        results: the results of the written steps that are one token of the model, with the number of the step, from 0.
        samplers: rollouts of the run's sampler, of the other one if there is one, and the deterministic rollout last.
        picks: what each aggregator picks, as `answers.jsonl` has it.
        maps: for each method that of all latents, then one for each latent.
        dependencies: None where they were not asked for or do not exist.
    """

    id: str
    text: str
    gold: str | None
    steps: tuple[str, ...]
    results: list[tuple[int, str]]
    samplers: list[TracedRollouts]
    picks: dict[str, dict[str, Any]]
    maps: list[LatentMap]
    dependencies: DependencyGraph | None

    @property
    def rollouts(self) -> TracedRollouts:
        """Those of the run's sampler."""
        return self.samplers[0]

    @property
    def deterministic(self) -> TracedRollouts:
        """The rollout without randomness."""
        return self.samplers[-1]

    @property
    def votes(self) -> list[tuple[str, int, str]]:
        """Each answer, how many rollouts gave it, and its kind; the most frequent first, `unreadable` last."""
        kinds = dict(zip(self.rollouts.predictions, self.kinds(0), strict=True))
        counts = sorted(Counter(self.rollouts.predictions).most_common(), key=lambda each: each[0] is None)
        return [(UNREADABLE if answer is None else answer, count, kinds[answer]) for answer, count in counts]

    def kinds(self, place: int) -> list[str]:
        """The kind of each rollout of `samplers[place]`, see `KINDS`."""
        own = self.samplers[place]
        if own.correct_N is not None:
            return ["right" if correct else "wrong" for correct in own.correct_N]
        counts = Counter(answer for answer in self.rollouts.predictions if answer is not None)
        voted = [answer for answer, _ in counts.most_common(1)]  # the first of equally frequent ones
        return ["voted" if answer in voted else "other" for answer in own.predictions]

    @property
    def votes_text(self) -> str:
        """The votes as people read them: `8 (12), 9 (3), unreadable (1)`."""
        return ", ".join(f"{answer} ({count})" for answer, count, _ in self.votes)

    @property
    def shown_rollout(self) -> int:
        """The rollout that is shown first: the pick of best_of_n, or rollout 0."""
        return self.picks.get("best_of_n", {}).get("rollout") or 0

    @property
    def listed(self) -> list[tuple[int, int, str]]:
        """The rollouts of tables: place of the sampler, number, label; the deterministic one first."""
        return [
            (len(self.samplers) - 1, 0, self.deterministic.sampler),
            *((0, number, str(number)) for number in range(len(self.rollouts.steps_N))),
        ]

    @property
    def counted(self) -> list[str]:
        """What the schedule counts, where rollouts differ in it or a latent was computed twice."""
        counts = self.rollouts.counts
        told = any(counts.get("conflicts", [])) or any(len(set(values)) > 1 for values in counts.values())
        return list(counts) if told else []

    def said(self, place: int, rollout: int) -> list[tuple[int, bool]]:
        """The most probable token of each latent of a rollout, and whether it is the result of a step."""
        lens, steps = self.samplers[place].lens, int(self.samplers[place].steps_N[rollout])
        said_T, results_TG = lens.token_NTK[rollout, :steps, 0], lens.spells_NTG[rollout, :steps]
        return [(int(token), bool(results_G.any())) for token, results_G in zip(said_T, results_TG, strict=True)]

    def drift_and_spread(self, place: int) -> tuple[Float64, Float64]:
        """Of the rollouts of `samplers[place]`; see `drift_and_spread`."""
        chosen = self.samplers[place]
        return drift_and_spread(chosen.latents_NTD, chosen.steps_N, self.deterministic.latents_NTD[0])


@dataclass(frozen=True)
class Trace:
    """Everything that `ltts trace` shows.

    Attributes:
        about: the settings by their keys, in the order in which they are shown.
        schedule: its name.
        vocabulary: the text of every token id in a lens.
        scorer: None without a scorer.
        no_dependencies: why there is no dependency graph; empty where there is one.
        questions: side by side.
    """

    about: dict[str, str]
    schedule: str
    vocabulary: dict[int, str]
    scorer: str | None
    no_dependencies: str
    questions: list[TracedQuestion]


# The arithmetic of maps and of dependencies


def own_latents(steps_N: Int64, latents: int) -> Bools:
    """Which of T latents each rollout has (N, T)."""
    return np.arange(latents) < np.asarray(steps_N)[:, None]


def principal_components(values_XD: Floats) -> tuple[Float64, Float64]:
    """Values on the two axes of largest variance (X, 2), from their mean, and the shares of the variance (2).

    The largest component of an axis is positive, so that a map is not mirrored by rounding.
    """
    centred_XD = values_XD - np.mean(values_XD, axis=0, dtype=np.float64)
    axes = np.linalg.svd(centred_XD, full_matrices=False)[2][:2]
    axes_2D = np.pad(axes, ((0, 2 - len(axes)), (0, 0)))
    axes_2D *= np.sign(np.take_along_axis(axes_2D, np.abs(axes_2D).argmax(1)[:, None], 1) + 1e-300)
    points_X2 = centred_XD @ axes_2D.T
    total = np.square(centred_XD).sum()
    return points_X2, np.square(points_X2).sum(0) / (total or 1.0)


def draw_map(method: str, samplers: Sequence[TracedRollouts], step: int | None = None) -> LatentMap:
    """A map of the latents of some samplers, or of one latent of each rollout.

    Raises:
        ImportError: `tsne` without scikit-learn.
    """
    chosen = slice(None) if step is None else slice(step, step + 1)
    latents_XTD = np.concatenate([each.latents_NTD for each in samplers])[:, chosen]
    steps_X = np.concatenate([each.steps_N for each in samplers])
    own_XT = own_latents(steps_X, samplers[0].latents_NTD.shape[1])[:, chosen]
    points_X2, explained = principal_components(latents_XTD[own_XT])
    points_XT2 = np.full((*own_XT.shape, 2), np.nan)
    points_XT2[own_XT] = points_X2 if method == "pca" else neighbour_embedding(latents_XTD[own_XT], points_X2)
    ends = np.cumsum([len(each.steps_N) for each in samplers])
    return LatentMap(method, step, np.split(points_XT2, ends[:-1]), explained if method == "pca" else None)


def neighbour_embedding(values_XD: Float32, start_X2: Float64) -> Float64:
    """t-SNE (X, 2), begun at the principal components, so that nothing of it is random; zeros for fewer than four."""
    from sklearn.manifold import TSNE

    count = len(values_XD)
    width = start_X2[:, 0].std()
    if count < 4 or not width:
        return np.zeros((count, 2))
    start: Any = (1e-4 / width * start_X2).astype(np.float32)
    perplexity = min(MAX_PERPLEXITY, (count - 1) / 3)
    made = TSNE(perplexity=perplexity, init=start, method="exact", random_state=0)
    return made.fit_transform(values_XD).astype(np.float64)


def drift_and_spread(latents_NTD: Floats, steps_N: Int64, deterministic_TD: Floats) -> tuple[Float64, Float64]:
    """How far rollouts are from the deterministic one, per latent, in multiples of the deterministic latent's norm.

    The mean of a few rollouts is off by chance; the part that their spread explains is subtracted, which makes the
    squared drift unbiased.

    Args:
        latents_NTD: of the rollouts.
        steps_N: how many each has.
        deterministic_TD: the latents without randomness, zeros beyond its own.

    Returns:
        The drift (T): distance of the rollouts' mean from the deterministic latent, 0 where chance explains it. The
        spread (T): root mean square distance of rollouts from their mean. NaN where fewer than two rollouts, or the
        deterministic one, have no such latent.
    """
    own_NT = own_latents(steps_N, len(deterministic_TD))
    anchor_TD = deterministic_TD.astype(np.float64)
    size_T1 = np.linalg.norm(anchor_TD, axis=1, keepdims=True)
    offset_NTD = np.where(own_NT[..., None], (latents_NTD - anchor_TD) / np.where(size_T1, size_T1, np.nan), 0.0)
    count_T = np.where(own_NT.sum(0) > 1, own_NT.sum(0), np.nan)
    mean_TD = offset_NTD.sum(0) / count_T[:, None]
    variance_T = (np.square(offset_NTD - mean_TD).sum(2) * own_NT).sum(0) / (count_T - 1)
    drift_T = np.sqrt(np.maximum(np.square(mean_TD).sum(1) - variance_T / count_T, 0))
    return drift_T, np.sqrt(variance_T)


def number(value: float | None, digits: int = 2) -> str:
    """A number in a table; empty for none."""
    if value is None or not np.isfinite(value):
        return ""
    return f"{value:.{digits}g}" if abs(value) < 10 else f"{value:.1f}"
