"""Models in GGUF files, rewritten once as checkpoint folders, which are kept beside the cache of rollouts.

Weights are dequantised to float32, since products of two half-precision numbers are not exact in a shorter dtype.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latent_tts.checkpoint.model_cache import make_once, models_folder
from latent_tts.errors import UsageError, bad_value, is_whole, require
from latent_tts.types import file_digest

log = logging.getLogger(__name__)
PREFIX = "gguf:"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # decoders that transformers reads and the engine runs
# What transformers reads of such a file, apart from the tokenizer; it drops any other field or weight without a word.
FIELDS_READ = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base",
    "rope.dimension_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length",
    "tensor_data_layout", "rope.scaling.finetuned",  # how the file was made
}  # fmt: skip
# values with which a field that is dropped changes nothing
NEUTRAL = {"rope.scaling.type": "none", "attention.causal": True, "expert_count": 0, "expert_used_count": 0}
SPLITTING = "tokenizer.ggml.pre"  # the only one of the tokenizer that is read here
HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
WEIGHTS_READ = (
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|(q_|k_)?norm)|ffn_(norm|gate|up|down)))\.weight"
)
BIASES_READ = r"blk\.\d+\.attn_[qkv]\.bias"  # of qwen2
# Files that a command of this project fetches
FETCHED = {"SmolLM2-135M-Instruct.Q4_1.gguf": "make smollm2"}
# How llama.cpp splits texts before merging: what it names, and whether each digit stands alone. transformers reads
# merges and vocabulary, not this. Source: `llm_tokenizer_bpe` of llama.cpp's src/llama-vocab.cpp.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
SPLITTINGS_OF_TRANSFORMERS = {"default", "gpt-2", "qwen2", "llama-bpe"}


def find_file(checkpoint: str, key: str) -> Path:
    """The file that `gguf:FILE` names; a name without a folder is also looked for among fetched models.

    Raises:
        UsageError: there is no such file.
    """
    name = Path(checkpoint.removeprefix(PREFIX)).expanduser()
    fetched = models_folder() / name.name
    file = fetched if not name.is_file() and name.name == str(name) else name
    hint = f"; `{FETCHED[file.name]}` fetches it" if file.name in FETCHED else ""
    require(key, checkpoint, file.is_file(), f"no such file{hint}")
    return file


def convert_once(file: Path, key: str) -> Path:
    """The checkpoint folder of a GGUF file, which is made at the first call (imports torch and transformers).

    Args:
        file: the GGUF file.
        key: the config key that errors name.

    Raises:
        UsageError: the file is damaged, or of an architecture that is not supported.
    """
    return make_once("gguf", file_digest(file), str(file), lambda new: convert(file, new, key))


def check(file: Path, key: str) -> str | None:
    """Check the header of a GGUF file; returns how texts are split before merging, if it says so.

    Raises:
        UsageError: gguf is not installed, or the file is damaged, of an architecture that is not supported, or has a
            field or weight that transformers drops, so that another model would be computed.
    """
    require(
        key,
        f"{PREFIX}{file}",
        find_spec("gguf") is not None,
        "gguf is not installed: pip install '.[gguf]' in the clone",
    )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        wanted = (name for name in reader.fields if not name.startswith("tokenizer.") or name == SPLITTING)
        fields = {name: reader.fields[name].contents() for name in wanted}
        weights = [tensor.name for tensor in reader.tensors]
    except (ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError) as error:
        raise bad_value(
            key, f"{PREFIX}{file}", f"truncated or not GGUF ({' '.join(str(error).split())[:120]})"
        ) from error
    architecture = fields.get("general.architecture")
    require(
        key,
        f"{PREFIX}{file}",
        architecture in ARCHITECTURES,
        f"is a GGUF file of the architecture {architecture}; must be one of {', '.join(ARCHITECTURES)}",
    )
    start = f"{architecture}."
    own = {name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}
    dropped = [f"{start}{name}={own[name]}" for name in own.keys() - FIELDS_READ if own[name] != NEUTRAL.get(name)]
    if len({own[name] for name in HEAD_WIDTHS if name in own}) > 1:
        dropped.append(" ".join(f"{start}{name}={own[name]}" for name in HEAD_WIDTHS if name in own))
    read = re.compile(rf"{WEIGHTS_READ}|{BIASES_READ}" if architecture == "qwen2" else WEIGHTS_READ)
    dropped += [f"the weight {name}" for name in weights if not read.fullmatch(name)]
    why = f"transformers does not read {min(dropped, default='')}, so this would be another model"
    require(key, f"{PREFIX}{file}", not dropped, f"{why}; name the folder of the original")
    return fields.get(SPLITTING)


def convert(file: Path, folder: Path, key: str) -> None:
    """Write a checkpoint folder with the weights (float32), tokenizer and chat template of a GGUF file.

    Args:
        file: the GGUF file.
        folder: to write to.
        key: the config key that errors name.

    Raises:
        UsageError: as `check`, or transformers cannot read the file.
    """
    splitting = check(file, key)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that `disable_progress_bar` does not reach
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.resolve().parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(file.resolve().parent, gguf_file=file.name)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise bad_value(
            key, f"{PREFIX}{file}", f"transformers cannot read it: {' '.join(str(error).split())[:200]}"
        ) from error
    lm, info = loaded
    missing = min(info["missing_keys"], default=None)
    require(key, f"{PREFIX}{file}", missing is None, f"lacks the weight {missing}")
    del lm.config.quantization_config  # the weights are plain now, and with a record `save_pretrained` refuses
    lm.hf_quantizer = None
    lm.is_quantized = False
    lm.save_pretrained(folder)
    for name in ("bos", "eos", "pad"):  # transformers 5.17 gives the tokenizer others than the file has
        token = getattr(lm.config, f"{name}_token_id")
        tokenizer.init_kwargs.pop(f"{name}_token_id", None)
        if is_whole(token) and 0 <= token < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    tokenizer.save_pretrained(folder)
    if splitting in SINGLE_DIGITS:
        _split_digits(folder / "tokenizer.json", file, splitting)
    elif splitting is not None and splitting not in SPLITTINGS_OF_TRANSFORMERS:
        log.warning("%s: texts are split as transformers does; the file asks for %r", file, splitting)


def _split_digits(path: Path, file: Path, splitting: str | None) -> None:
    """Let digits stand alone in a tokenizer, where transformers goes by the architecture alone."""
    content = json.loads(path.read_text())
    own = content["pre_tokenizer"]
    parts = [part for part in own.get("pretokenizers", [own]) if part.get("type") == "ByteLevel"]
    if not parts:
        raise UsageError(f"{PREFIX}{file}: a tokenizer of the kind {splitting} without byte-level tokens")
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, {**parts[0], "use_regex": True}]}
    content["normalizer"] = None  # early versions of transformers 5 give some architectures one
    path.write_text(json.dumps(content, ensure_ascii=False))
