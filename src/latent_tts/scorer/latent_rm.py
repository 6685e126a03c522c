"""`scorer=latent_rm`: a transformer that reads the prompt and the latents and scores every latent.

A checkpoint has the backbone's weights (named as in its causal LM), `classifier.weight` (1, D), `classifier.bias` (1),
and the backbone's `config.json`. One that `ltts train-rm lora.rank=R` wrote is an adapter of the reasoner
(`checkpoint.reward_adapter`). `ltts train-rm` adds the key `latent_rm` to the config: the reasoner and sampler of
the training rollouts, the reduction of step scores, and the temperature of the weighted vote, chosen on `valid`.

Source: You et al. (arXiv 2510.07745), section 4; checkpoint layout of ModalityDance/LatentTTS at 6657f20. Its CODI
variant, with a projector before the head, is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latent_tts.checkpoint import files, joining, reward_adapter
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import as_typed, bad_value, check_fields, is_number, require
from latent_tts.types import Floats, Reasoner, RewardModel, file_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

KEY = "scorer.checkpoint"
HEAD = set(reward_adapter.HEAD)
REDUCTIONS = {"sum": np.sum, "mean": np.mean, "last": lambda scores: scores[-1]}


@dataclass(frozen=True)
class LatentRM:
    """A LatentRM and how its step scores are used.

    Attributes:
        checkpoint: a folder, `shipped:NAME` or a hub id.
        reduce: how step scores are reduced: `sum`, `mean` or `last`; None: as in training, or `sum` if unknown.
        positions: `correct`: the positions of a row count from its first token. `official`: they are shifted as by the
            left padding of the official script, by the length of the longest text among the rollouts of the question
            minus that of the row. A score then depends on the answers of all rollouts of the question.
        revision: commit or tag of a hub id.
        range: lowest and highest score of a rollout; a score beyond it is an error. None if it is not known.
        only_own: use it only for the reasoner that it was trained for (set by `scorer=auto`).
    """

    checkpoint: str
    reduce: str | None
    positions: str
    revision: str | None = None
    range: Sequence[float] | None = None
    only_own: bool = False

    def __post_init__(self) -> None:
        names, bounds = ", ".join(REDUCTIONS), self.range
        known = self.reduce is None or str(self.reduce) in REDUCTIONS
        require("scorer.reduce", self.reduce, known, f"must be one of {names}, or null for the LatentRM's own")
        check_fields("scorer", self, positions=("correct", "official"))
        pair = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(is_number, bounds))
        ok = bounds is None or (pair and bounds[0] < bounds[1])
        allowed = "must be two numbers in ascending order, as in scorer.range=[-20,20], or null"
        require("scorer.range", bounds, ok, allowed)
        allowed = "must be a folder, shipped:NAME or a hub id: this model names no LatentRM"
        require(KEY, self.checkpoint, isinstance(self.checkpoint, str), allowed)

    @property
    def name(self) -> str:
        """The name of the scorer in tables."""
        return f"latent_rm:{self.checkpoint}"

    @cached_property
    def folder(self) -> Path:
        """The local checkpoint folder."""
        return files.resolve(self.checkpoint, self.revision, key=KEY)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        return files.read_json(self.folder, "config.json", key=KEY)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the backbone, by the names that most configs use; see `files.sizes`."""
        return files.sizes(self.config, files.weight_shapes(self._backbone_folder, key=KEY))

    @cached_property
    def _is_adapter(self) -> bool:
        return reward_adapter.is_reward_adapter(self.folder)

    @cached_property
    def _backbone_folder(self) -> Path:
        """The folder with the backbone's weights."""
        return reward_adapter.base_folder(self.folder, KEY) if self._is_adapter else self.folder

    @property
    def base_digest(self) -> str | None:
        """The digest of the reasoner whose weights an adapter shares; None for a LatentRM with weights of its own."""
        return str(self.trained.get("reasoner")) if self._is_adapter else None

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The record of its training in `config.json`; empty for the published checkpoints."""
        trained = self.config.get("latent_rm", {})
        require(KEY, self.folder, isinstance(trained, dict), "latent_rm in config.json must be an object")
        return trained

    @cached_property
    def digest(self) -> str:
        """A digest of the weights, the config, and the tokenizer if there is one.

        The config of an adapter has the digest of its reasoner.
        """
        tokenizer = [path for path in [self.folder / "tokenizer.json"] if path.is_file()]
        own = self._is_adapter
        weights = reward_adapter.file_paths(self.folder, KEY) if own else files.weight_files(self.folder, key=KEY)
        paths = [self.folder / "config.json", *tokenizer, *weights]
        return hashlib.sha256(b"".join(map(file_sha256, paths))).hexdigest()[:16]

    @property
    def temperature(self) -> float:
        """Temperature of the weighted vote, as chosen on `valid` in training; 1 if none was chosen."""
        value = self.trained.get("temperature", 1.0)
        require(
            KEY,
            self.folder,
            is_number(value) and value > 0,
            f"config.json has latent_rm.temperature={value}; it must be a positive number",
        )
        return float(value)

    @property
    def reduction(self) -> str:
        """How step scores are reduced."""
        chosen = str(self.reduce or self.trained.get("reduce") or "sum")
        require(
            KEY,
            self.folder,
            chosen in REDUCTIONS,
            f"config.json has latent_rm.reduce={chosen}; it must be one of {', '.join(REDUCTIONS)}",
        )
        return chosen

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; only `positions=official` reads it."""
        return files.load_tokenizer(self.folder, key=KEY)

    def check(self, reasoner: CheckpointAdapter, sampler: Mapping[str, Any]) -> list[str]:
        """Check every file, reading only the headers of the weights.

        Args:
            reasoner: the model whose latents are scored.
            sampler: the config of the sampler that draws them.

        Returns:
            Warnings, such as that it was trained on rollouts of another reasoner or sampler.

        Raises:
            UsageError: a file is missing or truncated, the head does not have one output, or the width is not that of
                the reasoner.
        """
        _ = reasoner.digest  # so that an adapter finds its folder: see `joining.find_base`
        shapes = files.weight_shapes(self._backbone_folder, key=KEY)
        if not self._is_adapter:
            files.check_sizes(self.config, self.folder, key=KEY)
            files.check_shapes(self.config, shapes, self.folder, key=KEY)
        else:
            for path in reward_adapter.file_paths(self.folder, KEY)[1:]:
                shapes |= files.tensor_shapes(path, key=KEY)
            joining.read_settings(self.folder, KEY)
        width = self.sizes.get("n_embd", self.sizes.get("hidden_size"))
        if {name: shapes.get(name) for name in HEAD} != {"classifier.weight": [1, width], "classifier.bias": [1]}:
            found = ", ".join(f"{name} {shapes.get(name, 'missing')}" for name in sorted(HEAD))
            raise bad_value(
                KEY, self.checkpoint, f"not a LatentRM: its head must have one output for width {width}, found {found}"
            )
        allowed = f"its width is {width}; the latents of {reasoner.name} have {reasoner.width}"
        require(KEY, self.checkpoint, width == reasoner.width, allowed)
        if self.positions == "official":
            _ = self.tokenizer
        _ = self.reduction, self.temperature
        return self._differences(reasoner, sampler)

    def _differences(self, reasoner: CheckpointAdapter, sampler: Mapping[str, Any]) -> list[str]:
        warnings = []
        digest = self.trained.get("reasoner")
        if digest is not None and digest != reasoner.digest:
            name = self.trained.get("reasoner_name", "another reasoner")
            warnings.append(
                f"{KEY}={self.checkpoint} was trained for the reasoner {name} ({digest}), "
                f"not for {reasoner.name} ({reasoner.digest}): its scores may be meaningless"
            )
        trained = self.trained.get("sampler")
        if isinstance(trained, Mapping):
            keys = [key for key in sorted({*trained, *sampler}) if trained.get(key) != sampler.get(key)]
            if keys:
                there, here = (_sampler_text(which, keys) for which in (trained, sampler))
                warnings.append(f"{KEY}={self.checkpoint} was trained on {there} and scores {here} here")
        reduce = self.trained.get("reduce")
        if self.reduce is not None and reduce is not None and reduce != self.reduce:
            warnings.append(
                f"scorer.reduce={self.reduce}: {self.checkpoint} was trained with {reduce}, "
                "and its temperature of the weighted vote was chosen for that"
            )
        return warnings

    def count_tokens(self, answer_text: str) -> int:
        """Number of tokens of a generated text in the LatentRM's own tokenizer, without special tokens."""
        return len(self.tokenizer.encode(answer_text, add_special_tokens=False).ids)

    def score_rollouts(self, step_scores: Sequence[Floats]) -> Floats:
        """The scores (R) of rollouts from their step scores; NaN for a rollout without any."""
        reduce = REDUCTIONS[self.reduction]
        scores = [float(reduce(np.asarray(row, dtype=np.float64))) if len(row) else np.nan for row in step_scores]
        return np.array(scores, dtype=np.float64)

    def load(self, *, device: str, dtype: str, base: Reasoner | None = None) -> RewardModel:
        """Load the weights (imports torch).

        Args:
            device: where to.
            dtype: that they are cast to.
            base: the reasoner with the digest `base_digest`, loaded there in that dtype: an adapter shares its weights,
                with the same scores as without it.
        """
        import torch
        from safetensors.torch import load_file
        from torch.nn import functional as F
        from transformers import AutoModel

        from latent_tts.checkpoint import loading

        if base is None:
            backbone = loading.load_causal_lm(self._backbone_folder, device=device, dtype=dtype, key=KEY,
                                              auto_class=AutoModel)  # fmt: skip
        else:
            backbone = reward_adapter.sharing_copy(base.lm.base_model)
        if self._is_adapter:
            reward_adapter.attach(backbone, backbone.base_model_prefix, self.folder, KEY)
            head = load_file(self.folder / joining.OWN)
        else:
            head = loading.load_tensors(self.folder, "classifier.", keep_prefix=True)
        precise = torch.promote_types(backbone.dtype, torch.float32)
        weight, bias = (head[name].to(device, precise) for name in reward_adapter.HEAD)

        def classifier(hidden: Tensor) -> Tensor:
            return F.linear(hidden.to(precise), weight, bias)[..., 0]

        return RewardModel(backbone, classifier)


def _sampler_text(sampler: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A sampler in words, by the keys that differ from another's: `dropout 0.05`, `dropout rate=0.05 site=residual`."""
    # a module of the group is named like its option
    kind = str(sampler.get("_target_", "rollouts")).split(".")[-2:][0]
    if "_target_" in keys:
        return " ".join([kind, *[f"{value:g}" for value in sampler.values() if is_number(value)][:1]])
    return " ".join([kind, *(f"{key}={as_typed(sampler[key])}" for key in keys if key in sampler)])
