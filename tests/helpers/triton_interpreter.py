"""Triton's interpreter (3.6), mended for NumPy 2.4 and for products and rounding in bfloat16; import it first."""

# pyright: reportMissingImports=false

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch, _create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_rounded(data, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()


def _widened(handle):
    if handle.dtype != tl.bfloat16:
        return handle
    data = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._patch_lang_tensor, interpreter._convert_float = _patch_with_index, _convert_rounded
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _create_dot(self, _widened(a), _widened(b), *rest)
