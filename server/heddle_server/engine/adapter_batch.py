"""The adapters of one step, as the woven modules see them: the rows' plan, and what no row says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heddle_adapters.device_rows import DeviceRows, LineSummary
from heddle_kernels.ops import Ops
from heddle_kernels.row_table import vector_at
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

NOWHERE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenAnswers:
    """Tokens whose embedding is an adapter's."""

    tokens: Tensor  # [num_answered] int64, which of the step's tokens
    offsets: Tensor  # [num_answered] int64, of rows of hidden_size in the pool
    is_virtual: Tensor  # [num_answered] bool: not a row of the embedding, so not scaled as its rows are


@dataclass(frozen=True)
class AdapterLines:
    """What plain torch needs to know of the adapters in a run of tokens: rare things, computed adapter by adapter."""

    rows: DeviceRows
    segments: Segments
    line_of_slot: Mapping[int, LineSummary]

    def changing(self, site: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, slot) of the segments whose adapter changes this site."""
        for begin, end, slot in self.segments.with_adapters():
            if site in self.line_of_slot[slot].touched_sites:
                yield begin, end, slot

    def add_deltas(self, y: Tensor, x: Tensor, group: SiteGroup) -> None:
        """y [num_tokens, sum of out_features] += x deltaᵀ where an adapter has one, in place."""
        for site, column in zip(group.sites, group.column_start, strict=True):
            for begin, end, slot in self.changing(site):
                at = column
                for piece in self.line_of_slot[slot].deltas.get(site, ()):  # [outputs, in_features]
                    y[begin:end, at : at + len(piece)] += x[begin:end] @ piece.T
                    at += len(piece)

    def scales_of(self, site: int) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
        """(begin, end, out_scale, bias) of the segments whose adapter has one of them; float32 [out_features]."""
        width = self.rows.width_of(site)
        table, vectors = self.rows.table, self.rows.vectors
        for begin, end, slot in self.changing(site):
            scale, bias = (vector_at(vectors, column, slot, site, width) for column in (table.out_scale, table.bias))
            yield begin, end, scale, bias

    def add_token_rows(self, y: Tensor, token_ids: Tensor, site: int) -> None:
        """Rows whose x is a token: y [num_tokens, hidden_size] += Σ gain · a[token] · b, in place."""
        table, rows = self.rows.table, self.rows.rows
        for begin, end, slot in self.changing(site):
            heap = table.heap_of(slot, range(site, site + 1))
            a_offset, b_offset = (table_rows[heap].to(y.device) for table_rows in (table.a_offset, table.b_offset))
            h = rows[a_offset[None, :] + token_ids[begin:end, None]].float()  # [tokens, num_rows]
            h = h * table.gain[heap].to(y.device)
            b = rows[b_offset[:, None] + torch.arange(y.shape[1], device=y.device)].float()  # [num_rows, hidden_size]
            y[begin:end] = y[begin:end].float() + h @ b

    def answer_head(self, y: Tensor, x: Tensor, base_bias: Tensor | None) -> None:
        """The head multiplies with an adapter's rows in place of its own: y [num_tokens, vocabulary], in place."""
        for begin, end, slot in self.segments.with_adapters():
            tokens = self.line_of_slot[slot].tokens
            if tokens is not None and tokens.reach_head:
                ids = torch.from_numpy(tokens.token_ids).to(y.device)
                offsets = torch.from_numpy(tokens.offsets).to(y.device)
                answered = x[begin:end] @ gathered(self.rows.rows, offsets, x.shape[1]).T
                y[begin:end, ids] = answered if base_bias is None else answered + base_bias[ids]

    @property
    def reach_head(self) -> bool:
        lines = self.line_of_slot.values()
        return any(line.tokens is not None and line.tokens.reach_head for line in lines)


@dataclass(frozen=True)
class AdapterBatch:
    """The adapters of one step. Filled by the model runner."""

    plan: Any  # of all tokens, as `Ops.plan_rows` made it
    head_plan: Any  # of the rows that reach the output head
    touched_sites: frozenset[int] | None  # sites that any of these adapters changes; None: look at all linears
    scaled_input_sites: frozenset[int]  # of those, where one scales the input
    touched_places: frozenset[int] = NOWHERE  # of the sites that any changes, those that are no linears
    lines: AdapterLines | None = None  # None: rows and vectors of linears and blocks are all that these adapters have
    head_lines: AdapterLines | None = None  # the same of the rows that reach the output head
    tokens: TokenAnswers | None = None

    def touches(self, group: SiteGroup) -> bool:
        return self.touched_sites is None or not self.touched_sites.isdisjoint(group.sites)


@dataclass
class ForwardContext:
    """The one thing that woven modules see of the step: whose tokens they are computing, and with what."""

    ops: Ops
    adapters: AdapterBatch | None = field(default=None, init=False)  # None: base only, or no forward running

    @contextmanager
    def using(self, adapters: AdapterBatch | None) -> Iterator[None]:
        """Hold the step's adapters during a forward. Forwards do not nest."""
        assert self.adapters is None, "a forward is already running"
        self.adapters = adapters
        try:
            yield
        finally:
            self.adapters = None


def gathered(rows: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Rows of the pool -> [num_rows, width]."""
    found: Tensor = rows[offsets[:, None] + torch.arange(width, device=rows.device)]
    return found
