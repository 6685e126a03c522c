"""Speculation on answers: a sibling's answer verified as a draft, in one pass, compared with plain decoding.

python experiments/parallel_in_time/answers.py OUTPUT.csv [OVERRIDE...], as in model=demo_codi n=16

A question's first rollout is decoded token by token. Its answer and end are a draft for the others, which run all of it
in one pass. A rollout whose every token is the one that it would have chosen itself is done; the rest are decoded
plainly. So tokens are equal to those of plain decoding, which is checked. Both ways take turns, batch by batch;
processor seconds of one thread. The model's answers are greedy; the sampler acts on latents alone.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from latent_tts.config.build import conf_dir, register_schemas
from latent_tts.config.requests import run_request
from latent_tts.engine.head import choose
from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.engine.sites import SiteHooks
from latent_tts.pipeline.models import load_reasoner, rollout_plan
from latent_tts.pipeline.spec import RunSpec, check_run
from latent_tts.random.draw import Draw
from latent_tts.types import Forward, Question

QUESTIONS, AT_ONCE = 48, 4


def think(engine: Engine, spec: RunSpec, questions: list[Question], hooks: SiteHooks) -> RolloutState:
    """The latents of all rollouts of some questions."""
    numbers_QN = torch.arange(spec.n).repeat(len(questions), 1)
    draw = Draw.of(spec.seed, [each.id for each in questions], numbers_QN, engine.width, engine.blocks)
    return RolloutState.start(engine, [spec.prompts[each.id] for each in questions], draw, hooks).make_latents()


def part_of(state: RolloutState, rows: torch.Tensor) -> RolloutState:
    """Some of the rollouts, for themselves."""
    return state.fork(rows, state.draw.rows(rows))


def speculate(engine: Engine, state: RolloutState, rollouts: int) -> tuple[list[list[int]], int, int, float]:
    """Answers by drafts: tokens of each row, draft tokens, those accepted, and seconds without the rejected rows."""
    begun = time.process_time()
    rows = torch.arange(len(state.latents_RTD)).view(-1, rollouts)
    leaders, siblings = rows[:, 0], rows[:, 1:].flatten()
    eos = engine.plan.eos_ids[0]
    first = part_of(state, leaders).decode_answers()
    drafts = [
        ids + [eos] * bool(stopped) for ids, stopped in zip(first.answer_ids, first.stopped_R.tolist(), strict=True)
    ]
    longest, end = max(map(len, drafts)), engine.plan.thinking_end_ids
    padded_QA = torch.tensor([draft + [eos] * (longest - len(draft)) for draft in drafts])
    draft_RA = padded_QA.repeat_interleave(rollouts - 1, 0)
    length_R = torch.tensor([len(draft) for draft in drafts]).repeat_interleave(rollouts - 1)
    checked, embed = part_of(state, siblings), engine.lm.get_input_embeddings()
    forced_RS = torch.tensor(end).expand(len(siblings), -1)
    inputs_RSD = torch.cat([checked.latents_RTD[:, -1:], embed(torch.cat([forced_RS, draft_RA[:, :-1]], 1))], 1)
    hidden_RSD = checked._run(inputs_RSD, [Forward("answer", engine.plan.latents, inputs_RSD.shape[1])])
    hidden_RAD = hidden_RSD[:, len(end) :]
    chosen_RA = choose(engine.head, hidden_RAD.flatten(0, 1)).token_R.view(len(siblings), -1)
    agree_RA = (chosen_RA == draft_RA) & (torch.arange(longest) < length_R[:, None])
    accepted_R = agree_RA.long().cumprod(1).sum(1)
    seconds = time.process_time() - begun
    answers: dict[int, list[int]] = dict(zip(leaders.tolist(), first.answer_ids, strict=True))
    for row in siblings[accepted_R == length_R].tolist():
        answers[row] = answers[row - row % rollouts]
    rejected = torch.tensor([row for row in siblings.tolist() if row not in answers], dtype=torch.long)
    if len(rejected):
        answers |= dict(zip(rejected.tolist(), part_of(state, rejected).decode_answers().answer_ids, strict=True))
    return [answers[row] for row in sorted(answers)], int(length_R.sum()), int(accepted_R.sum()), seconds


@torch.inference_mode()
def measure(spec: RunSpec) -> dict[str, object]:
    """A row of the table."""
    reasoner = load_reasoner(spec.adapter, spec.engine, "cpu", longest=spec.longest_sequence)
    engine = Engine(reasoner, rollout_plan(spec.adapter, spec.max_answer_tokens))
    tokens, ratios, best, drafted, accepted, equal = 0, [], [], 0, 0, True
    for start in range(0, len(spec.questions), AT_ONCE):
        questions = spec.questions[start : start + AT_ONCE]
        with SiteHooks(engine.lm, spec.sampler) as hooks:
            state = think(engine, spec, questions, hooks)
            begun = time.process_time()
            plain = part_of(state, torch.arange(len(state.latents_RTD))).decode_answers().answer_ids
            plain_seconds = time.process_time() - begun
            begun = time.process_time()
            answers, length, agreed, without = speculate(engine, state, spec.n)
            ratios.append((time.process_time() - begun) / plain_seconds)
        best.append(without / plain_seconds)
        tokens += sum(map(len, plain))
        drafted, accepted, equal = drafted + length, accepted + agreed, equal and answers == plain
    return {
        "model": spec.adapter.name, "sampler": spec.sampler.name, "rollouts": spec.n, "questions": len(spec.questions),
        "answer_tokens": tokens / (spec.n * len(spec.questions)), "accepted": accepted / drafted, "equal": equal,
        "time_over_plain": np.median(ratios[1:]), "time_over_plain_95": np.quantile(ratios[1:], 0.95),
        "without_rejected_rows": np.median(best[1:]),
    }  # fmt: skip


def main() -> None:
    """Measure the model that is given, at several numbers of rollouts."""
    torch.set_num_threads(1)
    output, *given = sys.argv[1:]
    register_schemas()
    rows = []
    with initialize_config_dir(conf_dir(), version_base=None):
        for sampler in ("gaussian", "dropout"):
            # masks in the answer's passes belong to its tokens one by one
            where = ["sampler.where=[thoughts]"] if sampler == "dropout" else []
            for rollouts in (4, 16, 64):
                line = [f"sampler={sampler}", *where, f"n={rollouts}", f"task.limit={QUESTIONS}", "task.split=valid"]
                cfg = compose("run", [*line, "scorer=none", *given], return_hydra_config=True)
                HydraConfig.instance().set_config(cfg)
                OmegaConf.set_struct(cfg, False)
                del cfg["hydra"]
                rows.append(measure(check_run(run_request(cfg))))
                print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(output, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
