"""The 4-bit base matmul as Triton kernels: a fused one for up to 128 tokens, and writing the weights out for more.

Few tokens read the whole weight once, so bytes decide: the weights are decoded in registers, right in the layout that
the tensor cores take (see `nf4_weight`), and they come first in `tl.dot`, because wgmma wants 64 rows of its first
operand but only 16 columns of its second. A layer too small to fill the GPU is split along the input; every split
writes its own float32 sums, and whoever reads them adds them up in order, so a result never depends on timing.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle_kernels.nf4_weight import CELL, CELL_BYTES, CELL_SCALES, NF4_CODE, Nf4Weight
from heddle_kernels.triton_kernels.target import INTERPRETED

MAX_TOKENS = 128  # of one nf4_gemm: above, writing the weights out once costs less than decoding them again
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TileShape:
    """What one program computes, and how it applies the absmax."""

    tokens: int
    row_cells: int  # cells above one another: the more, the less often the activations are read
    num_warps: int
    scale: str  # "accumulator": multiply the float32 sums of a block, exact; "weight": the decoded weights, cheaper


# 64 tokens' activations, read again for every 128 rows, would be twice the bytes of the weights: higher tiles there.
# The accumulator's multiplications grow with the tokens, so at 128 the weights are scaled instead.
TILE_SHAPES = (
    TileShape(16, 1, 4, "accumulator"),
    TileShape(32, 1, 4, "accumulator"),
    TileShape(64, 2, 8, "accumulator"),
    TileShape(128, 2, 8, "weight"),
)
# Without Hopper's wgmma both operands and the sums lie in registers, and larger tiles would not fit.
MMA_TILE_SHAPES = (*TILE_SHAPES[:2], TileShape(64, 1, 8, "accumulator"), TileShape(128, 1, 8, "weight"))
FLOAT32_TILE_SHAPE = TILE_SHAPES[0]  # without tensor cores nor would they
NUM_STAGES = 3  # cells in flight: a program's loads are this many steps ahead of its sums
PROCESSORS = 132  # of an H100 or H200; a constant, so that a layer's splits are the same on every machine
PROGRAMS_PER_PROCESSOR = 3  # what their registers allow of 32-token tiles: while one waits for bytes, others decode
MIN_STEPS = 4  # cells of a split, so that filling its pipeline and writing its sums stay a small part
MAX_SPLITS = 16


def splits_for(in_features: int, num_rows: int) -> int:
    """Into how many parts of the input a layer is cut: depends on its shape and on nothing else.

    Enough to give every processor its programs, unless the parts became too short; but in any case one program each.
    """
    num_steps, num_tiles = in_features // CELL, triton.cdiv(num_rows, CELL)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * PROCESSORS, num_tiles)
    allowed = max(num_steps // MIN_STEPS, triton.cdiv(PROCESSORS, num_tiles))
    splits = min(wanted, allowed, num_steps, MAX_SPLITS)
    return int(triton.cdiv(num_steps, triton.cdiv(num_steps, splits)))  # none is left without a cell


def tile_shape_for(num_tokens: int, dtype: torch.dtype, has_wgmma: bool) -> TileShape:
    """The smallest that takes all tokens, so that weights are decoded once; float32 takes several."""
    if dtype == torch.float32:
        return FLOAT32_TILE_SHAPE
    shapes = TILE_SHAPES if has_wgmma else MMA_TILE_SHAPES
    return next(shape for shape in shapes if shape.tokens >= num_tokens)


def supports(weight: Nf4Weight, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot multiply activations of `dtype` by this weight, or None if they can."""
    if dtype not in DTYPES:
        return f"activations of {dtype} are not among {', '.join(map(str, DTYPES))}"
    device = weight.packed.device
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the weight lies on {device}, the kernels run on NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@functools.cache
def _has_wgmma(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] == 9


