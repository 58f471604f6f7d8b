"""AMX: matrix tiles of 16 rows by 64 bytes, and bfloat16 products of them summed in float32."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from heddle_kernels.cpu_kernels.bits import compiled
from heddle_kernels.cpu_kernels.instructions import (
    BYTE,
    FLOATS,
    INT16,
    INT32,
    INT64,
    NUMBERS,
    POINTER,
    VECTOR_BYTES,
    VOID,
    call,
    data_of,
    has_features,
    load,
    rounded_bits,
    store,
)
from heddle_kernels.cpu_kernels.vectors import has_bfloat16_products

TILE_ROWS = 16

_HALVES = ir.VectorType(INT16, 16)


@cache
def has_tiles() -> bool:
    """Whether there are bfloat16 tiles (AMX) and the kernel lets this process use them, which has to be asked for.

    Source: the Linux kernel's documentation of XSTATE features, `arch_prctl(ARCH_REQ_XCOMP_PERM, 18)`.
    """
    if not (has_features("amx-tile", "amx-bf16") and has_bfloat16_products()):
        return False
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    granted: bool = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    return granted


@intrinsic  # type: ignore[untyped-decorator]
def add_scaled_tile(_context: Any, totals: Any, products: Any, scales: Any, num_rows: Any) -> Any:
    """Semantics: totals += products · scales. totals and products [num_rows or more, PANEL]; scales [PANEL]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total_data, product_data, scale_data, _ = data_of(context, builder, signature, arguments)
        scale = load(builder, scale_data, 0, FLOATS)
        with cgutils.for_range(builder, arguments[3]) as loop:
            offset = builder.mul(loop.index, INT64(VECTOR_BYTES))
            total_row, product_row = builder.gep(total_data, [offset]), builder.gep(product_data, [offset])
            total, product = load(builder, total_row, 0, FLOATS), load(builder, product_row, 0, FLOATS)
            store(builder, call(builder, "llvm.fma.v16f32", FLOATS, product, scale, total), total_row, 0)
        return context.get_dummy_value()

    return types.void(totals, products, scales, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_tile_rounded(_context: Any, y: Any, row_bytes: Any, change: Any, products: Any, num_rows: Any) -> Any:
    """Semantics: y = change[0] · (y − change[1]) + change[2] + products, rounded once to bfloat16 as `bits.narrow`
    does, in place.

    y [num_rows or more, 16], rows `row_bytes` apart; change [3, 16]; products [num_rows or more, 16].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y_data, stride, change_data, product_data, rows = data_of(context, builder, signature, arguments)
        scale, less, more = (load(builder, change_data, i * VECTOR_BYTES, FLOATS) for i in range(3))
        sixteen = ir.Constant(NUMBERS, [16] * 16)
        with cgutils.for_range(builder, rows) as loop:
            y_row = builder.gep(y_data, [builder.mul(loop.index, stride)])
            product_row = builder.gep(product_data, [builder.mul(loop.index, INT64(VECTOR_BYTES))])
            stored = builder.zext(load(builder, y_row, 0, _HALVES), NUMBERS)
            wide = builder.bitcast(builder.shl(stored, sixteen), FLOATS)
            changed = call(builder, "llvm.fma.v16f32", FLOATS, scale, builder.fsub(wide, less), more)
            total = builder.fadd(changed, load(builder, product_row, 0, FLOATS))
            is_nan = builder.fcmp_unordered("uno", total, total)
            upper = builder.lshr(rounded_bits(builder, total), sixteen)
            rounded = builder.select(is_nan, ir.Constant(NUMBERS, [0x7FC0] * 16), upper)
            store(builder, builder.trunc(rounded, _HALVES), y_row, 0)
        return context.get_dummy_value()

    return types.void(y, types.int64, change, products, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def shape_tiles(_context: Any, num_rows: Any) -> Any:
    """Tiles 0 to 4 get that many rows, 5 to 7 get TILE_ROWS; all have 64 bytes a row. Until `release_tiles`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            shapes = builder.alloca(ir.ArrayType(BYTE, 64))
            shapes.align = 64
        palette = builder.bitcast(shapes, POINTER)
        builder.store(ir.Constant(shapes.type.pointee, None), shapes)
        builder.store(BYTE(1), palette)
        rows = builder.trunc(arguments[0], BYTE)
        for tile in range(8):
            width = builder.bitcast(builder.gep(palette, [INT32(16 + 2 * tile)]), INT16.as_pointer())
            builder.store(INT16(VECTOR_BYTES), width)
            builder.store(rows if tile < 5 else BYTE(TILE_ROWS), builder.gep(palette, [INT32(48 + tile)]))
        call(builder, "llvm.x86.ldtilecfg", VOID, palette)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def release_tiles(_context: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", VOID)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_tile(_context: Any, tile: Any, values: Any, row_bytes: Any) -> Any:
    """A tile's rows from an array's beginning on, `row_bytes` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, data, _ = data_of(context, builder, signature, arguments)
        call(builder, "llvm.x86.tileloadd64", VOID, BYTE(tile.literal_value), data, arguments[2])
        return context.get_dummy_value()

    return types.void(tile, values, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_tile(_context: Any, tile: Any, values: Any, row_bytes: Any) -> Any:
    """A tile's rows into an array from its beginning on, `row_bytes` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, data, _ = data_of(context, builder, signature, arguments)
        call(builder, "llvm.x86.tilestored64", VOID, BYTE(tile.literal_value), data, arguments[2])
        return context.get_dummy_value()

    return types.void(tile, values, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def zero_tile(_context: Any, tile: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        call(builder, "llvm.x86.tilezero", VOID, BYTE(tile.literal_value))
        return context.get_dummy_value()

    return types.void(tile), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_tile_product(_context: Any, total: Any, x: Any, weights: Any) -> Any:
    """Semantics: total += x W. total float32 [rows, 16]; x bfloat16 [rows, 32]; W [16 pairs, 16, 2]: tile numbers."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        tiles = (BYTE(tile.literal_value) for tile in (total, x, weights))
        call(builder, "llvm.x86.tdpbf16ps", VOID, *tiles)
        return context.get_dummy_value()

    return types.void(total, x, weights), generate


@compiled
def rows_of_tiles(num_tokens: int) -> int:
    """Tokens of a tile: all tiles have as many, so the last begins among those of the one before, and computes them
    again with the same outcome."""
    num_tiles = (num_tokens + TILE_ROWS - 1) // TILE_ROWS
    return (num_tokens + num_tiles - 1) // num_tiles
