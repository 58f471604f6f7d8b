"""Attention of a sequence's many new tokens at once, a prompt's: torch's own, over the sequence's gathered pages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from heddle_kernels.reference import sequence_attention


def attend_prompt(
    query: Tensor,
    kv: Tensor,
    pages: Tensor,
    length: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence's new tokens, the last of its `length`, over its pages.

    query [new tokens, num_heads, head_dim]; kv one layer [num_pages, 2, page_tokens, num_kv_heads, head_dim];
    pages [at least those of `length` tokens] -> like query.
    """
    if softcap is not None or sinks is not None:
        return sequence_attention(query, kv, pages.long(), length, scaling, sliding_window, softcap, sinks)
    num_new, page_tokens = query.shape[0], kv.shape[2]
    first = 0 if sliding_window is None else max(0, length - num_new - sliding_window + 1)
    first_page = first // page_tokens
    kept = kv[pages[first_page : -(-length // page_tokens)]].transpose(0, 1).flatten(1, 2)
    kept = kept[:, first - first_page * page_tokens : length - first_page * page_tokens].transpose(1, 2)
    key, value = kept  # [num_kv_heads, kept, head_dim] each
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=None
        if num_new == length and sliding_window is None
        else _seen(num_new, length, first, sliding_window),
        is_causal=num_new == length and sliding_window is None,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _seen(num_new: int, length: int, first: int, sliding_window: int | None) -> Tensor:
    """Which of the positions first .. length - 1 each of the last `num_new` sees: bool [num_new, length - first]."""
    age = torch.arange(length - num_new, length)[:, None] - torch.arange(first, length)[None, :]
    return age >= 0 if sliding_window is None else (age >= 0) & (age < sliding_window)
