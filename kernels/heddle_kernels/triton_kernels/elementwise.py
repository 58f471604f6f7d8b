"""What lies between a transformer's matrix products: RMS norms, rotary positions, gated activations, a launch each."""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle_kernels.triton_kernels.target import INTERPRETED

TILE_VALUES = 1024  # of a program whose rows are short: two 16-byte loads of bfloat16 per thread of two warps
HEADS_PER_PROGRAM = 16  # of a rotary program: with 4 warps each thread moves 16 bytes of a 128-wide head


def rms_norm(x: Tensor, weight: Tensor, eps: float, adds_one: bool = False, rounds_first: bool = True) -> Tensor:
    """Root mean square norm over the last dimension, in float32.

    Semantics: y = weight * round(x / sqrt(mean(x²) + eps)), rounded again: Llama's. rounds_first=False rounds only
    once, at the end: OLMo-2's; with adds_one=True the factor is 1 + weight as well: Gemma's.
    x [..., width], weight [width] -> like x.
    """
    width = x.shape[-1]
    lines = x.reshape(-1, *x.shape[-2:])  # [outer, inner, width]; a view also where heads are a slice of a longer row
    if lines.stride(-1) != 1:
        lines = lines.contiguous()
    outer, inner = lines.shape[:2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_width = triton.next_power_of_2(width)
    block_lines = max(1, TILE_VALUES // block_width)
    _rms_norm_kernel[(triton.cdiv(outer * inner, block_lines),)](
        lines,
        weight,
        out,
        outer * inner,
        inner,
        lines.stride(0),
        lines.stride(1),
        eps,
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        BLOCK_LINES=block_lines,
        ADDS_ONE=adds_one,
        ROUNDS_FIRST=rounds_first,
        UPCAST=INTERPRETED,
        num_warps=min(16, max(2, block_width // 512)),
    )
    return out


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first `rotary_dim` values of every head by its token's position; the others pass.

    Semantics: with x = (x1, x2) the halves of those values, (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), in float32.
    query [batch, num_heads, num_tokens, head_dim], key with num_kv_heads, of any strides; cos and sin
    [1 or batch, num_tokens, rotary_dim] -> like query and key, stored token by token.
    """
    batch, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos.shape[-1]
    query, key, cos, sin = (
        states if states.stride(-1) == 1 else states.contiguous() for states in (query, key, cos, sin)
    )
    rotated = torch.empty(batch, num_tokens, num_heads + num_kv_heads, head_dim, dtype=query.dtype, device=query.device)
    cos, sin = (angles.expand(batch, -1, -1) for angles in (cos, sin))
    _rotary_kernel[(batch * num_tokens, triton.cdiv(num_heads + num_kv_heads, HEADS_PER_PROGRAM))](
        query,
        key,
        cos,
        sin,
        rotated,
        num_tokens,
        *query.stride()[:3],
        *key.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        num_warps=4,
    )
    rotated = rotated.transpose(1, 2)
    return rotated[:, :num_heads], rotated[:, num_heads:]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Semantics: silu(gate) * up in float32. gate and up [..., width], of any row stride -> like them, contiguous."""
    return _activate_and_multiply(gate, up, is_gelu=False)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Semantics: gelu(gate) * up in float32, with gelu's approximation by tanh; shapes as in `silu_mul`."""
    return _activate_and_multiply(gate, up, is_gelu=True)


def _activate_and_multiply(gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
    width = gate.shape[-1]
    gates, ups = (states.reshape(-1, width) for states in (gate, up))  # [num_tokens, width], slices stay views
    gates, ups = (states if states.stride(-1) == 1 else states.contiguous() for states in (gates, ups))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _activate_and_multiply_kernel[(gates.shape[0], triton.cdiv(width, TILE_VALUES))](
        gates,
        ups,
        out,
        width,
        gates.stride(0),
        ups.stride(0),
        IS_GELU=is_gelu,
        BLOCK=TILE_VALUES,
        num_warps=4,
    )
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_lines,
    inner,
    outer_stride,
    inner_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_LINES lines of x, held in registers between the sum and the product.

    UPCAST: the interpreter's conversion to bfloat16 truncates, so the rounding in between is left out there.
    """
    line = tl.program_id(0) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    column = tl.arange(0, BLOCK_WIDTH)
    is_kept = (line < num_lines)[:, None] & (column < WIDTH)[None, :]
    start = (line // inner).to(tl.int64) * outer_stride + (line % inner).to(tl.int64) * inner_stride  # [BLOCK_LINES]
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=is_kept, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ADDS_ONE:
        weight += 1.0
    mean_square = tl.sum(x * x, 1) / WIDTH
    y = x * tl.rsqrt(mean_square + eps)[:, None]
    if ROUNDS_FIRST and not UPCAST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    y = y * weight[None, :]
    here = out_ptr + line.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(here, y.to(out_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_tokens,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Some heads of one token; numbered on from the query's heads come the key's.

    out [batch, num_tokens, NUM_HEADS + NUM_KV_HEADS, HEAD_DIM].
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    flat_token = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)  # divided as 32 bits: for 64 there is no instruction
    token = flat_token - batch * num_tokens
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_query, is_key = head < NUM_HEADS, (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    query_here = query_ptr + batch * query_batch_stride + token * query_token_stride + head * query_head_stride
    key_here = key_ptr + batch * key_batch_stride + token * key_token_stride + (head - NUM_HEADS) * key_head_stride
    out_here = out_ptr + (flat_token * (NUM_HEADS + NUM_KV_HEADS) + head) * HEAD_DIM  # [BLOCK_HEADS] each
    half = tl.arange(0, BLOCK_HALF)
    is_half = half < HALF
    cos_here = cos_ptr + batch * cos_batch_stride + token * cos_token_stride + half
    sin_here = sin_ptr + batch * sin_batch_stride + token * sin_token_stride + half
    cos1 = tl.load(cos_here, mask=is_half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_here + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_here, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_here + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
    x1 = _load_heads(query_here, key_here, is_query, is_key, half, is_half)  # [BLOCK_HEADS, BLOCK_HALF]
    x2 = _load_heads(query_here + HALF, key_here + HALF, is_query, is_key, half, is_half)
    is_stored = (is_query | is_key)[:, None] & is_half[None, :]
    first = out_here[:, None] + half[None, :]
    tl.store(first, (x1 * cos1 - x2 * sin1).to(out_ptr.dtype.element_ty), mask=is_stored)
    tl.store(first + HALF, (x2 * cos2 + x1 * sin2).to(out_ptr.dtype.element_ty), mask=is_stored)
    if ROTARY_DIM < HEAD_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)
        passed = _load_heads(query_here, key_here, is_query, is_key, rest, rest < HEAD_DIM)
        is_stored = (is_query | is_key)[:, None] & (rest < HEAD_DIM)[None, :]
        tl.store(out_here[:, None] + rest[None, :], passed.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit
def _load_heads(query_here, key_here, is_query, is_key, column, is_column):
    """These columns of the heads, from wherever each one lies -> [heads, columns] float32."""
    query_mask, key_mask = is_query[:, None] & is_column[None, :], is_key[:, None] & is_column[None, :]
    from_query = tl.load(query_here[:, None] + column[None, :], mask=query_mask, other=0.0).to(tl.float32)
    from_key = tl.load(key_here[:, None] + column[None, :], mask=key_mask, other=0.0).to(tl.float32)
    return from_query + from_key


@triton.jit
def _activate_and_multiply_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    gate = tl.load(gate_ptr + token * gate_stride + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_stride + column, mask=is_column, other=0.0).to(tl.float32)
    slope = gate
    if IS_GELU:  # (1 + tanh(z)) / 2 = sigmoid(2z), with z = sqrt(2/pi) (x + 0.044715 x³)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate * tl.sigmoid(tl.maximum(slope, -80.0)) * up  # nothing is left there, and soon exp(-slope) overflows
    tl.store(out_ptr + token * width + column, y.to(out_ptr.dtype.element_ty), mask=is_column)
