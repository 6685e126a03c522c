"""Finds, checks and reads checkpoint folders. Nothing here imports torch.

A checkpoint is a folder (or a hub id) in the usual transformers layout: `config.json`, `tokenizer.json` and
safetensors, whole or sharded. Pickles are never read here; `ltts convert` turns one into such a folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from latent_tts.checkpoint import gguf
from latent_tts.errors import UsageError, bad_value, hub_clients, is_whole, reason, require
from latent_tts.types import file_sha256

MODEL_KEY = "model.checkpoint"  # the config key that errors name, unless a caller says another
SHIPPED_PREFIX = "shipped:"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.bin")
ADAPTER = "adapter_config.json"  # of PEFT
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
BESIDE_TOKENIZER = ("tokenizer_config.json", CHAT_TEMPLATE)  # special tokens by name, and how chats are written
PICKLES = ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "checkpoint_*")
# the tensors that tell the families apart; without any of them, a checkpoint is COCONUT's, a plain causal LM
FAMILIES = {"projector.": "CODI", "lt_head.": "CoLaR", "prj.": "PCCoT", "classifier.": "LatentRM"}
# what `config.json` says of a backbone's shape, by the key of its width: GPT-2-like and Llama-like
SIZES = {
    "n_embd": ("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size"),
    "hidden_size": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "max_position_embeddings", "vocab_size"),
    ),
}
# the names of Llama-like sizes in other configs
OTHER_NAMES = {
    "hidden_size": ("d_model", "n_embed"),
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers", "decoder_layers"),
    "num_attention_heads": ("num_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "head_dim": ("kv_channels",),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "moe_intermediate_size"),
    "max_position_embeddings": ("max_seq_len", "seq_length", "model_max_length", "max_target_positions"),
}
# models whose config need not say how wide the inner layer is: four times the model, as transformers takes it
INNER_IS_FOUR_TIMES_WIDTH = ("gpt_neo", "bloom", "falcon", "gpt_neox_japanese", "mpt")
# how many experts a mixture has, and how many of them a token goes through
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k")
# layers whose memory of a sequence are keys and values of its tokens
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# models with another memory (recurrent states, convolutions), from which no latent could be taken back
RECURRENT = (
    *("mamba", "falcon_mamba", "rwkv", "jamba", "zamba", "bamba", "recurrent_gemma", "xlstm", "falcon_h1"),
    *("granitemoehybrid", "lfm2", "plamo2", "nemotron_h", "qwen3_next", "kimi_linear", "reformer", "zaya"),
)
# encoders, unless their config says `is_decoder`
BIDIRECTIONAL = (
    *("bert", "bert-generation", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert"),
    *("electra", "ernie", "data2vec-text", "megatron-bert", "rembert", "roformer", "big_bird", "roc_bert", "xmod"),
    "mobilebert",
)
PLAIN_DTYPES = ("F64", "F32", "BF16", "F16")
OPTIONAL_SIZES = {"n_head", "n_inner", "num_key_value_heads", "head_dim"}  # missing or null: transformers' own
LATENT_TOKENS = ("<|latent|>", "<|start-latent|>", "<|end-latent|>")
EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
# sizes in `config.json`, and the axis of a weight that must be as long (None: either, since GPT-2 and others transpose
# it), so that no model larger than its files is created
LIMITS = (
    ("vocab_size", EMBEDDINGS, 0),
    ("n_embd", ("wte.weight",), 1),
    ("n_positions", ("wpe.weight",), 0),
    ("n_inner", ("mlp.c_fc.weight",), None),
    ("n_head", ("attn.c_attn.weight",), 0),
    ("hidden_size", ("embed_tokens.weight", "embed_in.weight"), 1),
    ("intermediate_size", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
    ("num_attention_heads", ("self_attn.q_proj.weight",), 0),
    ("num_key_value_heads", ("self_attn.k_proj.weight",), 0),
    ("head_dim", ("self_attn.q_proj.weight",), 0),
)
NARROW_EMBEDDINGS = ("word_embed_proj_dim", "embedding_size")  # of models whose embedding is narrower than their blocks
LAYER = re.compile(r"(?:^|\.)(?:h|layers?|blocks?)\.(\d+)\.")
# implementations in transformers itself; for any other name it would fetch code from the hub
IMPLEMENTATIONS = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"),
    *("grouped_mm", "batched_mm"),
)
# settings that transformers would follow, and why they are refused
REFUSED = {
    "quantization_config": ": its weights are quantized, which is not supported; use a checkpoint of plain weights, "
    "which engine.quantize quantizes",
    "transformers_weights": f"; the weights must be {WEIGHTS} or the shards of {INDEX}",
}
MAX_LABELS = 1 << 20
TRAINING_LAYOUTS = {"base_causallm": "COCONUT", "codi": "CODI"}  # by the first part of their tensors' names


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which replaces `folder` when the block ends well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def resolve(checkpoint: str, revision: str | None = None, *, key: str = MODEL_KEY) -> Path:
    """The local folder of a checkpoint.

    Args:
        checkpoint: a folder, `shipped:NAME` for one inside the package, `gguf:FILE` for a GGUF file, or a hub id such
            as `owner/name`.
        revision: a commit or tag of the hub id.
        key: the config key that errors name.

    Raises:
        UsageError: there is no such folder, and nothing can be fetched.
    """
    if checkpoint.startswith(SHIPPED_PREFIX):
        name = checkpoint.removeprefix(SHIPPED_PREFIX)
        folder = Path(str(files("latent_tts"))) / "weights" / name
        if not folder.is_dir():
            shipped = sorted(p.name for p in folder.parent.iterdir() if p.is_dir() and p.name[0] not in "._")
            raise bad_value(key, checkpoint, f"no such built-in checkpoint; one of {', '.join(shipped)}")
        return folder
    if checkpoint.startswith(gguf.PREFIX):
        return gguf.convert_once(gguf.find_file(checkpoint, key), key)
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    require(key, checkpoint, not folder.is_file(), f"must be a folder; {convert_hint(folder, key)}")
    require(
        key,
        checkpoint,
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)) and not checkpoint.startswith("."),
        "no such folder, and not a hub id of the form owner/name",
    )
    from huggingface_hub import snapshot_download  # slow to import, and only hub ids need it

    try:
        with hub_clients():
            return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=WANTED_FILES))
    except Exception as error:  # the hub client raises many kinds of errors; all mean that the download failed
        raise UsageError(
            f"{key}={checkpoint}: no such folder, and the download from the hub failed ({reason(error)[:160]})\n"
            f"fetch it where there is a network (`hf download {checkpoint} --local-dir FOLDER`), "
            f"then {key}=FOLDER"
        ) from error


def convert_hint(path: Path, key: str = MODEL_KEY) -> str:
    """What to do with a checkpoint that is not in the layout of transformers."""
    return f"`ltts convert {path} NEW_FOLDER` rewrites it once, then {key}=NEW_FOLDER"


def read_json(folder: Path, name: str, *, key: str = MODEL_KEY) -> dict[str, Any]:
    """A JSON file of a checkpoint folder, as a dict."""
    path = folder / name
    require(key, folder, path.is_file(), f"the folder lacks {name}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise bad_value(key, folder, f"{name} is not JSON ({error})") from error
    require(key, folder, isinstance(content, dict), f"{name} does not hold an object")
    return content


def is_empty_json(path: Path) -> bool:
    """Whether a file holds nothing, or an object without keys, as some published `config.json` do."""
    return re.fullmatch(rb"\s*(\{\s*\})?\s*", path.read_bytes()) is not None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config of a checkpoint.

    Raises:
        UsageError: it is missing, empty or no JSON object.
    """
    empty = (folder / name).is_file() and is_empty_json(folder / name)
    require(MODEL_KEY, folder, not empty, f"{name} is empty; copy the config.json of the model that was fine-tuned")
    return read_json(folder, name)


