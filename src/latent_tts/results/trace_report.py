"""A trace in the terminal: for each question a map, a table of its latents, one of its rollouts, and the sweeps."""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text

from latent_tts.errors import printable
from latent_tts.results import report
from latent_tts.results.trace import KINDS, UNREADABLE, LatentMap, Trace, TracedQuestion, TracedRollouts, number
from latent_tts.types import Float64

MAP_WIDTH, MAP_HEIGHT = 96, 18
MAX_ROWS = 16  # of a table of rollouts
# marks of rollouts, and of the latents of a sweep: committed, to be computed again, final before, not computed
SIGNS = {"right": "●", "wrong": "✗", "voted": "●", "other": "✗", "beside": "·",
         "commit": "✓", "conflict": "↻", "kept": "·", "free": " "}  # fmt: skip
ASCII = {"right": "o", "wrong": "x", "voted": "o", "other": "x", "beside": ".",
         "commit": "C", "conflict": "!", "kept": ".", "free": " "}  # fmt: skip
STYLES = {"right": "cyan", "wrong": "red", "voted": "cyan", "other": "red", "beside": "magenta",
          "deterministic": "bold", "commit": "cyan", "conflict": "red"}  # fmt: skip
STEPS = string.digits[1:] + string.ascii_letters  # what marks the latents of the deterministic rollout


def print_trace(trace: Trace) -> None:
    """Print what is to be seen of each question, and a table that holds them side by side."""
    console = Console(highlight=False)
    signs = ASCII if console.options.ascii_only else SIGNS
    report.print_line(", ".join(f"{key} {value}" for key, value in trace.about.items()))
    for question in trace.questions:
        print()
        print_question(trace, question, console, signs)
    if len(trace.questions) > 1:
        print()
        print_side_by_side(trace)


def print_question(trace: Trace, question: TracedQuestion, console: Console, signs: dict[str, str]) -> None:
    """Print one question."""
    report.print_columns(question.text, *latents_table(trace, question), notes=list(notes(trace, question)))
    if question.maps:
        print()
        for line in map_lines(question, question.maps[0], min(console.width, MAP_WIDTH + 4) - 2, signs):
            console.print(line, soft_wrap=True)
        console.print(legend(question, question.maps[0], signs), soft_wrap=True)
    keys, columns = spread_table(question)
    if keys[0].cells:
        print()
        report.print_columns("drift from the deterministic latents, and spread, in norms of those", keys, columns)
    print()
    more = len(question.listed) - MAX_ROWS - 1
    left_out = [f"{report.counted(more, 'more rollout')} on the page"] if more > 0 else []
    report.print_columns(f"rollouts of {question.rollouts.sampler}", *rollouts_table(trace, question), notes=left_out)
    if trace.schedule != "sequential":
        print()
        for line in timeline_lines(question, signs):
            console.print(line, soft_wrap=True)


def notes(trace: Trace, question: TracedQuestion) -> Iterator[str]:
    """What stands below the table of latents."""
    gold = "" if question.gold is None else f"right answer: {question.gold}; "
    yield f"{gold}votes: {question.votes_text}"
    picks = [f"{name} {'unreadable' if pick['answer'] is None else pick['answer']}" for name, pick in
             question.picks.items()]  # fmt: skip
    if picks:
        yield f"picked: {', '.join(picks)}"
    graph = question.dependencies
    if graph is None:
        if trace.no_dependencies:
            yield f"no dependency graph: {trace.no_dependencies}"
        return
    growth = "" if np.isnan(graph.growth) else f", growth {graph.growth:+.2f} per latent"
    yield (
        f"dependencies of at least {graph.threshold:g}: critical path {len(graph.path)} of "
        f"{report.counted(len(graph.relative_TT), 'latent')}, parallel potential {graph.potential:.2f}{growth}"
    )


