"""Low-rank adapters of PEFT in training: small matrices beside frozen weights, and rows of new tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint.joining import find_unsupported
from latent_tts.errors import bad_value, check_fields, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the head


@dataclass(frozen=True)
class Lora:
    """The keys `lora.*`.

    Attributes:
        rank: of the product that is added to a weight; None trains all weights.
        alpha: the product counts alpha / rank.
        targets: names of the linear layers; None for all but the head.
        dropout: rate before the product, in [0, 1).
    """

    rank: int | None
    alpha: float
    targets: Sequence[str] | None
    dropout: float

    def __post_init__(self) -> None:
        if self.rank is None:
            return
        kinds = {"rank": "a positive integer", "alpha": "a positive number", "dropout": "a number in [0, 1)"}
        check_fields("lora", self, **kinds)
        names = self.targets
        require(
            "lora.targets",
            names,
            names is None or bool(isinstance(names, list) and names and all(isinstance(n, str) for n in names)),
            "must be a list of names of layers, as in [q_proj,v_proj], or null for all",
        )
        require(
            "lora.rank",
            self.rank,
            find_spec("peft") is not None,
            "peft is not installed: pip install '.[convert]' in the clone",
        )

    def attach(self, lm: PreTrainedModel, tokens: Sequence[int], seed: int) -> Any:
        """Put the adapter into a causal LM, in place; only it and the rows of `tokens` are trained.

        Args:
            lm: the model.
            tokens: ids of new tokens.
            seed: of the adapter's weights.

        Returns:
            PEFT's model around it; None without a rank: then all weights are trained.

        Raises:
            UsageError: the model has no such layer, or PEFT adapts it by more than products of two matrices.
        """
        if self.rank is None:
            return None
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        names: dict[Any, str] = {module: name for name, module in lm.named_modules()}
        rows = {names[lm.get_input_embeddings()].rpartition(".")[2]: list(tokens)} if tokens else {}
        if tokens and not lm.config.tie_word_embeddings:
            rows[names[lm.get_output_embeddings()]] = list(tokens)
        layers = [name for module, name in names.items() if isinstance(module, (torch.nn.Linear, Conv1D))]
        adaptable = ",".join(sorted({name.rpartition(".")[2] for name in layers} - {"lm_head", "embed_out"}))
        others = f"choose among its linear layers, as in [{adaptable}]"
        config = LoraConfig(
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in names),
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules=ALL_LINEAR if self.targets is None else list(self.targets),
            trainable_token_indices=rows or None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated names of transformers
                warnings.simplefilter("ignore", RuntimeWarning)  # of patterns, which are refused below
                adapted = get_peft_model(lm, config)
            with torch.no_grad():
                lm(input_ids=torch.zeros(1, 1, dtype=torch.long))
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
            why = f"{type(lm).__name__} cannot be run with it ({' '.join(str(error).split())[:120]}); {others}"
            raise bad_value("lora.targets", self.targets, why) from error
        unsupported = find_unsupported(plain_settings(adapted))  # as where PEFT adapts all experts of a mixture at once
        require("lora.targets", self.targets, unsupported is None, f"PEFT would set {unsupported}; {others}")
        return adapted


FULL = Lora(rank=None, alpha=1.0, targets=None, dropout=0.0)  # no adapter: all weights are trained


def plain_settings(adapted: Any) -> dict[str, Any]:
    """PEFT's config of an adapter in training, as JSON takes it."""
    settings = adapted.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
