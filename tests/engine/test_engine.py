"""The engine against the oracle, and what must not change its results: batches, orders, counts, other rows."""

import random
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from against_oracle import (
    EVERYWHERE,
    MASKS,
    NOISE,
    assert_rows_equal,
    base_passes,
    check_against_oracle,
    name,
    roll,
)
from marks import slow

from latent_tts.engine import head, rollout
from latent_tts.engine import prompts as prompt_pieces
from latent_tts.engine.rollout import Engine
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy

SAMPLERS = {
    "greedy": Greedy(),
    "gaussian": NOISE,
    "relative": Gaussian(0.3, True),
    "dropout everywhere": MASKS,
    "dropout in thoughts": Dropout(0.2, "ffn", ["thoughts"], "fresh"),
    "locked dropout": Dropout(0.2, "residual", ["thoughts", "answer"], "locked"),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
families = pytest.mark.parametrize("family", tiny.FAMILIES)
two_families = pytest.mark.parametrize("family", ["gpt2", "qwen3"])
WHERES = [["prompt"], ["thoughts"], ["answer"], ["prompt", "thoughts"], ["thoughts", "answer"], EVERYWHERE]
# ids that are now and then the most probable after a latent of the models of `tiny.reasoner`
STOP_IDS = {"gpt2": 11, "llama": 6, "llama_tied": 34, "qwen3": 37}
LENGTHS = [[1, 9, 23], [1, 1], [30, 2], [5], [6, 6]]


def cases():
    """Every sampler in surroundings that are drawn once and for all."""
    dice = random.Random(0)
    dropouts = [
        Dropout(0.3, site, where, mask)
        for site, where, mask in product(("ffn", "residual", "residual_embedding"), WHERES, ("fresh", "locked"))
    ]
    others = [Greedy(), NOISE, Gaussian(0.3, True), Control("zero"), Control("repeat"), Control("shuffle")]
    for number, sampler in enumerate(dropouts):
        family, lengths = dice.choice(list(tiny.FAMILIES)), dice.choice(LENGTHS)
        case = family, sampler, lengths, dice.choice((1, 2)), dice.choice((1, 3, 6))
        yield slow(*case) if number % 5 else case  # every site, place and mask is among the others
    for number, (sampler, family) in enumerate(product(others, ["gpt2", "llama", "qwen3"])):
        rollouts = 1 if sampler.deterministic else dice.choice((1, 2, 5))
        case = family, sampler, dice.choice(LENGTHS), rollouts, dice.choice((0, 1, 3, 6))
        yield case if number % 3 == number // 3 % 3 else slow(*case)  # each sampler with one of the families


@pytest.mark.parametrize(("family", "sampler", "lengths", "rollouts", "latents"), list(cases()), ids=name)
def test_the_engine_equals_the_oracle(family, sampler, lengths, rollouts, latents):
    plan = tiny.plan(latents, eos_id=tiny.EOS_IDS[family], answer=3, end=1 + latents % 2)
    check_against_oracle(family, sampler, lengths, rollouts, plan)


@pytest.mark.every_other
@pytest.mark.parametrize(("family", "sampler"), [("gpt2", MASKS), ("llama", Greedy()), ("qwen3", NOISE)], ids=name)
def test_the_engine_equals_the_oracle_over_twelve_latents(family, sampler):
    check_against_oracle(family, sampler, [2, 11], 1, tiny.plan(12, eos_id=tiny.EOS_IDS[family]))


@pytest.mark.every_other
@pytest.mark.parametrize("where", WHERES, ids="+".join)
def test_the_engine_equals_the_oracle_under_dropout_without_latents(where):
    check_against_oracle("qwen3", Dropout(0.3, "residual_embedding", where, "fresh"), [1, 7], 2, tiny.plan(0, answer=3))


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "sampler"), [("gpt2", NOISE), ("llama", Dropout(0.2, "residual", ["thoughts"], "fresh"))], ids=name
)
def test_the_engine_equals_the_oracle_with_64_rollouts(family, sampler):
    plan = tiny.plan(3, eos_id=tiny.EOS_IDS[family])
    check_against_oracle(family, sampler, [1, 8], 64, plan, check_every=7)


def test_the_engine_equals_the_oracle_where_latents_are_not_hidden_states():
    check_against_oracle("gpt2", NOISE, [3, 1], 2, tiny.plan(3), next_latent=lambda hidden: torch.tanh(hidden) + 0.1)


