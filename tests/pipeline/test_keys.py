"""What determines a rollout: edits of code and settings that make other rollouts, and those that do not."""

import importlib
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from own_adapter import Soft

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.pipeline import code, keys, models
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.results.cache import RolloutCache
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import COMPUTATIONS

SEARCH = """
from dataclasses import dataclass
from latent_tts.search.independent import Independent

@dataclass(frozen=True)
class Shifted(Independent):
    '''Independent rollouts with an option.'''
    name = "shifted"
    shift: int = 0
"""

NOISE = '''
"""An add-on's sampler."""
from dataclasses import dataclass

from latent_tts.sampler import Sampler
from noise_helper import SCALE  # the line that an edit is in stands elsewhere


@dataclass(frozen=True)
class Noise(Sampler):
    """Noise of a fixed size."""

    name = "noise"

    def latent(self, h_RD, draw, step):
        return h_RD + SCALE * draw.normal(step, h_RD.shape[-1])
'''


def forget(*names: str) -> None:
    """What a new process does not know."""
    for name in [each for each in sys.modules if each.partition(".")[0] in names]:
        del sys.modules[name]
    for function in (code.digest_of_package, code._digest_of_rooms, code._sources, code._imported_packages):
        function.cache_clear()


@pytest.fixture
def addon(tmp_path, monkeypatch):
    """A folder on the path with a sampler and the module that it takes its scale from."""
    folder = tmp_path / "addon"
    folder.mkdir()
    (folder / "noise_sampler.py").write_text(NOISE)
    (folder / "noise_helper.py").write_text("SCALE = 0.01\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    forget("noise_sampler", "noise_helper")


def answers(result) -> list:
    assert result.code == 0, result.err
    return pd.read_parquet(result.last.parent / "rollouts.parquet")["answer_logprob"].tolist()


def test_an_edited_sampler_of_an_add_on_gets_fresh_rollouts_and_a_comment_changes_nothing(addon, run, tmp_path):
    line = ["sampler=greedy", "sampler._target_=noise_sampler.Noise"]
    first = answers(run(*line))
    forget("noise_sampler", "noise_helper")
    (addon / "noise_sampler.py").write_text(NOISE.replace("elsewhere", "over there").replace("fixed size", "one size"))
    (addon / "noise_helper.py").write_text('"""How large."""\n\n\nSCALE = 0.01  # small\n')
    again = run(*line)
    assert answers(again) == first
    assert "in the cache" in again.err
    forget("noise_sampler", "noise_helper")
    (addon / "noise_helper.py").write_text("SCALE = 1.0\n")
    edited = run(*line)
    fresh = run(*line, f"paths.cache={tmp_path / 'fresh'}")
    assert "in the cache" not in edited.err
    assert answers(edited) == answers(fresh) != first


def test_all_modules_of_an_installed_distribution_count_and_those_of_others_do_not(tmp_path, monkeypatch):
    names = ["mine_a/__init__.py", "mine_b.py", "others/__init__.py", "mine-1.0.dist-info/RECORD", "mine_a/notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / names[3]).write_text("mine_a/__init__.py,,\nmine_b.py,,\nmine_a/notes.txt,,\n")
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def digest() -> str:
        forget("mine_a")
        importlib.import_module("mine_a")
        return code.digest_of_package("mine_a")

    first = digest()
    for name, counts in (("mine_b.py", True), ("mine_a/notes.txt", False), ("others/__init__.py", False)):
        (tmp_path / name).write_text("x = 2\n")
        assert (digest() != first) == counts
        (tmp_path / name).write_text("x = 1\n")
    forget("mine_a")


def test_helpers_in_other_folders_of_the_path_and_classes_of_values_count(addon, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "other")
    (tmp_path / "other" / "noise_helper.py").write_text(
        "def scale():\n    import noise_deep\n    return noise_deep.SCALE\n"
    )
    (addon / "noise_helper.py").unlink()
    (addon / "noise_deep.py").write_text("SCALE = 1\n")
    (addon / "noise_sampler.py").write_text("import noise_helper, torch\nclass Held:\n    pass\n")

    def digests() -> dict[str, str]:
        forget("noise_sampler", "noise_helper", "noise_deep")
        held = importlib.import_module("noise_sampler").Held
        scorer = LatentRM(".", None, "correct")
        object.__setattr__(scorer, "heads", {"first": [held()]})
        return code.code_digests([scorer], [], ())

    first = digests()
    assert set(first) == {"latent_tts", "noise_sampler", "noise_helper", "noise_deep"}
    for path in (tmp_path / "other" / "noise_helper.py", addon / "noise_deep.py"):
        text = path.read_text()
        path.write_text(text + "EXTRA = 2\n")
        assert digests() != first
        path.write_text(text)
    assert digests() == first


def test_a_search_without_a_scorer_is_part_of_the_key_and_named_in_the_table(addon, run):
    (addon / "noise_helper.py").write_text(SEARCH)
    line = ["search._target_=noise_helper.Shifted"]
    runs = [run(*line), run(*line, "+search.shift=1"), run()]
    assert len({record_of(each)["cache"] for each in runs}) == 3
    tables = [pd.read_csv(each.last, keep_default_na=False) for each in runs]
    assert [table["search"].iloc[0] for table in tables] == ["shifted", "shifted", ""]


def test_what_this_package_draws_and_scores_with_is_part_of_the_key(monkeypatch, tmp_path):
    root = Path(code.__file__).resolve().parents[1]
    for room in {*code.DRAWING, *code.SCORING}:
        shutil.copytree(root / room, tmp_path / "latent_tts" / room)
    (tmp_path / "latent_tts" / "pipeline").mkdir()
    monkeypatch.setattr(code, "__file__", str(tmp_path / "latent_tts" / "pipeline" / "code.py"))

    def digests() -> tuple[str, str]:
        forget()
        return tuple(code.code_digests([], [], rooms)["latent_tts"] for rooms in (code.DRAWING, code.SCORING))

    drawing, scoring = digests()
    path = tmp_path / "latent_tts" / "sampler" / "gaussian.py"
    text = path.read_text()
    path.write_text("# a comment\n" + text.replace('"""', '"""Other words. ', 1))
    assert digests() == (drawing, scoring)
    path.write_text(text + "\nSCALE = 2\n")
    assert digests()[0] != drawing
    assert digests()[1] == scoring
    path.write_text(text)
    assert digests() == (drawing, scoring)
    scorer = tmp_path / "latent_tts" / "scorer" / "latent_rm.py"
    scorer.write_text(scorer.read_text().replace("np.mean", "np.max"))
    assert digests()[0] == drawing
    assert digests()[1] != scoring
    forget()


def test_layout_comments_docstrings_and_assertions_do_not_count_and_all_else_does():
    def digest(text: str) -> bytes:
        return code._digest_of_source(text.encode())

    bare = "class A(B):\n    x: int = 1\n\n    def f(self):\n        return {'a', 'b', 'c'}\n\n\ny = 0.5\n"
    told = '"""M."""\n# c\n\nclass A(B):\n    """A."""\n\n    x: int = 1  # d\n\n\n    def f(self):\n        """F."""\n'
    told += "        assert self\n        return {'a', 'b', 'c'}\ny = 0.5\n"
    assert digest(told) == digest(bare)
    edits = [
        ("0.5", "0.6"),
        ("'c'", "'d'"),
        ("f(self)", "f(self, z=1)"),
        ("x: int = 1", "x: int = 1.0"),
        ("(B)", "(C)"),
    ]
    assert len({digest(bare), *(digest(bare.replace(*edit)) for edit in edits)}) == 1 + len(edits)


def test_a_process_reads_the_code_once(monkeypatch):
    first = code.code_digests([], [], code.DRAWING)
    monkeypatch.delattr(Path, "read_bytes")
    assert code.code_digests([], [], code.DRAWING) == first


def test_a_model_is_loaded_again_for_another_value_of_an_added_field(checkpoint):
    @dataclass(frozen=True)
    class Scaled(Coconut):
        scale: float = 1.0

        def load(self, *, device: str, dtype: str):
            return replace(super().load(device=device, dtype=dtype), next_latent=lambda h_RD: h_RD * self.scale)

    engine, one = EngineSettings("float32", "cpu", None), torch.ones(1)
    for scale in (1.0, 0.5, 0.5):
        adapter = Scaled("scaled", str(checkpoint), 2, {}, scale=scale)
        assert models.load_reasoner(adapter, engine, "cpu", longest=20).next_latent(one).item() == scale


def soft(checkpoint, **changes) -> Soft:
    return Soft("soft", str(checkpoint), 2, {}, **changes)


def test_every_field_of_an_adapter_that_can_change_a_rollout_is_part_of_the_key(checkpoint, tmp_path):
    one = soft(checkpoint)
    one.check()
    key = keys.model_key(one)
    assert key["fields"] == {"latents": 2, "eos": None, "softness": 0.5, "table": None}
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    same = replace(one, name="other", checkpoint=str(moved), recommended={"sigma": 1.0}, latent_rm="some/where")
    assert keys.model_key(same) == key
    for change in ({"softness": 0.6}, {"latents": 3}, {"table": complex(1, 2)}, {"table": {"a": [1]}}):
        assert keys.model_key(replace(one, **change)) != key
    assert keys.model_key(replace(one, table=1j)) == keys.model_key(replace(one, table=1j))
    other = Coconut("soft", str(checkpoint), 2, {})
    assert keys.model_key(other)["adapter"] != key["adapter"]
    with pytest.raises(UsageError, match=r"model\.table=function: a value that can be pickled"):
        keys.model_key(replace(one, table=lambda: 1))


def test_a_field_that_only_says_how_scores_are_used_is_no_part_of_the_key(checkpoint):
    one = LatentRM(str(checkpoint), None, "correct")
    key = keys.score_key(one, "float32", 4, COMPUTATIONS[0])
    assert keys.score_key(replace(one, reduce="mean"), "float32", 8, COMPUTATIONS[0]) == key
    assert keys.score_key(replace(one, positions="official"), "float32", 4, COMPUTATIONS[0]) != key


def test_a_base_class_of_another_package_counts_and_a_library_counts_by_its_version():
    digests = code.code_digests(
        [soft(".")], [{"_target_": "torch.nn.Linear", "inner": [{"_target_": "math.prod"}]}], ()
    )
    assert set(digests) == {"latent_tts", "own_adapter", "torch"}
    assert digests["torch"] == code.version("torch")
    assert issubclass(Soft, CheckpointAdapter)


def test_how_a_model_is_computed_is_part_of_the_key(run, cached, monkeypatch):
    first = run()
    assert first.err.count("in the cache") == 1
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "prove_reasoner", lambda reasoner, longest: COMPUTATIONS[2])
    other = run("n=5")  # transformers was updated, say, and the engine's attention is no more right
    ours, theirs = (json.loads((done.last.parent / "run.json").read_text()) for done in (first, other))
    assert (ours["attention"], theirs["attention"]) == ("shared-prefix", "transformers")
    assert ours["cache"] != theirs["cache"]
    assert theirs["rollouts"]["drawn_now"] == 30


def test_a_damaged_word_on_how_rollouts_were_computed_is_set_aside(run, cached):
    (path,) = Path("cache").rglob("computation.json")
    good = path.read_text()
    path.write_text(good.replace("head", "heap"))
    again = run()
    assert "computation.json is damaged" in again.err
    assert "logits" not in record_of(again)
    cache = RolloutCache(Path("other"), {"seed": 0})
    path = cache.folder / "computation.json"
    for damage in ("", "{}", '{"attention": "head"', "[]", "\udc00"):
        path.write_bytes(damage.encode(errors="surrogatepass"))
        assert cache.read_computation() is None
        assert not path.exists(), damage
    path.write_text(good)
    assert cache.read_computation() is not None


def test_how_a_scorer_is_computed_is_part_of_the_key_of_its_scores(run, latent_rm, monkeypatch):
    line = ["scorer=latent_rm", f"scorer.checkpoint={latent_rm}"]
    first, again = record_of(run(*line)), record_of(run(*line))
    assert again["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 0}
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "prove_reward_model", lambda model, longest: COMPUTATIONS[2])
    other = record_of(run(*line))  # complete scores serve, whichever way they were computed
    assert other["rollouts"]["scored_now"] == 0
    assert other["scorer"] == first["scorer"]
    longer = record_of(run(*line, "n=5"))  # those of two ways are not mixed
    assert longer["rollouts"] == {"total": 30, "drawn_now": 6, "scored_now": 30}
    assert (first["scorer"]["attention"], longer["scorer"]["attention"]) == ("shared-prefix", "transformers")


@pytest.mark.slow
def test_how_a_guiding_scorer_is_computed_is_part_of_the_key_of_the_rollouts(run, latent_rm, monkeypatch):
    beam = ["search=beam", "search.beams=2", "search.candidates=2"]
    line = ["scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *beam]
    first = record_of(run(*line))
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "prove_reward_model", lambda model, longest: COMPUTATIONS[2])
    again, longer = record_of(run(*line)), record_of(run(*line, "task.limit=7"))
    assert again["rollouts"]["drawn_now"] == 0
    assert longer["rollouts"]["drawn_now"] == 7 * 4
    assert longer["cache"] != first["cache"]


def record_of(result) -> dict:
    assert result.code == 0, result.err
    return json.loads((result.last.parent / "run.json").read_text())