def latents_table(trace: Trace, question: TracedQuestion) -> tuple[list[report.Column], list[report.Column]]:
    """A row per latent: what it says, scores, what it depends on."""
    own, anchor, graph = question.rollouts, question.deterministic, question.dependencies
    latents = max(each.latents for each in question.samplers)
    certain = [
        f"{100 * value:.0f}" if np.isfinite(value) else "" for value in anchor.lens.probability_NTK[0, :latents, 0]
    ]
    columns = [report.Column("says", [said(trace, anchor, latent) for latent in range(latents)], left=True)]
    columns.append(report.Column("%", certain))
    if question.results:
        cells = [", ".join(spelled(question, own, latent)) for latent in range(latents)]
        columns.append(report.Column("rollouts that say a result", cells, left=True, breaks=", "))
    if own.step_scores_NT is not None:
        kinds_N = np.array(question.kinds(0))
        for kind in dict.fromkeys(sorted(kinds_N, key=list(KINDS).index)):
            means = [
                number(pd.Series(own.step_scores_NT[kinds_N == kind, latent], dtype=float).mean(), 3)
                for latent in range(latents)
            ]
            columns.append(report.Column(f"score, {KINDS[kind]}", means, 1))
    if graph is not None:
        there = len(graph.relative_TT)
        cells = [depends_on(graph.relative_TT[latent], graph.threshold) if latent < there else "" for latent in
                 range(latents)]  # fmt: skip
        columns.append(report.Column("depends on", cells, left=True))
    return [report.Column("latent", [str(latent + 1) for latent in range(latents)])], columns


def spread_table(question: TracedQuestion) -> tuple[list[report.Column], list[report.Column]]:
    """Two rows per sampler: drift and spread, a column per latent."""
    rows = [
        (f"{each.sampler}: {what}", values_T)
        for place, each in enumerate(question.samplers[:-1])
        for what, values_T in zip(("drift", "spread"), question.drift_and_spread(place), strict=True)
        if np.isfinite(values_T).any()
    ]
    latents = max(each.latents for each in question.samplers)
    return [report.Column("latent", [name for name, _ in rows], left=True)], [
        report.Column(str(step + 1), [number(values_T[step]) for _, values_T in rows]) for step in range(latents)
    ]


def said(trace: Trace, rollouts: TracedRollouts, latent: int, rollout: int = 0) -> str:
    """The most probable token of a latent."""
    token = int(rollouts.lens.token_NTK[rollout, latent, 0])
    if token < 0:
        return ""
    return trace.vocabulary[token].replace("\n", "\\n").strip() or repr(trace.vocabulary[token])


def spelled(question: TracedQuestion, rollouts: TracedRollouts, latent: int) -> Iterator[str]:
    """The results of steps that a latent says in some rollouts, with the share of those."""
    for place, (step, text) in enumerate(question.results):
        share = rollouts.spelled_TG[latent, place]
        if share > 0:
            yield f"{text} of step {step + 1}: {100 * share:.0f} %"


def depends_on(relative_T: Float64, threshold: float) -> str:
    """The latents that one depends on, from the most to the least."""
    order = [int(place) for place in np.argsort(-relative_T, kind="stable") if relative_T[place] >= threshold]
    return " ".join(str(place + 1) for place in order)


def rollouts_table(trace: Trace, question: TracedQuestion) -> tuple[list[report.Column], list[report.Column]]:
    """A row per rollout: answer, score, what its latents say, counts of the schedule."""
    listed = question.listed[: MAX_ROWS + 1]
    rows = [(question.samplers[place], rollout) for place, rollout, _ in listed]
    answers = [own.predictions[i] for own, i in rows]
    columns = [report.Column("answer", [UNREADABLE if answer is None else answer for answer in answers])]
    if question.gold is not None:
        right = ["yes" if own.correct_N and own.correct_N[i] else "no" for own, i in rows]
        columns.append(report.Column("right", right))
    if question.rollouts.score_N is not None:
        scores = [number(None if own.score_N is None else own.score_N[i]) for own, i in rows]
        columns.append(report.Column("score", scores))
    says = [" ".join(said(trace, own, latent, i) for latent in range(own.steps_N[i])) for own, i in rows]
    columns.append(report.Column("latents say", says, left=True))
    for name in question.rollouts.counts if trace.schedule != "sequential" else ():
        columns.append(report.Column(name, [str(own.counts[name][i]) for own, i in rows], 1))
    return [report.Column("rollout", [label for *_, label in listed], left=True)], columns


