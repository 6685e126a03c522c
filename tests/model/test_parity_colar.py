"""CoLaR's published layout: prompt, latent head and answer rule against the official implementation's ids.

The official code falls back into latent mode at its cap of 16 latents; there `###` is to be forced instead.
"""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.errors import UsageError
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Question, Reasoner
from parity import COLAR, MAX_LATENTS, colar

EXPECTED = json.loads((COLAR / "expected.json").read_text())


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return colar().load(device="cpu", dtype="float32")


def latents_before_the_end(ids: list[int]) -> int | None:
    """How many latents the official code thought; None at its cap, where it falls back into latent mode."""
    end = ids.index(EXPECTED["end_id"]) if EXPECTED["end_id"] in ids else len(ids)
    return end if end < MAX_LATENTS and set(ids[:end]) <= {EXPECTED["latent_id"]} else None


COMPARABLE = [row for row, ids in enumerate(EXPECTED["generated_ids"]) if latents_before_the_end(ids) is not None]


@pytest.mark.parametrize("row", range(len(EXPECTED["prompts"])))
def test_prompt_ids_are_the_official_ones(row):
    text = EXPECTED["prompts"][row].removeprefix("Question: ").partition(" Let's think")[0]
    assert colar().encode(Question("q", text, "")) == EXPECTED["prompt_ids"][row]


def test_the_speed_is_part_of_the_recipe():
    assert colar(thinking_speed=5).prompt_recipe.endswith("(Thinking speed: 5)###")
    with pytest.raises(UsageError, match="thinking_speed=0"):
        colar(thinking_speed=0)


def rolled(reasoner, rows):
    """Greedy rollouts of some prompts: ids as the official code writes them, latents as ids."""
    model, answer = colar(), len(EXPECTED["generated_ids"][0])
    plan = RolloutPlan(MAX_LATENTS, model.thinking_end_ids, -1, answer, model.stop_id)
    draw = Draw.of(0, [str(row) for row in rows], torch.zeros(len(rows), 1, dtype=torch.long), 64)
    result = Engine(reasoner, plan).roll([EXPECTED["prompt_ids"][row] for row in rows], draw, Greedy())
    return [
        [EXPECTED["latent_id"]] * int(steps) + [EXPECTED["end_id"], *ids]
        for steps, ids in zip(result.steps_R, result.answer_ids, strict=True)
    ]


@pytest.mark.every_other
@pytest.mark.parametrize("together", [True, False], ids=["batch", "single"])
def test_the_engine_thinks_and_answers_like_the_official_code(together):
    reasoner = colar().load(device="cpu", dtype="float32")  # its own: the engine changes the attention
    rows = range(len(EXPECTED["prompts"]))
    written = rolled(reasoner, rows) if together else [rolled(reasoner, [row])[0] for row in rows]
    for row in rows:
        official = EXPECTED["generated_ids"][row]
        if row in COMPARABLE:
            assert written[row][: len(official)] == official
        else:
            assert written[row][: MAX_LATENTS + 1] == [EXPECTED["latent_id"]] * MAX_LATENTS + [EXPECTED["end_id"]]


def test_rollouts_of_a_run_have_latents_of_their_own_number(ltts, tmp_path):
    file = tmp_path / "questions.jsonl"
    questions = [text.removeprefix("Question: ").partition(" Let's think")[0] for text in EXPECTED["prompts"]]
    file.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in questions))
    line = [
        "run",
        "budget=fixed",
        "model=colar",
        f"model.checkpoint={COLAR}",
        "model.latents=16",
        "task=jsonl",
        f"task.path={file}",
    ]
    result = ltts(
        *line, "sampler=dropout", "sampler.where=[thoughts,answer]", "n=3", "max_answer_tokens=5", "keep_latents=true"
    )
    assert result.code == 0, result.err
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert rollouts["latent_steps"].nunique() > 1
    latents_RTD = load_file(result.last.parent / "latents.safetensors")["latents_RTD"]
    used = (latents_RTD != 0).any(-1).sum(1)
    assert used.tolist() == rollouts["latent_steps"].tolist()


@pytest.mark.parametrize("row", COMPARABLE)
@torch.inference_mode()
def test_thinking_and_answer_are_the_official_ones(reasoner, row):
    model, official = colar(), EXPECTED["generated_ids"][row]
    model.check()
    embed = reasoner.lm.get_input_embeddings()
    sequence_SD, written = embed(torch.tensor(EXPECTED["prompt_ids"][row])), []
    thinking = True
    while len(written) < len(official):
        out = reasoner.lm(inputs_embeds=sequence_SD[None], output_hidden_states=True, use_cache=False)
        token = int(out.logits[0, -1].argmax())
        if thinking and token not in model.thinking_end_ids:
            token, fed_D = EXPECTED["latent_id"], reasoner.next_latent(out.hidden_states[-1][0, -1])
        else:
            thinking, fed_D = False, embed(torch.tensor(token))
        written.append(token)
        sequence_SD = torch.cat([sequence_SD, fed_D[None]])
    assert written == official


def test_there_are_rows_to_compare():
    assert len(COMPARABLE) >= 2


@pytest.mark.parametrize(
    ("name", "shape"), [("lt_head.fc.2.weight", (96, 64)), ("lt_head.mean.bias", (32,)), ("lt_head.fc.3.bias", None)]
)
def test_a_latent_head_that_does_not_fit(tmp_path, name, shape):
    folder = shutil.copytree(COLAR, tmp_path / "colar")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights | ({} if shape is None else {name: torch.ones(shape)}), folder / "model.safetensors")
    with pytest.raises(UsageError, match=name):
        colar(folder).check()


def test_a_config_without_the_embeddings_spread(tmp_path):
    folder = shutil.copytree(COLAR, tmp_path / "colar")
    config = json.loads((folder / "config.json").read_text())
    del config["latent_embedding_std"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="latent_embedding_std=None"):
        colar(folder).check()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 18", "18"),
        ("###Answer: 1,234###", "1234"),
        ("Answer: 3 so\nAnswer:-0.5 #", "-0.5"),
        ("7", "7"),
        ("Answer: eighteen", "eighteen"),
    ],
)
def test_the_answer_follows_the_last_answer_sign(text, answer):
    assert colar().decimal_answer(text) == answer
