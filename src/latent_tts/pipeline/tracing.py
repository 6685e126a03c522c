"""What `ltts trace` shows, gathered from a run's rollouts.

Answers and scores are those of the run. Latents are recomputed: the random numbers are keyed, so they are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.dependencies import PlainRecurrence, find_dependencies
from latent_tts.engine.lens import read_latents
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import LESS_MEMORY, UsageError, computing
from latent_tts.pipeline.driver import jobs_of
from latent_tts.pipeline.models import find_device, refuse_graphs
from latent_tts.pipeline.rollouts import RunRollouts, draw_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import answer_lines, rollout_table
from latent_tts.pipeline.trace_spec import TraceSpec, sampler_text, shown_settings
from latent_tts.pipeline.worker import Drawer, places_of
from latent_tts.results.cache import known_to_fit
from latent_tts.results.run_folder import COUNT_COLUMNS
from latent_tts.results.trace import (
    DependencyGraph,
    LatentMap,
    Lens,
    Trace,
    TracedQuestion,
    TracedRollouts,
    draw_map,
    own_latents,
)
from latent_tts.types import Float32, Int64, Question

RESULT = re.compile(r"=\s*([^=<>]+?)[\s.]*(?:>>.*)?$")  # of a written step, as in `<<3+4=7>>`


def trace(asked: TraceSpec, rollouts: RunRollouts) -> Trace:
    """Everything there is to see of a run's questions.

    Args:
        asked: what to show.
        rollouts: of `asked.run`.

    Raises:
        RunError: a failure while drawing or computing.
    """
    run, view = asked.run, asked.view
    drawn = [
        (run, rollouts),
        *((spec, draw_rollouts(spec)) for spec in (asked.beside, asked.deterministic) if spec is not None),
    ]
    with computing("tracing", "what was drawn is in the cache", LESS_MEMORY):
        results_Q = [result_tokens(run.adapter, question) for question in run.questions]
        samplers = [
            traced_rollouts(spec, made, view.top, [[token for _, _, token in each] for each in results_Q])
            for spec, made in drawn
        ]
        graphs_Q = find_graphs(asked, samplers[-1])
    answers = answer_lines(run, rollout_table(run, rollouts))
    questions = [
        TracedQuestion(
            id=question.id, text=question.text, gold=question.answer, steps=question.steps,
            results=[(step, text) for step, text, _ in results_Q[place]],
            samplers=(own := [each[place] for each in samplers]),
            picks=answers[place]["picks"],
            maps=draw_maps(view.maps, own),
            dependencies=graphs_Q[place],
        )
        for place, question in enumerate(run.questions)
    ]  # fmt: skip
    ids = np.unique(np.concatenate([own.lens.token_NTK.ravel() for each in questions for own in each.samplers]))
    return Trace(
        about=shown_settings(asked),
        schedule=run.schedule.name,
        vocabulary={int(token): run.adapter.answer_text([int(token)]) for token in ids if token >= 0},
        scorer=None if run.scorer is None else run.scorer.name,
        no_dependencies=asked.no_dependencies,
        questions=questions,
    )


def result_tokens(adapter: CheckpointAdapter, question: Question) -> list[tuple[int, str, int]]:
    """The results of a question's written steps that are one token: number of the step, text, id of the token."""
    found = []
    for number, step in enumerate(question.steps):
        result = RESULT.search(step)
        with suppress(UsageError):  # a word that the model does not know
            if result and len(ids := adapter.forced_ids(result[1])) == 1:
                found.append((number, result[1], ids[0]))
    return found


def recompute(spec: RunSpec) -> tuple[Engine, Float32, Int64, Int64]:
    """Recompute the latents of a run's rollouts, R of them in the order of its tables.

    Returns:
        The engine, the latents (R, T, D; zeros beyond a rollout's own), how many each rollout has (R), and first, stop
        and final latents of the sweeps that made them (3, R, S), see `results.trace.TracedRollouts`.
    """
    wanted = spec.wanted()
    rows = {place: row for row, place in enumerate(wanted.itertuples(index=False, name=None))}
    jobs = jobs_of(spec, wanted)
    refuse_graphs(spec.engine, "the host reads what each sweep did")
    longest = max(len(job.prompt) for job in jobs)
    drawer = Drawer(spec, longest, scored=False, max_bytes=known_to_fit(spec.cache))
    latents_RTD = np.zeros((len(rows), spec.adapter.latents, drawer.engine.width), dtype=np.float32)
    steps_R, sweeps = np.zeros(len(rows), dtype=np.int64), []
    for batch in drawer.batches(jobs):
        made, here = drawer.roll(batch, answers=False), [rows[place] for place in places_of(batch)]
        latents_RTD[here] = made.latents_RTD.float().cpu().numpy()
        steps_R[here] = made.steps_R.numpy()
        sweeps.append((here, sweeps_of(made)))
    most = max((each.shape[2] for _, each in sweeps), default=0)
    timeline_3RS = np.repeat(steps_R[None, :, None], 3, 0).repeat(most, 2)
    for here, each in sweeps:
        timeline_3RS[:, here, : each.shape[2]] = each
    return drawer.engine, latents_RTD, steps_R, timeline_3RS


