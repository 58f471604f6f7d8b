"""The operations of an NVIDIA GPU, for `dispatch`: what each computes is said in `reference.ReferenceOps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heddle_kernels.dense_buffer import DenseBuffer
from heddle_kernels.nf4_weight import Nf4Weight
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup
from heddle_kernels.triton_kernels import attention, elementwise, rows
from heddle_kernels.triton_kernels.nf4_linear import Nf4Linear
from heddle_kernels.triton_kernels.row_plan import (
    DECODE,
    PREFILL,
    DeviceTable,
    PlanCapacity,
    TritonRowPlan,
)
from heddle_kernels.triton_kernels.target import INTERPRETED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECODE_TOKENS_PER_SEGMENT = 8  # on average; with more, the tiles for prefill move fewer bytes


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these operations cannot compute there, or with this dtype; None when they can."""
    if dtype not in DTYPES:
        return f"{dtype} is none of {', '.join(map(str, DTYPES))}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton compiles for GPUs, not for {device.type} (TRITON_INTERPRET=1 runs it anyway, for tests)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@dataclass(frozen=True)
class StepRows:
    """A step's adapters in device memory."""

    rows: Tensor  # flat, compute dtype
    vectors: Tensor  # flat, float32
    table: DeviceTable
    plan: TritonRowPlan


class TritonOps:
    """Keeps the device's copy of the row table up to date. Called from one thread."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.elementwise = elementwise
        self._device = device
        self._table: DeviceTable | None = None
        self._most_rows: NDArray[np.int32] = np.zeros(0, np.int32)  # [num_slots], of any group
        self._group_begins: NDArray[np.int64] = np.zeros(1, np.int64)  # first site of each group
        self._dense = DenseBuffer()

    @property
    def table_generation(self) -> int:
        """Another number when the table has moved in memory: captured graphs would read the old one."""
        return 0 if self._table is None else self._table.generation

    def prepare(self, groups: Sequence[SiteGroup], dtype: torch.dtype) -> None:
        """Once, before the first plan: all groups, in the order of their sites."""
        self._group_begins = np.array([group.first_site for group in groups], np.int64)

    def plan_rows(self, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments) -> StepRows:
        """As large as the step is, in memory of its own."""
        mirror = self._synced(table)
        is_decode = segments.num_tokens <= DECODE_TOKENS_PER_SEGMENT * max(1, len(segments.slot))
        packed = TritonRowPlan.pack(segments, self._most_rows, DECODE if is_decode else PREFILL)
        return StepRows(rows, vectors, mirror, packed.views(self._copied(packed.words)))

    def plan_rows_into(
        self, words: Tensor, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments, capacity: PlanCapacity
    ) -> StepRows:
        """A decode step's plan in memory that a CUDA graph reads, int32 [capacity.num_words]. Raises PlanTooLarge."""
        mirror = self._synced(table)
        packed = TritonRowPlan.pack(segments, self._most_rows, DECODE, capacity)
        words.copy_(self._copied(packed.words), non_blocking=True)
        return StepRows(rows, vectors, mirror, packed.views(words))

    def shrink(self, x: Tensor, plan: StepRows, group: SiteGroup) -> Tensor:
        return rows.shrink(x, plan.rows, plan.table, plan.plan, group)

    def expand_add(self, y: Tensor, h: Tensor, plan: StepRows, group: SiteGroup, base_bias: Tensor | None) -> None:
        rows.expand(y, h, plan.rows, plan.vectors, plan.table, plan.plan, group, base_bias, y)

    def expand_sums(
        self, sums: Tensor, h: Tensor, plan: StepRows, group: SiteGroup, base_bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Finish a split sum and add the adapters in one pass.

        sums float32 [splits, num_tokens, at least sum of out_features] without the bias -> y of `dtype`.
        """
        y = torch.empty(sums.shape[1], sum(group.out_features), dtype=dtype, device=sums.device)
        rows.expand(sums, h, plan.rows, plan.vectors, plan.table, plan.plan, group, base_bias, y)
        return y

    def scale_input(self, x: Tensor, plan: StepRows, site: int) -> Tensor:
        return rows.scale_input(x, plan.vectors, plan.table, plan.plan, site)

    def write_kv(self, key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
        attention.write_kv(key, value, kv, batch)

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
        return attention.paged_attention(query, kv, batch, scaling, sliding_window, softcap, sinks)

    def nf4_linear(self, packed: Tensor, quant_state: Any, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A linear over bitsandbytes' 4-bit weight, repacked, for inputs of `dtype`. Raises UnsupportedWeight."""
        # float32 is asked for by who wants exact weights; else 1 in 2,048 of a scale is nothing beside rounded products
        absmax_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        return Nf4Linear(Nf4Weight.from_bitsandbytes([(packed, quant_state)], absmax_dtype), bias, self._dense)

    def _synced(self, table: RowTable) -> DeviceTable:
        """The device's copy of the table, with what has changed since the last step."""
        if self._table is None:
            self._table = DeviceTable(table, self._device)
            changed = np.arange(table.num_slots)
        else:
            changed = self._table.sync(table)
        if len(changed):
            if len(self._most_rows) < table.num_slots:
                self._most_rows = np.resize(self._most_rows, table.num_slots)
            of_groups = np.add.reduceat(table.count.numpy()[changed], self._group_begins, axis=1)
            self._most_rows[changed] = of_groups.max(axis=1)
        return self._table

    def _copied(self, words: NDArray[np.int32]) -> Tensor:
        """[num_words] in device memory; the host does not wait for the copy."""
        host = torch.from_numpy(words)
        return host if INTERPRETED else host.pin_memory().to(self._device, non_blocking=True)
