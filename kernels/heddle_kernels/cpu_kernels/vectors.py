"""Processor instructions that no compiler finds by itself: AVX-512's look-up and bfloat16 products, AMX's tiles."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from heddle_kernels.nf4_weight import NF4_CODE

PANEL = 16  # output features that are computed side by side: the float32 numbers of a vector
BLOCK_PAIRS = 32  # a block's input features, by two: a bfloat16 product takes two at a time
TILE_ROWS = 16

_BYTE, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VOID, _POINTER = ir.VoidType(), _BYTE.as_pointer()
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_PAIRS = ir.VectorType(_INT32, 16)  # of bfloat16
_WORDS = ir.VectorType(_INT16, 32)
_VECTOR_BYTES = 64
_NIBBLES = 4  # of a word
_FETCH_AHEAD_BYTES = 4608  # eight blocks: the processor itself does not fetch ahead beyond a page
_CODE = torch.tensor(NF4_CODE).bfloat16().view(torch.int16).tolist()
# A word's lowest five bits look up, of which the fifth belongs to the next weight: both halves say the same.
_TABLE = ir.Constant(_WORDS, [code & 0xFFFF for code in _CODE] * 2)
_ZEROS = ir.Constant(_FLOATS, [0.0] * 16)
_ONLY_FIRST = ir.Constant(_PAIRS, [0] * 16)


@cache
def has_bfloat16_products() -> bool:
    features = get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512bf16"))


@cache
def has_tiles() -> bool:
    """Whether there are bfloat16 tiles (AMX) and the kernel lets this process use them, which has to be asked for.

    Source: the Linux kernel's documentation of XSTATE features, `arch_prctl(ARCH_REQ_XCOMP_PERM, 18)`.
    """
    features = get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16") and has_bfloat16_products()):
        return False
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    granted: bool = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    return granted


@intrinsic  # type: ignore[untyped-decorator]
def decode_block(_context: Any, words: Any, pairs: Any) -> Any:
    """One block of a panel, its 256 words (see `Nf4Panels`) -> pairs uint16 [BLOCK_PAIRS, PANEL, 2] of bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = _data(context, builder, signature, arguments)
        for i, weights in enumerate(_decoded(builder, source)):
            _store(builder, weights, target, i * _VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(words, pairs), generate


def _multiply_block(num_rows: int) -> Any:
    def multiply(_context: Any, x: Any, words: Any, scales: Any, totals: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_data, source, scale_data, total_data, _ = _data(context, builder, signature, arguments)
            row_bytes = builder.mul(arguments[4], _INT64(2))
            rows = [builder.gep(x_data, [builder.mul(_INT64(row), row_bytes)]) for row in range(num_rows)]
            # A product waits six cycles for the sum it adds to: eight sums keep the processor busy.
            num_sums = max(1, 8 // num_rows)
            sums = [[_ZEROS] * num_sums for _ in rows]
            for i, weights in enumerate(_decoded(builder, source)):
                for row, of_row in zip(rows, sums, strict=True):
                    pair = _everywhere(builder, _load(builder, row, 4 * i, _INT32))
                    of_row[i % num_sums] = _call(
                        builder,
                        "llvm.x86.avx512bf16.dpbf16ps.512",
                        _FLOATS,
                        of_row[i % num_sums],
                        builder.bitcast(weights, _PAIRS),
                        pair,
                    )
            scale = _load(builder, scale_data, 0, _FLOATS)
            for row, of_row in enumerate(sums):
                total = _load(builder, total_data, row * _VECTOR_BYTES, _FLOATS)
                while len(of_row) > 1:
                    of_row = [builder.fadd(a, b) for a, b in zip(of_row[::2], of_row[1::2], strict=True)]
                scaled = _call(builder, "llvm.fma.v16f32", _FLOATS, of_row[0], scale, total)
                _store(builder, scaled, total_data, row * _VECTOR_BYTES)
            return context.get_dummy_value()

        return types.void(x, words, scales, totals, stride), generate

    multiply.__doc__ = f"""Semantics: totals += scales · x Wᵀ over one block, for {num_rows} rows of x.

    x [rows, 64] bfloat16, `stride` elements apart; words as for `decode_block`; scales [PANEL]; totals [rows, PANEL].
    """
    return intrinsic(multiply)


multiply_block_1, multiply_block_2, multiply_block_4, multiply_block_8 = map(_multiply_block, (1, 2, 4, 8))


@intrinsic  # type: ignore[untyped-decorator]
def add_scaled_tile(_context: Any, totals: Any, products: Any, scales: Any, num_rows: Any) -> Any:
    """Semantics: totals += products · scales. totals and products [num_rows or more, PANEL]; scales [PANEL]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total_data, product_data, scale_data, _ = _data(context, builder, signature, arguments)
        scale = _load(builder, scale_data, 0, _FLOATS)
        with cgutils.for_range(builder, arguments[3]) as loop:
            offset = builder.mul(loop.index, _INT64(_VECTOR_BYTES))
            total_row, product_row = builder.gep(total_data, [offset]), builder.gep(product_data, [offset])
            total, product = _load(builder, total_row, 0, _FLOATS), _load(builder, product_row, 0, _FLOATS)
            _store(builder, _call(builder, "llvm.fma.v16f32", _FLOATS, product, scale, total), total_row, 0)
        return context.get_dummy_value()

    return types.void(totals, products, scales, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def shape_tiles(_context: Any, num_rows: Any) -> Any:
    """Tiles 0, 1 and 2 get that many rows, 3 and 4 get TILE_ROWS; all have 64 bytes a row. Until `release_tiles`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            shapes = builder.alloca(ir.ArrayType(_BYTE, 64))
            shapes.align = 64
        palette = builder.bitcast(shapes, _POINTER)
        builder.store(ir.Constant(shapes.type.pointee, None), shapes)
        builder.store(_BYTE(1), palette)
        rows = builder.trunc(arguments[0], _BYTE)
        for tile in range(5):
            width = builder.bitcast(builder.gep(palette, [_INT32(16 + 2 * tile)]), _INT16.as_pointer())
            builder.store(_INT16(_VECTOR_BYTES), width)
            builder.store(rows if tile < 3 else _BYTE(TILE_ROWS), builder.gep(palette, [_INT32(48 + tile)]))
        _call(builder, "llvm.x86.ldtilecfg", _VOID, palette)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def release_tiles(_context: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", _VOID)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_tile(_context: Any, tile: Any, values: Any, row_bytes: Any) -> Any:
    """A tile's rows from an array's beginning on, `row_bytes` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, data, _ = _data(context, builder, signature, arguments)
        _call(builder, "llvm.x86.tileloadd64", _VOID, _BYTE(tile.literal_value), data, arguments[2])
        return context.get_dummy_value()

    return types.void(tile, values, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_tile(_context: Any, tile: Any, values: Any) -> Any:
    """A tile's rows into an array, one right after another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, data = _data(context, builder, signature, arguments)
        number, row_bytes = _BYTE(tile.literal_value), _INT64(_VECTOR_BYTES)
        _call(builder, "llvm.x86.tilestored64", _VOID, number, data, row_bytes)
        return context.get_dummy_value()

    return types.void(tile, values), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def zero_tile(_context: Any, tile: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilezero", _VOID, _BYTE(tile.literal_value))
        return context.get_dummy_value()

    return types.void(tile), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_tile_product(_context: Any, total: Any, x: Any, weights: Any) -> Any:
    """Semantics: total += x W. total float32 [rows, 16]; x bfloat16 [rows, 32]; W [16 pairs, 16, 2]: tile numbers."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        tiles = (_BYTE(tile.literal_value) for tile in (total, x, weights))
        _call(builder, "llvm.x86.tdpbf16ps", _VOID, *tiles)
        return context.get_dummy_value()

    return types.void(total, x, weights), generate


def _decoded(builder: Any, words: Any) -> Any:
    """The vectors of a block's weights: each of 16 outputs by 2 inputs, in the order of the inputs."""
    for i in range(BLOCK_PAIRS // _NIBBLES):
        ahead = builder.gep(words, [_INT64(_FETCH_AHEAD_BYTES + i * _VECTOR_BYTES)])
        _call(builder, "llvm.prefetch.p0", _VOID, ahead, _INT32(0), _INT32(3), _INT32(1))
        here = _load(builder, words, i * _VECTOR_BYTES, _WORDS)
        for nibble in range(_NIBBLES):
            index = builder.lshr(here, ir.Constant(_WORDS, [4 * nibble] * 32))
            yield _call(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, _TABLE, index)


def _everywhere(builder: Any, pair: Any) -> Any:
    undefined = ir.Constant(_PAIRS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, pair, _INT32(0)), undefined, _ONLY_FIRST)


def _data(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Where arrays begin, as pointers to bytes; other arguments as they are."""
    return [
        builder.bitcast(context.make_array(kind)(context, builder, value).data, _POINTER)
        if isinstance(kind, types.Array)
        else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def _load(builder: Any, begin: Any, offset_bytes: int, kind: Any) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(begin, [_INT64(offset_bytes)]), kind.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, begin: Any, offset_bytes: int) -> None:
    target = builder.bitcast(builder.gep(begin, [_INT64(offset_bytes)]), value.type.as_pointer())
    builder.store(value, target).align = 1


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
