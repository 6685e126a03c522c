"""Which tokens end an answer, whatever file of a checkpoint names them."""

import json
import shutil

import pytest
from refusal import check
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def write(folder, name, **values):
    path = folder / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | values))


def adapter(folder, **more):
    return Coconut("tiny", str(folder), 6, {}, **more)


def test_every_file_is_read_and_the_config_comes_first(folder):
    write(folder, "generation_config.json", eos_token_id=[0, 5])
    write(folder, "tokenizer_config.json", eos_token="apples")
    apples = adapter(folder).tokenizer.token_to_id("apples")
    assert adapter(folder).eos_ids == (0, 5, apples)
    assert adapter(folder).eos_id == 0


def test_padding_and_latent_tokens_do_not_end_an_answer_unless_they_are_named(folder):
    latent = adapter(folder).latent_id
    write(folder, "config.json", pad_token_id=7)
    write(folder, "generation_config.json", eos_token_id=[0, 7, latent])
    assert adapter(folder).eos_ids == (0,)
    assert adapter(folder, eos=[7, "<|latent|>"]).eos_ids == (7, latent)


def test_one_named_by_the_tokenizer_alone_is_taken(folder):
    write(folder, "config.json", eos_token_id=None, pad_token_id=None)
    write(folder, "generation_config.json", eos_token_id=None)
    with pytest.raises(UsageError, match=r"model\.eos"):
        _ = adapter(folder).eos_ids
    write(folder, "tokenizer_config.json", eos_token={"content": "apples"})
    assert adapter(folder).eos_ids == (adapter(folder).tokenizer.token_to_id("apples"),)


def test_ids_of_no_token_end_nothing(folder, caplog):
    write(folder, "config.json", eos_token_id=[-1, 0, 10**9, 10**30, None])
    adapter(folder).check()
    assert adapter(folder).eos_ids == (0,)
    assert not caplog.messages


def test_files_that_differ_are_named_once(folder, caplog):
    adapter(folder).check()
    assert not caplog.messages
    write(folder, "generation_config.json", eos_token_id=[0, 5])
    adapter(folder).check()
    (message,) = caplog.messages
    assert "config.json has [0]" in message
    assert "generation_config.json has [0, 5]" in message


@pytest.mark.parametrize(("asked", "adds"), [(True, True), (True, False), (False, True), (False, False), (None, True)])
def test_a_tokenizer_that_does_not_add_what_its_config_asks_for_is_named(folder, caplog, asked, adds):
    apples = adapter(folder).tokenizer.token_to_id("apples")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if adds:
        tokenizer.post_processor = TemplateProcessing(single="apples $A", special_tokens=[("apples", apples)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", bos_token="apples", **({} if asked is None else {"add_bos_token": asked}))
    adapter(folder).check()
    said = [message for message in caplog.messages if "add_bos_token" in message]
    assert len(said) == (asked is not None and asked != adds)
    assert all("prompts are made by tokenizer.json" in message for message in said)


@pytest.mark.every_other
@pytest.mark.parametrize("eos", ["nonsense", 10**6, 10**30, -1, 1.5, "[]"])
def test_a_token_that_is_not_there_is_refused(refuse, eos):
    refuse(f"model.eos={eos}", words=["model.eos=" if eos != "[]" else "model.eos"])


def test_a_tokenizer_beyond_the_embedding_is_refused_before_loading(folder, ltts):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|forgotten|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    done = ltts("run", f"model.checkpoint={folder}", "task.limit=2", "n=1")
    check(done, "<|forgotten|>", f"the embedding has {rows} rows")
