"""Every operation in plain torch: what the compiled kernels are tested against, and what runs where they cannot.

Rows and vectors are read from the pool's flat views; arithmetic is float32 with one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from heddle_kernels import torch_elementwise
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import RowTable, vector_at
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (  # by the number in RowTable.activation
    lambda h: h,
    functional.relu,
    lambda h: functional.gelu(h, approximate="tanh"),
    functional.silu,
)


@dataclass(frozen=True)
class ReferencePlan:
    """A step's adapters, as these operations read them."""

    rows: Tensor  # flat, compute dtype
    vectors: Tensor  # flat, float32
    table: RowTable
    segments: Segments


class ReferenceOps:
    """The operations, a loop over segments or sequences each."""

    name = "reference"
    elementwise = torch_elementwise

    def prepare(self, groups: Sequence[SiteGroup], dtype: torch.dtype) -> None:
        """Nothing to prepare."""

    def plan_rows(self, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments) -> ReferencePlan:
        return ReferencePlan(rows, vectors, table, segments)

    def shrink(self, x: Tensor, plan: ReferencePlan, group: SiteGroup) -> list[Tensor]:
        """The scaled dot products of every token with its adapter's `a` rows at all of the group's sites.

        Semantics: h_g = gain · act(x_g A_gᵀ + c).
        x [num_tokens, in_features] -> of each segment with an adapter float32 [tokens, the group's rows].
        """
        products = list[Tensor]()
        for begin, end, slot in plan.segments.with_adapters():
            heap = plan.table.heap_of(slot, group.sites)
            a = _gather(plan.rows, plan.table.a_offset[heap], group.in_features)  # [num_rows, in_features]
            dots = x[begin:end].float() @ a.T + plan.table.c[heap].to(x.device)
            products.append(_activate(dots, plan.table.activation[heap]) * plan.table.gain[heap].to(x.device))
        return products

    def expand_add(
        self, y: Tensor, h: list[Tensor], plan: ReferencePlan, group: SiteGroup, base_bias: Tensor | None
    ) -> None:
        """Turn the base's output into the adapters' output, in place.

        Semantics, site by site: y_g = out_scale · (y_g − b0) + b0 + bias + h_g B_g, where y_g is the base's W x + b0.
        y [num_tokens, sum of out_features]; h as `shrink` returned it; base_bias b0 [sum of out_features] or None.
        """
        table = plan.table
        for (begin, end, slot), products in zip(plan.segments.with_adapters(), h, strict=True):
            read = 0
            for site, column, width in zip(group.sites, group.column_start, group.out_features, strict=True):
                columns = slice(column, column + width)
                heap = table.heap_of(slot, group.alone(site).sites)
                b = _gather(plan.rows, table.b_offset[heap], width)  # [num_rows, out_features]
                b0 = None if base_bias is None else base_bias[columns]
                total = self._with_vectors(y[begin:end, columns].float(), plan, slot, site, b0)
                y[begin:end, columns] = total + products[:, read : read + len(b)] @ b
                read += len(b)

    def scale_input(self, x: Tensor, plan: ReferencePlan, site: int) -> Tensor:
        """Semantics: x_g · in_scale for the segments whose adapter scales this site's input, x_g for the others.

        x [num_tokens, in_features] -> a new tensor if anything changed, else x itself.
        """
        scaled = x
        for begin, end, slot in plan.segments.with_adapters():
            if (scale := vector_at(plan.vectors, plan.table.in_scale, slot, site, x.shape[1])) is not None:
                scaled = x.clone() if scaled is x else scaled
                scaled[begin:end] = x[begin:end].float() * scale
        return scaled

    def write_kv(self, key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
        """Store the new tokens' keys and values in their pages.

        key, value [num_tokens, num_kv_heads, head_dim];
        kv one layer [num_pages, 2, page_tokens, num_kv_heads, head_dim].
        """
        page, place = batch.write_slot // kv.shape[2], batch.write_slot % kv.shape[2]
        kv[page, 0, place] = key
        kv[page, 1, place] = value

    def paged_attention(
        self,
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
        out = torch.empty_like(query)
        for (begin, end), length, pages in zip(
            pairwise(batch.query_bounds), batch.lengths, batch.page_table.long(), strict=True
        ):
            if length:
                options = (scaling, sliding_window, softcap, sinks)
                out[begin:end] = sequence_attention(query[begin:end], kv, pages, length, *options)
        return out

    @staticmethod
    def _with_vectors(y: Tensor, plan: ReferencePlan, slot: int, site: int, b0: Tensor | None) -> Tensor:
        """One site's base output, float32 [tokens, out_features], with the adapter's scale and bias."""
        table = plan.table
        if (scale := vector_at(plan.vectors, table.out_scale, slot, site, y.shape[1])) is not None:
            y = scale * y if b0 is None else scale * (y - b0) + b0
        if (bias := vector_at(plan.vectors, table.bias, slot, site, y.shape[1])) is not None:
            y = y + bias
        return y


def sequence_attention(
    query: Tensor,
    kv: Tensor,
    pages: Tensor,
    length: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence's new tokens, the last of its `length`, over its pages: see `ReferenceOps.paged_attention`.

    query [new tokens, num_heads, head_dim]; pages int64 [at least those of `length` tokens] -> like query.
    """
    page_tokens, num_kv_heads, head_dim = kv.shape[2:]
    num_new, group = query.shape[0], query.shape[1] // num_kv_heads  # query heads that share a key head
    first = 0 if sliding_window is None else max(0, length - num_new - sliding_window + 1)
    first_page = first // page_tokens
    kept = kv[pages[first_page : -(-length // page_tokens)]].transpose(0, 1).flatten(1, 2)
    kept = kept[:, first - first_page * page_tokens : length - first_page * page_tokens].float()
    keys, values = kept.transpose(1, 2)  # [num_kv_heads, kept, head_dim] each
    grouped = query.view(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).float()
    scores = grouped.flatten(1, 2) @ keys.transpose(1, 2) * scaling  # [num_kv_heads, group * new, kept]
    scores = scores.view(num_kv_heads, group, num_new, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if num_new > 1:  # a single token sees everything that was kept
        age = torch.arange(length - num_new, length, device=query.device)[:, None]
        age = age - torch.arange(first, length, device=query.device)[None, :]
        hidden = age < 0 if sliding_window is None else (age < 0) | (age >= sliding_window)
        scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        extra = sinks.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, num_new, 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : values.shape[1]]
    attended: Tensor = (weights.flatten(1, 2) @ values).view(num_kv_heads, group, num_new, head_dim)
    return attended.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)


def _gather(flat: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Rows of `width` elements from `flat` -> float32 [num_rows, width]."""
    index = offsets.to(flat.device)[:, None] + torch.arange(width, device=flat.device)
    return flat[index].float()


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
