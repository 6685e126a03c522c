"""PCCoT: T latents that K sweeps make in parallel; K belongs to the model, which was trained with it.

All latents begin as the embedding of `<|latent|>`. A sweep runs them side by side and puts the projected hidden state
before each in its place; after K sweeps the answer reads the keys and values of what they have become. That is
`schedule=jacobi` with `sweeps` = K, as part of the model: with another K or order it would be another model, and there
is no sequential run that K sweeps would approximate.

A checkpoint here is a causal LM in the layout of transformers with the projection's tensors `prj.*` beside it, or
without any where `config.json` says `latent_tts.sweeps` (the code's `use_projection=false`). The published files hold a
LoRA adapter of PEFT, which `ltts convert` merges.

Source: Wu et al. 2025 (arXiv 2506.18582); whyNLP/PCCoT, `models/modeling_gpt2.py` and `models/data_processor.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import bad_value, is_whole
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.types import Reasoner

if TYPE_CHECKING:
    pass

PROJECTION = "prj."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pccot(CheckpointAdapter):
    """Adapter of PCCoT checkpoints on any causal LM of transformers.

    Attributes:
        sweeps: K; a `config.json` with `latent_tts.sweeps` says what the checkpoint was trained with.
        answer_prompt: forced after the latents and `<|end-latent|>`.
    """

    sweeps: int = 3
    answer_prompt: str = "The answer is:"

    family = "PCCoT"
    question_end = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_whole(self.sweeps) and self.sweeps >= 1):
            raise bad_value("model.sweeps", self.sweeps, "a number of sweeps, 1 or more")
        if self.latents < 1:
            raise bad_value("model.latents", self.latents, "1 or more: its sweeps remake latents")
        if not isinstance(self.answer_prompt, str):
            raise bad_value("model.answer_prompt", self.answer_prompt, "a text, which may be empty")

    @property
    def prompt_recipe(self) -> str:
        """A text that stands for how prompts are made, and what is forced before the answer."""
        return f"{super().prompt_recipe}...<|end-latent|>{self.answer_prompt}"

    @property
    def own_schedule(self) -> Jacobi:
        """The sweeps of the model."""
        return Jacobi(self.sweeps, None, "token")

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """`<|end-latent|>` and the answer's prompt."""
        return [*super().thinking_end_ids, *self.tokenizer.encode(self.answer_prompt, add_special_tokens=False).ids]

    def check_tokens(self) -> None:
        """Check that the tokenizer has the latent tokens and can read the answer's prompt; raises UsageError."""
        super().check_tokens()
        if self._unknown_id is not None and self._unknown_id in self.thinking_end_ids:
            raise bad_value("model.answer_prompt", self.answer_prompt, f"words of the vocabulary of {self.checkpoint}")

    @property
    def _said(self) -> Mapping[str, Any]:
        said = self.config.get("latent_tts")
        return said if isinstance(said, dict) else {}

    def reads(self, family: str) -> bool:
        """Whether it reads checkpoints of a family: its own, and a plain causal LM whose config speaks of sweeps."""
        return family == self.family or (family == "COCONUT" and is_whole(self._said.get("sweeps")))

    def check(self) -> None:
        """Read everything but the weights; warn of numbers of latents or sweeps that it was not trained with.

        Raises:
            UsageError: as in every family.
        """
        super().check()
        trained = self._said.get("sweeps")
        if is_whole(trained) and trained != self.sweeps:
            log.warning("model.sweeps=%d: %s was trained with %d", self.sweeps, self.checkpoint, trained)

    def check_tensors(self, shapes: Mapping[str, list[int]]) -> None:
        """Check that the projection, if there is one, is whole and as wide as the backbone.

        Raises:
            UsageError: a tensor is missing, or has another shape.
        """
        if not any(name.startswith(PROJECTION) for name in shapes):
            return
        width = [self.width]
        wanted = {f"{layer}.weight": width * 2 for layer in (0, 2)} | {"3.weight": width}
        wanted |= {f"{layer}.bias": width for layer in (0, 2, 3)}
        for name, shape in wanted.items():
            found = shapes.get(PROJECTION + name)
            if found != shape:
                raise bad_value(
                    "model.checkpoint",
                    self.folder,
                    f"{PROJECTION}{name} has the shape {found or 'of nothing: it is missing'}; with the backbone's "
                    f"width of {self.width} it should be {shape}",
                )

    def answer_span(self, answer_text: str) -> str:
        """All that is written after the forced prompt, or after the last `#` of it."""
        return answer_text.rpartition("#")[2].strip()

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        import torch

        from latent_tts.checkpoint import loading
        from latent_tts.checkpoint.modules import pccot_projection

        lm = loading.load_causal_lm(self.folder, device=device, dtype=dtype)
        tensors = loading.load_tensors(self.folder, PROJECTION)
        if not tensors:
            return Reasoner(lm=lm, next_latent=lambda hidden_RD: hidden_RD)
        projection = pccot_projection(self.width)
        projection.load_state_dict(tensors)
        projection.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        return Reasoner(lm=lm, next_latent=projection)