def nf4_gemm(x: Tensor, weight: Nf4Weight, workspace: Tensor | None = None) -> Tensor:
    """Multiply up to 128 tokens by the weight; whoever reads the result sums over its splits.

    Semantics: workspace.sum(0)[:, : weight.num_rows] = x Wᵀ.
    x [num_tokens, in_features], rows contiguous -> workspace [splits, num_tokens, num_padded_rows] float32, made here
    unless given. Raises ValueError for another number of tokens.
    """
    num_tokens, in_features = x.shape
    if not 1 <= num_tokens <= MAX_TOKENS or in_features != weight.in_features or x.stride(1) != 1:
        raise ValueError(f"x of {tuple(x.shape)} is not 1 to {MAX_TOKENS} rows of {weight.in_features}")
    splits = splits_for(in_features, weight.num_rows)
    if workspace is None:
        workspace = x.new_empty(splits, num_tokens, weight.num_padded_rows, dtype=torch.float32)
    shape = tile_shape_for(num_tokens, x.dtype, _has_wgmma(x.device))
    num_tiles = triton.cdiv(weight.packed.shape[0], shape.row_cells)
    _nf4_gemm_kernel[num_tiles, splits, triton.cdiv(num_tokens, shape.tokens)](
        x,
        weight.packed,
        weight.absmax,
        workspace,
        num_tokens,
        x.stride(0),
        weight.packed.shape[1],
        triton.cdiv(weight.packed.shape[1], splits),
        weight.num_padded_rows,
        TOKENS=shape.tokens,
        ROW_CELLS=shape.row_cells,
        SCALE=shape.scale,
        DECODE=DECODE,
        UPCAST=INTERPRETED,
        num_warps=shape.num_warps,
        num_stages=NUM_STAGES,
    )
    return workspace


def reduce(workspace: Tensor, base_bias: Tensor | None, out: Tensor) -> Tensor:
    """Finish `nf4_gemm` where no adapter does: a batch of base tokens only.

    Semantics: out = round(workspace.sum(0) + base_bias), summed in float32 in the order of the splits.
    workspace [splits, num_tokens, num_padded_rows] float32; base_bias [num_rows] or None; out [num_tokens, num_rows].
    """
    splits, num_tokens, num_padded_rows = workspace.shape
    num_rows = out.shape[1]
    _reduce_kernel[num_tokens, triton.cdiv(num_rows, REDUCE_BLOCK)](
        workspace,
        base_bias,
        out,
        num_tokens,
        num_padded_rows,
        num_rows,
        out.stride(0),
        SPLITS=splits,
        HAS_BIAS=base_bias is not None,
        BLOCK=REDUCE_BLOCK,
        UPCAST=INTERPRETED,
    )
    return out


def dequantize(weight: Nf4Weight, buffer: Tensor) -> Tensor:
    """Write the weights out, for a matmul of more tokens than `nf4_gemm` takes.

    Semantics: W = round(code · absmax), computed in float32.
    buffer: at least num_rows * in_features elements, flat, shared by all layers -> its beginning as a view
    [num_rows, in_features].
    """
    out = buffer[: weight.num_rows * weight.in_features].view(weight.num_rows, weight.in_features)
    _dequantize_kernel[weight.packed.shape[0], weight.packed.shape[1]](
        weight.packed, weight.absmax, out, weight.num_rows, weight.packed.shape[1], DECODE=DECODE
    )
    return out


# Decoding. A warp's 32 lanes keep the table of 16 codes, twice, one code a lane; `shfl` fetches the code of a nibble
# from the lane of that number (it looks at 5 bits: the highest, the next nibble's, chooses between two equal copies).
# The interpreter has no assembler: there `DECODE` is "ref" and looks the codes up in a tensor.

DECODE = "ref" if INTERPRETED else "shfl"


def _code_bits(dtype: torch.dtype) -> list[int]:
    """Each code as a 32-bit word: one float32, or the same 16-bit float in both halves."""
    codes = torch.tensor(NF4_CODE).to(dtype)
    if dtype == torch.float32:
        return [bits & 0xFFFFFFFF for bits in codes.view(torch.int32).tolist()]
    return [(bits & 0xFFFF) * 0x10001 for bits in codes.view(torch.int16).tolist()]