def common_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its sizes under the names that most configs use."""
    text = config.get("text_config")  # of a model that sees, too
    config = {**config, **text} if isinstance(text, Mapping) else dict(config)
    if "n_embd" in config:
        return config
    named = {
        name: next((config[other] for other in others if other in config), None) for name, others in OTHER_NAMES.items()
    }
    common = {name: value for name, value in named.items() if value is not None} | config
    kind, width = config.get("model_type"), common.get("hidden_size")
    if common.get("intermediate_size") is None and kind in INNER_IS_FOUR_TIMES_WIDTH and is_whole(width):
        common["intermediate_size"] = 4 * width
    if kind == "bloom":  # attention scores fall with distance, and no limit is named
        common.setdefault("max_position_embeddings", 1 << 20)
    return common


def sizes(config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """`common_sizes` of a checkpoint and, as `block_weights`, the matrix entries of a block that a token goes through.

    Args:
        config: the checkpoint's `config.json`.
        shapes: of its tensors.
    """
    common = common_sizes(config)
    experts = next((common[name] for name in EXPERTS if is_whole(common.get(name))), 0)
    chosen = next((common[name] for name in CHOSEN_EXPERTS if is_whole(common.get(name))), experts)
    blocks: dict[str, float] = {}
    for name, shape in shapes.items():
        found = LAYER.search(name)
        if found is None or len(shape) not in (2, 3) or name.endswith("bias"):
            continue
        in_expert = re.search(r"(?:^|\.)experts\.", name) or (len(shape) == 3 and shape[0] == experts)
        blocks[found[1]] = blocks.get(found[1], 0.0) + math.prod(shape) * (
            chosen / experts if experts and in_expert else 1.0
        )
    return common | ({"block_weights": sum(blocks.values()) / len(blocks)} if blocks else {})


def check_decoder(config: Mapping[str, Any], folder: Path, *, key: str = MODEL_KEY) -> None:
    """Check that a backbone is a decoder whose memory, keys and values of its tokens, can be rewound and forked.

    Raises:
        UsageError: it has an encoder, or another kind of memory.
    """
    config = common_sizes(config)
    kind, why = str(config.get("model_type", "")), "latents are fed to decoders made of attention"
    layers = config.get("layer_types") or []
    other = sorted({str(layer) for layer in layers} - ATTENTION_LAYERS) if isinstance(layers, list) else []
    state = f" ({', '.join(other)})" if other else ""
    queries, keys = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    wrong = {
        f"a {kind} model has an encoder; {why}": config.get("is_encoder_decoder"),
        f"in a {kind} model tokens attend to those after them; {why}": (
            kind in BIDIRECTIONAL and not config.get("is_decoder")
        ),
        f"a {kind} model keeps no keys and values of earlier tokens; {why}": (
            kind in ("openai-gpt", "xlnet", "xlm", "flaubert")  # in transformers
        ),
        f"in a {kind} model every layer looks a token's id up; latents have none": (
            config.get("hidden_size_per_layer_input") and config.get("vocab_size_per_layer_input")
        ),
        f"config.json has num_key_value_heads={keys}, must be {queries}: with kv_lora_rank, keys have as many heads as "
        "queries": config.get("kv_lora_rank") and None not in (queries, keys) and queries != keys,
        f"a {kind} model keeps another memory than keys and values{state}, as a running state, which cannot be rewound "
        f"or forked; {why}": other or kind.startswith(RECURRENT),
    }
    for refusal, holds in wrong.items():
        require(key, folder, not holds, refusal)


def check_sizes(config: Mapping[str, Any], folder: Path, *, key: str = MODEL_KEY) -> None:
    """Check that a backbone can be run, and that its `config.json` has its sizes.

    Raises:
        UsageError: it cannot be run, it asks for code from elsewhere, or a size is missing or not a whole number.
    """
    check_settings(config, folder, key=key)
    check_decoder(config, folder, key=key)
    config = common_sizes(config)
    names = next((names for width, names in SIZES.items() if width in config), ())
    require(key, folder, bool(names), f"config.json has no {' or '.join(SIZES)}")
    for name in names:
        value, least = config.get(name), 0 if name.endswith(("layer", "layers")) else 1
        ok = (is_whole(value) and value >= least) or (value is None and name in OPTIONAL_SIZES)
        found = f"{name}={json.dumps(value)}" if name in config else f"no {name}"
        require(key, folder, ok, f"config.json has {found}; must be an integer, {least} or more")


def check_settings(config: Any, folder: Path, *, key: str = MODEL_KEY) -> None:
    """Check that a `config.json` asks for no code or weights from elsewhere and no quantised ones, at any depth.

    `auto_map`, which names code in the checkpoint, is left alone: it is never run. So are the names of transformers'
    own attention, which `loading` does not hand on.

    Raises:
        UsageError: it does.
    """
    if isinstance(config, list):
        for part in config:
            check_settings(part, folder, key=key)
    if not isinstance(config, Mapping):
        return
    for name, value in config.items():
        require(key, folder, name not in REFUSED or value is None, f"config.json has {name}{REFUSED.get(name)}")
        if name.endswith(("attn_implementation", "attn_implementation_internal")) or "experts_implementation" in name:
            for one in value.values() if isinstance(value, Mapping) else [value]:
                why = f"{name}={json.dumps(one)}: none of {', '.join(IMPLEMENTATIONS)}; code from a hub is never run"
                require(key, folder, one is None or one in IMPLEMENTATIONS, f"config.json has {why}")
        many = name == "num_labels" and is_whole(value) and value > MAX_LABELS  # transformers makes a name for each
        require(key, folder, not many, f"config.json has {name}={value}; must be {MAX_LABELS} at most")
        check_settings(value, folder, key=key)


def check_shapes(
    config: Mapping[str, Any], shapes: Mapping[str, list[int]], folder: Path, *, key: str = MODEL_KEY
) -> None:
    """Check that a `config.json` does not describe a larger model than the weights.

    Raises:
        UsageError: it has more layers, or a larger size.
    """
    config = common_sizes(config)
    name = "n_layer" if "n_embd" in config else "num_hidden_layers"
    layers = len({found[1] for tensor in shapes if (found := LAYER.search(tensor))})
    depth = config.get(name)
    require(
        key,
        folder,
        not is_whole(depth) or depth <= layers,
        f"config.json has {name}={depth}, the weights have {layers} layers",
    )
    for name, suffixes, axis in LIMITS:
        value, found = config.get(name), next((t for t in shapes if t.endswith(suffixes)), None)
        if found is None or not is_whole(value) or (axis == 1 and any(other in config for other in NARROW_EMBEDDINGS)):
            continue
        require(
            key,
            folder,
            len(shapes[found]) == 2 and value <= (max(shapes[found]) if axis is None else shapes[found][axis]),
            f"config.json has {name}={value}, but {found} is {shapes[found]}",
        )


def weight_files(folder: Path, *, key: str = MODEL_KEY) -> list[Path]:
    """The safetensors files of a checkpoint, in order. Each is whole, and shards hold the tensors that the index lists.

    Raises:
        UsageError: there are none, one is missing or cut off, there is only a pickle, or an adapter is beside them:
            transformers would load the model that it names.
    """
    require(key, folder, not (folder / ADAPTER).is_file(), f"holds an adapter ({ADAPTER}); {convert_hint(folder, key)}")
    shards: dict[str, set[str]] = {}
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():  # the order of transformers
        shards[WEIGHTS] = set()
    else:
        weight_map = read_json(folder, INDEX, key=key).get("weight_map", {})
        require(key, folder, isinstance(weight_map, dict) and bool(weight_map), f"{INDEX} has no weight_map")
        for tensor, name in sorted(weight_map.items(), key=lambda item: (str(item[1]), item[0])):
            require(
                key,
                folder,
                isinstance(name, str) and Path(name).name == name,
                f"{INDEX} names {name!r}, which is no file of the folder",
            )
            shards.setdefault(name, set()).add(tensor)
    for name, tensors in shards.items():
        path = folder / name
        if not path.is_file():
            found = (each for pattern in PICKLES for each in sorted(folder.glob(pattern)) if each.is_file())
            pickle = next(found, None)
            whole = pickle is None or PICKLE_SHARD.fullmatch(pickle.name)
            hint = convert_hint(folder if whole else pickle, key) if pickle else "no pickle either"
            raise bad_value(key, folder, f"the folder lacks {name}; {hint}")
        lacking = min(tensors - set(tensor_shapes(path, key=key)), default=None)
        require(key, path, lacking is None, f"lacks the tensor {lacking}, which {INDEX} lists for this file")
    return [folder / name for name in shards]


def weight_shapes(folder: Path, *, key: str = MODEL_KEY) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a checkpoint, from the files' headers; raises as `weight_files` does."""
    paths = weight_files(folder, key=key)
    return {name: shape for path in paths for name, shape in tensor_shapes(path, key=key).items()}


