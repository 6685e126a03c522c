"""Training computes any causal LM as the model computes itself: its hidden states, its logits, its windows and caps."""

import json

import pytest
import tiny
import tiny_gguf
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, OPTConfig, OPTForCausalLM

from latent_tts.checkpoint.loading import name_body
from latent_tts.engine.head import ModelLogits
from latent_tts.errors import UsageError
from latent_tts.training.reasoner.batch import Sequences, check_computation, pad_rows
from latent_tts.training.reasoner.initial import copy_checkpoint, load_trainable_lm
from latent_tts.training.reasoner.lora import Lora
from latent_tts.training.recompute import recomputing_blocks
from latent_tts.training.reward_model.model import LatentRMModule

PROMPTS = [[3, 1, 2], [5, 4, 2, 0, 1, 7, 8]]
QUICK = ("granite", "gemma2", "llama4")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny.OTHER_CONFIGS]
RECOMPUTED = [
    pytest.param(name, marks=() if name == "gemma3" else pytest.mark.slow)
    for name in tiny.OTHER_CONFIGS
    if name != "ctrl"
]
REWARD_QUICK = ("mistral", "gemma2")
REWARD = [name if name in REWARD_QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny.OTHER_CONFIGS]


def random_lm(family, **more):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny.OTHER_CONFIGS[family](), **more).float()
    name_body(lm)
    return lm


def trainable(family, folder):
    random_lm(family).save_pretrained(folder)
    return load_trainable_lm(folder)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_latents_are_the_models_own(family, tmp_path):
    if family == "ctrl":
        pytest.skip("refused, see below")
    lm = trainable(family, tmp_path)
    check_computation(lm)
    assert lm.training
    lm.eval()
    embed, rows = lm.get_input_embeddings(), Sequences(lm)
    prompt_QL, mask_QL = pad_rows(PROMPTS, 0, torch.device("cpu"), left=True)
    latents_QTD = [rows.feed(embed(prompt_QL), mask_QL).last_hidden_state[:, -1:]]
    latents_QTD.append(rows.feed(latents_QTD[0]).last_hidden_state)
    tokens_QAD = embed(torch.tensor([[9, 8, 7], [6, 5, 4]]))
    vectors_QSD = torch.cat([latents_QTD[1], tokens_QAD], 1)
    layers = rows.fork().feed(vectors_QSD, every_layer=True).hidden_states
    hidden_QSD = rows.feed(vectors_QSD).last_hidden_state
    torch.testing.assert_close(layers[-1], hidden_QSD)
    logits_QAV = ModelLogits(lm)(hidden_QSD)
    for question, prompt in enumerate(PROMPTS):
        fed = [each[question] for each in (*latents_QTD, tokens_QAD)]
        vectors_1SD = torch.cat([embed(torch.tensor(prompt)), *fed])[None]
        wanted_AV = lm(inputs_embeds=vectors_1SD, use_cache=False).logits[0, -4:]
        torch.testing.assert_close(logits_QAV[question].log_softmax(-1), wanted_AV.log_softmax(-1), rtol=0, atol=5e-4)


def test_a_model_whose_head_does_not_run_alone_is_refused():
    lm = OPTForCausalLM(OPTConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                                  word_embed_proj_dim=32))  # fmt: skip
    with pytest.raises(UsageError, match="init=OPTForCausalLM: training cannot run its head alone"):
        check_computation(lm)


def test_a_model_that_training_does_not_compute_is_refused(tmp_path):
    lm = trainable("ctrl", tmp_path)
    words = r"init=CTRLLMHeadModel: training does not compute this model as it computes itself: log-prob"
    with pytest.raises(UsageError, match=words):
        check_computation(lm)