def _lane_code_asm(dtype: torch.dtype) -> str:
    """$0 = the code of this lane. Done once a program, so a chain of 16 comparisons will do."""
    moves = (f"setp.eq.u32 is, lane, {i}; @is mov.b32 $0, {bits};" for i, bits in enumerate(_code_bits(dtype)))
    start = ".reg .b32 lane; .reg .pred is; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mov.b32 $0, 0;"
    return f"{{ {start} {' '.join(moves)} }}"


def _decode_asm(dtype: torch.dtype) -> str:
    """Four bytes in one register (nibble n is bits 4n to 4n + 3) to the codes of their high, then of their low nibbles.

    Sixteen-bit codes come out two a register: $0, $1 high, $2, $3 low; $4 is the bytes, $5 the lane's code.
    Float32 codes one a register: $0 to $3 high, $4 to $7 low; $8 is the bytes, $9 the lane's code.
    """
    is_wide = dtype == torch.float32
    packed, lane_code = ("$8", "$9") if is_wide else ("$4", "$5")
    lines = [".reg .b32 code<8>, index<8>;"]
    for n in range(8):
        lines.append(f"shr.u32 index{n}, {packed}, {4 * n};")
        lines.append(f"shfl.sync.idx.b32 code{n}, {lane_code}, index{n}, 31, -1;")
    high, low = (1, 3, 5, 7), (0, 2, 4, 6)
    if is_wide:
        lines += [f"mov.b32 ${out}, code{n};" for out, n in enumerate(high + low)]
    else:
        pairs = (high[:2], high[2:], low[:2], low[2:])
        lines += [f"prmt.b32 ${out}, code{a}, code{b}, 0x5410;" for out, (a, b) in enumerate(pairs)]
    return f"{{ {' '.join(lines)} }}"


def _decode_operands(dtype: torch.dtype) -> str:
    """Of `_decode_asm`: its outputs, the bytes, and the lane's code once for each byte though one would do."""
    return ",".join(["=r"] * (8 if dtype == torch.float32 else 4) + ["r"] * 5)


_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
_CODES = tl.constexpr({kind: torch.tensor(NF4_CODE).to(dtype).tolist() for kind, dtype in _DTYPES.items()})
_LANE_CODE_ASM = tl.constexpr({kind: _lane_code_asm(dtype) for kind, dtype in _DTYPES.items()})
_DECODE_ASM = tl.constexpr({kind: _decode_asm(dtype) for kind, dtype in _DTYPES.items()})
_DECODE_OPERANDS = tl.constexpr({kind: _decode_operands(dtype) for kind, dtype in _DTYPES.items()})
_HALVES = tl.constexpr({kind: (kind, kind) for kind in _DTYPES})
_CELL = tl.constexpr(CELL)
_CELL_BYTES = tl.constexpr(CELL_BYTES)
_CELL_SCALES = tl.constexpr(CELL_SCALES)
REDUCE_BLOCK = 1024  # columns of a program of `reduce`


@triton.jit
def _code_table(unused, DTYPE: tl.constexpr, DECODE: tl.constexpr):
    """What `_decode` looks codes up in: this lane's code, or all 16 codes as a tensor (rounded to DTYPE, float32).

    unused: any scalar, because Triton's assembler wants an input.
    """
    if DECODE == "shfl":
        table = tl.inline_asm_elementwise(_LANE_CODE_ASM[DTYPE], "=r,r", [unused], tl.int32, is_pure=True, pack=1)
    else:
        table = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            table = tl.where(tl.arange(0, 16) == i, _CODES[DTYPE][i], table)
    return table


@triton.jit
def _decode(packed, table, DTYPE: tl.constexpr, DECODE: tl.constexpr):
    """Cells' bytes to the codes of their two halves (high nibbles, low nibbles), as `_by_row` arranges them."""
    if DECODE == "shfl":
        first, second = tl.inline_asm_elementwise(
            _DECODE_ASM[DTYPE], _DECODE_OPERANDS[DTYPE], [packed, table], _HALVES[DTYPE], is_pure=True, pack=4
        )
    else:
        nibbles = packed.reshape(packed.numel)
        first = tl.gather(table, (nibbles >> 4).to(tl.int32), 0).reshape(packed.shape)
        second = tl.gather(table, (nibbles & 15).to(tl.int32), 0).reshape(packed.shape)
    return _by_row(first), _by_row(second)


