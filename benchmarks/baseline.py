"""The naive way to draw rollouts, as in the official code and `generate(num_return_sequences=N)`: the baseline.

The prompt is repeated N times and padded on the left before it is run. The cache grows by concatenation. The LM head
runs at every prompt position and in every latent step. Hidden states of all layers are kept. Every row is decoded to
the last token. Dropout, if any, masks the prompt too.

Source: ModalityDance/LatentTTS at 6657f20; `generate` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from command import clock
from latent_tts.engine.sites import BRANCHES, find_blocks


@contextmanager
def dropout_in_branches(lm: PreTrainedModel, rate: float) -> Iterator[None]:
    """Torch's own dropout on both residual branches: by GPT-2's modules, or by hooks on models without them."""
    own = [module for name, module in lm.named_modules() if name.endswith(("resid_dropout", "mlp.dropout"))]
    handles = []
    for module in own:
        assert isinstance(module, nn.Dropout)
        module.p = rate
        module.train(rate > 0)
    if not own and rate > 0:
        for block in find_blocks(lm):
            for _, names in BRANCHES:
                branch = next(getattr(block, name) for name in names if hasattr(block, name))
                handles.append(branch.register_forward_hook(_dropped(rate)))
    try:
        yield
    finally:
        for module in own:
            module.eval()
        for handle in handles:
            handle.remove()


def _dropped(rate: float) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        del module, args
        if isinstance(output, tuple):
            return F.dropout(output[0], rate), *output[1:]
        return F.dropout(output, rate)

    return hook


@torch.inference_mode()
def roll(
    lm: PreTrainedModel,
    prompts: list[list[int]],
    rollouts: int,
    *,
    latents: int,
    end_id: int,
    answer_tokens: int,
    sigma: float = 0.0,
    rate: float = 0.0,
) -> Tensor:
    """Draw `rollouts` rollouts of each prompt; returns answer ids (R, A), question-major.

    Args:
        lm: the causal LM, in evaluation mode.
        prompts: Q lists of token ids.
        rollouts: N.
        latents: T, at least 1.
        end_id: the token forced after the last latent.
        answer_tokens: A.
        sigma: standard deviation of the noise on latents.
        rate: dropout rate on both residual branches, from the prompt to the pass that computes the last latent.
    """
    rows = [prompt for prompt in prompts for _ in range(rollouts)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=lm.config)

    def run(**inputs: Tensor):
        nonlocal mask, positions
        output = lm(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        return output

    def new_latent(output) -> Tensor:
        hidden_R1D = output.hidden_states[-1][:, -1:]
        return hidden_R1D + sigma * torch.randn_like(hidden_R1D)

    with dropout_in_branches(lm, rate):
        latent_R1D = new_latent(run(input_ids=ids))
        for _ in range(latents - 1):
            latent_R1D = new_latent(run(inputs_embeds=latent_R1D))
    run(inputs_embeds=latent_R1D)
    token = torch.full((len(rows), 1), end_id, device=lm.device)
    answer = []
    for _ in range(answer_tokens):
        token = run(input_ids=token).logits[:, -1:].argmax(-1)
        answer.append(token)
    return torch.cat(answer, dim=1)


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, including work that is queued on the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = clock()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - started
