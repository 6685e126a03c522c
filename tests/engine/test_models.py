"""Families that no checkpoint here has: each equals the oracle, by the way that the proof chose for it."""

from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from against_oracle import EVERYWHERE, questions, roll
from marks import slow
from oracle import Oracle, plain_scores
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

from latent_tts.engine import proof
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.head import ModelLogits
from latent_tts.engine.proof import prove_reasoner, prove_reward_model
from latent_tts.engine.rollout import Engine
from latent_tts.engine.scoring import LatentScorer
from latent_tts.engine.state import KeyValueState
from latent_tts.errors import RunError, UsageError
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.types import Computation, Reasoner, RewardModel

FAST, SLOW = "shared-prefix", "transformers"
WAYS = {
    "gpt2": (FAST, "head", ""),
    "llama": (FAST, "head", ""),
    "llama_tied": (FAST, "head", ""),
    "qwen3": (FAST, "head", ""),
    "gpt_neox": (FAST, "head", ""),
    "mistral_wide": (FAST, "head", ""),
    "phi3": (FAST, "head", ""),
    "olmo2": (FAST, "head", ""),
    "smollm3": (FAST, "head", ""),
    "mixtral": (FAST, "head", ""),
    "qwen3_moe": (FAST, "head", ""),
    "granite": (FAST, "model", "does more to logits than its LM head"),
    "cohere": (FAST, "model", "does more to logits than its LM head"),
    "gemma2": (SLOW, "model", "attention scores are capped at 2.0"),
    "gpt_neo": (SLOW, "head", "the attention of GPTNeoModel cannot be replaced"),
    "mistral": (SLOW, "head", "not all tokens of a sequence of 96 tokens see all tokens before them"),
    "qwen2": (SLOW, "head", "not all tokens of a sequence of 96 tokens see all tokens before them"),
    "gemma3": (SLOW, "head", "not all tokens of a sequence of 96 tokens see all tokens before them"),
    "llama4": (FAST, "head", ""),
    "llama4_chunks": (SLOW, "head", "not all tokens of a sequence of 96 tokens see all tokens before them"),
    "deepseek_v3": (SLOW, "head", "shared-prefix attention: it fails with RuntimeError"),
    "gptj": (SLOW, "head", "the attention of GPTJModel cannot be replaced"),
    "gpt_bigcode": (FAST, "head", ""),
}
# of these no more is known than that they equal the oracle
UNTUNED = sorted(set(tiny.OTHER_CONFIGS) - set(WAYS))
QUICK = ("gpt_neo", "mistral", "gemma2", "gemma3", "granite", "cohere", "gpt_neox", "mixtral", "llama4")
EACH = [name if name in QUICK else slow(name) for name in WAYS]
NOISE, MASKS = Gaussian(0.5, False), Dropout(0.2, "residual_embedding", EVERYWHERE, "fresh")
LENGTHS, ROLLOUTS = [7, 2, 7], 2


def check(family, sampler, *, stop_id=None, dtype=torch.float32, change=None, check_every=1, rollouts=ROLLOUTS, **more):
    """Rollouts of ragged prompts beside the oracle's."""
    reasoner, prompts = tiny.reasoner(family, dtype), tiny.prompts(LENGTHS)
    if change is not None:
        change(reasoner.lm)
    plan = tiny.plan(3, answer=3, stop_id=stop_id, **more)
    oracle = Oracle(reasoner, plan, masked=bool(sampler.random_phases))
    engine = Engine(tiny.proven(reasoner), plan)
    found = roll(engine, prompts, range(rollouts), sampler)
    rows = list(product(range(len(prompts)), range(rollouts)))
    for row in range(0, len(rows), check_every):
        question, number = rows[row]
        wanted = oracle.roll(prompts[question], sampler, question_id=questions(prompts)[question], rollout=number)
        steps, scale = len(wanted.latents_TD), float(wanted.latents_TD.abs().max()) if len(wanted.latents_TD) else 1.0
        assert int(found.steps_R[row]) == steps
        torch.testing.assert_close(found.latents_RTD[row, :steps], wanted.latents_TD, rtol=0, atol=2e-4 * scale)
        assert found.answer_ids[row] == wanted.answer_ids
        assert float(found.answer_logprob_R[row]) == pytest.approx(wanted.logprob, abs=3e-3)
        assert float(found.answer_margin_R[row]) == pytest.approx(wanted.margin, abs=3e-3)
    return found


@pytest.mark.every_other
@pytest.mark.parametrize("family", WAYS)
def test_each_family_takes_the_way_that_is_right(family):
    attention, logits, reason = WAYS[family]
    for model in (tiny.reasoner(family, torch.float32), tiny.reward_model(family, torch.float32)):
        found = tiny.proven(model).computation
        assert found.attention == attention
        if isinstance(model, Reasoner):
            assert found.logits == logits
            assert reason in found.reason
            assert bool(reason) == bool(found.reason)