def family(names: Iterable[str]) -> tuple[str, str]:
    """The family of a checkpoint in transformers' layout, and what marks it, as in `projector.*` (empty: nothing)."""
    own = {prefix for name in names for prefix in FAMILIES if name.startswith(prefix)}
    return next(((family, f"{prefix}*") for prefix, family in FAMILIES.items() if prefix in own), ("COCONUT", ""))


def training_layout(names: Iterable[str]) -> str | None:
    """The family whose training code named these tensors, None for transformers' own names."""
    starts = {name.partition(".")[0] for name in names}
    return next((layout for start, layout in TRAINING_LAYOUTS.items() if start in starts), None)


def tensor_shapes(path: Path, *, key: str = MODEL_KEY) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file, from its header.

    Raises:
        UsageError: the file is not as long as it says, or has weights that are no plain numbers.
    """
    try:
        with safe_open(path, "np") as file:
            found = {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: tensor.get_dtype() for name, tensor in found.items()}
            shapes = {name: list(tensor.get_shape()) for name, tensor in found.items()}
    except (SafetensorError, OSError) as error:
        raise bad_value(key, path, f"truncated or not safetensors ({error})") from error
    for name, kind in kinds.items():  # masks and counters may be integers
        require(
            key,
            path,
            not name.endswith("weight") or kind in PLAIN_DTYPES,
            f"{name} is {kind}, must be one of {', '.join(PLAIN_DTYPES)}; use a checkpoint of plain weights",
        )
    return shapes


digested: dict[str, Path] = {}  # checkpoint folders that this process has read, by their digests


def digest(folder: Path) -> str:
    """16 hex digits that stand for the weights, the shape and the tokenizer of a checkpoint."""
    paths = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    found = hashlib.sha256(b"".join(map(file_sha256, paths))).hexdigest()[:16]
    digested[found] = folder
    return found


def load_tokenizer(folder: Path, *, key: str = MODEL_KEY) -> Tokenizer:
    """The fast tokenizer of a checkpoint, without transformers."""
    path = folder / "tokenizer.json"
    require(key, folder, path.is_file(), "the folder lacks tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise bad_value(key, folder, f"tokenizer.json cannot be read ({error})") from error
    tokenizer.no_padding()  # a tokenizer keeps what it was last used with in training
    tokenizer.no_truncation()
    return tokenizer


def copy_beside_tokenizer(source: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside `tokenizer.json`, on which prompts and end tokens depend."""
    for name in BESIDE_TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def is_token(token: Any, tokenizer: Tokenizer) -> TypeGuard[int]:
    """Whether a value is the id of a token."""
    return is_whole(token) and 0 <= token < 1 << 31 and tokenizer.id_to_token(token) is not None


