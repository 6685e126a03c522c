"""What the adapters of checkpoint folders share: files, special tokens, and every check that needs no torch.

A family adds its prompt recipe, its answer rule and what it does with a hidden state (`latent_tts.model`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer

from latent_tts.checkpoint import files, joining
from latent_tts.errors import UsageError, as_typed, is_whole, require
from latent_tts.schedule import Schedule
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, Reasoner

log = logging.getLogger(__name__)
MAX_WORDS = 120  # of a vocabulary that an error lists


@dataclass(frozen=True)
class CheckpointAdapter:
    """An adapter of checkpoints with T latents between `<|start-latent|>` and `<|end-latent|>`.

    Attributes:
        name: what tables call the model.
        checkpoint: folder, `shipped:NAME`, `gguf:FILE` or hub id.
        latents: T, the number of latent thoughts.
        recommended: `sigma` and `rate` that suit it, `answer_tokens` where answers are long, and `answer_lead`, the
            text that its answers begin with; the samplers' configs, `max_answer_tokens` and `schedule.exit_prefix`
            take them as defaults.
        revision: commit or tag of a hub id.
        trained_latents: T of training, by `checkpoint`; a `config.json` with `latent_tts.latents` says its own.
        latent_rm: checkpoint of the LatentRM that was trained for it, the default of `scorer`; None if there is none.
        eos: the tokens that end an answer, by text or id, one or a list; None: all that the files name.
    """

    name: str
    checkpoint: str
    latents: int
    recommended: Mapping[str, Any]
    revision: str | None = None
    trained_latents: Mapping[str, int] | None = None
    latent_rm: str | None = None
    eos: str | int | Sequence[str | int] | None = None

    family: ClassVar[str]
    question_end: ClassVar[str] = ""  # written between the question and <|start-latent|>

    def __post_init__(self) -> None:
        require(
            "model.checkpoint",
            self.checkpoint,
            isinstance(self.checkpoint, str),
            f"must be a folder or hub id: model={self.name} has no default",
        )
        for key, kind, allowed in (
            ("name", str | int | float | None, "must be text, or null"),
            ("revision", str | int | float | None, "must be text, or null"),
            ("trained_latents", Mapping | None, "must be a mapping, as in conf/model/*.yaml"),
            ("recommended", Mapping | None, "must be a mapping, as in conf/model/*.yaml"),
        ):
            require(f"model.{key}", getattr(self, key), isinstance(getattr(self, key), kind), allowed)
        require(
            "model.latents",
            self.latents,
            is_whole(self.latents) and self.latents >= 0,
            "must be a number of latent thoughts, 0 or more",
        )

    @property
    def stop_id(self) -> int | None:
        """The token that ends a rollout's thinking when it is the most probable; None for T latents in any case."""
        return None

    @property
    def prompt_recipe(self) -> str:
        """A text that stands for how prompts are made; part of every cache key."""
        return "{question}" + self.question_end.replace("\n", "\\n") + "<|start-latent|>"

    def check(self) -> None:
        """Check everything but the weights; warn if the model was trained with another number of latents.

        Raises:
            UsageError: a file is missing or cut off, the checkpoint is of another family, its tensors do not fit its
                config, or the tokenizer lacks a latent token.
        """
        shapes = files.weight_shapes(self.folder)
        layout = files.training_layout(shapes)
        require(
            "model.checkpoint",
            self.folder,
            layout is None,
            f"is in {layout}'s training layout; {files.convert_hint(self.folder)}",
        )
        found, prefix = files.family(shapes)
        own = next((f"{prefix}*" for prefix, family in files.FAMILIES.items() if family == self.family), "")
        require(
            "model.checkpoint",
            self.folder,
            self.reads(found),
            f"holds a {found} checkpoint ({'with' if prefix else 'without'} {prefix or own}), "
            f"and the {type(self).__name__} adapter reads {self.family} ones\n"
            f"choose the model that reads it, or a {self.family} checkpoint",
        )
        files.check_sizes(self.config, self.folder)
        files.check_shapes(self.config, shapes, self.folder)
        self.check_tensors(shapes)
        self.check_tokens()
        files.check_vocabulary(self.tokenizer, shapes, self.config, self.folder)
        _ = self.thinking_end_ids, self.eos_ids, self.positions
        said = {name: set(ids) for name, ids in self._special_ids("eos").items() if ids}
        if self.eos is None and any(ids != set(self.eos_ids) for ids in said.values()):
            log.warning(
                "%s: its files name different end tokens (%s); an answer ends at any of %s; model.eos chooses others",
                self.checkpoint, ", ".join(f"{name} has {sorted(ids)}" for name, ids in said.items()),
                [self.tokenizer.id_to_token(token) for token in self.eos_ids],
            )  # fmt: skip
        of_file = self.recorded.get("latents")
        trained = of_file if is_whole(of_file) else (self.trained_latents or {}).get(self.checkpoint)
        if trained is not None and trained != self.latents:
            log.warning("model.latents=%d: %s was trained with %d", self.latents, self.checkpoint, trained)

    @cached_property
    def latent_weights(self) -> int:
        """Matrix entries of the family's own tensors, without CoLaR's `log_std`, which only `sampler=native` runs."""
        own = {name: shape for name, shape in files.weight_shapes(self.folder).items() if len(shape) == 2}
        return sum(prod(own[name]) for name in own if name.startswith(tuple(files.FAMILIES)) and "log_std" not in name)

    @property
    def has_spread(self) -> bool:
        """Whether its latent head predicts a Gaussian."""
        return False

    @property
    def own_schedule(self) -> Schedule | None:
        """None: the latents are made in any order that the user chooses."""
        return None

    def reads(self, family: str) -> bool:
        """Whether it reads checkpoints of a family."""
        return family == self.family

    def check_tensors(self, shapes: Mapping[str, list[int]]) -> None:
        """Check the names and shapes of the family's own tensors; raises UsageError."""

    def require_tensors(
        self, part: str, prefix: str, wanted: Mapping[str, list[int]], shapes: Mapping[str, list[int]]
    ) -> None:
        """Check that the checkpoint has all tensors of a part of the model, in the right shapes.

        Raises:
            UsageError: a tensor is missing, or has another shape.
        """
        for name, shape in wanted.items():
            found = shapes.get(prefix + name)
            require("model.checkpoint", self.folder, found is not None, f"the {part} lacks {prefix}{name}")
            allowed = f"with the backbone's width of {self.width} it must be {shape}"
            require("model.checkpoint", self.folder, found == shape, f"{prefix}{name} has the shape {found}; {allowed}")

    def check_tokens(self) -> None:
        """Check that the tokenizer has what prompts are made of; raises UsageError."""
        _ = self.start_id, self.latent_id
        self._warn_of_tokens_around()

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What the training recorded in `config.json`, as `latent_tts`; empty if nothing."""
        recorded = self.config.get("latent_tts")
        return recorded if isinstance(recorded, dict) else {}

    @cached_property
    def folder(self) -> Path:
        """The local checkpoint folder."""
        return joining.join_once(files.resolve(self.checkpoint, self.revision), files.MODEL_KEY)

    @cached_property
    def digest(self) -> str:
        """What identifies the weights, shape and tokenizer."""
        return files.digest(self.folder)

    @cached_property
    def identity(self) -> str:
        """`digest`, and a digest of prompts and end tokens where files that it leaves out say what they are."""
        beside = any((self.folder / name).is_file() for name in files.BESIDE_TOKENIZER)
        if not beside and set(self.eos_ids) == set(self._special_ids("eos")["config.json"]):
            return self.digest
        read = json.dumps([self.prompt_recipe, sorted(self.eos_ids)])
        return f"{self.digest}-{hashlib.sha256(read.encode()).hexdigest()[:6]}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        return files.read_config(self.folder)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the backbone, by the names that most configs use; see `files.sizes`."""
        return files.sizes(self.config, files.weight_shapes(self.folder))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The fast tokenizer."""
        return files.load_tokenizer(self.folder)

    @cached_property
    def width(self) -> int:
        """D of the backbone."""
        return int(next(self.sizes[key] for key in files.SIZES if key in self.sizes))

    @cached_property
    def positions(self) -> int:
        """The longest sequence, in tokens and latents, that the backbone takes."""
        return int(self.sizes["n_positions" if "n_embd" in self.sizes else "max_position_embeddings"])

    @property
    def latent_id(self) -> int:
        """Id of `<|latent|>`, the placeholder of a latent thought in written form."""
        return files.token_id(self.tokenizer, "<|latent|>", self.folder)

    @cached_property
    def start_id(self) -> int:
        """Id of `<|start-latent|>`, the last token of every prompt."""
        return files.token_id(self.tokenizer, "<|start-latent|>", self.folder)

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """The tokens forced after the last latent."""
        return [files.token_id(self.tokenizer, "<|end-latent|>", self.folder)]

    @property
    def eos_id(self) -> int:
        """The token that ends an answer where a text is written out, as in training."""
        return self.eos_ids[0]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: `eos`, or all that the checkpoint's files name.

        The first is the one of `config.json`, or of the tokenizer where `config.json` names none or several. Another is
        left out where it is a padding or latent token as well.

        Raises:
            UsageError: no file names one, or `eos` names no token.
        """
        if self.eos is not None:
            chosen = self.eos if isinstance(self.eos, list | tuple) else [self.eos]
            ids = [self.tokenizer.token_to_id(token) if isinstance(token, str) else token for token in chosen]
            known = [token for token in ids if files.is_token(token, self.tokenizer)]
            require(
                "model.eos",
                self.eos,
                bool(known) and known == ids,
                f"must be a token of {self.checkpoint}, by its text or id, or a list of them",
            )
            return tuple(dict.fromkeys(known))
        named = self._special_ids("eos")
        of_tokenizer = named["tokenizer_config.json"]
        of_config = named["config.json"]
        first = of_config if len(of_config) == 1 else of_tokenizer or of_config or named["generation_config.json"]
        require(
            "model.checkpoint",
            self.folder,
            bool(first),
            f"none of {', '.join(named)} names the token that ends an answer\nname it, as in model.eos='<|im_end|>'",
        )
        markers = set(map(self.tokenizer.token_to_id, files.LATENT_TOKENS)).union(*self._special_ids("pad").values())
        everything = dict.fromkeys([first[0], *(token for ids in named.values() for token in ids)])
        return tuple(token for token in everything if token == first[0] or token not in markers)

    def _special_ids(self, kind: str) -> dict[str, list[int]]:
        return files.special_ids(kind, self.folder, self.config, self.tokenizer)

    def _warn_of_tokens_around(self) -> None:
        """Warn where `tokenizer_config.json` asks for a token around texts that `tokenizer.json` does not add."""
        for name, asked in files.tokens_around(self.folder, self.tokenizer).items():
            log.warning(
                "%s: tokenizer_config.json has %s=%s, tokenizer.json %s such a token; prompts are made by "
                "tokenizer.json", self.checkpoint, name, as_typed(asked), "adds no" if asked else "adds",
            )  # fmt: skip

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt: the question, the recipe's ending, `<|start-latent|>`.

        Raises:
            UsageError: a word is not in a word-level vocabulary.
        """
        return [*self.text_ids(question, question.text + self.question_end), self.start_id]

    def text_ids(self, question: Question, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a question's text, with or without the special tokens that the tokenizer adds around a text.

        Raises:
            UsageError: a word is not in a word-level vocabulary.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
        unknown = self.tokenizer.token_to_id("<|unknown|>")
        if unknown is not None and unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            known = [token for token in sorted(self.tokenizer.get_vocab()) if re.fullmatch(r"[A-Za-z]+", token)]
            shown = [*known[:MAX_WORDS], *["..."] * (len(known) > MAX_WORDS)]
            raise UsageError(
                f"question {question.quoted}: the word {text[start:end]!r} is not in the vocabulary of "
                f"model={self.name}\na word-level model reads only the words of its own task: numbers and "
                f"{' '.join(shown)}\n`ltts ask --example` asks a question of the built-in reasoners; "
                "for other words use a checkpoint with a subword tokenizer"
            )
        return encoding.ids

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights; latents are the final hidden states, unless a family says otherwise (imports torch)."""
        from latent_tts.checkpoint import loading

        lm = loading.load_causal_lm(self.folder, device=device, dtype=dtype)
        return Reasoner(lm=lm, next_latent=lambda hidden_RD: hidden_RD)

    def forced_ids(self, text: str) -> list[int]:
        """Token ids of a text that every answer begins with (`answer.forced_prefix`).

        Raises:
            UsageError: the tokenizer cannot read it, or it ends the answer.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        require(
            "answer.forced_prefix",
            text,
            self.answer_text(ids).strip() == text.strip() and not (set(self.eos_ids) & set(ids)),
            f"must be text in the vocabulary of model={self.name}, without its eos",
        )
        return ids

    def answer_text(self, answer_ids: list[int]) -> str:
        """The text of answer ids, special tokens kept."""
        return self.tokenizer.decode(answer_ids, skip_special_tokens=False)

    def read_answer(self, answer_text: str, rule: AnswerRule) -> str | None:
        """The canonical form of the answer in a generated text; None if it cannot be read.

        Numbers are read as by the family's own evaluation; other answers are read from the text unchanged.
        """
        return rule.parse((self.decimal_answer if rule.name == "decimal" else self.answer_span)(answer_text))

    def answer_span(self, answer_text: str) -> str | None:
        """The part of an answer's text that holds the answer, unchanged: what follows the last `#`, or all of it."""
        return answer_text.rpartition("#")[2].strip()

    def decimal_answer(self, answer_text: str) -> str | None:
        """The number in an answer's text: the answer, unless a family's own evaluation reads numbers in another way."""
        return self.answer_span(answer_text)
