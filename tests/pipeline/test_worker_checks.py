"""A worker that has other code or other files than the driver refuses to compute."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from marks import slow

from latent_tts.checkpoint import files
from latent_tts.checkpoint.draft import DraftRecord, find_draft
from latent_tts.engine.draft import DraftHead, save_draft
from latent_tts.errors import RunError
from latent_tts.executor.local import Local
from latent_tts.executor.ray import Ray
from latent_tts.model.coconut import Coconut
from latent_tts.pipeline import code, worker_checks
from latent_tts.pipeline.code import WHOLE, code_digests
from latent_tts.pipeline.worker_checks import check_code, check_draft, check_weights, work_of


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Nothing is known of code and files."""
    monkeypatch.setattr(worker_checks, "_checked", set())

    def forget():
        for function in (code.digest_of_package, code._digest_of_rooms, code._sources, code._imported_packages):
            function.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize(
    "module", ["text/answer.py", slow("scorer/latent_rm.py"), slow("pipeline/labeller.py"), slow("executor/ray.py")]
)
def test_a_difference_in_any_module_of_the_package_is_refused(module, new_process, tmp_path, monkeypatch):
    driver = code_digests([], [], WHOLE)
    check_code(driver)
    here = tmp_path / "latent_tts"
    shutil.copytree(Path(code.__file__).parents[1], here, ignore=lambda *_: {"weights", "__pycache__"})
    monkeypatch.setattr(code, "__file__", str(here / "pipeline" / "code.py"))
    new_process()
    check_code(driver)
    with (here / module).open("a") as file:
        file.write("\nEDITED = True\n")
    new_process()
    with pytest.raises(RunError, match="has another version of latent_tts than the driver"):
        check_code(driver)


def test_another_version_of_a_package_with_an_option_is_refused(new_process, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_sampler.py").write_text("class Own:\n    size = 1\n")
    import own_sampler  # pyright: ignore[reportMissingImports]

    driver = code_digests([own_sampler.Own()], [{"_target_": "own_sampler.Own"}], WHOLE)
    monkeypatch.delitem(sys.modules, "own_sampler")
    new_process()
    check_code(driver)  # which a worker has not imported yet
    (tmp_path / "own_sampler.py").write_text("class Own:\n    size = 2\n")
    monkeypatch.delitem(sys.modules, "own_sampler")
    new_process()
    with pytest.raises(RunError, match="has another version of own_sampler than the driver"):
        check_code(driver)


def test_nothing_is_compared_in_the_drivers_own_process():
    def make():
        raise AssertionError

    assert work_of(Local(), make, [], [], []) is make


def test_work_of_another_process_is_done_only_with_the_drivers_code(monkeypatch):
    work = pickle.loads(pickle.dumps(work_of(Ray(), Path, [], [], [])))  # pyright: ignore[reportArgumentType]
    assert work() == Path()
    monkeypatch.setattr(worker_checks, "code_digests", lambda *_: {"latent_tts": "other"})
    with pytest.raises(RunError, match="has another version of latent_tts than the driver"):
        work()


def draft_in(folder, seed=0):
    torch.manual_seed(seed)
    save_draft(DraftHead(4, tiny.WIDTH), folder / "draft.safetensors", DraftRecord("digest", 4, tiny.WIDTH))


def test_another_draft_head_under_the_same_path_is_refused(tmp_path, monkeypatch):
    draft_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = find_draft("draft.safetensors", "digest", 4)
    monkeypatch.chdir("/")  # a worker's own working directory
    assert found.path == tmp_path / "draft.safetensors"
    check_draft(None)
    check_draft(found)
    worker_checks._checked.clear()
    draft_in(tmp_path, seed=1)
    with pytest.raises(RunError, match="has another draft head than the driver"):
        check_draft(found)
    os.remove(found.path)
    with pytest.raises(RunError, match="cannot read the draft head"):
        check_draft(found)


def test_weights_are_read_once_per_process_and_others_are_refused(checkpoint, tmp_path, monkeypatch):
    folder, read, digest = shutil.copytree(checkpoint, tmp_path / "model"), [], files.digest

    def counted(folder):
        read.append(folder)
        return digest(folder)

    monkeypatch.setattr(files, "digest", counted)
    adapter = Coconut("tiny", str(folder), 4, {})
    driver = adapter.digest
    work = pickle.dumps(adapter)
    for _ in range(3):
        sent = pickle.loads(work)
        check_weights([sent, None])
        assert sent.digest == driver
    assert len(read) == 2  # by the driver, and by the worker
    worker_checks._checked.clear()
    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match="has other weights of"):
        check_weights([pickle.loads(work)])