def special_ids(kind: str, folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of a kind of special token (`eos`, `pad`) by the file that names them, without those of no token."""

    def ids_of(settings: Mapping[str, Any]) -> list[int]:
        value = settings.get(f"{kind}_token_id")
        return [token for token in (value if isinstance(value, list) else [value]) if is_token(token, tokenizer)]

    text = _token_text(_read_optional(folder, "tokenizer_config.json").get(f"{kind}_token"))
    of_tokenizer = None if text is None else tokenizer.token_to_id(text)
    return {
        "config.json": ids_of(config),
        "generation_config.json": ids_of(_read_optional(folder, "generation_config.json")),
        "tokenizer_config.json": [] if of_tokenizer is None else [of_tokenizer],
    }


def tokens_around(folder: Path, tokenizer: Tokenizer) -> dict[str, bool]:
    """What `tokenizer_config.json` says of tokens before and after a text, where `tokenizer.json` does otherwise."""
    config, mask = _read_optional(folder, "tokenizer_config.json"), tokenizer.encode("1").special_tokens_mask
    added = {"bos_token": bool(mask and mask[0]), "eos_token": bool(mask and mask[-1] and not all(mask))}
    return {
        f"add_{name}": not adds
        for name, adds in added.items()
        if config.get(f"add_{name}") is (not adds)
        and tokenizer.token_to_id(_token_text(config.get(name)) or "") is not None
    }


def chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """A checkpoint's Jinja template of chats (None if it has none), and the special tokens that it may name."""
    config = _read_optional(folder, "tokenizer_config.json")
    tokens = {name: text for name in SPECIAL if (text := _token_text(config.get(name))) is not None}
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8"), tokens
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None, tokens


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file that a checkpoint may lack; raises UsageError if it is damaged."""
    return read_json(folder, name) if (folder / name).is_file() else {}


def _token_text(token: Any) -> str | None:
    """The text of a special token in `tokenizer_config.json`; None if it is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def check_vocabulary(
    tokenizer: Tokenizer, shapes: Mapping[str, list[int]], config: Mapping[str, Any], folder: Path
) -> None:
    """Check that every id of a tokenizer has a row in the embedding.

    Raises:
        UsageError: an id has none.
    """
    rows = next(
        (shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS)), common_sizes(config)["vocab_size"]
    )
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    token = min(beyond, key=lambda name: (name not in LATENT_TOKENS, beyond[name]), default="")
    why = f"its tokenizer gives {token} the id {beyond.get(token)}, the embedding has {rows} rows"
    require(MODEL_KEY, folder, not beyond, f"{why} (was resize_token_embeddings forgotten?)")


def token_id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    """The id of a special token, by name.

    Raises:
        UsageError: the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise bad_value(
            MODEL_KEY, folder, f"its tokenizer has no token {token}; the checkpoint may belong to another model family"
        )
    return found
