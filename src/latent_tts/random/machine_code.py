"""What functions in machine code are made of. Imported where numba is installed (the extra `fast`).

`compiled` turns a Python function of one pointer into one that `cpu.run` takes. It reads its arguments by
`numbers_at` and `array_at`, and asks `next_piece` for work until there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

# sums may be vectorized and products fused; NaN and infinity stay what they are
FAST = {"reassoc", "contract", "nsz", "arcp"}
MOST_ARGUMENTS = 24
F32, U16, U32, I32 = np.float32, np.uint16, np.uint32, np.int32
HALF, ONE, LOWEST = F32(0.5), F32(1.0), F32(-87.0)  # below it exp is no normal number
# exp(x) = 2^k exp(r), r in [-ln 2 / 2, ln 2 / 2]; ln 2 in two parts, so that k ln 2 is exact
LOG2E, LN2_HIGH, LN2_LOW = F32(1.44269504088896341), F32(0.693359375), F32(-2.12194440e-4)
P0, P1, P2 = F32(1.9875691500e-4), F32(1.3981999507e-3), F32(8.3334519073e-3)
P3, P4, P5 = F32(4.1665795894e-2), F32(1.6666665459e-1), F32(5.0000001201e-1)


def compiled(function: Callable[[Any], None]) -> Any:
    """A function in machine code for `cpu.run`, kept on disk where a folder can be written."""
    make = {"fastmath": FAST, "error_model": "numpy"}
    try:
        return cfunc("void(voidptr)", cache=True, **make)(function)
    except RuntimeError:  # no such folder
        return cfunc("void(voidptr)", **make)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of such functions."""
    return njit(fastmath=FAST, error_model="numpy")(function)


def _next_piece(typingctx, numbers):  # type: ignore[no-untyped-def] # numba looks at the signature, annotations too
    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        integer = context.get_value_type(types.int64)
        return builder.atomic_rmw("add", builder.bitcast(values[0], integer.as_pointer()), integer(1), "monotonic")

    return types.int64(types.voidptr), code


def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


# takes the pointer that the function got: the number of a piece that no thread has taken yet; beyond the last one there
# is nothing left to do
next_piece: Any = intrinsic(_next_piece)
_as_pointer: Any = intrinsic(_pointer)


@njit(inline="always")
def numbers_at(pointer: Any) -> Any:
    """The numbers that `cpu.run` packed; those not given are not to be read."""
    return carray(pointer, (MOST_ARGUMENTS,), np.int64)


@njit(inline="always")
def array_at(address: Any, shape: Any, dtype: Any) -> Any:
    """The array of a tensor's address."""
    return carray(_as_pointer(address), shape, dtype)


@njit(inline="always")
def wide(bits: Any) -> Any:
    """The float32 of a bfloat16, whose bits NumPy holds as uint16."""
    return U32(U32(bits) << U32(16)).view(F32)


@njit(inline="always")
def narrow(value: Any) -> Any:
    """The bits of the nearest bfloat16; of two, the even one."""
    bits = F32(value).view(U32)
    return U16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


@njit(inline="always", fastmath=FAST, error_model="numpy")
def exp(x: Any) -> Any:
    """The exponential of x <= 0, to two units in the last place.

    Source: the polynomial is expf's of the Cephes library (Moshier 1992).
    """
    x = x if x > LOWEST else LOWEST
    k = np.floor(x * LOG2E + HALF)
    r = x - k * LN2_HIGH - k * LN2_LOW
    polynomial = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    return (polynomial * r * r + r + ONE) * I32((I32(k) + I32(127)) << I32(23)).view(F32)
