import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from latent_tts.checkpoint.files import check_shapes, check_sizes, sizes
from latent_tts.engine.cost import PassCost, Rates, RolloutCost, Shape, batch_costs
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi
from latent_tts.model.colar import Colar
from latent_tts.random.draw import Draw
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.types import Reasoner

LENGTH, VOCABULARY = 12, 50
SHAPE = Shape(layers=3, width=8, vocabulary=40, attention=8, keys=4, block_weights=500)
lengths = st.integers(0, 200)
OTHER_SIZES = {
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "qwen3_moe": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
    "granitemoe": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def gpt2(**changes):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, attn_implementation="eager", **changes)).eval()


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).eval()


MODELS = [
    pytest.param(gpt2(), id="gpt2"),
    pytest.param(gpt2(n_inner=48), id="gpt2-inner"),
    pytest.param(llama(), id="llama"),
    pytest.param(llama(num_key_value_heads=2), id="llama-grouped"),
    pytest.param(llama(num_key_value_heads=1, head_dim=16), id="llama-wide-heads"),
]


def shape_of(lm):
    return Shape.from_config(lm.config.to_dict())


def counted(lm, tokens, past=None):
    """Counted operations of the blocks and of the LM head, and the model's output."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = lm(torch.zeros(1, tokens, dtype=torch.long), past_key_values=past, use_cache=True)
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    head = counts[f"{type(lm).__name__}.lm_head"]
    angles = counts.get(f"{type(lm).__name__}.model.rotary_emb", 0)  # of positions: a product in older transformers
    return counts["Global"] - head - angles, head, output


@pytest.mark.parametrize("lm", MODELS)
def test_a_prefill_costs_what_is_counted_less_the_masked_half(lm):
    shape = shape_of(lm)
    blocks, head, _ = counted(lm, LENGTH)
    masked = shape.layers * 4 * shape.attention * LENGTH * (LENGTH - 1) / 2  # eager attention computes it nevertheless
    assert shape.pass_flops(LENGTH) == blocks - masked
    assert head == 2 * LENGTH * shape.width * shape.vocabulary


@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_blocks_of_other_families_have_the_weights_that_a_token_goes_through(kind):
    config = CONFIG_MAPPING[kind](**OTHER_SIZES[kind], vocab_size=VOCABULARY)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(tensor.shape) for name, tensor in lm.state_dict().items()}
    written = json.loads(config.to_json_string())
    check_sizes(written, Path("model"))
    check_shapes(written, shapes, Path("model"))
    shape = Shape.from_config(sizes(written, shapes))
    assert (shape.layers, shape.width, shape.attention) == (2, 32, 32)
    active = 0.0
    for name, tensor in lm.state_dict().items():
        if tensor.ndim > 1 and "embed" not in name and ".wte" not in name and "lm_head" not in name:
            is_expert = "experts." in name or tensor.ndim == 3
            active += tensor.numel() * (0.5 if is_expert else 1.0)
    assert shape.layers * shape.block_weights == active


@pytest.mark.parametrize("lm", MODELS)
def test_a_pass_after_earlier_tokens_costs_exactly_what_is_counted(lm):
    past = counted(lm, LENGTH)[2].past_key_values
    blocks, _, _ = counted(lm, 1, past)
    assert shape_of(lm).pass_flops(1, LENGTH) == blocks


@pytest.mark.every_other
@pytest.mark.parametrize("lm", MODELS)
def test_a_rollout_costs_its_passes_and_a_head_for_each_answer_token_and_the_eos(lm):
    shape = shape_of(lm)
    latents, forced, answer = 3, 1, 2
    past, total, head = counted(lm, LENGTH)[2].past_key_values, 0, 0
    for _ in range(latents + forced + answer):
        blocks, head, output = counted(lm, 1, past)
        past, total = output.past_key_values, total + blocks
    assert RolloutCost(shape, latents, forced).rollout_flops(LENGTH, latents, answer) == total + (answer + 1) * head


@pytest.mark.parametrize("lm", MODELS)
def test_cache_and_weights_take_the_bytes_of_their_tensors(lm):
    shape = shape_of(lm)
    past = counted(lm, LENGTH)[2].past_key_values
    tensors = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    assert shape.cache_bytes(LENGTH, 4) == sum(tensor.nbytes for tensor in tensors)
    matrices = [p for name, p in lm.named_parameters() if p.ndim == 2 and ".embed" not in name and ".wpe" not in name]
    assert shape.weight_bytes(4) == sum(p.nbytes for p in matrices)


@settings(derandomize=True, deadline=None)
@given(first=lengths, second=lengths, context=lengths)
def test_a_pass_costs_the_same_in_two_pieces(first, second, context):
    pieces = SHAPE.pass_flops(first, context) + SHAPE.pass_flops(second, context + first)
    assert SHAPE.pass_flops(first + second, context) == pieces


def test_what_of_the_prompt_is_a_rollouts_own_moves_from_the_question_to_the_rollout():
    plain = RolloutCost.of(SHAPE, 6, 1, (), (), looks_for_stop=False)
    last, whole = (RolloutCost.of(SHAPE, 6, 1, phases, (), False) for phases in (("thoughts",), ("prompt", "thoughts")))
    assert RolloutCost.of(SHAPE, 0, 1, ("thoughts",), (), looks_for_stop=False).own_last is False
    for own, tokens in ((last, 1), (whole, 20)):
        moved = SHAPE.pass_flops(tokens, 20 - tokens)
        assert own.rollout_flops(20, 6, 3) - plain.rollout_flops(20, 6, 3) == moved
        assert own.thinking_flops(20, 6) - plain.thinking_flops(20, 6) == moved
        assert plain.shared_flops(20) - own.shared_flops(20) == moved
    assert whole.shared_flops(20) == 0


def test_gpt2_costs_two_operations_a_weight_and_token():
    config = {"n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_head": 12, "n_inner": None}
    shape = Shape.from_config(config)
    assert shape.block_weights == 12 * 768**2
    assert shape.pass_flops(1, 0) == pytest.approx(2 * 85e6, rel=0.01)
    assert shape.weight_bytes(2) == pytest.approx(2 * 124e6, rel=0.01)


def test_the_floor_waits_for_operations_or_for_bytes():
    assert Rates(flops=10.0, bytes=2.0).floor_seconds([PassCost(30.0, 4.0), PassCost(5.0, 8.0)]) == 3.0 + 4.0


@settings(derandomize=True, deadline=None)
@given(data=st.data(), own=st.sampled_from(["", "last", "prompt"]), forced=st.integers(0, 2), stop=st.booleans())
def test_a_batch_needs_what_its_passes_need(data, own, forced, stop):
    questions, rollouts, item = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 2
    rows = questions * rollouts
    prompts_Q = data.draw(st.lists(st.integers(1, 9), min_size=questions, max_size=questions))
    steps_R = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    answers_R = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    repeated = data.draw(st.sampled_from([[], [(2, 1), (1, 0)]]))
    own_prompt, own_last = own == "prompt", int(own == "last")
    passes = RolloutCost(SHAPE, 4, forced, own_prompt, bool(own_last), repeated, stop)
    answers = None if answers_R is None else np.array(answers_R)
    batch = batch_costs(passes, item, np.array(prompts_Q), np.array(steps_R), answers)
    blocks, head = SHAPE.layers * SHAPE.block_weights * item, SHAPE.width * SHAPE.vocabulary * item
    one = SHAPE.cache_bytes(1, item)
    prompts_R = [prompt for prompt in prompts_Q for _ in range(rollouts)]

    def prefixes(going):
        """Tokens of prompts that a pass reads for the rows that it runs."""
        read = [prompts_R[row] for row in range(rows) if row in going]
        if not own_prompt:
            read = [prompts_Q[question] for question in sorted({row // rollouts for row in going})]
        return sum(read) - len(read) * own_last

    everything = range(rows)
    checks_R = [stop * min(steps + 1, 4) for steps in steps_R]
    thoughts = max(checks_R) * head + own_last * (blocks + one * (prefixes(everything) + rows))
    for position in range(1, max(steps_R)):
        suffixes = sum(position + own_last for steps in steps_R if steps > position)
        thoughts += blocks + one * (prefixes(everything) + suffixes)
    for tokens, before in repeated:
        thoughts += blocks + one * (prefixes(everything) + rows * (own_last + before + tokens))
    answers = 0
    for written in range(max(answers_R) + 1):
        going = [row for row in everything if answers_R[row] >= written]
        suffixes = sum(own_last + steps_R[row] + forced + written for row in going)
        answers += blocks + head + one * (prefixes(going) + suffixes)
    prefill = blocks + one * prefixes(everything)
    assert [work.bytes for work in batch] == pytest.approx([prefill, thoughts, answers])

    once = sum(map(passes.shared_flops, prompts_Q))
    each = sum(passes.rollout_flops(*row) for row in zip(prompts_R, steps_R, answers_R, strict=True))
    assert sum(work.flops for work in batch) == pytest.approx(once + each)


SAMPLERS = [Gaussian(0.1, False), Dropout(0.3, "ffn", ["thoughts"], "fresh"), Dropout(0.3, "ffn", ["prompt"], "fresh")]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["nothing", "last", "prompt"])
def test_the_engine_does_the_operations_of_its_batch(sampler):
    lm, latents, answer, prompts, n = gpt2(), 3, 4, [[1, 2, 3, 4, 5]] * 2, 3
    shape = shape_of(lm)
    engine = Engine(Reasoner(lm, lambda hidden: hidden), RolloutPlan(latents, [7], None, answer))
    draw = Draw.of(0, ["a", "b"], torch.arange(n).repeat(2, 1), shape.width, shape.layers)
    # the fused kernel of a CPU is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.roll(prompts, draw, sampler)
    # the token limit, not an eos, ends these answers: the last token is chosen and not run
    passes = RolloutCost.of(shape, latents, 1, sampler.random_phases, (), looks_for_stop=False)
    least = batch_costs(passes, 4, np.full(2, 5), np.full(6, latents), np.full(6, answer - 1))
    alone = len(prompts[0]) - bool(sampler.random_phases)  # tokens that run without the rollouts, or without the last
    copies = 6 if passes.own_prompt else 2
    masked_in_prefill = copies * shape.layers * 4 * shape.attention * alone * (alone - 1) / 2
    masked_for_the_last_latent = 6 * shape.layers * 4 * shape.attention
    expected = sum(work.flops for work in least) + masked_in_prefill + masked_for_the_last_latent
    assert counter.get_total_flops() == expected


def test_a_guess_made_of_another_rollout_costs_its_prompt_and_its_latents():
    lm, latents, prompts, n = gpt2(), 3, [[1, 2, 3, 4, 5]] * 2, 3
    shape, flops = shape_of(lm), {}
    for guess in ("zero", "greedy"):
        plan = RolloutPlan(latents, [7], None, 4, schedule=Jacobi(sweeps=2, guess=guess))
        engine = Engine(Reasoner(lm, lambda hidden: hidden), plan)
        draw = Draw.of(0, ["a", "b"], torch.arange(n).repeat(2, 1), shape.width, shape.layers)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            engine.roll(prompts, draw, Gaussian(0.1, False))
        flops[guess] = counter.get_total_flops()
    counted = 2 * RolloutCost.of(shape, latents, 1, (), (), looks_for_stop=False).guess_flops(len(prompts[0]))
    masked = 2 * shape.layers * 4 * shape.attention * len(prompts[0]) * (len(prompts[0]) - 1) / 2
    assert flops["greedy"] - flops["zero"] == counted + masked


@pytest.mark.parametrize(("family", "name"), [(Codi, "codi"), (Colar, "colar"), (Coconut, "coconut")])
def test_what_a_family_does_to_a_hidden_state_is_counted(family, name):
    adapter = family(name=name, checkpoint=f"shipped:{name}_arith", latents=6, recommended={})
    next_latent = adapter.load(device="cpu", dtype="float32").next_latent
    with FlopCounterMode(display=False) as counter:
        next_latent(torch.zeros(3, adapter.width))
    passes = RolloutCost(SHAPE, 3, 1, latent_weights=adapter.latent_weights)
    assert counter.get_total_flops() == passes.making_flops(3)
    assert (passes.making_flops(3) > 0) == (family is not Coconut)
    again = replace(passes, latent_weights=0)
    assert passes.thinking_flops(9, 3) - again.thinking_flops(9, 3) == passes.making_flops(3)


def test_scoring_reads_the_weights_twice_and_each_prompt_once():
    prefill, steps = SHAPE.scoring_cost([4, 2], np.array([3, 3, 1, 2]), item=4)
    blocks = SHAPE.layers * SHAPE.block_weights * 4
    assert prefill == PassCost(SHAPE.pass_flops(4) + SHAPE.pass_flops(2), blocks + SHAPE.cache_bytes(6, 4))
    rows = [(4, 3), (4, 3), (2, 1), (2, 2)]
    assert steps == PassCost(sum(SHAPE.scoring_flops(*row) for row in rows), blocks + SHAPE.cache_bytes(6 + 9, 4))
