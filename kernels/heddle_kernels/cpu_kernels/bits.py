"""How kernels see numbers: stored as bfloat16, float16 or float32, computed with as float32.

numpy knows no bfloat16, so a tensor is viewed as an array whose integer type stands for its format: uint16 is
bfloat16, int16 is float16, float32 is itself. One kernel source then serves all three; numba compiles it for each.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

Stored = NDArray[Any]  # uint16, int16 or float32, see above
Floats = NDArray[np.float32]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_VIEWED_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
SUPPORTED = (*_VIEWED_AS, torch.float32)

_FOLDER = Path(__file__).parent
_SOURCES = blake2b(
    b"".join(file.read_bytes() for file in sorted([*_FOLDER.glob("*.py"), _FOLDER.parent / "nf4_weight.py"]))
).hexdigest()  # of all that kernels are built of

# What lets LLVM sum in vectors. Not "nnan" and "ninf": an infinite or undefined number must stay one.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}

# Without numba's own memory management a slice is a pointer and a length. With it every slice counts references, which
# made attention's inner loops several times slower; the price is that no kernel allocates, so callers bring the room.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def compiled(kernel: Kernel) -> Kernel:
    """Compile by numba at the first call, release the interpreter lock while it runs."""
    return _compile(kernel, _REORDER)


def compiled_in_order(kernel: Kernel) -> Kernel:
    """As `compiled`, where the order of operations is the accuracy. Products may still be fused with sums."""
    return _compile(kernel, set())


def _compile(kernel: Kernel, fastmath: set[str]) -> Kernel:
    """Kept on disk beside the kernel's file or where numba is told to; where neither can be written, nowhere."""
    optimised: Any
    try:
        optimised = njit(**_OPTIONS, fastmath=fastmath, cache=True)(kernel)
    except RuntimeError:  # numba found no place for its cache
        return cast(Kernel, njit(**_OPTIONS, fastmath=fastmath)(kernel))
    # numba compiles anew when the kernel's own file has changed, and kernels are built of functions from several.
    optimised._cache._cache_file._source_stamp = _SOURCES
    return cast(Kernel, optimised)


def as_stored(tensor: Tensor) -> Stored:
    """The same memory as a numpy array that kernels can read and write. Only for tensors in host memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    viewed_as = _VIEWED_AS.get(tensor.dtype)
    stored: Stored = tensor.numpy() if viewed_as is None else tensor.view(viewed_as).numpy()
    return stored


@intrinsic  # type: ignore[untyped-decorator]
def widen(_context: Any, stored: Any) -> Any:
    """A stored number as float32, exactly."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if stored == types.uint16:  # bfloat16 is the upper half of float32
            upper = builder.shl(builder.zext(bits, _INT32), ir.Constant(_INT32, 16))
            return builder.bitcast(upper, _FLOAT32)
        if stored == types.int16:
            return builder.fpext(builder.bitcast(bits, _FLOAT16), _FLOAT32)
        return bits

    return (types.float32(stored), generate) if stored in _STORED_TYPES else None


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_context: Any, value: Any, like: Any) -> Any:
    """float32 rounded to the nearest number, ties to even, that can be stored as `like` is."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if like == types.uint16:
            return _to_bfloat16(builder, number)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(number, _FLOAT16), _INT16)
        return number

    return (like(value, like), generate) if value == types.float32 and like in _STORED_TYPES else None


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(_context: Any, exponent: Any) -> Any:
    """2 to a whole float32 from -126 to 127: it becomes the exponent of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], _INT32), ir.Constant(_INT32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INT32, 23)), _FLOAT32)

    return (types.float32(exponent), generate) if exponent == types.float32 else None


_INT16, _INT32 = ir.IntType(16), ir.IntType(32)
_FLOAT16, _FLOAT32 = ir.HalfType(), ir.FloatType()
_STORED_TYPES = (types.uint16, types.int16, types.float32)


def _to_bfloat16(builder: Any, number: Any) -> Any:
    """The upper half, after adding just under half of its last place; NaN apart, which adding could overflow."""

    def constant(value: int) -> Any:
        return ir.Constant(_INT32, value)

    bits = builder.bitcast(number, _INT32)
    last_place = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(last_place, constant(0x7FFF))), constant(16))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), _INT16)
