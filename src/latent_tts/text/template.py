"""Prompts made by Jinja templates, which come with checkpoints: rendered in transformers' sandbox, within limits.

A template may loop for ever or double a text again and again, so it is rendered in a process with limits of time and
memory (`latent_tts.text.guard`). Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from latent_tts.text.guard import process_of

MAX_CHARACTERS = 1 << 20  # of a rendered prompt
SECONDS = 2.0
TODAY = datetime(2024, 7, 26)  # the date that templates see: a prompt must be the same tomorrow
QUESTION = re.compile(r"\{\{-?\s*question\b")  # the place of the question


def render_prompt(template: str, question: str, tokens: Mapping[str, str]) -> str:
    """Render a template with the question as `question`, and as the only message, the user's, in `messages`.

    Args:
        template: Jinja.
        question: the text of the question.
        tokens: variables for special tokens, such as `bos_token`.

    Raises:
        ValueError: the template is invalid or refuses the question, or the result takes too much time or memory, or is
            too long; the message says which.
    """
    reply = process_of(__name__).ask(("render", template, question, json.dumps(dict(tokens))), SECONDS)
    result = reply.get("result", {"error": f"it takes more than {SECONDS:g} s, or too much memory"})
    if "error" in result:
        raise ValueError(result["error"])
    return result["text"]


def warm_up() -> None:
    """Import what `render` needs and freeze the date that templates see, in the process that renders."""
    from transformers.utils import chat_template_utils

    utils: Any = chat_template_utils
    utils.datetime = SimpleNamespace(now=lambda: TODAY)


def render(template: str, question: str, tokens: str) -> dict[str, Any]:
    """The text of a prompt, or what is wrong; runs in the guarded process."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {**json.loads(tokens), "question": question}
    conversation: Any = [[{"role": "user", "content": question}]]
    try:
        result: Any = render_jinja_template(
            conversation, chat_template=template, add_generation_prompt=True, **variables
        )
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    text = result[0][0]
    if len(text) > MAX_CHARACTERS:
        return {"error": f"the prompt has more than {MAX_CHARACTERS:,} characters"}
    return {"text": text}
