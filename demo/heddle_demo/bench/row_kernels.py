"""Times the row operations: heddle's, a loop over segments in torch, and gathered matrices in one batched product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heddle_demo.bench.kernel_plan import RANK_SETS, KernelPlan
from heddle_demo.bench.kernel_results import Timing
from heddle_demo.bench.mixes import MIXES, num_distinct
from heddle_demo.bench.random_rows import RandomRows, one_token_each, row_bytes
from heddle_demo.bench.rotation import Call, num_copies, seconds_per_call
from heddle_kernels.dispatch import select_kernels
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

DTYPE = torch.bfloat16


def time_rows(
    layer: str,
    in_features: int,
    out_features: tuple[int, ...],
    rank_name: str,
    plan: KernelPlan,
    num_layers: int,
    device: torch.device,
) -> Iterator[Timing]:
    """One group of sites by all arms, for every batch and popularity of the plan."""
    ranks = list(islice(cycle(RANK_SETS[rank_name]), max(plan.batches)))
    bytes_of_rank = row_bytes(in_features, out_features, 1, DTYPE)
    copies = num_copies(bytes_of_rank * sum(ranks), num_layers, device)
    rows = RandomRows.of(in_features, out_features, ranks, copies, DTYPE, device)
    ops = select_kernels(device, DTYPE, plan.kernels).ops
    ops.prepare(rows.groups, DTYPE)
    for batch in plan.batches:
        for popularity in plan.popularities:
            slots = sorted(slot for slot in MIXES[popularity](batch, batch) if slot is not None)
            case = Case(rows, slots, device)
            activation_bytes = batch * (in_features + 2 * sum(out_features)) * DTYPE.itemsize
            num_bytes = bytes_of_rank * sum(ranks[slot] for slot in set(slots)) + activation_bytes
            exact = case.result(case.by(ReferenceOps()))
            for arm, by in case.arms(ops):
                y = case.y.clone()
                calls: list[Call] = [partial(by, group, y) for group in rows.groups]
                yield Timing(
                    part="rows",
                    layer=layer,
                    size={
                        "rank": rank_name,
                        "batch": batch,
                        "popularity": popularity,
                        "adapters": num_distinct(list(slots)),
                    },
                    arm=arm,
                    seconds=seconds_per_call(calls, device, plan.cpu_seconds),
                    num_bytes=num_bytes,
                    floor_bytes=num_bytes,
                    relative_error=_error(case.result(by), exact, case.y),
                )


By = Callable[[SiteGroup, Tensor], object]  # adds the adapters to y, in place


class Case:
    """One batch: a token for each of `slots`, which are sorted."""

    def __init__(self, rows: RandomRows, slots: list[int], device: torch.device) -> None:
        group = rows.groups[0]
        self._rows = rows
        self._slots = slots
        self._segments = one_token_each(slots)
        self.x = torch.randn(len(slots), group.in_features, device=device).to(DTYPE)
        self.y = torch.randn(len(slots), sum(group.out_features), device=device).to(DTYPE)

    def arms(self, ops: Any) -> Iterator[tuple[str, By]]:
        """heddle's operations last."""
        yield "torch loop", self._loop()
        yield "gather, bmm", self._gather_bmm()
        yield "heddle", self.by(ops)

    def by(self, ops: Any) -> By:
        """A backend's operations, over a plan that is made here."""
        plan = ops.plan_rows(self._rows.rows, self._rows.vectors, self._rows.table, self._segments)

        def by(group: SiteGroup, y: Tensor) -> None:
            ops.expand_add(y, ops.shrink(self.x, plan, group), plan, group, None)

        return by

    def result(self, by: By) -> Tensor:
        """What this arm makes of y at the first layer."""
        y = self.y.clone()
        by(self._rows.groups[0], y)
        return y

    def _loop(self) -> By:
        """For every segment and site two products, as PEFT's mixed batch does."""
        parts = {group.first_site: list(self._matrices(group, self._segments)) for group in self._rows.groups}

        def by(group: SiteGroup, y: Tensor) -> None:
            for tokens, columns, a, b in parts[group.first_site]:
                y[tokens, columns] += self.x[tokens] @ a.T @ b

        return by

    def _gather_bmm(self) -> By:
        """Every site's matrices stacked, padded to the largest rank; each token takes its own."""
        index = torch.tensor(self._slots, device=self.x.device)
        stacks = {
            site: (
                self._stack([self._rows.a(slot, site, group.in_features) for slot in range(max(self._slots) + 1)]),
                self._stack([self._rows.b(slot, site, width) for slot in range(max(self._slots) + 1)]),
            )
            for group in self._rows.groups
            for site, width in zip(group.sites, group.out_features, strict=True)
        }

        def by(group: SiteGroup, y: Tensor) -> None:
            for site, begin, width in zip(group.sites, group.column_start, group.out_features, strict=True):
                a, b = stacks[site]
                h = torch.bmm(self.x[:, None], a[index].transpose(1, 2))  # [batch, 1, rank]
                y[:, begin : begin + width] += torch.bmm(h, b[index])[:, 0]

        return by

    @staticmethod
    def _stack(matrices: list[Tensor]) -> Tensor:
        """[num_slots, largest rank, width]"""
        return pad_sequence(matrices, batch_first=True)

    def _matrices(self, group: SiteGroup, segments: Segments) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        for (begin, end), slot in zip(pairwise(segments.start), segments.slot, strict=True):
            for site, column, width in zip(group.sites, group.column_start, group.out_features, strict=True):
                a, b = self._rows.a(slot, site, group.in_features), self._rows.b(slot, site, width)
                yield slice(begin, end), slice(column, column + width), a, b


def _error(actual: Tensor, exact: Tensor, before: Tensor) -> float:
    """Of what was added to y, not of y."""
    difference = torch.linalg.vector_norm(actual.float() - exact.float())
    return float(difference / torch.linalg.vector_norm(exact.float() - before.float()))