@pytest.mark.every_other
@pytest.mark.parametrize("family", EACH)
def test_rollouts_equal_the_oracle_under_dropout_everywhere(family):
    check(family, MASKS)


@pytest.mark.slow
@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("sampler", [Greedy(), NOISE, AnswerSampling(1.5, 0.9).over(NOISE)], ids=str)
def test_rollouts_equal_the_oracle(family, sampler):
    check(family, sampler)


@pytest.mark.parametrize("family", [slow(family) for family in UNTUNED])
def test_families_that_nobody_thought_of_equal_the_oracle(family):
    check(family, NOISE)


def test_a_site_that_is_not_run_is_found():
    reasoner = tiny.reasoner("llama", torch.float32)
    first = reasoner.lm.model.layers[0]
    first.attention, first.self_attn = first.self_attn, nn.ModuleList([first.self_attn])
    first.forward = lambda hidden_states, **more: hidden_states + first.attention(hidden_states, **more)[0]
    engine = Engine(replace(reasoner, computation=Computation(SLOW)), tiny.plan(2, answer=2))
    words = "branches of LlamaDecoderLayer cannot be masked: the attention branch of block 0 ran 0 times in"
    with pytest.raises(UsageError, match=words):
        roll(engine, tiny.prompts([3]), range(1), MASKS)


def test_a_branch_that_adds_its_input_itself_is_not_masked():
    config = MptConfig(d_model=32, n_heads=4, n_layers=1, expansion_ratio=2, max_seq_len=64, vocab_size=61)
    lm = MptForCausalLM(config).eval().requires_grad_(False)
    engine = Engine(tiny.proven(Reasoner(lm, lambda hidden: hidden), 32), tiny.plan(2, answer=2))
    with pytest.raises(UsageError, match="MptBlock cannot be masked: MptMLP adds what it gets itself"):
        roll(engine, tiny.prompts([3]), range(1), MASKS)


@pytest.mark.every_other
@pytest.mark.parametrize("family", ["mistral", slow("gpt_neo"), slow("gemma3"), slow("granite")])
@pytest.mark.parametrize("sampler", [NOISE, MASKS], ids=["noise", "dropout"])
def test_rows_that_stop_by_a_token_leave_no_trace(family, sampler):
    reasoner, prompts = tiny.proven(tiny.reasoner(family, torch.float32)), tiny.prompts(LENGTHS)
    for stop_id in range(tiny.VOCABULARY):
        steps = roll(Engine(reasoner, tiny.plan(3, answer=3, stop_id=stop_id)), prompts, range(4), sampler).steps_R
        if len(steps.unique()) > 2:
            break
    else:
        raise AssertionError("no token stops rows at different steps")
    found = check(family, sampler, stop_id=stop_id, rollouts=4)
    assert len(found.steps_R.unique()) > 2


@pytest.mark.parametrize("family", ["mistral", slow("gpt_neo"), slow("gemma2"), slow("granite")])
@pytest.mark.parametrize("sampler", [NOISE, Dropout(0.2, "residual_embedding", ["thoughts"], "fresh")], ids=str)
def test_as_many_parallel_sweeps_as_latents_equal_the_sequential_oracle(family, sampler):
    check(family, sampler, schedule=Jacobi(3, 2, "token"), latent_id=59)


@pytest.mark.parametrize("family", ["mistral", slow("llama"), slow("gemma2"), slow("granite"), slow("gpt_neo")])
def test_quantised_weights_equal_the_oracle_by_the_same_way(family):
    pytest.importorskip("torchao")
    from latent_tts.engine.quantization import quantize

    assert check(family, NOISE, change=lambda lm: quantize(lm, "int8"), check_every=2)