def test_the_engine_equals_the_oracle_without_end_of_thinking_tokens():
    check_against_oracle("llama", MASKS, [3, 1], 2, tiny.plan(2, end=0))


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        pytest.param(family, sampler, marks=() if i % 3 == j else pytest.mark.slow)
        for i, family in enumerate(tiny.FAMILIES)
        for j, sampler in enumerate([NOISE, MASKS, Dropout(0.3, "ffn", ["thoughts"], "fresh")])
    ],
    ids=name,
)
def test_the_engine_equals_the_oracle_where_rows_stop_thinking_by_a_token(family, sampler):
    stop_id = STOP_IDS[family]
    plan = tiny.plan(6, eos_id=tiny.EOS_IDS[family], answer=3, stop_id=stop_id)
    result = check_against_oracle(family, sampler, [1, 9, 14], 4, plan, check_every=3)
    assert len(set(result.steps_R.tolist())) > 1, "nothing to tell a fixed number of steps from"


@pytest.mark.every_other
@two_families
@samplers
def test_rows_that_finish_leave_the_batch_without_changing_the_others(family, sampler):
    reasoner, prompts, eos = tiny.reasoner(family), tiny.prompts([1, 9, 4, 23, 5, 7]), tiny.EOS_IDS[family]
    endless = roll(Engine(reasoner, tiny.plan(3, answer=10)), prompts, range(5), sampler)
    result = roll(Engine(reasoner, tiny.plan(3, answer=10, eos_id=eos)), prompts, range(5), sampler)
    for row, ids in enumerate(endless.answer_ids):
        assert result.answer_ids[row] == (ids[: ids.index(eos)] if eos in ids else ids)
        assert result.stopped_R[row] or eos not in ids
        if not result.stopped_R[row]:
            assert_rows_equal(result, row, endless, row)
    assert len({len(ids) for ids in result.answer_ids}) > 1  # some finished before others


def test_a_batch_shrinks_as_rows_finish():
    reasoner = tiny.reasoner("gpt2")
    shapes = base_passes(reasoner.lm)
    plan = tiny.plan(3, answer=10, eos_id=tiny.EOS_IDS["gpt2"])
    result = roll(Engine(reasoner, plan), tiny.prompts([1, 9, 4, 23, 5, 7]), range(5), NOISE)
    rows = [shape[0] for shape in shapes[3:]]
    unfinished = [sum(len(ids) >= position for ids in result.answer_ids) for position in range(len(rows))]
    assert rows == sorted(rows, reverse=True)
    assert all(count <= fed for count, fed in zip(unfinished, rows, strict=True))
    assert rows[-1] < rows[0]


def test_without_an_eos_no_pass_looks_for_one():
    reasoner = tiny.reasoner("gpt2")
    shapes = base_passes(reasoner.lm)
    roll(Engine(reasoner, tiny.plan(3, answer=4, eos_id=None)), tiny.prompts([5, 2]), range(3), NOISE)
    assert len(shapes) == 1 + 2 + 4  # the prompt makes the first latent, the first answer token's pass runs the last


def test_an_eos_right_after_the_last_allowed_token_counts_as_stopped():
    reasoner, prompts, eos = tiny.reasoner("gpt2"), tiny.prompts([1, 9, 4, 23, 5, 7]), tiny.EOS_IDS["gpt2"]
    long = roll(Engine(reasoner, tiny.plan(3, answer=10, eos_id=eos)), prompts, range(5), NOISE)
    lengths = [len(ids) for ids, stopped in zip(long.answer_ids, long.stopped_R, strict=True) if stopped]
    limit = sorted(lengths)[len(lengths) // 2]
    assert limit > 0
    short = roll(Engine(reasoner, tiny.plan(3, answer=limit, eos_id=eos)), prompts, range(5), NOISE)
    for row, ids in enumerate(long.answer_ids):
        assert short.answer_ids[row] == ids[:limit]
        assert bool(short.stopped_R[row]) == bool(long.stopped_R[row] and len(ids) <= limit)
        if short.stopped_R[row]:
            assert_rows_equal(short, row, long, row)


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "sampler"),
    [*(("gpt2", sampler) for sampler in SAMPLERS.values()), ("llama", NOISE), ("qwen3", MASKS)],
    ids=name,
)
def test_results_do_not_depend_on_the_batch_or_its_order(family, sampler):
    reasoner, prompts, rollouts = tiny.reasoner(family), tiny.prompts([1, 9, 23]), 3
    engine = Engine(reasoner, tiny.plan(3, eos_id=tiny.EOS_IDS[family]))
    whole = roll(engine, prompts, range(rollouts), sampler)
    order = [2, 0, 1]
    permuted = roll(engine, [prompts[question] for question in order], range(rollouts), sampler)
    for place, question in enumerate(order):
        alone = roll(engine, [prompts[question]], range(rollouts), sampler)
        for number in range(rollouts):
            row = question * rollouts + number
            assert_rows_equal(permuted, place * rollouts + number, whole, row)
            assert_rows_equal(alone, number, whole, row)
        last = roll(engine, [prompts[question]], range(rollouts - 1, rollouts), sampler)
        assert_rows_equal(last, 0, whole, question * rollouts + rollouts - 1)


