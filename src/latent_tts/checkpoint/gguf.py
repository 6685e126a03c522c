"""Models in GGUF files, rewritten once as checkpoint folders, which are kept beside the cache of rollouts.

The folder's name holds the digest of the file: a second start finds the folder, and a changed file is another model.
Weights are dequantised to float32, since products of two half-precision numbers are not exact in a shorter dtype.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latent_tts.errors import RunError, UsageError, bad_value, is_whole, require
from latent_tts.types import file_digest

log = logging.getLogger(__name__)
PREFIX = "gguf:"
VERSION = 3  # of what conversion writes; part of the folder's name
PARTIAL, SOURCE = "partial-", "source.json"  # a folder that is being written; what a model was made from
DAMAGED = ".damaged"  # how the name of a kept model ends that is not what was written
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # decoders that transformers reads and the engine runs
# What transformers reads of such a file, apart from the tokenizer; it drops any other field or weight without a word.
FIELDS_READ = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base",
    "rope.dimension_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length",
}  # fmt: skip
# values with which a field that is dropped changes nothing
NEUTRAL = {"rope.scaling.type": "none", "attention.causal": True, "expert_count": 0, "expert_used_count": 0}
SPLITTING = "tokenizer.ggml.pre"  # the only one of the tokenizer that is read here
TENSOR_FIELDS = {"tensor_data_layout", "rope.scaling.finetuned"}  # how the file was made
HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
WEIGHTS_READ = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(norm|q|k|v|output|q_norm|k_norm)|ffn_(norm|gate|up|down)))\.weight"
)
BIASES_READ = {"qwen2": re.compile(r"blk\.\d+\.attn_[qkv]\.bias")}
# Files that a command of this project fetches
FETCHED = {"SmolLM2-135M-Instruct.Q4_1.gguf": "make smollm2"}
# How llama.cpp splits texts before merging: what it names, and whether each digit stands alone. transformers reads
# merges and vocabulary, not this. Source: `llm_tokenizer_bpe` of llama.cpp's src/llama-vocab.cpp.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
SPLITTINGS_OF_TRANSFORMERS = {"default", "gpt-2", "qwen2", "llama-bpe"}


def models_folder() -> Path:
    """Where fetched and converted models are kept: `models` in the cache folder."""
    return Path(os.environ.get("LTTS_CACHE") or ".cache/latent_tts").expanduser() / "models"


def find_file(checkpoint: str, key: str) -> Path:
    """The file that `gguf:FILE` names; a name without a folder is also looked for among fetched models.

    Raises:
        UsageError: there is no such file.
    """
    name = Path(checkpoint.removeprefix(PREFIX)).expanduser()
    fetched = models_folder() / name.name
    file = fetched if not name.is_file() and name.name == str(name) else name
    if not file.is_file():
        hint = f"; `{FETCHED[file.name]}` fetches it" if file.name in FETCHED else ""
        raise bad_value(key, checkpoint, f"no such file{hint}")
    return file


def convert_once(file: Path, key: str) -> Path:
    """The checkpoint folder of a GGUF file, which is made at the first call (imports torch and transformers).

    Args:
        file: the GGUF file.
        key: the config key that errors name.

    Raises:
        UsageError: the file is damaged, or of an architecture that is not supported.
    """
    folder = models_folder() / f"gguf{VERSION}-{file_digest(file)}"
    set_truncated_aside(folder)
    if not folder.is_dir():
        require(
            key,
            f"{PREFIX}{file}",
            find_spec("gguf") is not None,
            "gguf is not installed: pip install '.[gguf]' in the clone",
        )
        splitting = check(file, key)
        log.info("%s: converting it, once, to %s", file, folder)
        with kept_folder(folder, str(file)) as partial:
            convert(file, partial, splitting, key)
    note_use(folder)
    return folder


@contextlib.contextmanager
def kept_folder(folder: Path, source: str) -> Iterator[Path]:
    """A folder to write into, which gets its name once everything is written; a failure leaves nothing.

    Args:
        folder: the name.
        source: what the model in it is made from, for `ltts cache`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=PARTIAL))
    try:
        yield partial
        paths = sorted(path for path in partial.iterdir() if path.is_file())
        written = {path.name: (path.stat().st_size, file_digest(path)) for path in paths}
        (partial / SOURCE).write_text(json.dumps({"from": source, "files": written}) + "\n")
        partial.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def set_truncated_aside(folder: Path) -> None:
    """Set a kept model aside, with a warning, if a file of it is missing or has another size than was written."""
    for name, (size, _) in _written(folder).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            log.warning("%s is damaged: its folder is now %s, and it is made anew", path, _set_aside(folder).name)
            return


