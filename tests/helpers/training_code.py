"""Tiny random models in the layouts of training codes, and a plain computation of their rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from latent_tts.types import Question

FIXTURE = Path(__file__).parents[1] / "parity" / "coconut" / "tokenizer.json"
VOCABULARY, ROWS, WIDTH = 600, 603, 32
LATENTS, ANSWER = 3, 4
QUESTION = Question(id="q", text="A robe takes 2 bolts of blue fiber. How many?", answer="2")


def backbone(kind: str, *, rows: int = ROWS, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            shape = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
            return GPT2LMHeadModel(GPT2Config(vocab_size=rows, bos_token_id=0, eos_token_id=0, **shape)).eval()
        config = LlamaConfig(
            vocab_size=rows, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=0,
            eos_token_id=[0, 5], pad_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.inference_mode()
def plain_rollout(lm: PreTrainedModel, prompt: list[int], end: int, next_latent: Callable) -> tuple[Tensor, list[int]]:
    """Latents and greedy answer ids; the whole sequence is run for every new vector."""
    embed = lm.get_input_embeddings()
    sequence_SD = embed(torch.tensor(prompt))
    latents, answer = [], []
    for _ in range(LATENTS):
        hidden = lm(inputs_embeds=sequence_SD[None], output_hidden_states=True, use_cache=False).hidden_states[-1]
        latents.append(next_latent(hidden[0, -1]))
        sequence_SD = torch.cat([sequence_SD, latents[-1][None]])
    sequence_SD = torch.cat([sequence_SD, embed(torch.tensor([end]))])
    while len(answer) < ANSWER:
        token = int(lm(inputs_embeds=sequence_SD[None], use_cache=False).logits[0, -1].argmax())
        if token == 0:
            break
        answer.append(token)
        sequence_SD = torch.cat([sequence_SD, embed(torch.tensor([token]))])
    return torch.stack(latents), answer
