"""Every operation in plain torch: what the Triton kernels are tested against, and what runs on a CPU.

Rows and vectors are read from the pool's flat views; arithmetic is float32 with one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import ABSENT, RowTable
from heddle_kernels.segments import Segments

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (lambda h: h,)  # by the number in RowTable.activation


def shrink(x: Tensor, rows: Tensor, table: RowTable, segments: Segments, site: int) -> Tensor:
    """The scaled dot products of every token with its adapter's `a` rows.

    Semantics: h_g = gain · act(x_g A_gᵀ + c), segments one after another, each [tokens, rows] row-major.
    x [num_tokens, in_features]; rows flat, compute dtype -> h flat float32 [sum of tokens x rows].
    """
    parts = [x.new_empty(0, dtype=torch.float32)]
    for begin, end, slot in segments.with_adapters():
        heap = _heap(table, slot, site)
        a = _gather(rows, table.a_offset[heap], x.shape[1])  # [num_rows, in_features]
        dots = x[begin:end].float() @ a.T + table.c[heap].to(x.device)
        parts.append((_activate(dots, table.activation[heap]) * table.gain[heap].to(x.device)).flatten())
    return torch.cat(parts)


def expand_add(
    y: Tensor,
    h: Tensor,
    rows: Tensor,
    vectors: Tensor,
    table: RowTable,
    segments: Segments,
    site: int,
    base_bias: Tensor | None,
) -> None:
    """Turn the base's output into the adapters' output, in place.

    Semantics: y_g = out_scale · (y_g − b0) + b0 + bias + h_g B_g, where y_g is the base's W x + b0.
    y [num_tokens, out_features]; h as `shrink` returned it; base_bias b0 [out_features] or None.
    """
    read = 0
    for begin, end, slot in segments.with_adapters():
        heap = _heap(table, slot, site)
        b = _gather(rows, table.b_offset[heap], y.shape[1])  # [num_rows, out_features]
        num_values = (end - begin) * b.shape[0]
        total = y[begin:end].float()
        if (scale := _vector(vectors, table.out_scale, slot, site, y.shape[1])) is not None:
            total = scale * total if base_bias is None else scale * (total - base_bias) + base_bias
        if (bias := _vector(vectors, table.bias, slot, site, y.shape[1])) is not None:
            total = total + bias
        y[begin:end] = total + h[read : read + num_values].view(end - begin, -1) @ b
        read += num_values


def scale_input(x: Tensor, vectors: Tensor, table: RowTable, segments: Segments, site: int) -> Tensor:
    """Semantics: x_g · in_scale for the segments whose adapter scales this site's input, x_g for the others.

    x [num_tokens, in_features] -> a new tensor if anything changed, else x itself.
    """
    scaled = x
    for begin, end, slot in segments.with_adapters():
        if (scale := _vector(vectors, table.in_scale, slot, site, x.shape[1])) is not None:
            scaled = x.clone() if scaled is x else scaled
            scaled[begin:end] = x[begin:end].float() * scale
    return scaled


def write_kv(key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
    """Store the new tokens' keys and values in their pages.

    key, value [num_tokens, num_kv_heads, head_dim]; kv one layer [num_pages, 2, page_tokens, num_kv_heads, head_dim].
    """
    kv[batch.write_page, 0, batch.write_offset] = key
    kv[batch.write_page, 1, batch.write_offset] = value


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: PagedBatch,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its own pages, and over nothing else.

    query [num_tokens, num_heads, head_dim]; kv one layer as in `write_kv` -> [num_tokens, num_heads, head_dim].
    sinks [num_heads]: an extra logit per head that takes weight and gives no value.
    """
    page_tokens, num_kv_heads, head_dim = kv.shape[2:]
    group = query.shape[1] // num_kv_heads  # query heads that share a key head
    out = torch.empty_like(query)
    for begin, end, length, pages in batch.sequences():
        first = 0 if sliding_window is None else max(0, length - (end - begin) - sliding_window + 1)
        first_page = first // page_tokens
        kept = kv[pages[first_page:]].transpose(0, 1).flatten(1, 2)  # [2, tokens in pages, num_kv_heads, head_dim]
        kept = kept[:, first - first_page * page_tokens : length - first_page * page_tokens].float()
        keys, values = kept.transpose(1, 2)  # [num_kv_heads, kept, head_dim] each
        grouped = query[begin:end].view(-1, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).float()
        scores = grouped.flatten(1, 2) @ keys.transpose(1, 2) * scaling  # [num_kv_heads, group * new, kept]
        scores = scores.view(num_kv_heads, group, end - begin, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if end - begin > 1:  # a single token sees everything that was kept
            age = torch.arange(length - (end - begin), length, device=query.device)[:, None]
            age = age - torch.arange(first, length, device=query.device)[None, :]
            hidden = age < 0 if sliding_window is None else (age < 0) | (age >= sliding_window)
            scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            extra = sinks.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, end - begin, 1)
            scores = torch.cat([scores, extra], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : values.shape[1]]
        attended = (weights.flatten(1, 2) @ values).view(num_kv_heads, group, end - begin, head_dim)
        out[begin:end] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _heap(table: RowTable, slot: int, site: int) -> slice:
    first = int(table.first[slot, site])
    return slice(first, first + int(table.count[slot, site]))


def _gather(flat: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Rows of `width` elements from `flat` -> float32 [num_rows, width]."""
    index = offsets.to(flat.device)[:, None] + torch.arange(width, device=flat.device)
    return flat[index].float()


def _vector(vectors: Tensor, column: Tensor, slot: int, site: int, width: int) -> Tensor | None:
    offset = int(column[slot, site])
    return None if offset == ABSENT else vectors[offset : offset + width]


def _activate(dots: Tensor, activation: Tensor) -> Tensor:
    """Apply to each row's column its own activation; rows of one adapter nearly always share one."""
    numbers: set[int] = set(activation.tolist())
    if len(numbers) == 1:
        (number,) = numbers
        return ACTIVATIONS[number](dots)
    for number in numbers:
        chosen = (activation == number).to(dots.device)
        dots = torch.where(chosen, ACTIVATIONS[number](dots), dots)
    return dots
