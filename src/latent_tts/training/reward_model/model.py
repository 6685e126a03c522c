"""LatentRM in training: the reasoner's backbone with a scalar head; all rollouts of a question are mostly one row.

Source: You et al. 2025 (arXiv 2510.07745), section 5; checkpoint layout of ModalityDance/latent-tts-rm.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latent_tts.checkpoint import reward_adapter
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.proof import find_attention_problem
from latent_tts.training.reasoner.lora import FULL, Lora, plain_settings
from latent_tts.training.recompute import recomputing_blocks


def packed_layout(lengths_Q: Tensor, longest: int, rollouts: int, latents: int) -> tuple[Tensor, Tensor]:
    """Mask and positions of rows of one question each: the prompt, then the latents of N rollouts (S = L + N*T).

    Args:
        lengths_Q: number of tokens of each prompt.
        longest: L, to which prompts are padded on the right.
        rollouts: N.
        latents: T.

    Returns:
        The mask (Q, 1, S, S), True where a position (third axis) attends to another (last axis): a prompt token to the
        prompt up to itself, a latent to the prompt and to its own rollout up to itself, padding to the prompt up to
        itself, so that no row of the mask is empty. And the position ids (Q, S): the first latent of every rollout
        follows the last prompt token.
    """
    device, questions = lengths_Q.device, len(lengths_Q)
    place_L = torch.arange(longest, device=device)
    rollout_S = torch.cat(
        [place_L.new_full((longest,), -1), torch.arange(rollouts, device=device).repeat_interleave(latents)]
    )
    order_S = torch.cat([place_L, torch.arange(latents, device=device).repeat(rollouts)])
    is_prompt_S = rollout_S < 0
    siblings_SS = (rollout_S[:, None] == rollout_S[None]) & (order_S[None] <= order_S[:, None])
    real_QS = ~is_prompt_S | (order_S < lengths_Q[:, None])
    to_prompt_QSS = (~is_prompt_S[:, None] & is_prompt_S[None]) & real_QS[:, None]
    positions_QS = torch.where(is_prompt_S, order_S, order_S + lengths_Q[:, None])
    return (siblings_SS | to_prompt_QSS)[:, None], positions_QS.expand(questions, -1)


class LatentRMModule(nn.Module):
    """A backbone with a scalar head: r_t = w . h + b at latent t, with h the last layer's output there.

    Dropout stays off while it is trained, as in the official training.

    Attributes:
        backbone: the causal LM without its head.
        prefix: what the backbone's keys begin with in the causal LM's checkpoint (`transformer`, `model`).
        classifier: the head.
        recompute: whether the backward pass computes activations again.
        adapted: PEFT's model around the causal LM; None where all weights are trained.
    """

    adapted: Any

    def __init__(self, lm: PreTrainedModel, seed: int, lora: Lora = FULL) -> None:
        """Take the backbone of `lm` (and its weights) and make a head.

        Args:
            lm: the reasoner's causal LM.
            seed: of the head's weights: normal, with the standard deviation of the backbone's own initial weights; and
                of the adapter's.
            lora: the low-rank adapter that is trained in place of the weights, if it has a rank.
        """
        super().__init__()
        self.__dict__["adapted"] = lora.attach(lm, [], seed)  # not registered as a module: it has the same weights
        self.recompute = False
        self._packs: dict[int, bool] = {}
        use_own_attention(lm)
        self.prefix = lm.base_model_prefix
        self.backbone: Any = lm.base_model.requires_grad_(True) if self.adapted is None else lm.base_model
        self.classifier = nn.Linear(lm.config.hidden_size, 1)
        generator = torch.Generator().manual_seed(seed)
        std = getattr(lm.config, "initializer_range", 0.02)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.randn(self.classifier.weight.shape, generator=generator) * std)
            self.classifier.bias.zero_()
        self.classifier.to(next(self.backbone.parameters()).dtype)

    def train(self, mode: bool = True) -> LatentRMModule:
        """Set the training mode; the backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, prompt_QL: Tensor, lengths_Q: Tensor, latents_QNTD: Tensor) -> Tensor:
        """The logits r_t (Q, N, T) of the latents, in the dtype of the head even under autocast.

        Args:
            prompt_QL: token ids, padded on the right.
            lengths_Q: number of tokens of each prompt.
            latents_QNTD: latents of the rollouts.
        """
        (questions, _, latents, width), longest = latents_QNTD.shape, prompt_QL.shape[1]
        rows = self._packed if self.packs(longest + latents) else self._plain
        vectors, mask, positions = rows(prompt_QL, lengths_Q, latents_QNTD)
        with recomputing_blocks(self.backbone, self.recompute):
            hidden = self.backbone(
                inputs_embeds=vectors, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        hidden_QND = hidden[:, longest:].reshape(questions, -1, width)
        weight, bias = self.classifier.weight, self.classifier.bias
        with torch.autocast(hidden_QND.device.type, enabled=False):
            logits_QN1 = F.linear(hidden_QND.to(weight.dtype), weight, bias)
        return logits_QN1.view(latents_QNTD.shape[:3])

    def packs(self, longest: int) -> bool:
        """Whether the rollouts of a question can be one row: not where tokens see only some of those before them.

        Args:
            longest: tokens and latents of the longest rollout.
        """
        if longest not in self._packs:
            with torch.no_grad():
                self._packs[longest] = find_attention_problem(self.backbone, longest) is None
        return self._packs[longest]

    def _packed(self, prompt_QL: Tensor, lengths_Q: Tensor, latents_QNTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, additive mask and positions of rows of a question each, with all its rollouts."""
        questions, rollouts, latents, width = latents_QNTD.shape
        prompt_QLD = self.backbone.get_input_embeddings()(prompt_QL)
        latents_QRD = latents_QNTD.reshape(questions, rollouts * latents, width).to(prompt_QLD.dtype)
        mask_Q1SS, positions_QS = packed_layout(lengths_Q, prompt_QL.shape[1], rollouts, latents)
        # additive, since attention functions other than SDPA add the mask to the scores
        additive_Q1SS = torch.zeros_like(mask_Q1SS, dtype=prompt_QLD.dtype).masked_fill(
            ~mask_Q1SS, torch.finfo(prompt_QLD.dtype).min
        )
        return torch.cat([prompt_QLD, latents_QRD], dim=1), additive_Q1SS, positions_QS

    def _plain(self, prompt_QL: Tensor, lengths_Q: Tensor, latents_QNTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, mask and positions of rows of a rollout each, with padding on the left."""
        rollouts = latents_QNTD.shape[1]
        place_L = torch.arange(prompt_QL.shape[1], device=prompt_QL.device)
        padding_Q1 = prompt_QL.shape[1] - lengths_Q[:, None]
        moved_QL = prompt_QL.gather(1, (place_L - padding_Q1) % prompt_QL.shape[1])
        prompt_RLD = self.backbone.get_input_embeddings()(moved_QL).repeat_interleave(rollouts, 0)
        latents_RTD = latents_QNTD.flatten(0, 1).to(prompt_RLD.dtype)
        real_RL = (place_L >= padding_Q1).repeat_interleave(rollouts, 0)
        mask_RS = torch.cat([real_RL, real_RL.new_ones(latents_RTD.shape[:2])], 1).long()
        return torch.cat([prompt_RLD, latents_RTD], 1), mask_RS, (mask_RS.cumsum(1) - 1).clamp(min=0)

    def write(self, folder: Path, adapter: CheckpointAdapter, dtype: torch.dtype, record: Mapping[str, Any]) -> None:
        """Write the checkpoint: weights, the reasoner's tokenizer, and its config with `latent_rm: record`.

        An adapter is written without the reasoner's weights; the record names its checkpoint as `base`.
        """
        head = {f"classifier.{name}": value for name, value in self.classifier.named_parameters()}
        head = _rounded(head, dtype)
        if self.adapted is not None:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(self.adapted, save_embedding_layers=False)
            reward_adapter.write(
                folder, adapter.folder, _rounded(state, dtype), plain_settings(self.adapted), head,
                adapter.config | {"latent_rm": dict(record)},
            )  # fmt: skip
            return
        folder.mkdir(parents=True, exist_ok=True)
        named = {f"{self.prefix}.{name}": value for name, value in self.backbone.named_parameters()}
        save_file(_rounded(named, dtype) | head, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(adapter.folder / "tokenizer.json", folder / "tokenizer.json")
        config = {**adapter.config, "dtype": str(dtype).removeprefix("torch."), "latent_rm": dict(record)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as a file takes them."""
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}
