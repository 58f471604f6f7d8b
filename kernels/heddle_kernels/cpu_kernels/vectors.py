"""AVX-512: sixteen NF4 weights by two in one look-up, and products of bfloat16 pairs summed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from heddle_kernels.cpu_kernels.instructions import (
    FLOATS,
    INT16,
    INT32,
    INT64,
    VECTOR_BYTES,
    VOID,
    call,
    data_of,
    has_features,
    load,
    rounded_bits,
    store,
)
from heddle_kernels.nf4_weight import NF4_CODE

PANEL = 16  # output features that are computed side by side: the float32 numbers of a vector
# A product waits for the sum that it adds to. Two sums keep the processor busy enough for a single row, whose weights
# are waited for anyway, and as every number of rows has two, a row's outcome does not depend on it.
NUM_SUMS = 2
CHUNK = 32  # inputs that one product of tiles sums over
BLOCK_PAIRS = 32  # a block's input features, by two: a bfloat16 product takes two at a time

_PAIRS = ir.VectorType(INT32, 16)  # of bfloat16
_WORDS = ir.VectorType(INT16, 32)
_NIBBLES = 4  # of a word
_FETCH_AHEAD_BYTES = 4608  # eight blocks: the processor itself does not fetch ahead beyond a page
_CODE = torch.tensor(NF4_CODE).bfloat16().view(torch.int16).tolist()
# A word's lowest five bits look up, of which the fifth belongs to the next weight: both halves say the same.
_TABLE = ir.Constant(_WORDS, [code & 0xFFFF for code in _CODE] * 2)
_EXACT_TABLE = ir.Constant(FLOATS, list(NF4_CODE))
_ZEROS = ir.Constant(FLOATS, [0.0] * 16)
_ONLY_FIRST = ir.Constant(_PAIRS, [0] * 16)


def has_bfloat16_products() -> bool:
    return has_features("avx512f", "avx512bw", "avx512bf16")


@intrinsic  # type: ignore[untyped-decorator]
def decode_block(_context: Any, words: Any, pairs: Any) -> Any:
    """One block of a panel, its 256 words (see `Nf4Panels`) -> pairs uint16 [BLOCK_PAIRS, PANEL, 2] of bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = data_of(context, builder, signature, arguments)
        for i, weights in enumerate(_decoded(builder, source)):
            store(builder, weights, target, i * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(words, pairs), generate


@intrinsic  # type: ignore[untyped-decorator]
def write_block(_context: Any, words: Any, scales: Any, weight: Any, row_bytes: Any, num_rows: Any) -> Any:
    """Semantics: weight = code · scale, rounded once to bfloat16, for one block of a panel.

    weight [num_rows, 64], rows `row_bytes` apart, of PANEL outputs at most; words and scales as for `decode_block`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, scale_data, target, stride, given = data_of(context, builder, signature, arguments)
        scale = load(builder, scale_data, 0, FLOATS)

        def exact(words: Any, shift: int) -> Any:
            """The weights of one nibble in float32, before they are rounded: look-ups read the lowest four bits."""
            index = builder.lshr(words, ir.Constant(_PAIRS, [shift] * 16))
            code = call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, _EXACT_TABLE, index)
            return builder.fmul(code, scale)

        pairs = list[Any]()  # vectors by input, the outputs side by side
        for i in range(BLOCK_PAIRS // _NIBBLES):
            here = load(builder, source, i * VECTOR_BYTES, _PAIRS)
            for nibble in range(_NIBBLES):
                even, odd = (rounded_bits(builder, exact(here, 4 * nibble + half)) for half in (0, 16))
                lower = builder.lshr(even, ir.Constant(_PAIRS, [16] * 16))
                pairs.append(builder.or_(lower, builder.and_(odd, ir.Constant(_PAIRS, [0xFFFF0000] * 16))))
        for half in range(2):
            for row, line in enumerate(_transposed(builder, pairs[16 * half : 16 * half + 16])):
                with builder.if_then(builder.icmp_signed("<", INT64(row), given)):
                    store(builder, line, builder.gep(target, [builder.mul(INT64(row), stride)]), half * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(words, scales, weight, types.int64, types.int64), generate


def _multiply_block(num_rows: int) -> Any:
    def multiply(_context: Any, x: Any, words: Any, scales: Any, totals: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_data, source, scale_data, total_data, _ = data_of(context, builder, signature, arguments)
            row_bytes = builder.mul(arguments[4], INT64(2))
            rows = [builder.gep(x_data, [builder.mul(INT64(row), row_bytes)]) for row in range(num_rows)]
            sums = [[_ZEROS] * NUM_SUMS for _ in rows]
            for i, weights in enumerate(_decoded(builder, source)):
                for row, of_row in zip(rows, sums, strict=True):
                    pair = _everywhere(builder, load(builder, row, 4 * i, INT32))
                    of_row[i % NUM_SUMS] = call(
                        builder,
                        "llvm.x86.avx512bf16.dpbf16ps.512",
                        FLOATS,
                        of_row[i % NUM_SUMS],
                        builder.bitcast(weights, _PAIRS),
                        pair,
                    )
            scale = load(builder, scale_data, 0, FLOATS)
            for row, of_row in enumerate(sums):
                total = load(builder, total_data, row * VECTOR_BYTES, FLOATS)
                scaled = call(builder, "llvm.fma.v16f32", FLOATS, builder.fadd(*of_row), scale, total)
                store(builder, scaled, total_data, row * VECTOR_BYTES)
            return context.get_dummy_value()

        return types.void(x, words, scales, totals, stride), generate

    multiply.__doc__ = f"""Semantics: totals += scales · x Wᵀ over one block, for {num_rows} rows of x.

    x [rows, 64] bfloat16, `stride` elements apart; words as for `decode_block`; scales [PANEL]; totals [rows, PANEL].
    """
    return intrinsic(multiply)


multiply_block_1, multiply_block_2, multiply_block_4, multiply_block_8 = map(_multiply_block, (1, 2, 4, 8))


def _decoded(builder: Any, words: Any) -> Iterator[Any]:
    """The vectors of a block's weights: each of 16 outputs by 2 inputs, in the order of the inputs."""
    for i in range(BLOCK_PAIRS // _NIBBLES):
        ahead = builder.gep(words, [INT64(_FETCH_AHEAD_BYTES + i * VECTOR_BYTES)])
        call(builder, "llvm.prefetch.p0", VOID, ahead, INT32(0), INT32(3), INT32(1))
        here = load(builder, words, i * VECTOR_BYTES, _WORDS)
        for nibble in range(_NIBBLES):
            index = builder.lshr(here, ir.Constant(_WORDS, [4 * nibble] * 32))
            yield call(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, _TABLE, index)


@intrinsic  # type: ignore[untyped-decorator]
def transpose_pairs(_context: Any, rows: Any, offsets: Any, width: Any, pairs: Any) -> Any:
    """Up to PANEL rows of `width` bfloat16 numbers, a multiple of CHUNK -> pairs [width / CHUNK, CHUNK / 2, PANEL, 2].

    rows flat, offsets [rows] where each begins; missing rows become zeros.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_data, _, _, target = data_of(context, builder, signature, arguments)
        given = context.make_array(offsets)(context, builder, arguments[1])
        num_rows = builder.extract_value(given.shape, 0)
        begins, exist = list[Any](), list[Any]()
        for row in range(PANEL):
            exists = builder.icmp_signed("<", INT64(row), num_rows)
            place = builder.gep(given.data, [builder.select(exists, INT64(row), INT64(0))])
            begins.append(builder.gep(row_data, [builder.mul(builder.load(place), INT64(2))]))
            exist.append(exists)
        with cgutils.for_range(builder, builder.udiv(arguments[2], INT64(CHUNK))) as loop:
            here = builder.mul(loop.index, INT64(CHUNK * 2))
            lines = [
                builder.select(exists, load(builder, builder.gep(begin, [here]), 0, _PAIRS), ir.Constant(_PAIRS, None))
                for begin, exists in zip(begins, exist, strict=True)
            ]
            there = builder.gep(target, [builder.mul(loop.index, INT64(PANEL * VECTOR_BYTES))])
            for i, line in enumerate(_transposed(builder, lines)):
                store(builder, line, there, i * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(rows, offsets, types.int64, pairs), generate


@intrinsic  # type: ignore[untyped-decorator]
def repeat_pairs(_context: Any, rows: Any, offset: Any, pairs: Any) -> Any:
    """PANEL bfloat16 numbers of flat rows from `offset` on -> pairs [PANEL, 2], each number twice."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_data, begin, target = data_of(context, builder, signature, arguments)
        halves = ir.VectorType(INT16, PANEL)
        values = load(builder, builder.gep(row_data, [builder.mul(begin, INT64(2))]), 0, halves)
        lower = builder.zext(values, _PAIRS)
        upper = builder.shl(lower, ir.Constant(_PAIRS, [16] * PANEL))
        store(builder, builder.or_(lower, upper), target, 0)
        return context.get_dummy_value()

    return types.void(rows, types.int64, pairs), generate


def _transposed(builder: Any, lines: list[Any]) -> list[Any]:
    """16 vectors of 16 pairs, rows for columns: blocks of 1, 2, 4 and 8 change places across the diagonal."""
    for size in (1, 2, 4, 8):
        for i in (line for line in range(16) if not line & size):
            upper, lower = lines[i], lines[i + size]
            # Of two lines, numbered through: what stays, and what comes from the other.
            kept = [k if not k & size else 16 + k - size for k in range(16)]
            gained = [k + size if not k & size else 16 + k for k in range(16)]
            lines[i] = builder.shuffle_vector(upper, lower, ir.Constant(_PAIRS, kept))
            lines[i + size] = builder.shuffle_vector(upper, lower, ir.Constant(_PAIRS, gained))
    return lines


def _everywhere(builder: Any, pair: Any) -> Any:
    undefined = ir.Constant(_PAIRS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, pair, INT32(0)), undefined, _ONLY_FIRST)
