"""`engine.quantize`: the linear layers of a transformer's blocks in int8 or float8, through torchao.

Embeddings, the LM head and what a family adds beside the transformer (projector, latent head) stay as they were loaded.
A weight has one scale per output channel. int8 quantises weights alone: it would enlarge the rounding by which
activations differ between batches, and rollouts would depend on their batch (docs/tuning.md has the figures). float8
quantises activations too, with one scale per token, so that no row's scale depends on another's.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from latent_tts.engine.device import is_gpu
from latent_tts.engine.sites import find_blocks
from latent_tts.errors import bad_value, require

KEY = "engine.quantize"
FLOAT8_FROM = (8, 9)  # CUDA's compute capability
FLOAT8_MULTIPLE = 16  # of a layer's two widths; torchao silently leaves others as they are


def check_products(kind: str, device: str) -> None:
    """Check that a device can do what `quantize` will ask of it.

    Args:
        kind: `int8`, which any device can do, or `float8`.
        device: a torch device.

    Raises:
        UsageError: it cannot.
    """
    fit = kind != "float8" or (is_gpu(device) and torch.cuda.get_device_capability(device) >= FLOAT8_FROM)
    needed = f"{device} has no float8 products: they take CUDA with compute capability {FLOAT8_FROM[0]}."
    require(KEY, kind, fit, f"{needed}{FLOAT8_FROM[1]} or more\nengine.quantize=int8 runs on a CPU too")


def quantize(lm: PreTrainedModel, kind: str) -> None:
    """Quantise the linear layers of a causal LM's blocks in place; GPT-2's `Conv1D` become `nn.Linear` before.

    Args:
        lm: on a device that passed `check_products`, in bfloat16 or (`int8`) float32.
        kind: `int8` or `float8`.

    Raises:
        UsageError: a block has weights that torchao would leave as they are.
    """
    blocks = find_blocks(lm)
    for parent in list(blocks.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv1D:
                setattr(parent, name, as_linear(child))
    for name, module in blocks.named_modules():  # torchao would leave other matrices as they are, silently
        shapes = [tuple(weight.shape) for weight in module.parameters(recurse=False) if weight.dim() > 1]
        allowed = f"block {name} is a {type(module).__name__}, which torchao does not quantise"
        require(KEY, kind, not shapes or type(module) is nn.Linear, allowed)
        if kind == "float8" and any(width % FLOAT8_MULTIPLE for shape in shapes for width in shape):
            needed = f"takes layers whose widths are multiples of {FLOAT8_MULTIPLE}"
            raise bad_value(KEY, kind, f"{needed}, {name} has {shapes[0]}")
    from torchao import quantization as torchao
    from torchao.quantization.quantize_.common import KernelPreference

    # torchao's settings of torch.compile are global, and its choice of kernels depends on what else is installed
    if kind == "int8":
        config = torchao.Int8WeightOnlyConfig(granularity=torchao.PerRow(), set_inductor_config=False, version=2)
    else:
        config = torchao.Float8DynamicActivationFloat8WeightConfig(
            granularity=torchao.PerRow(),
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
            version=2,
        )
    torchao.quantize_(blocks, config)


def as_linear(conv: Conv1D) -> nn.Linear:
    """The same layer with its weight transposed."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear
