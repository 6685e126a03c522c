"""Explicit chain of thought, the baseline of every latent reasoner: no latents, the steps are written as tokens.

Everything after the prompt (the steps, then the answer) is decoded as answer tokens, so `answer.temperature` samples
whole chains, and costs include all written tokens. With `prompt=plain` the prompt is the question and a newline, and a
chain ends in `### answer`. Instruct models take their own chat template, or one that the user writes.

Source: the `cot` mode of facebookresearch/coconut (`dataset.py`), with its format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError, bad_value, require
from latent_tts.text.number import MINUS, canonical_number, closing
from latent_tts.text.template import QUESTION, render_prompt
from latent_tts.types import Question

PLAIN, CHAT = "plain", "chat"
MAX_SHOWN = 60  # characters of a template that an error quotes
MARKER = re.compile(r"#{3,}")
SEPARATOR = r"(?:,|\{,\}|\\,|,\\!)"  # of thousands
FRACTION = r"(?:\d+ +)?\d+/\d+(?![\d/]|[.,]\d)|(?:\d+ *)?\\[dt]?frac\{\d+\}\{\d+\}"
NUMBER = re.compile(  # not the exponent of `10 cm^2`; the sign of `x-3` is not that of a number
    r"(?<![\d.^_])(?<!\^\{)(?<!\^-)(?<!\^\{-)(?:(?<![\w)])-)?"
    rf"(?:{FRACTION}|(?:\d{{1,3}}(?:{SEPARATOR}\d{{3}})+(?!\d|{SEPARATOR}\d)|\d+)(?:\.\d+)?)|(?<![\w.])-?\.\d+"
)
LEAD = re.compile(r"^.*\banswer\b(?:\s+is)?[*\s]*:?[*\s]*(?=[^\s*.])", re.IGNORECASE)  # of a line that says what it is
DASH = re.compile(r"(?<=[A-Za-z:=]\s)[\u2012-\u2014](?=\d)")  # of a number, not between two
BOXED = "\\boxed{"


@dataclass(frozen=True)
class Cot(CheckpointAdapter):
    """Adapter of any causal LM of transformers that writes its steps and then an answer. `latents` is 0.

    Attributes:
        prompt: `plain` (the question and a newline), `chat` (the checkpoint's chat template), or a Jinja template with
            `{{question}}`.
    """

    prompt: str = PLAIN

    family = "COCONUT"  # the same files: a plain causal LM and its tokenizer
    question_end = "\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "model.latents", self.latents, self.latents == 0, "must be 0: an explicit chain of thought has no latents"
        )
        if not (isinstance(self.prompt, str) and (self.prompt in (PLAIN, CHAT) or QUESTION.search(self.prompt))):
            raise self._bad_prompt("must be plain, chat, or a Jinja template with {{question}}")

    @property
    def prompt_recipe(self) -> str:
        """A text that identifies how prompts are made: the template, where there is one."""
        return "{question}\\n" if self.prompt == PLAIN else f"{self.prompt}\n{self._tokens}\n{self._template}"

    def check_tokens(self) -> None:
        """Check that there is a template if the prompt needs one: the tokens are any tokenizer's.

        Raises:
            UsageError: the checkpoint has no chat template, or does not name a special token of a given template.
        """
        if self.prompt != CHAT:
            self._warn_of_tokens_around()
        if self.prompt == PLAIN:
            return
        _ = self._template
        unnamed = [name for name in files.SPECIAL if name in self.prompt and name not in self._tokens]
        if unnamed:
            raise self._bad_prompt(f"{self.checkpoint} names no {unnamed[0]} in tokenizer_config.json; write the token")

    @cached_property
    def _template(self) -> str:
        if self.prompt != CHAT:
            return self.prompt
        template, _ = files.chat_template(self.folder)
        if template is None:
            raise self._bad_prompt(
                f"{self.checkpoint} has no chat template; give one, as in model.prompt=\"'Question: {{{{question}}}}'\""
            )
        return template

    @cached_property
    def _tokens(self) -> dict[str, str]:
        return files.chat_template(self.folder)[1]

    def _bad_prompt(self, why: str) -> UsageError:
        text = str(self.prompt)
        return bad_value("model.prompt", repr(text[:MAX_SHOWN])[1:-1] + "..." * (len(text) > MAX_SHOWN), why)

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """Empty: the first written token follows the prompt."""
        return []

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt.

        Raises:
            UsageError: a word is not in a word-level vocabulary, the text has no tokens, or the template fails.
        """
        if self.prompt == PLAIN:
            ids = self.text_ids(question, question.text + self.question_end)
        else:
            try:
                text = render_prompt(self._template, question.text, self._tokens)
            except ValueError as error:
                raise self._bad_prompt(f"question {question.quoted} cannot be written: {error}") from error
            ids = self.text_ids(question, text, special=self.prompt != CHAT)  # a chat template writes them itself
        if not ids:
            raise UsageError(
                f"question {question.quoted}: its text has no tokens in the vocabulary of model={self.name}"
            )
        return ids

    def answer_span(self, answer_text: str) -> str | None:
        """The text after the last `#`; None if a plain chain contains no `#`.

        Instruct models end in many ways: for them it is what the last box of LaTeX holds, or the last line without
        `The answer is` and its like.
        """
        if self.prompt == PLAIN:
            _, sign, answer = answer_text.rpartition("#")
            return answer.strip() if sign else None
        end = MARKER.split(answer_text)[-1]
        boxed = _last_boxed(end)
        lines = [line.strip() for line in end.splitlines() if line.strip()]
        return boxed if boxed is not None else LEAD.sub("", lines[-1]).strip("*") if lines else None

    def decimal_answer(self, answer_text: str) -> str | None:
        """The number in that text; for instruct models that of the last box, or else the last one of the text."""
        if self.prompt == PLAIN:
            return self.answer_span(answer_text)
        text = DASH.sub("-", MINUS.sub("-", answer_text))
        end = MARKER.split(text)[-1]
        boxed = _last_boxed(end)
        if canonical_number(boxed) is not None:
            return boxed
        numbers = NUMBER.findall(end) or NUMBER.findall(text)
        return re.sub(SEPARATOR, "", numbers[-1]) if numbers else None


def _last_boxed(text: str) -> str | None:
    """What the last whole box of LaTeX in a text holds; None if there is none."""
    begin = text.rfind(BOXED) + len(BOXED)
    end = closing(text, begin - 1) if BOXED in text else None
    return None if end is None else text[begin : end - 1]