@pytest.mark.every_other
@samplers
def test_four_rollouts_are_the_first_of_64(sampler):
    engine, prompts = Engine(tiny.reasoner("gpt2"), tiny.plan(3, eos_id=tiny.EOS_IDS["gpt2"])), tiny.prompts([1, 9])
    few, many = (roll(engine, prompts, range(n), sampler) for n in (4, 64))
    for question, number in product(range(2), range(4)):
        assert_rows_equal(few, question * 4 + number, many, question * 64 + number)


@pytest.mark.parametrize("sampler", [NOISE, MASKS, SAMPLERS["dropout in thoughts"]], ids=name)
def test_rollouts_of_a_question_differ(sampler):
    latents = roll(Engine(tiny.reasoner("llama"), tiny.plan(2)), tiny.prompts([4]), range(8), sampler).latents_RTD
    assert (torch.cdist(latents.flatten(1), latents.flatten(1)) + torch.eye(8)).min() > 0.1


@pytest.mark.every_other
@two_families
@pytest.mark.parametrize(
    "sampler",
    [Gaussian(0.0, False), Gaussian(0, True), *(Dropout(0, site, EVERYWHERE, "fresh") for site in ("ffn", "residual"))],
    ids=str,
)
def test_sigma_or_rate_zero_is_greedy(family, sampler):
    engine, prompts = Engine(tiny.reasoner(family), tiny.plan(3, eos_id=tiny.EOS_IDS[family])), tiny.prompts([1, 9, 4])
    result, greedy = (roll(engine, prompts, range(2), which) for which in (sampler, Greedy()))
    assert torch.equal(result.latents_RTD, greedy.latents_RTD)
    assert result.answer_ids == greedy.answer_ids
    assert torch.equal(result.answer_logprob_R, greedy.answer_logprob_R)


@pytest.mark.parametrize(
    ("sampler", "before_thinking", "thinking"),
    [
        (NOISE, [(2, 7)], [(10, 1)] * 2),  # the prompt's own pass makes h_1
        (Dropout(0.2, "ffn", ["answer"], "fresh"), [(2, 7)], [(10, 1)] * 2),
        (Dropout(0.2, "ffn", ["thoughts"], "fresh"), [(2, 6)], [(10, 1)] * 3),
        (Dropout(0.2, "ffn", ["prompt"], "fresh"), [(10, 6)], [(10, 1)] * 3),
        (MASKS, [(10, 6)], [(10, 1)] * 3),
    ],
    ids=name,
)
def test_a_prompt_runs_once_a_question_unless_it_is_random(sampler, before_thinking, thinking):
    reasoner = tiny.reasoner("gpt2")
    shapes = base_passes(reasoner.lm)
    roll(Engine(reasoner, tiny.plan(3, answer=2)), tiny.prompts([7, 7]), range(5), sampler)
    assert shapes == [*before_thinking, *thinking, (10, 2), (10, 1), (10, 1)]


@families
def test_the_head_runs_only_where_an_answer_token_is_chosen(family, monkeypatch):
    calls, choose = [], rollout.choose
    monkeypatch.setattr(rollout, "choose", lambda *args: calls.append(tuple(args[1].shape)) or choose(*args))
    roll(Engine(tiny.reasoner(family), tiny.plan(6, answer=2)), tiny.prompts([7, 3]), range(5), MASKS)
    assert calls == [(10, tiny.WIDTH)] * 3  # two tokens and the eos that might follow