@pytest.mark.parametrize("family", RECOMPUTED)
def test_gradients_are_equal_when_activations_are_computed_again(family):
    lm, gradients = random_lm(family, attn_implementation="eager").eval(), []
    embed = lm.get_input_embeddings()
    prompt_QL, mask_QL = pad_rows(PROMPTS, 0, torch.device("cpu"), left=True)
    for wanted in (False, True):
        lm.zero_grad()
        with recomputing_blocks(lm, wanted):
            rows = Sequences(lm)
            latent_Q1D = rows.feed(embed(prompt_QL), mask_QL).last_hidden_state[:, -1:]
            other = rows.fork().feed(embed(torch.tensor([[9, 8], [6, 5]]))).last_hidden_state
            hidden_Q1D = rows.feed(rows.feed(latent_Q1D).last_hidden_state).last_hidden_state
            (hidden_Q1D.square().mean() + other.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("family", REWARD)
def test_scores_in_training_are_those_of_plain_rows(family):
    module = LatentRMModule(random_lm(family), seed=0).train()
    lengths_Q = torch.tensor([len(prompt) for prompt in PROMPTS])
    prompt_QL = pad_rows(PROMPTS, 0, torch.device("cpu"), left=False)[0]
    latents_QNTD = torch.randn(2, 3, 2, tiny.WIDTH)
    logits_QNT = module(prompt_QL, lengths_Q, latents_QNTD)
    embed: nn.Module = module.backbone.get_input_embeddings()
    for question, prompt in enumerate(PROMPTS):
        for rollout in range(3):
            vectors_1SD = torch.cat([embed(torch.tensor(prompt)), latents_QNTD[question, rollout]])[None]
            hidden_1SD = module.backbone(inputs_embeds=vectors_1SD, use_cache=False).last_hidden_state
            wanted_T = module.classifier(hidden_1SD[0, -2:])[:, 0]
            torch.testing.assert_close(logits_QNT[question, rollout], wanted_T, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad(logits_QNT.sum(), module.classifier.weight)
    assert gradients[0].abs().max() > 0


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama4", r"Llama4ForCausalLM cannot be run with it \(.*\); .*q_proj"),
        ("qwen3_moe", r"PEFT would set alpha_pattern=.*q_proj"),
    ],
)
def test_an_adapter_that_could_not_be_joined_is_refused_before_training(family, words):
    with pytest.raises(UsageError, match=rf"lora\.targets=null: {words}"):
        Lora(rank=2, alpha=4, targets=None, dropout=0.0).attach(random_lm(family), [], 0)
    targets = ["q_proj", "v_proj"]
    assert Lora(rank=2, alpha=4, targets=targets, dropout=0.0).attach(random_lm(family), [], 0) is not None


def test_biases_of_an_lm_head_grow_with_it(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    vocabulary = len(tiny_gguf.vocabulary())
    config = AutoConfig.for_model("phi", **tiny.SHAPE | tiny.OWN_IDS | {"vocab_size": vocabulary})
    before = AutoModelForCausalLM.from_config(config)
    nn.init.normal_(before.lm_head.bias)
    before.save_pretrained(tmp_path / "old")
    tiny_gguf.tokenizer().save(str(tmp_path / "old" / "tokenizer.json"))
    copy_checkpoint(tmp_path / "old", tmp_path / "new", ["<a>", "<b>"], "<|im_start|>")
    bias_V = load_trainable_lm(tmp_path / "new").lm_head.bias.detach()
    torch.testing.assert_close(bias_V, torch.cat([before.lm_head.bias, before.lm_head.bias.mean().expand(2)]))


def test_the_engine_validates_a_model_with_caps_as_it_computes_itself(ltts, place):
    folder = place / "gemma"
    config = Gemma2Config(
        **tiny.SHAPE | {"vocab_size": len(tiny_gguf.vocabulary()), "max_position_embeddings": 256},
        head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_gguf.tokenizer().save(str(folder / "tokenizer.json"))
    rows = [{"question": f"{a} plus 3?", "answer": a + 3, "steps": [f"<<{a}+3={a + 3}>>"]} for a in range(20)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = ltts(
        "train-reasoner", "model=coconut", "init=gemma", "task=jsonl", "task.path=rows.jsonl", "device=cpu",
        "output=out", "optimization.batch=4", "valid_questions=2", "model.latents=1", "recipe.written_updates=1",
        "recipe.stage_updates=[]", "recipe.final_updates=1", "lora.rank=2", "validation.every=1",
        "validation.rollouts=2", "validation.max_answer_tokens=4", "optimization.bf16=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "validation takes longer: attention scores are capped at 2.0; the model does more to logits" in done.err
