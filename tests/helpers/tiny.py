"""Tiny random reasoners, with large initial weights so that their argmaxes vary, and prompts of plain ids."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from latent_tts.checkpoint.loading import name_body
from latent_tts.engine.proof import prove_reasoner, prove_reward_model
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


WINDOW = 4
WITHOUT_GROUPS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
NEO = {
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": WINDOW,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "vocab_size": VOCABULARY,
}
# what other families do differently: windows, caps, scales, experts, attention outside transformers' interface
OTHER_CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_neo": lambda: GPTNeoConfig(**NEO, **OWN_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**WITHOUT_GROUPS, **OWN_IDS),
    "mistral": lambda: MistralConfig(**SHAPE, **OWN_IDS, sliding_window=WINDOW),
    "mistral_wide": lambda: MistralConfig(**SHAPE, **OWN_IDS, sliding_window=POSITIONS),
    "qwen2": lambda: Qwen2Config(
        **SHAPE, **OWN_IDS, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **SHAPE, **OWN_IDS, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **OWN_IDS, head_dim=8, sliding_window=WINDOW),
    "granite": lambda: GraniteConfig(
        **SHAPE, **OWN_IDS, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5,
        embedding_multiplier=3.0,
    ),
    "cohere": lambda: CohereConfig(**SHAPE, **OWN_IDS, logit_scale=0.25),
    "phi3": lambda: Phi3Config(**SHAPE, **OWN_IDS),
    "olmo2": lambda: Olmo2Config(**SHAPE, **OWN_IDS),
    "smollm3": lambda: SmolLM3Config(**SHAPE, **OWN_IDS),
    "mixtral": lambda: MixtralConfig(**SHAPE, **OWN_IDS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **OWN_IDS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    # its experts give the tokens of all rows one after another
    "llama4": lambda: Llama4TextConfig(**SHAPE, **OWN_IDS, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
    "llama4_chunks": lambda: Llama4TextConfig(
        **SHAPE, **OWN_IDS, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **WITHOUT_GROUPS, **OWN_IDS, **MOE, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_group=1, topk_group=1, n_routed_experts=4,
    ),
    "gptj": lambda: GPTJConfig(**GPT, **OWN_IDS, rotary_dim=4),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**GPT, **OWN_IDS),
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = MOE | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1,
                "topk_group": 1}  # fmt: skip
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": POSITIONS, "vocab_size": VOCABULARY,
       "initializer_range": 0.3}  # fmt: skip
# Llama-like ones, by transformers' name, with what they need besides
for _name, _more in {
    "apertus": {}, "arcee": {}, "biogpt": {}, "bitnet": {}, "ernie4_5": {}, "exaone4": {}, "glm": {"head_dim": 8},
    "dots1": MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "glm4": {"head_dim": 8}, "gpt_oss": MOE | {"head_dim": 8, "sliding_window": WINDOW},
    "granitemoe": MOE | {"num_local_experts": 4}, "helium": {"head_dim": 8}, "hunyuan_v1_dense": {"head_dim": 8},
    "minimax_m2": MOE | {"head_dim": 8, "num_local_experts": 4}, "nemotron": {}, "olmo": {}, "persimmon": {},
    "seed_oss": {"head_dim": 8}, "stablelm": {}, "starcoder2": {}, "xglm": {},
    "afmoe": MOE | {"head_dim": 8, "num_experts": 4, "num_dense_layers": 1}, "codegen": GPT | {"rotary_dim": 4},
    "cohere2": {"head_dim": 8, "sliding_window": WINDOW}, "ctrl": {}, "deepseek_v2": LATENT,
    "cwm": {"head_dim": 8, "bos_token_id": 0, "eos_token_id": 0},
    "diffllama": {"head_dim": 8}, "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": MOE | {"num_experts": 4, "head_dim": 8}, "falcon": {}, "gemma": {"head_dim": 8},
    "flex_olmo": MOE | {"num_experts": 4}, "glm4_moe": MOE | {"n_routed_experts": 4, "head_dim": 8},
    "glm4_moe_lite": LATENT, "granitemoeshared": MOE | {"num_local_experts": 4, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2}, "internlm3": {"head_dim": 8},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8}, "minicpm3": LATENT, "ministral": {"head_dim": 8},
    "nanochat": {}, "olmo3": {"sliding_window": WINDOW}, "olmoe": MOE | {"num_experts": 4}, "phi": {},
    "phimoe": MOE | {"num_local_experts": 4}, "qwen2_moe": MOE | {"num_experts": 4, "sliding_window": WINDOW},
    "solar_open": MOE | {"n_routed_experts": 4, "head_dim": 8}, "vaultgemma": {"head_dim": 8}, "youtu": LATENT,
}.items():  # fmt: skip
    OTHER_CONFIGS[_name] = lambda kind=_name, more=_more: AutoConfig.for_model(kind, **SHAPE | OWN_IDS | more)


def _build(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return FAMILIES[family]()
    lm = AutoModelForCausalLM.from_config(OTHER_CONFIGS[family]())
    name_body(lm)
    return lm


# ids that the models of `reasoner` often write
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
        lm = _build(family).to(dtype)
    if dtype == torch.float64:
        _norms_of_torch(lm)
    return Reasoner(lm.eval().requires_grad_(False), next_latent)


def _norms_of_torch(module: nn.Module) -> None:
    """Replace the RMS norms of transformers, which always compute in float32, by those of torch."""
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=child.weight.dtype))
        else:
            _norms_of_torch(child)


def proven(model: Any, longest: int = POSITIONS) -> Any:
    """A reasoner or LatentRM with the way in which the engine computes it right."""
    prove = prove_reasoner if isinstance(model, Reasoner) else prove_reward_model
    return replace(model, computation=prove(model, longest))


def plain_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy without the engine's attention (`sdpa`, since `eager` has a softmax in float32 for Llama)."""
    lm = copy.deepcopy(lm)
    try:
        lm.set_attn_implementation("sdpa")
    except ValueError:  # it caps scores
        lm.set_attn_implementation("eager")
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
        lm = _build(family).to(dtype)
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
