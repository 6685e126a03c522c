"""A tiny Llama in a GGUF file, as llama.cpp writes one, and the model of transformers with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

WIDTH, LAYERS, HEADS, GROUPS, INNER, POSITIONS = 32, 2, 4, 2, 64, 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ċ Ċ", "h e", "Ġ a"]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def tokenizer() -> Tokenizer:
    """The tokenizer without a file."""
    ids = {token: place for place, token in enumerate(vocabulary())}
    made = Tokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in MERGES]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": partial(Qwen3Config, head_dim=128)}


def model(seed: int = 0, *, tied: bool = True, architecture: str = "llama") -> PreTrainedModel:
    config = CONFIGS[architecture](
        vocab_size=len(vocabulary()), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config).eval()
        for name, value in lm.named_parameters():
            if name.endswith(".bias"):  # zeros otherwise
                torch.nn.init.normal_(value)
        return lm


def write(
    file: Path,
    lm: PreTrainedModel,
    *,
    architecture: str = "llama",
    splitting: str = "smollm",
    chat: str | None = CHAT,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str | None = None,
    rotated: int | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a model with a byte-level tokenizer; matrices of the blocks are quantised to `kind`, one is left out.

    `rotated` is the width that positions rotate, of the head's; `more` adds to the file what it likes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    width = 128 if architecture == "qwen3" else WIDTH // HEADS  # of a head
    writer.add_rope_dimension_count(rotated or width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(vocabulary())
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if chat is not None:
        writer.add_chat_template(chat)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = {name: value.float().numpy() for name, value in lm.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not lm.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for layer in range(LAYERS):
        for name, other in names.items():
            if f"model.layers.{layer}.{name}.bias" in state:
                tensors[f"blk.{layer}.{other}.bias"] = state[f"model.layers.{layer}.{name}.bias"]
            value = state.get(f"model.layers.{layer}.{name}.weight")
            if value is None or f"blk.{layer}.{other}.weight" == without:
                continue
            if other in ("attn_q", "attn_k") and architecture == "llama":
                value = _interleaved(value, HEADS if other == "attn_q" else GROUPS)
            tensors[f"blk.{layer}.{other}.weight"] = value
    for name, value in tensors.items():
        if name.startswith("blk.") and value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a projection in the order in which llama.cpp rotates them."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
