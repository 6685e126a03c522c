"""Templates of prompts: what they see, and the limits that they are rendered in."""

import pytest

from latent_tts.text import template
from latent_tts.text.template import MAX_CHARACTERS, QUESTION, render_prompt


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("Q: {{question}}\nA:", "Q: 1+1?\nA:"),
        ("{{ messages[0]['content'] | upper }}", "1+1?"),
        ("{{bos_token}}{{- question}}", "<s>1+1?"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}", "2024"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)
def test_a_template_sees_the_question_and_the_special_tokens(source, text):
    assert render_prompt(source, "1+1?", {"bos_token": "<s>"}) == text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ question", "TemplateSyntaxError"),
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ nosuch.field }}", "UndefinedError"),
        ("{% for i in range(9999999) %}{% endfor %}", "Range too big"),
        (f"{{{{ 'x' * {MAX_CHARACTERS + 1} }}}}", "more than 1,048,576 characters"),
        ("{{ 'x' * (10 ** 11) }}", "too much memory"),
    ],
)
def test_a_template_that_fails_says_why(source, words):
    with pytest.raises(ValueError, match=words):
        render_prompt(source, "1+1?", {})


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"more than 0\.2 s"):
        render_prompt(endless, "1+1?", {})
    assert render_prompt("{{question}}", "next", {}) == "next"


@pytest.mark.parametrize(
    ("text", "named"),
    [("{{question}}", True), ("{{- question | trim }}", True), ("{{ questions }}", False), ("question", False)],
)
def test_the_place_of_the_question_is_found(text, named):
    assert bool(QUESTION.search(text)) is named
