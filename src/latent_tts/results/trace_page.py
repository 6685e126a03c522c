"""The page of `ltts trace`: one file of HTML with its style, its script and its data, which loads nothing.

Texts come from users, files and models. The template escapes them, data are JSON in which no tag can begin or end, the
script makes text nodes alone, and a content security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_tts.results.trace import Trace, TracedQuestion, TracedRollouts, number

TEMPLATES = Path(__file__).parent / "templates"
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
DIGITS = 5  # of numbers in the data


def render_page(trace: Trace) -> str:
    """The page as text."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["number"] = partial(number, digits=3)
    script = (TEMPLATES / "trace.js").read_text(encoding="utf-8")
    data = {
        "vocabulary": trace.vocabulary,
        "scorer": trace.scorer,
        "schedule": trace.schedule,
        "questions": [question_data(question) for question in trace.questions],
    }
    return templates.get_template("trace.html").render(
        trace=trace,
        data=json_in_html(data),
        style=(TEMPLATES / "trace.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def json_in_html(value: Any) -> str:
    """JSON that can stand inside a `script` element, whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(ESCAPED.get(sign, sign) for sign in text)


def question_data(question: TracedQuestion) -> dict[str, Any]:
    """What the script of the page reads of a question."""
    graph = question.dependencies
    return {
        "gold": question.gold,
        "results": question.results,
        "selected": question.shown_rollout,
        "samplers": [
            rollouts_data(each) | {"kinds": question.kinds(place)} for place, each in enumerate(question.samplers)
        ],
        "spread": [
            [plain(each) for each in question.drift_and_spread(place)] for place in range(len(question.samplers))
        ],
        "maps": [
            {
                "method": each.method,
                "step": each.step,
                "points": [plain(points) for points in each.points],
                "explained": plain(each.explained_2),
            }
            for each in question.maps
        ],
        "graph": graph and {"relative": plain(graph.relative_TT), "threshold": graph.threshold, "path": graph.path},
    }


def rollouts_data(rollouts: TracedRollouts) -> dict[str, Any]:
    """What it reads of the rollouts of a sampler."""
    return {
        "name": rollouts.sampler,
        "steps": plain(rollouts.steps_N),
        "predictions": rollouts.predictions,
        "correct": rollouts.correct_N,
        "scores": plain(rollouts.score_N),
        "stepScores": plain(rollouts.step_scores_NT),
        "counts": rollouts.counts,
        "sweeps": dict(zip(("first", "stop", "final"), plain(rollouts.sweeps_3NS), strict=True)),
        "tokens": plain(rollouts.lens.token_NTK),
        "probabilities": plain(rollouts.lens.probability_NTK),
        "ranks": plain(rollouts.lens.rank_NTG),
    }


def plain(values: Any) -> Any:
    """An array as lists of numbers with few digits; None for NaN, and for None."""
    if isinstance(values, np.ndarray):
        return [plain(each) for each in values]
    if values is None or not math.isfinite(values):
        return None
    return int(values) if values == int(values) else float(f"{values:.{DIGITS}g}")