def check_kept(folder: Path, known: Mapping[str, str]) -> None:
    """Check that a kept model is what was written; a damaged one is set aside. Other folders are left alone.

    Args:
        folder: of a checkpoint.
        known: digests of some of its files, as they are now.

    Raises:
        RunError: it is damaged.
    """
    written = _written(folder) if folder.parent == models_folder() else {}
    for name, (_, wanted) in written.items():
        path = folder / name
        if (known.get(name) or (file_digest(path) if path.is_file() else None)) != wanted:
            aside = _set_aside(folder).name
            raise RunError(f"{path} is damaged: its folder is now {aside}; re-run the command to make it anew")


def _written(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of each file of a kept model as it was written; those of earlier versions do not say."""
    try:
        files = json.loads((folder / SOURCE).read_text())["files"]
        return {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}{DAMAGED}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process was first
        folder.rename(aside)
    return aside


def note_use(folder: Path) -> None:
    """Say that a kept model was used now, by the time of its folder."""
    with contextlib.suppress(OSError):  # a cache that others own
        os.utime(folder)


def check(file: Path, key: str) -> str | None:
    """Check the header of a GGUF file; returns how texts are split before merging, if it says so.

    Raises:
        UsageError: it is damaged, of an architecture that is not supported, or has a field or weight that transformers
            drops, so that another model would be computed.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        wanted = (name for name in reader.fields if not name.startswith("tokenizer.") or name == SPLITTING)
        fields = {name: reader.fields[name].contents() for name in wanted}
        weights = [tensor.name for tensor in reader.tensors]
    except (ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise bad_value(key, f"{PREFIX}{file}", f"truncated or not GGUF ({reason})") from error
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        allowed = f"must be one of {', '.join(ARCHITECTURES)}"
        raise bad_value(key, f"{PREFIX}{file}", f"is a GGUF file of the architecture {architecture}; {allowed}")
    start = f"{architecture}."
    own = {name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}
    dropped = [
        f"{start}{name}={own[name]}"
        for name in own.keys() - FIELDS_READ - TENSOR_FIELDS
        if own[name] != NEUTRAL.get(name)
    ]
    if len({own[name] for name in HEAD_WIDTHS if name in own}) > 1:
        dropped.append(" ".join(f"{start}{name}={own[name]}" for name in HEAD_WIDTHS if name in own))
    biases = BIASES_READ.get(architecture)
    dropped += [
        f"the weight {name}"
        for name in weights
        if not (WEIGHTS_READ.fullmatch(name) or (biases and biases.fullmatch(name)))
    ]
    if dropped:
        reason = f"transformers does not read {min(dropped)}, so this would be another model"
        raise bad_value(key, f"{PREFIX}{file}", f"{reason}; name the folder of the original")
    return fields.get(SPLITTING)


def convert(file: Path, folder: Path, splitting: str | None, key: str) -> None:
    """Write a checkpoint folder with the weights (float32), tokenizer and chat template of a GGUF file.

    Args:
        file: the GGUF file.
        folder: to write to.
        splitting: how texts are split before merging, see `check`.
        key: the config key that errors name.

    Raises:
        UsageError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where, name = str(file.resolve().parent), file.name
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that `disable_progress_bar` does not reach
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise bad_value(key, f"{PREFIX}{file}", f"transformers cannot read it: {reason}") from error
    lm, info = loaded
    if info["missing_keys"]:
        raise bad_value(key, f"{PREFIX}{file}", f"lacks the weight {min(info['missing_keys'])}")
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
    _write_splitting(folder / "tokenizer.json", splitting, file)


def _write_splitting(path: Path, splitting: str | None, file: Path) -> None:
    """Write into a tokenizer how texts are split before merging, where transformers goes by the architecture alone."""
    if splitting in SINGLE_DIGITS:
        content = json.loads(path.read_text())
        own = content["pre_tokenizer"]
        parts = [part for part in own.get("pretokenizers", [own]) if part.get("type") == "ByteLevel"]
        if not parts:
            raise UsageError(f"{PREFIX}{file}: a tokenizer of the kind {splitting} without byte-level tokens")
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, {**parts[0], "use_regex": True}]}
        content["normalizer"] = None  # early versions of transformers 5 give some architectures one
        path.write_text(json.dumps(content, ensure_ascii=False))
    elif splitting is not None and splitting not in SPLITTINGS_OF_TRANSFORMERS:
        log.warning("%s: texts are split as transformers does; the file asks for %r", file, splitting)