@pytest.mark.parametrize("family", ["gemma2", slow("qwen2"), slow("gpt_neo"), slow("cohere"), slow("granite")])
def test_scores_equal_a_plain_forward_pass(family):
    prompts = tiny.prompts(LENGTHS)
    latents_RTD = torch.randn(6, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).double()
    scores_RT = LatentScorer(tiny.proven(tiny.reward_model(family))).score(prompts, latents_RTD)
    for row, latents_TD in enumerate(latents_RTD):
        expected = plain_scores(family, prompts[row // 2], latents_TD)
        torch.testing.assert_close(scores_RT[row], expected, rtol=0, atol=1e-5)


def test_a_window_matters_from_the_sequence_on_that_is_longer():
    reasoner = tiny.reasoner("mistral_wide", torch.float32)
    assert prove_reasoner(reasoner, tiny.POSITIONS).attention == FAST
    assert prove_reasoner(reasoner, tiny.POSITIONS + 1).attention == SLOW
    assert prove_reasoner(reasoner, tiny.POSITIONS).attention == FAST  # and back again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [slow(family) for family in WAYS])
def test_half_precision_takes_the_same_way(family, dtype):
    attention, logits, _ = WAYS[family]
    found = prove_reasoner(tiny.reasoner(family, dtype), tiny.POSITIONS)
    assert (found.attention, found.logits) == (attention, logits)


@pytest.mark.every_other
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", ["scale", "order", "padding"])
def test_an_attention_that_is_not_the_models_is_found(monkeypatch, dtype, wrong):
    """The proof itself: each of these changes numbers on some rows alone, and must not pass."""
    right = KeyValueState.write_suffix

    def append(self, layer, key, value):
        if wrong == "scale":
            key = key * 1.3
        if wrong == "order":
            key = key.flip(0)
        return right(self, layer, key, value)

    monkeypatch.setattr(KeyValueState, "write_suffix", append)
    if wrong == "padding":
        lengths = KeyValueState._add_questions
        monkeypatch.setattr(
            KeyValueState, "_add_questions", lambda self, n: lengths(self, torch.full_like(n, int(n.max())))
        )
    found = prove_reasoner(tiny.reasoner("llama", dtype), 20)
    assert found.attention == SLOW
    assert "shared-prefix attention: hidden states are off by" in found.reason


def test_what_no_way_computes_right_is_refused(monkeypatch):
    reasoner = tiny.reasoner("gpt_neo", torch.float32)
    attention = reasoner.lm.transformer.h[0].attn.attention
    forward = attention.forward
    # only with a cache, as where a model loses its positions there
    monkeypatch.setattr(
        attention, "forward",
        lambda hidden, *args, layer_past=None, **kwargs: forward(
            hidden * (1 if layer_past is None else 1.1), *args, layer_past=layer_past, **kwargs
        ),
    )  # fmt: skip
    with pytest.raises(UsageError, match="GPTNeoForCausalLM cannot be run latent by latent: with transformers' own"):
        prove_reasoner(reasoner, 20)


def test_values_that_are_not_finite_are_named_as_such():
    reasoner = tiny.reasoner("llama", torch.float32)
    reasoner.lm.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="not finite in float32"):
        prove_reasoner(reasoner, 20)


@pytest.mark.parametrize("tied", [True, False])
def test_models_without_layers_pass(tied):
    config = {"vocab_size": 9, "n_embd": 8, "n_layer": 0, "n_head": 1, "n_positions": 32, **tiny.OWN_IDS}
    lm = tiny.GPT2LMHeadModel(tiny.GPT2Config(**config, tie_word_embeddings=tied)).eval().requires_grad_(False)
    assert prove_reasoner(Reasoner(lm, lambda hidden: hidden), 32) == proof.Computation()
    assert prove_reward_model(RewardModel(lm.base_model, lambda hidden: hidden[..., 0]), 32) == proof.Computation()


def test_the_proof_takes_ten_passes_of_a_token_at_most():
    reasoner, passes = tiny.reasoner("llama", torch.float32), []
    reasoner.lm.base_model.register_forward_hook(lambda _module, _args, out: passes.append(out.last_hidden_state.shape))
    prove_reasoner(reasoner, 20)
    assert len(passes) <= 10


def test_the_models_own_logits_need_no_second_pass():
    lm = tiny.reasoner("granite", torch.float32).lm
    hidden_RD = torch.randn(3, tiny.WIDTH)
    with torch.inference_mode():
        torch.testing.assert_close(ModelLogits(lm)(hidden_RD), lm.lm_head(hidden_RD) / 4.0)
    assert isinstance(lm.model.layers, nn.ModuleList)  # the model itself is as it was


@pytest.mark.parametrize(
    "lm",
    [
        lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61, **tiny.OWN_IDS)),
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
                max_position_embeddings=96, vocab_size=61, **tiny.OWN_IDS,
            )
        ),
    ],
    ids=["ALiBi", "a body in a body"],
)  # fmt: skip
def test_others_are_proven_too(lm):
    reasoner = Reasoner(lm().eval().requires_grad_(False), lambda hidden: hidden)
    assert prove_reasoner(reasoner, 32).attention in (FAST, SLOW)
    plan, prompts = tiny.plan(2, answer=2), tiny.prompts(LENGTHS)
    oracle_lm = tiny.plain_copy(reasoner.lm)
    found = roll(Engine(tiny.proven(reasoner, 32), plan), prompts, range(2), Greedy())
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            vectors = oracle_lm.get_input_embeddings()(torch.tensor(prompt))[None]
            for step in range(2):
                hidden = oracle_lm.base_model(inputs_embeds=vectors, use_cache=False).last_hidden_state[:, -1:]
                torch.testing.assert_close(found.latents_RTD[2 * row, step], hidden[0, 0], rtol=0, atol=1e-3)
                vectors = torch.cat([vectors, hidden], 1)
