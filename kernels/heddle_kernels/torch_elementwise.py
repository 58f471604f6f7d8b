"""RMS norm and rotary positions in few torch calls, for a CPU, where most of a small tensor's time is the calls.

What `heddle_kernels.triton_kernels.elementwise` is on a GPU. Gated activations are not here: nothing in torch is faster
than activation and product one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float, adds_one: bool = False, rounds_first: bool = True) -> Tensor:
    """Root mean square norm over the last dimension, in float32.

    Semantics: y = weight * round(x / sqrt(mean(x²) + eps)), rounded again: Llama's. rounds_first=False rounds only
    once, at the end: OLMo-2's; with adds_one=True the factor is 1 + weight as well: Gemma's.
    x [..., width], weight [width] -> like x.
    """
    if adds_one:
        return functional.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)
    if rounds_first:
        return functional.rms_norm(x, weight.shape, None, eps).mul_(weight)
    return functional.rms_norm(x, weight.shape, weight, eps)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first `rotary_dim` values of every head by its token's position; the others pass.

    Semantics: with x = (x1, x2) the halves of those values, (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).
    query [batch, num_heads, num_tokens, head_dim], key with num_kv_heads; cos and sin [1 or batch, num_tokens,
    rotary_dim] -> like query and key, stored token by token.
    """
    num_heads, rotary_dim = query.shape[1], cos.shape[-1]
    signed = sin.unsqueeze(2).clone()  # negative in its first half: then swapping the halves is all that is left to do
    signed[..., : rotary_dim // 2].neg_()
    heads = torch.cat((query.transpose(1, 2), key.transpose(1, 2)), dim=2)
    turned = heads[..., :rotary_dim]
    rotated = torch.roll(turned, rotary_dim // 2, -1).mul_(signed).addcmul_(turned, cos.unsqueeze(2))
    if rotary_dim < heads.shape[-1]:
        rotated = torch.cat((rotated, heads[..., rotary_dim:]), dim=-1)
    rotated = rotated.transpose(1, 2)
    return rotated[:, :num_heads], rotated[:, num_heads:]