def map_lines(question: TracedQuestion, drawn: LatentMap, width: int, signs: dict[str, str]) -> Iterator[Text]:
    """A map as lines of text: what comes later lies above."""
    points = [each.reshape(-1, 2) for each in drawn.points]
    low_2, high_2 = (bound(np.concatenate(points), axis=0) for bound in (np.nanmin, np.nanmax))
    span_2 = np.where(high_2 > low_2, high_2 - low_2, 1.0)
    cells = [[(" ", "")] * width for _ in range(MAP_HEIGHT)]

    def put(point_2: Float64, sign: str, style: str) -> None:
        if np.isfinite(point_2).all():
            across, up = (point_2 - low_2) / span_2
            cells[round((1 - up) * (MAP_HEIGHT - 1))][round(across * (width - 1))] = sign, style

    anchor = len(drawn.points) - 1
    for point_2 in points[1] if anchor > 1 else ():
        put(point_2, signs["beside"], STYLES["beside"])
    for kind, path_T2 in zip(question.kinds(0), drawn.points[0], strict=True):
        for point_2 in path_T2:
            put(point_2, signs[kind], STYLES[kind])
    for latent, point_2 in enumerate(points[anchor]):
        put(point_2, STEPS[(drawn.step or latent) % len(STEPS)], STYLES["deterministic"])
    for row in cells:
        line = Text.assemble(*row)
        line.rstrip()
        yield line


def legend(question: TracedQuestion, drawn: LatentMap, signs: dict[str, str]) -> str:
    """What the marks of a map mean."""
    own = question.rollouts
    axes = "t-SNE" if drawn.explained_2 is None else f"PCA, {100 * sum(drawn.explained_2):.0f} % of the variance"
    kinds = ("voted", "other") if own.correct_N is None else ("right", "wrong")
    marks = [f"{signs[kind]} {own.sampler}, {KINDS[kind]}" for kind in kinds]
    marks += [f"{signs['beside']} {question.samplers[1].sampler}"] * (len(question.samplers) > 2)
    return printable(f"{axes}: {'; '.join(marks)}; 1 2 3 ... the deterministic latents")


def timeline_lines(question: TracedQuestion, signs: dict[str, str]) -> Iterator[Text]:
    """The sweeps of a rollout, the one that best_of_n picks if there is one: a line per sweep."""
    rollout = question.shown_rollout
    sweeps_S3 = question.rollouts.sweeps_3NS[:, rollout].T
    yield Text(
        f"sweeps of rollout {rollout}: {signs['commit']} final after it, {signs['conflict']} computed from a guess, "
        f"not final, {signs['kept']} final before"
    )
    before = 0
    for sweep, (first, stop, final) in enumerate(sweeps_S3):
        if first < stop:
            line = Text(f"{sweep + 1:>4}  ")
            for latent in range(sweeps_S3[:, 1].max()):
                made = "commit" if latent < final else "conflict"
                kind = "kept" if latent < before else made if first <= latent < stop else "free"
                line.append(signs[kind] + " ", STYLES.get(kind, "dim"))
            yield line
            before = final


def print_side_by_side(trace: Trace) -> None:
    """A row per question."""
    questions = trace.questions
    columns = [report.Column("votes", [each.votes_text for each in questions], left=True)]
    if questions[0].gold is not None:
        columns.insert(0, report.Column("right answer", [str(each.gold) for each in questions]))
    for place, each in enumerate(questions[0].samplers[:-1]):
        means = [
            [number(pd.Series(values).mean()) for values in question.drift_and_spread(place)] for question in questions
        ]
        columns.append(report.Column(f"drift of {each.sampler}", [drift for drift, _ in means], 2))
        columns.append(report.Column(f"spread of {each.sampler}", [spread for _, spread in means], 3))
    if not trace.no_dependencies:
        graphs = [each.dependencies for each in questions]
        columns.append(
            report.Column("critical path", ["" if graph is None else str(len(graph.path)) for graph in graphs], 1)
        )
    report.print_columns(
        "side by side", [report.Column("question", [each.id for each in questions], left=True)], columns
    )
