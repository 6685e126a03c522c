"""Failures while computing."""

import socket
import sys
import threading
import weakref

import datasets
import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError

from latent_tts import cli
from latent_tts.config.error_text import describe
from latent_tts.errors import RunError, computing, hub_clients, is_number


def test_what_failed_leaves_no_tensors_behind_for_whoever_keeps_the_error():
    left = []

    def draw():
        caches = torch.zeros(3)
        left.append(weakref.ref(caches))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    with (
        pytest.raises(RunError, match="drawing failed: CUDA out of memory") as kept,
        computing("drawing", "kept"),
    ):
        draw()
    assert kept.value.__cause__ is not None
    assert left[0]() is None


def flags() -> list[bool]:
    return [datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE]


def test_the_hubs_clients_do_not_try_again_for_a_minute_where_nothing_answers(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    before = flags()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        with hub_clients():  # nobody listens
            assert flags() == [True, True]
        server.listen()
        with hub_clients():
            assert flags() == before
    assert flags() == before
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with hub_clients():
        assert flags() == before


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    asked = threading.Event()

    def look_up(*_):
        asked.wait(30)
        raise OSError

    monkeypatch.setattr("socket.create_connection", look_up)
    within = []

    def use() -> None:
        within.extend(flags())
        raise KeyError("not in the cache")

    with pytest.raises(ConnectionError, match="cannot be reached, and no copy is on this disk"), hub_clients(0.05):
        use()
    assert within == [True, True]
    asked.set()  # the thread ends before the test does
    asked.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "no space left"),
        (OSError(122, "Disk quota exceeded", "out/a.csv"), "out/a.csv: Disk quota exceeded"),
        (OSError("Cannot save file into a non-existent directory: 'out'"), "Cannot save file into"),
    ],
)
def test_what_is_wrong_with_a_disk_is_named_whoever_wrote(error, words):
    error.filename = getattr(error, "filename", None) or "out/a.csv"
    lines, code = describe(error)
    assert code == 1
    assert lines[0].startswith("out/a.csv: ")
    assert words in lines[0]
    assert "rror" not in lines[0]


def test_an_integer_that_is_no_float_is_named_by_its_key(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ltts run", f"answer.top_p=1{400 * '0'}"])
    with pytest.raises(OverflowError) as raised:
        float(10**400)
    assert describe(raised.value) == (["answer.top_p: a number that is beyond those of float64"], 2)


@pytest.mark.parametrize("line", [["help"], ["list", "models"], []])
def test_a_disk_that_is_full_of_what_is_printed_is_named(monkeypatch, capfd, line):
    monkeypatch.setattr(sys, "argv", ["ltts", *line])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="1"):
            cli.entry()
    assert capfd.readouterr().err.startswith("ltts: error: no space left on the disk")


def test_a_command_whose_output_is_closed_ends_well(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ltts", "--version"])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit, match="0"):
        cli.entry()
    sys.stdout.close()  # which the command opened


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), True, "1", None])
def test_no_number_is_beyond_those_of_floats(value):
    assert not is_number(value)
    assert is_number(10**300)
    assert is_number(-0.5)
