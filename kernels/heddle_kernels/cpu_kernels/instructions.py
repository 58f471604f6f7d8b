"""What intrinsics are made of: processor instructions that no compiler finds by itself, as LLVM names them."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

BYTE, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VOID, POINTER = ir.VoidType(), BYTE.as_pointer()
FLOATS, NUMBERS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(INT32, 16)
VECTOR_BYTES = 64


@cache
def has_features(*names: str) -> bool:
    """Whether the processor that numba compiles for has all of these, by their names in LLVM: usually this one, but
    NUMBA_CPU_NAME may say otherwise."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{name}" for name in names} <= set(features.split(","))


def data_of(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Where arrays begin, as pointers to bytes; other arguments as they are."""
    return [
        builder.bitcast(context.make_array(kind)(context, builder, value).data, POINTER)
        if isinstance(kind, types.Array)
        else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def load(builder: Any, begin: Any, offset_bytes: int, kind: Any) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(begin, [INT64(offset_bytes)]), kind.as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: Any, value: Any, begin: Any, offset_bytes: int) -> None:
    target = builder.bitcast(builder.gep(begin, [INT64(offset_bytes)]), value.type.as_pointer())
    builder.store(value, target).align = 1


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def rounded_bits(builder: Any, numbers: Any) -> Any:
    """float32 vectors as integers, whose upper halves are the nearest bfloat16, ties to even; not for NaN, which adding
    could overflow."""
    bits = builder.bitcast(numbers, NUMBERS)
    last_place = builder.and_(builder.lshr(bits, ir.Constant(NUMBERS, [16] * 16)), ir.Constant(NUMBERS, [1] * 16))
    return builder.add(bits, builder.add(last_place, ir.Constant(NUMBERS, [0x7FFF] * 16)))
