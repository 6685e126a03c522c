"""The page of `ltts trace`: one file of HTML with its style, its script and its data, which loads nothing.

Texts come from users, files and models. The template escapes them, data are JSON in which no tag can begin or end, the
script makes text nodes alone, and a content security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_tts.results.trace import Trace, TracedQuestion, TracedRollouts

TEMPLATES = Path(__file__).parent / "templates"
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
DIGITS = 5  # of numbers in the data


def render_page(trace: Trace) -> str:
    """The page as text."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"number": number, "percent": percent, "signed": signed}
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
                "explained": each.explained,
            }
            for each in question.maps
        ],
        "graph": graph and {"relative": plain(graph.relative_TT), "threshold": graph.threshold, "path": graph.path},
    }


def rollouts_data(rollouts: TracedRollouts) -> dict[str, Any]:
    """What it reads of the rollouts of a sampler."""
    timeline = rollouts.timeline
    return {
        "name": rollouts.sampler,
        "steps": plain(rollouts.steps_N),
        "predictions": rollouts.predictions,
        "correct": rollouts.correct_N,
        "scores": plain(rollouts.score_N),
        "stepScores": plain(rollouts.step_scores_NT),
        "counts": rollouts.counts,
        "first": plain(timeline.first_NS),
        "stop": plain(timeline.stop_NS),
        "final": plain(timeline.final_NS),
        "tokens": plain(rollouts.lens.token_NTK),
        "probabilities": plain(rollouts.lens.probability_NTK),
        "ranks": plain(rollouts.lens.rank_NTG),
    }


def plain(values: Any) -> Any:
    """An array as lists of numbers with few digits; None for NaN, and for None."""
    if values is None:
        return None
    if isinstance(values, np.ndarray | list):
        return [plain(each) for each in values]
    value = float(values)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")


def number(value: float | None) -> str:
    """A number in a table; empty for none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


def signed(value: float) -> str:
    """A number with its sign."""
    return f"{value:+.2f}"


def percent(value: float) -> str:
    """A share in percent; empty for none."""
    return "" if not math.isfinite(value) else f"{100 * value:.0f}"
