"""PCCoT: T latents computed in parallel, in K sweeps; K is part of the model, which was trained with it.

All latents begin as the embedding of `<|latent|>`. A sweep runs them side by side and replaces each by the projected
hidden state before it. After K sweeps the answer attends to the final latents. This is `schedule=jacobi` with K sweeps,
but as a part of the model: a different K or order is a different model, and there is no sequential result that the
sweeps approximate.

With `known_first` the first sweep begins with h_1 in its place, which the prompt's pass makes. So K sweeps reach one
step further in the same number of passes. Published models are not trained in this way.

A checkpoint is a causal LM in the layout of transformers with the tensors `prj.*` of the projection, or without them if
`config.json` has `latent_tts.sweeps` (`use_projection=false` in the original code). The published files contain a LoRA
adapter of PEFT, which `ltts convert` merges.

Source: Wu et al. 2025 (arXiv 2506.18582); whyNLP/PCCoT, `models/modeling_gpt2.py` and `models/data_processor.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import as_typed, check_fields, is_whole, require
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.types import Reasoner

PROJECTION = "prj."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pccot(CheckpointAdapter):
    """Adapter of PCCoT checkpoints on any causal LM of transformers.

    Attributes:
        sweeps: K, 1 or more; `latent_tts.sweeps` in `config.json` records the K of training.
        answer_prompt: text forced after the latents and `<|end-latent|>`.
        known_first: whether the first sweep begins with h_1; `latent_tts.known_first` records that of training.
    """

    sweeps: int = 3
    answer_prompt: str = "The answer is:"
    known_first: bool = False

    family = "PCCoT"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("model", self, sweeps="a positive integer", known_first="true or false")
        require(
            "model.latents",
            self.latents,
            self.latents >= 1,
            "must be an integer, 1 or more: the sweeps compute latents",
        )
        require(
            "model.answer_prompt",
            self.answer_prompt,
            isinstance(self.answer_prompt, str),
            "must be a text, which may be empty",
        )

    @property
    def prompt_recipe(self) -> str:
        """A text that identifies how prompts are made and what is forced before the answer."""
        return f"{super().prompt_recipe}...<|end-latent|>{self.answer_prompt}"

    @property
    def own_schedule(self) -> Jacobi:
        """The sweeps of the model."""
        return Jacobi(self.sweeps, None, "token", known_first=self.known_first)

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """`<|end-latent|>` and the answer prompt."""
        return [*super().thinking_end_ids, *self.tokenizer.encode(self.answer_prompt, add_special_tokens=False).ids]

    def check_tokens(self) -> None:
        """Check that the tokenizer has the latent tokens and can read the answer prompt.

        Raises:
            UsageError: a token is missing, or a word is not in the vocabulary.
        """
        super().check_tokens()
        require(
            "model.answer_prompt",
            self.answer_prompt,
            self.tokenizer.token_to_id("<|unknown|>") not in self.thinking_end_ids,
            f"must be words in the vocabulary of {self.checkpoint}",
        )

    def reads(self, family: str) -> bool:
        """Whether it reads checkpoints of a family: its own, or a plain causal LM whose config records sweeps."""
        return family == self.family or (family == "COCONUT" and is_whole(self.recorded.get("sweeps")))

    def check(self) -> None:
        """Check every file; warn about latents and sweeps that the model was not trained with.

        Raises:
            UsageError: as for every family.
        """
        super().check()
        if not is_whole(self.recorded.get("sweeps")):
            return
        for key, given in {"sweeps": self.sweeps, "known_first": self.known_first}.items():
            trained = self.recorded.get(key, False)
            if trained != given:
                log.warning(
                    "model.%s=%s: %s was trained with %s", key, as_typed(given), self.checkpoint, as_typed(trained)
                )

    def check_tensors(self, shapes: Mapping[str, list[int]]) -> None:
        """Check that the projection, if there is one, is complete and has the width of the backbone.

        Raises:
            UsageError: a tensor is missing, or has another shape.
        """
        if not any(name.startswith(PROJECTION) for name in shapes):
            return
        width = [self.width]
        wanted = {f"{layer}.weight": width * 2 for layer in (0, 2)} | {"3.weight": width}
        wanted |= {f"{layer}.bias": width for layer in (0, 2, 3)}
        self.require_tensors("projection", PROJECTION, wanted, shapes)

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        from latent_tts.checkpoint import loading
        from latent_tts.checkpoint.modules import pccot_projection

        plain, tensors = super().load(device=device, dtype=dtype), loading.load_tensors(self.folder, PROJECTION)
        if not tensors:
            return plain
        projection = loading.fill_module(pccot_projection(self.width), tensors, plain.lm)
        return Reasoner(lm=plain.lm, next_latent=projection)