def sweeps_of(made: Rollouts) -> Int64:
    """First, stop and final latents (3, R, S) of each sweep; where a schedule keeps none, a sweep made each latent."""
    steps_R = made.steps_R.numpy()
    if made.timeline:
        sweeps = [torch.stack([sweep.first_R, sweep.stop_R, sweep.final_R]) for sweep in made.timeline]
        return torch.stack(sweeps, 2).cpu().numpy()
    place_S = np.arange(steps_R.max(initial=0))
    return np.minimum(np.stack([place_S, place_S + 1, place_S + 1])[:, None], steps_R[:, None])


def traced_rollouts(
    spec: RunSpec, rollouts: RunRollouts, top: int, results_Q: Sequence[Sequence[int]]
) -> list[TracedRollouts]:
    """The rollouts of each question, with what their latents say.

    Args:
        spec: the run.
        rollouts: its rollouts.
        top: tokens of each latent.
        results_Q: of each question the tokens whose ranks are asked for.
    """
    (engine, latents_RTD, steps_R, timeline_3RS), table = recompute(spec), rollout_table(spec, rollouts)
    step_scores_RT = None if rollouts.scores is None else rollouts.scores.step_scores_RT
    traced, start = [], 0
    for count, results in zip(spec.table_counts, results_Q, strict=True):
        own = slice(start, start := start + count)
        rows = table.iloc[own]
        latents_NTD, steps_N = latents_RTD[own], steps_R[own]
        traced.append(
            TracedRollouts(
                sampler=sampler_text(spec.sampler),
                latents_NTD=latents_NTD,
                steps_N=steps_N,
                predictions=[
                    None if text is None else str(text) for text in rows["prediction"].replace({np.nan: None})
                ],
                correct_N=None if rows["correct"].isna().all() else [bool(each) for each in rows["correct"]],
                texts=rows["answer_text"].tolist(),
                answer_logprob_N=rows["answer_logprob"].to_numpy(dtype=np.float64),
                step_scores_NT=None if step_scores_RT is None else step_scores_RT[own],
                score_N=None if step_scores_RT is None else rows["score"].to_numpy(dtype=np.float64, na_value=np.nan),
                counts={name: rows[name].tolist() for name in COUNT_COLUMNS},
                sweeps_3NS=timeline_3RS[:, own],
                lens=read_lens(engine, latents_NTD, steps_N, top, results),
            )
        )
    return traced


def read_lens(engine: Engine, latents_NTD: Float32, steps_N: Int64, top: int, results: Sequence[int]) -> Lens:
    """Read rollouts' latents through the LM head."""
    own_NT = own_latents(steps_N, latents_NTD.shape[1])
    values_XD = torch.from_numpy(latents_NTD[own_NT]).to(engine.device, engine.lm.dtype)
    arrays = []
    for read, beyond in zip(read_latents(engine.head, values_XD, top, results), (-1, np.nan, -1), strict=True):
        arrays.append(np.full((*own_NT.shape, read.shape[1]), beyond, read.numpy().dtype))
        arrays[-1][own_NT] = read.numpy()
    return Lens(*arrays)


def draw_maps(methods: Sequence[str], samplers: Sequence[TracedRollouts]) -> list[LatentMap]:
    """For each method the map of all latents and one of each latent that some rollout has."""
    longest = max(int(each.steps_N.max(initial=0)) for each in samplers)
    if not longest:
        return []
    return [draw_map(method, samplers, step) for method in methods for step in (None, *range(longest))]


def find_graphs(asked: TraceSpec, deterministic: Sequence[TracedRollouts]) -> list[DependencyGraph | None]:
    """How the latents of each question's deterministic rollout depend on each other."""
    run, view = asked.run, asked.view
    if asked.no_dependencies:
        return [None] * len(deterministic)
    plain = run.adapter.load(device=find_device(run.engine), dtype=run.engine.dtype)
    use_own_attention(plain.lm, "eager")

    def find_graph(question: Question, rollout: TracedRollouts) -> DependencyGraph | None:
        own_TD = torch.from_numpy(rollout.latents_NTD[0, : rollout.steps_N[0]]).to(plain.lm.device, plain.lm.dtype)
        if not len(own_TD):
            return None
        found = find_dependencies(PlainRecurrence(plain, run.prompts[question.id]), own_TD, view.directions)
        path = found.critical_path(view.threshold)
        return DependencyGraph(found.relative_TT.double().cpu().numpy(), view.threshold, path, found.growth)

    return list(map(find_graph, run.questions, deterministic))