@triton.jit
def _by_row(stored):
    """Cells above one another as stored, [cells, CELL_BYTES], with every bit of a row and an input an axis.

    -> [2 cells, 4, 2, 8 (a row), 2, 2, 2, 4, 2 (an input)]; reshaped, [128 cells, 64 inputs].
    """
    cells: tl.constexpr = stored.shape[0]
    axes = stored.reshape(cells, 2, 2, 4, 8, 4, 2, 2, 2, 2).permute(0, 2, 3, 8, 4, 1, 6, 7, 5, 9)
    return axes.reshape(2 * cells, 4, 2, 8, 2, 2, 2, 4, 2)


@triton.jit
def _scale_ptrs(absmax_ptr, first_row_cell, num_row_cells, num_steps, ROW_CELLS: tl.constexpr):
    """Where the absmax of the first cells of a tile lie: [256 ROW_CELLS, 4], four values of two rows in each line.

    Four lanes share a row in the tensor cores' layout, so there are four equal lines: each lane reads for itself, and
    nothing has to be exchanged.
    """
    reader = tl.arange(0, 2 * _CELL * ROW_CELLS)  # of a cell [2, 4, 8, 4 lanes]
    row_cell = tl.minimum(first_row_cell + reader // (2 * _CELL), num_row_cells - 1).to(tl.int64)
    lines = row_cell * num_steps * _CELL_SCALES + reader % (2 * _CELL) // 4 * 4
    return absmax_ptr + lines[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _load_scales(scale_ptrs):
    """The absmax of cells above one another -> two of [2 cells, 4, 2, 8 (a row), 4 lanes], for the two halves."""
    scales = tl.load(scale_ptrs).reshape(scale_ptrs.shape[0] // 128, 4, 8, 4, 2, 2)
    return tl.split(scales.permute(0, 1, 4, 2, 3, 5))


@triton.jit(do_not_specialize=["num_tokens", "steps_per_split"])
def _nf4_gemm_kernel(
    x_ptr,  # [num_tokens, in_features]
    packed_ptr,  # [row cells, column cells, CELL_BYTES] uint8
    absmax_ptr,  # [row cells, column cells, CELL_SCALES] float16 or float32
    workspace_ptr,  # [splits, num_tokens, num_padded_rows] float32
    num_tokens,
    x_stride,
    num_steps,  # column cells
    steps_per_split,
    num_padded_rows,
    TOKENS: tl.constexpr,
    ROW_CELLS: tl.constexpr,
    SCALE: tl.constexpr,
    DECODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The transposed tile [128 ROW_CELLS rows, TOKENS] of the output, of one split."""
    first_row_cell, split = tl.program_id(0) * ROW_CELLS, tl.program_id(1)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, num_steps)
    # A tile that reaches below the matrix reads its last cell again, which costs no memory traffic.
    row_cell = tl.minimum(first_row_cell + tl.arange(0, ROW_CELLS), num_padded_rows // _CELL - 1).to(tl.int64)
    packed_ptrs = packed_ptr + (row_cell * num_steps * _CELL_BYTES)[:, None] + tl.arange(0, _CELL_BYTES)[None, :]
    scale_ptrs = _scale_ptrs(absmax_ptr, first_row_cell, num_padded_rows // _CELL, num_steps, ROW_CELLS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    is_token = token[None, :] < num_tokens
    x_ptrs = x_ptr + token[None, :] * x_stride + tl.arange(0, _CELL // 2)[:, None]  # [64 inputs, TOKENS]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    table = _code_table(split, dtype, DECODE)
    total = tl.zeros((_CELL * ROW_CELLS, TOKENS), tl.float32)
    first_scale, second_scale = _load_scales(scale_ptrs + begin * _CELL_SCALES)
    for step in range(begin, end):
        # Weights are read once: let them leave the cache first. (Today Triton's asynchronous copies drop this hint.)
        packed = tl.load(packed_ptrs + step * _CELL_BYTES, eviction_policy="evict_first")
        first_x = tl.load(x_ptrs + step * _CELL, mask=is_token, other=0.0)
        second_x = tl.load(x_ptrs + step * _CELL + _CELL // 2, mask=is_token, other=0.0)
        following = tl.minimum(step + 1, end - 1)  # the scales one step ahead: nothing else would hide their latency
        next_first_scale, next_second_scale = _load_scales(scale_ptrs + following * _CELL_SCALES)
        first, second = _decode(packed, table, dtype, DECODE)
        if UPCAST:
            first_x, second_x = first_x.to(tl.float32), second_x.to(tl.float32)
        total = _add_block(total, first, first_scale, first_x, SCALE)
        total = _add_block(total, second, second_scale, second_x, SCALE)
        first_scale, second_scale = next_first_scale, next_second_scale
    row = first_row_cell * _CELL + tl.arange(0, _CELL * ROW_CELLS)[:, None]
    out = (split.to(tl.int64) * num_tokens + token[None, :]) * num_padded_rows + row
    tl.store(workspace_ptr + out, total, mask=is_token & (row < num_padded_rows))


@triton.jit
def _add_block(total, codes, scale, x, SCALE: tl.constexpr):
    """total [rows, TOKENS] += (codes · scale) x, with x [64, TOKENS]."""
    rows: tl.constexpr = total.shape[0]
    tokens: tl.constexpr = total.shape[1]
    if SCALE == "accumulator":
        sums = tl.dot(codes.reshape(rows, 64), x, input_precision="ieee")
        by_lane = sums.reshape(rows // 64, 4, 2, 8, tokens // 8, 4, 2)  # a lane has two neighbouring tokens of eight
        scaled = by_lane * scale.to(tl.float32)[:, :, :, :, None, :, None]
        total += scaled.reshape(rows, tokens)
    else:
        weights = codes * scale.to(codes.dtype)[:, :, :, :, None, None, None, :, None]
        total = tl.dot(weights.reshape(rows, 64), x, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _reduce_kernel(
    workspace_ptr,  # [SPLITS, num_tokens, num_padded_rows] float32
    bias_ptr,  # [num_rows]
    out_ptr,  # [num_tokens, num_rows]
    num_tokens,
    num_padded_rows,
    num_rows,
    out_stride,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < num_rows
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        source = workspace_ptr + (split * num_tokens + token) * num_padded_rows + column
        total += tl.load(source, mask=column < num_padded_rows, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # [row cells, column cells, CELL_BYTES] uint8
    absmax_ptr,  # [row cells, column cells, CELL_SCALES] float16 or float32
    out_ptr,  # [num_rows, in_features]
    num_rows,
    num_steps,  # column cells
    DECODE: tl.constexpr,
):
    """One cell."""
    row_cell, step = tl.program_id(0), tl.program_id(1)
    packed_ptr += (row_cell.to(tl.int64) * num_steps + step) * _CELL_BYTES
    packed = tl.load(packed_ptr + tl.arange(0, _CELL_BYTES)[None, :], eviction_policy="evict_first")
    first, second = _decode(packed, _code_table(step, tl.float32, DECODE), tl.float32, DECODE)
    scale_ptrs = _scale_ptrs(absmax_ptr, row_cell, row_cell + 1, num_steps, 1)
    first_scale, second_scale = _load_scales(scale_ptrs + step * _CELL_SCALES)
    first *= first_scale.to(tl.float32)[:, :, :, :, None, None, None, :, None]
    second *= second_scale.to(tl.float32)[:, :, :, :, None, None, None, :, None]
    row = row_cell.to(tl.int64) * _CELL + tl.arange(0, _CELL)[:, None]
    out_ptrs = out_ptr + row * num_steps * _CELL + step * _CELL + tl.arange(0, _CELL // 2)[None, :]
    tl.store(out_ptrs, first.reshape(128, 64).to(out_ptr.dtype.element_ty), mask=row < num_rows)
    tl.store(out_ptrs + _CELL // 2, second.reshape(128, 64).to(out_ptr.dtype.element_ty), mask=row < num_rows)
