"""Vocabularies that grow or are cut: the same tokens for the texts that count, the same logits for tokens that stay."""

import pytest
import tiny_gguf
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from latent_tts.checkpoint import files
from latent_tts.checkpoint.vocabulary import cut_to, with_tokens
from latent_tts.errors import UsageError
from latent_tts.training.reasoner.initial import copy_checkpoint

TEXTS = ["the  heads of a", "12 + 30"]
OTHERS = ["é ☕\n\n  he", "Ġ Ċ", "<|im_end|> a"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LTTS_CACHE", str(tmp_path / "cache"))
    return lambda tied: files.resolve(f"gguf:{tiny_gguf.write(tmp_path / 'm.gguf', tiny_gguf.model(tied=tied))}")


def fitted(source, folder, **more):
    folder.mkdir()
    copy_checkpoint(source, folder, **more)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm, files.load_tokenizer(folder)


@pytest.mark.every_other
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("begin", ["mean", "<|im_start|>"])
def test_new_tokens_get_rows_that_begin_as_asked_and_the_others_keep_theirs(source, tmp_path, tied, begin):
    folder = source(tied)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm, tokenizer = fitted(folder, tmp_path / "new", tokens=files.LATENT_TOKENS, begin=begin)
    size = before.config.vocab_size
    assert [tokenizer.token_to_id(token) for token in files.LATENT_TOKENS] == [size, size + 1, size + 2]
    for layer, old in ((lm.get_input_embeddings(), before.get_input_embeddings()),
                       (lm.get_output_embeddings(), before.get_output_embeddings())):  # fmt: skip
        row = old.weight.mean(0) if begin == "mean" else old.weight[1]
        assert torch.equal(layer.weight[:size], old.weight)
        torch.testing.assert_close(layer.weight[size:], row.expand(3, -1))
    assert tokenizer.encode("a<|latent|>b").tokens == ["a", "<|latent|>", "b"]
    assert lm.config.vocab_size == size + 3


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_vocabulary_reads_its_texts_as_before_and_its_logits_are_the_models(source, tmp_path, tied):
    folder = source(tied)
    before, old = AutoModelForCausalLM.from_pretrained(folder).eval(), files.load_tokenizer(folder)
    lm, tokenizer = fitted(folder, tmp_path / "cut", texts=TEXTS[1:])
    assert tokenizer.get_vocab_size() < old.get_vocab_size()
    assert "ĊĊ" not in tokenizer.get_vocab()
    for text in TEXTS[1:]:
        assert tokenizer.encode(text).tokens == old.encode(text).tokens
    for text in (*TEXTS, *OTHERS):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    ids = tokenizer.encode("12 + 30 he").ids
    same = [old.token_to_id(tokenizer.id_to_token(token)) for token in ids]
    kept = [old.token_to_id(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size())]
    with torch.no_grad():
        logits, wanted = lm(torch.tensor([ids])).logits, before(torch.tensor([same])).logits[..., kept]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert lm.config.eos_token_id == tokenizer.token_to_id("<|im_end|>")


def test_shards_in_half_precision_are_joined_and_grow_in_their_dtype(tmp_path):
    before = tiny_gguf.model(tied=False).bfloat16()
    before.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tiny_gguf.tokenizer().save(str(tmp_path / "shards" / "tokenizer.json"))
    lm, _ = fitted(tmp_path / "shards", tmp_path / "new", tokens=files.LATENT_TOKENS)
    size, rows = before.config.vocab_size, lm.get_output_embeddings().weight
    assert torch.equal(rows[:size], before.get_output_embeddings().weight.float())
    mean = before.get_output_embeddings().weight.float().mean(0).bfloat16().float()
    assert torch.equal(rows[size:], mean.expand(3, -1))


def test_the_parts_that_a_kept_token_is_merged_of_are_kept(source):
    cut = cut_to(files.load_tokenizer(source(True)), ["the"], "init_vocabulary")
    assert "he" in cut.get_vocab()
    assert "ĠĠ" not in cut.get_vocab()


def test_a_tokenizer_of_words_cannot_be_cut(checkpoint):
    with pytest.raises(UsageError, match=r"init_vocabulary=used: needs a byte-level BPE tokenizer.* WordLevel"):
        cut_to(files.load_tokenizer(checkpoint), ["Ann"], "init_vocabulary")


def test_a_model_without_room_for_new_tokens_is_refused(source, tmp_path):
    folder = source(True)
    tokenizer = with_tokens(files.load_tokenizer(folder), ["<extra>"])  # no row
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"\Ainit=.*has no room for new tokens: .*'<extra>' the id 263.* 263 rows\Z"):
        fitted(folder, tmp_path / "new", tokens=files.LATENT_TOKENS)


def test_rows_begin_from_a_token_that_is_there(source, tmp_path):
    with pytest.raises(UsageError, match=r"recipe\.new_tokens=<none>: must be mean, or a token"):
        fitted(source(True), tmp_path / "new", tokens=files.LATENT_TOKENS, begin="<none>")


def test_tokens_that_are_there_stay_as_they_are():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|latent|>": 1}, unk_token="a"))
    assert with_tokens(tokenizer, ["<|latent|>"]).get_vocab() == tokenizer.get_vocab()
