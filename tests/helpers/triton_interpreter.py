"""Triton's interpreter (3.6), mended for NumPy 2.4 and for products in bfloat16; import it before any kernel."""

# pyright: reportMissingImports=false

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch, _create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widened(handle):
    if handle.dtype != tl.bfloat16:
        return handle
    data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._patch_lang_tensor = _patch_with_index
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _create_dot(self, _widened(a), _widened(b), *rest)
