"""`engine.quantize`: the linear layers of a transformer's blocks in int8 or float8, through torchao.

Embeddings, the LM head and what a family adds beside the transformer (projector, latent head) stay as they were loaded.
A weight has one scale an output channel. Activations are quantised anew in every pass with one scale a token, so no
row's numbers depend on another's; the int8 products are sums of integers, which do not depend on their order either.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from latent_tts.engine.sites import find_blocks
from latent_tts.errors import bad_value

KEY = "engine.quantize"
MULTIPLES = {"int8": 8, "float8": 16}  # of a layer's two widths; torchao does others on a CPU, or silently not at all
FLOAT8_FROM = (8, 9)  # CUDA's compute capability


def check_device(kind: str, device: str) -> None:
    """Check that a device multiplies exactly what `quantize` will give it.

    Args:
        kind: `int8` or `float8`.
        device: a torch device.

    Raises:
        UsageError: it does not.
    """
    if kind == "float8":
        fit = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= FLOAT8_FROM
        needed = f"{device} has no float8 products: they take CUDA with compute capability {FLOAT8_FROM[0]}."
        if not fit:
            raise bad_value(KEY, kind, f"{needed}{FLOAT8_FROM[1]} or more\nengine.quantize=int8 runs on a CPU too")
        return
    from torchao.kernel import int_scaled_matmul

    # processors without VNNI may cut pairs of products off at 16 bits; the largest ones show it
    largest_SD = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    one_S1 = torch.ones(32, 1, device=device)
    products = int_scaled_matmul(largest_SD, largest_SD.t(), one_S1)
    if not bool((products == 64 * 127 * 127).all()):
        raise bad_value(KEY, kind, f"the int8 products of {device} overflow on this machine")


def quantize(lm: PreTrainedModel, kind: str) -> None:
    """Quantise the linear layers of a causal LM's blocks in place; GPT-2's `Conv1D` become `nn.Linear` before.

    Args:
        lm: on a device that `check_device` has let pass; in at most 32 bits for `int8`, in bfloat16 for `float8`.
        kind: `int8` or `float8`.

    Raises:
        UsageError: a block has weights that torchao would leave as they are.
    """
    blocks = find_blocks(lm)
    for parent in list(blocks.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv1D:
                setattr(parent, name, as_linear(child))
    _check_layers(blocks, kind)
    from torchao import quantization as torchao
    from torchao.quantization.quantize_.common import KernelPreference

    # torchao's settings of torch.compile are global, and its choice of kernels depends on what else is installed
    if kind == "int8":
        config = torchao.Int8DynamicActivationInt8WeightConfig(
            granularity=torchao.PerRow(), set_inductor_config=False, version=2
        )
    else:
        config = torchao.Float8DynamicActivationFloat8WeightConfig(
            granularity=torchao.PerRow(),
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
            version=2,
        )
    torchao.quantize_(blocks, config)


def as_linear(conv: Conv1D) -> nn.Linear:
    """The same layer with its weight the other way round."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear


def _check_layers(blocks: nn.Module, kind: str) -> None:
    """Raises UsageError unless every matrix of the blocks is the weight of a linear layer of a shape that is done."""
    multiple = MULTIPLES[kind]
    for name, module in blocks.named_modules():
        shapes = [tuple(weight.shape) for weight in module.parameters(recurse=False) if weight.dim() > 1]
        if shapes and type(module) is not nn.Linear:
            raise bad_value(KEY, kind, f"block {name} is a {type(module).__name__}, which torchao does not quantise")
        if any(width % multiple for shape in shapes for width in shape):
            raise bad_value(KEY, kind, f"takes layers whose widths are multiples of {multiple}, {name} has {shapes[0]}")