@pytest.mark.every_other
@pytest.mark.parametrize(("latents", "forced"), [(3, [5]), (2, [7, 9, 7]), (0, [1, 2])])
@pytest.mark.parametrize("sampler", [NOISE, MASKS], ids=name)
def test_the_engine_equals_the_oracle_where_answers_have_a_forced_beginning(sampler, latents, forced):
    plan = replace(tiny.plan(latents, eos_id=tiny.EOS_IDS["gpt2"], answer=4), forced_ids=forced)
    result = check_against_oracle("gpt2", sampler, [1, 9], 3, plan)
    assert all(ids[: len(forced)] == forced for ids in result.answer_ids)


def test_a_forced_beginning_takes_no_passes():
    reasoner = tiny.reasoner("gpt2")
    shapes = base_passes(reasoner.lm)
    plan = replace(tiny.plan(3, answer=3), forced_ids=[4, 5])
    roll(Engine(reasoner, plan), tiny.prompts([7]), range(5), NOISE)
    assert shapes[-2:] == [(5, 4), (5, 1)]  # h_3, end of thinking, two forced tokens; the third token


class LastTokens(Gaussian):
    """Chooses the lowest logit of even rollouts and the highest of odd ones."""

    chooses_tokens = True

    def token(self, logits_RV, draw, step):
        return torch.where(draw.rollouts_R % 2 == 0, logits_RV.argmin(-1), logits_RV.argmax(-1))


@pytest.mark.every_other
@two_families
@pytest.mark.parametrize(
    ("sampler", "pieces"),
    # without the last token, and three times each, where masks of the prompt are a rollout's own
    [(NOISE, [(2, 9), (1, 23), (2, 4)]), (MASKS, [(3, 1), (3, 8), (1, 22), (1, 22), (1, 22), (6, 3)])],
    ids=name,
)
def test_the_engine_equals_the_oracle_where_prompts_run_in_pieces(family, sampler, pieces, monkeypatch):
    monkeypatch.setitem(prompt_pieces.TOKENS_AT_ONCE, "cpu", 40)
    monkeypatch.setitem(prompt_pieces.PADDING, "cpu", 10)
    reasoner, lengths = tiny.reasoner(family), [1, 9, 23, 4, 2]
    shapes = base_passes(reasoner.lm)
    roll(Engine(reasoner, tiny.plan(1)), tiny.prompts(lengths), range(3), sampler)
    assert shapes[: len(pieces)] == pieces
    check_against_oracle(family, sampler, lengths, 3, tiny.plan(2, answer=3))


@two_families
def test_the_engine_equals_the_oracle_where_the_sampler_chooses_tokens(family, monkeypatch):
    monkeypatch.setitem(head.SORTED_AT_ONCE, "cpu", 3 * tiny.VOCABULARY)
    plan = tiny.plan(2, eos_id=tiny.EOS_IDS[family], answer=4)
    check_against_oracle(family, LastTokens(0.5, False), [5, 2], 4, plan)


def test_no_hook_stays_on_the_model():
    reasoner = tiny.reasoner("gpt2")
    engine = Engine(reasoner, tiny.plan(2))
    roll(engine, tiny.prompts([3]), range(2), MASKS)
    with pytest.raises(IndexError):
        engine.roll([[10**6]], tiny.draw(["a"], range(1)), MASKS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reasoner.lm.modules())


@pytest.mark.every_other
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)], ids=str)
def test_half_precision_latents_are_finite_and_near_those_of_float32(family, dtype, allowed):
    prompts, plan = tiny.prompts([1, 9, 4, 23]), tiny.plan(2)
    exact, half = (
        roll(Engine(tiny.reasoner(family, kind), plan), prompts, range(3), MASKS) for kind in (torch.float32, dtype)
    )
    assert half.latents_RTD.dtype == dtype
    assert half.latents_RTD.isfinite().all()
    assert half.answer_logprob_R.isfinite().all()
    distance = (half.latents_RTD.float() - exact.latents_RTD).square().mean().sqrt()
    assert distance < allowed * exact.latents_RTD.square().mean().sqrt()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_of_several_tokens_ends_an_answer_and_its_probability_counts(family):
    plan = tiny.plan(3, eos_id=tiny.EOS_IDS[family], answer=8, other_eos_ids=(3, 17, 21))
    check_against_oracle(family, NOISE, [5, 9], 4, plan)
