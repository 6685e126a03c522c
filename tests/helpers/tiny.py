"""Tiny random reasoners, with large initial weights so that their argmaxes vary, and prompts of plain ids."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from latent_tts.engine.rollout import RolloutPlan
from latent_tts.random.draw import Draw
from latent_tts.types import Reasoner, RewardModel

VOCABULARY, WIDTH, POSITIONS = 61, 32, 96
END_ID = 60
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
OWN_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


# ids that these models often write
EOS_IDS = {"gpt2": 36, "llama": 26, "llama_tied": 16, "qwen3": 11}
NEVER = -1


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=3,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.3,
        **OWN_IDS,
    )
    return GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **OWN_IDS, tie_word_embeddings=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **OWN_IDS, tie_word_embeddings=True)),
    # its heads are wider than the model together, and queries and keys are normalised
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, **OWN_IDS, head_dim=16, tie_word_embeddings=True)),
}


def reasoner(
    family: str, dtype: torch.dtype = torch.float64, next_latent: Callable[[Tensor], Tensor] = lambda hidden: hidden
) -> Reasoner:
    """A reasoner with the same weights in every call; in float64 no operation uses less precision."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lm = FAMILIES[family]().to(dtype)
    if dtype == torch.float64:
        _norms_of_torch(lm)
    return Reasoner(lm.eval().requires_grad_(False), next_latent)


def _norms_of_torch(module: nn.Module) -> None:
    """Replace the RMS norms of transformers, which always compute in float32, by those of torch."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=child.weight.dtype))
        else:
            _norms_of_torch(child)


def plain_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy without the engine's attention (`sdpa`, since `eager` has a softmax in float32 for Llama)."""
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation("sdpa")
    return lm


def plan(
    latents: int, *, eos_id: int | None = NEVER, end: int = 1, answer: int = 6, stop_id: int | None = None, **more: Any
) -> RolloutPlan:
    """A plan with `end` end-of-thinking tokens."""
    return RolloutPlan(latents, [END_ID] * end, eos_id, answer, stop_id, **more)


def prompts(lengths: list[int]) -> list[list[int]]:
    """Different prompts with these lengths."""
    return [
        [(7 * row + 3 * place + place * place) % (VOCABULARY - 1) for place in range(n)]
        for row, n in enumerate(lengths)
    ]


def draw(questions: list[str], rollouts: range, seed: int = 0) -> Draw:
    """The random numbers of these rollouts of each question."""
    return Draw.of(seed, questions, torch.tensor(list(rollouts)).repeat(len(questions), 1), WIDTH)


def reward_model(family: str, dtype: torch.dtype = torch.float64) -> RewardModel:
    """A LatentRM with random weights, different from those of `reasoner`."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        lm = FAMILIES[family]().to(dtype)
        head = nn.Linear(WIDTH, 1, dtype=dtype).requires_grad_(False)
    if dtype == torch.float64:
        _norms_of_torch(lm)
    backbone = lm.eval().requires_grad_(False).base_model
    return RewardModel(backbone, lambda hidden: head(hidden)[..., 0])


def write_latent_rm(folder: Path, reasoner: Path, trained: dict | None = None, seed: int = 5) -> Path:
    """Write a LatentRM checkpoint with random weights, in the size of a reasoner's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(reasoner / "tokenizer.json", folder)
    config = json.loads((reasoner / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({} if trained is None else {"latent_rm": trained})))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = GPT2LMHeadModel(GPT2Config(**config | {"initializer_range": 0.5}))
        head = nn.Linear(lm.config.n_embd, 1)
    weights = {name: value for name, value in lm.state_dict().items() if name != "lm_head.weight"}
    save_file(weights | {"classifier.weight": head.weight, "classifier.bias": head.bias}, folder / "model.safetensors")
    return folder
