"""RMS norm, rotary positions and the product of a gate by tanh-GELU, each one pass over memory.

What each computes, `heddle_kernels.triton_kernels.elementwise` says. They round where transformers' own code rounds,
but for products that the processor fuses with a sum in float32 and float16: these are not rounded in between. A gate by
SiLU is not here: torch's two calls take no longer, and less time for few tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from heddle_kernels.cpu_kernels.bits import Floats, Stored, as_stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.exponential import gelu_tanh

_ZERO, _ONE = np.float32(0), np.float32(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, adds_one: bool = False, rounds_first: bool = True) -> Tensor:
    """x [..., width], weight [width] -> like x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    room = np.empty(x.shape[-1], np.float32)
    _norm_rows(as_stored(rows), as_stored(weight), eps, adds_one, rounds_first and not adds_one, room, as_stored(out))
    return out.view(x.shape)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query [batch, num_heads, num_tokens, head_dim], key with num_kv_heads, cos and sin [1 or batch, num_tokens,
    rotary_dim] -> like query and key. Fastest where the heads of a token lie together in memory."""
    cosines, sines = as_stored(cos.reshape(-1, cos.shape[-1])), as_stored(sin.reshape(-1, sin.shape[-1]))
    return _rotated(query, cosines, sines), _rotated(key, cosines, sines)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Semantics: gelu(gate) · up, in gelu's approximation by tanh.

    gate, up [..., width], the halves of one tensor too -> contiguous.
    """
    gates, ups = _with_whole_rows(gate), _with_whole_rows(up)
    out = gates.new_empty(gates.shape)
    _gate_rows(_flat(gates), gates.stride(0), _flat(ups), ups.stride(0), as_stored(out))
    return out.view(gate.shape)


def _rotated(states: Tensor, cosines: Stored, sines: Stored) -> Tensor:
    by_token = states.transpose(1, 2).contiguous()  # [batch, num_tokens, heads, head_dim]
    out = torch.empty_like(by_token)
    _rotate_tokens(as_stored(by_token.flatten(0, 1)), cosines, sines, as_stored(out.flatten(0, 1)))
    return out.transpose(1, 2)


def _with_whole_rows(states: Tensor) -> Tensor:
    """[..., width] -> [num_rows, width] whose values of a row lie together, copied only if they do not."""
    rows = states.reshape(-1, states.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat(rows: Tensor) -> Stored:
    """[num_rows, width] -> all of it as one array, with what lies between two rows."""
    num_rows, width = rows.shape
    return as_stored(rows.as_strided((max(0, (num_rows - 1) * rows.stride(0) + width),), (1,)))


@compiled
def _norm_rows(
    x: Stored, weight: Stored, eps: float, adds_one: bool, rounds_first: bool, room: Floats, out: Stored
) -> None:
    """x [num_rows, width], weight [width] -> out like x; room [width] to work in."""
    width = x.shape[1]
    for row in range(x.shape[0]):
        values, normed = x[row], out[row]
        squares = _ZERO
        for k in range(width):
            value = widen(values[k])
            room[k] = value
            squares += value * value
        scale = _ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
        if adds_one:
            for k in range(width):
                normed[k] = narrow(room[k] * scale * (widen(weight[k]) + _ONE), normed[k])
        elif rounds_first:
            for k in range(width):
                rounded = widen(narrow(room[k] * scale, normed[k]))
                normed[k] = narrow(rounded * widen(weight[k]), normed[k])
        else:
            for k in range(width):
                normed[k] = narrow(room[k] * scale * widen(weight[k]), normed[k])


@compiled
def _rotate_tokens(states: Stored, cosines: Stored, sines: Stored, out: Stored) -> None:
    """states, out [batch * num_tokens, heads, head_dim]; cosines, sines the same or [num_tokens, rotary_dim]."""
    half = cosines.shape[1] // 2
    for token in range(states.shape[0]):
        cos, sin = cosines[token % cosines.shape[0]], sines[token % cosines.shape[0]]
        for head in range(states.shape[1]):
            given, rotated = states[token, head], out[token, head]
            first, second = given[:half], given[half : 2 * half]
            _rotate_half(first, second, cos[:half], sin[:half], rotated[:half], -_ONE)
            _rotate_half(second, first, cos[half:], sin[half:], rotated[half : 2 * half], _ONE)
            for k in range(2 * half, given.shape[0]):
                rotated[k] = given[k]


@compiled
def _rotate_half(given: Stored, partner: Stored, cos: Stored, sin: Stored, out: Stored, sign: np.float32) -> None:
    """Semantics: out = given · cos + sign · partner · sin, rounding every product. All [half]."""
    for k in range(cos.shape[0]):
        own = widen(narrow(widen(given[k]) * widen(cos[k]), given[k]))
        turned = widen(narrow(sign * widen(partner[k]) * widen(sin[k]), given[k]))
        out[k] = narrow(own + turned, given[k])


@compiled
def _gate_rows(gate: Stored, gate_stride: int, up: Stored, up_stride: int, out: Stored) -> None:
    """gate and up flat, a row every stride -> out [num_rows, width]."""
    width = out.shape[1]
    for row in range(out.shape[0]):
        gates, ups = gate[row * gate_stride : row * gate_stride + width], up[row * up_stride : row * up_stride + width]
        products = out[row]
        for k in range(width):
            activated = widen(narrow(gelu_tanh(widen(gates[k])), gates[k]))
            products[k] = narrow(activated * widen(ups[k]), gates[k])
