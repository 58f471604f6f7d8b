"""What intrinsics are made of: processor instructions that no compiler finds by itself, as LLVM names them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

BYTE, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VOID, POINTER = ir.VoidType(), BYTE.as_pointer()
FLOATS = ir.VectorType(ir.FloatType(), 16)
VECTOR_BYTES = 64


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
