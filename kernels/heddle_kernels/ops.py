"""What every implementation of the operations offers; `dispatch` chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup


class Ops(Protocol):
    """The operations of one backend. `reference.ReferenceOps` says what each computes.

    A plan, and what `shrink` hands to `expand_add`, are each backend's own.
    """

    name: str

    @property
    def elementwise(self) -> Any:
        """rms_norm, rotary, …: see `torch_elementwise`; what it lacks is left to the model's own code."""

    def prepare(self, groups: Sequence[SiteGroup], dtype: torch.dtype) -> None:
        """Once, before anything else: all groups in the order of their sites, and the compute dtype."""

    def plan_rows(self, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments) -> Any:
        """Once a step: what the row operations need to know of these segments."""

    def shrink(self, x: Tensor, plan: Any, group: SiteGroup) -> Any:
        """x [num_tokens, in_features] -> the products of every token with its adapter's `a` rows."""

    def expand_add(self, y: Tensor, h: Any, plan: Any, group: SiteGroup, base_bias: Tensor | None) -> None:
        """y [num_tokens, sum of out_features], in place."""

    def scale_input(self, x: Tensor, plan: Any, site: int) -> Tensor:
        """x [num_tokens, in_features] -> like x; x itself where nothing is scaled."""
        ...

    def write_kv(self, key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
        """key, value [num_tokens, num_kv_heads, head_dim] into their pages."""

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
        """query [num_tokens, num_heads, head_dim] -> like query."""
        ...
