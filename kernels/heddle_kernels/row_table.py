"""Where every adapter's rows and vectors lie in the pool: one line per (slot, site)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ABSENT = -1  # in a vector column: this adapter has no such vector at this site
SLOT_COLUMNS = ("first", "count", "in_scale", "out_scale", "bias")  # of a RowTable: a line per slot
HEAP_COLUMNS = ("a_offset", "b_offset", "gain", "c", "activation")  # an entry per row
COLUMNS = SLOT_COLUMNS + HEAP_COLUMNS


@dataclass
class RowChanges:
    """What a copy of the table lacks."""

    slots: set[int] = field(default_factory=set)
    heap: list[slice] = field(default_factory=list)
    has_grown: bool = False  # all tensors are others now


class RowTable:
    """Offsets into the pool's typed views, in elements of that view.

    A site's rows are `count[slot, site]` entries of the heap from `first[slot, site]` on; entry i is the rank-one
    update (a_offset[i], b_offset[i], gain[i], c[i], activation[i]). Rows of several adapters may be listed one after
    another without copying them, which is how a mix is made.

    The tensors lie in host memory, where the table is changed between two steps.
    """

    first: Tensor  # [num_slots, num_sites] int32
    count: Tensor  # [num_slots, num_sites] int32
    in_scale: Tensor  # [num_slots, num_sites] int64, offset of in_features floats or ABSENT
    out_scale: Tensor  # [num_slots, num_sites] int64, offset of out_features floats or ABSENT
    bias: Tensor  # [num_slots, num_sites] int64, offset of out_features floats or ABSENT
    a_offset: Tensor  # [heap_capacity] int64
    b_offset: Tensor  # [heap_capacity] int64
    gain: Tensor  # [heap_capacity] float32
    c: Tensor  # [heap_capacity] float32
    activation: Tensor  # [heap_capacity] int8

    def __init__(self, num_slots: int, num_sites: int, heap_capacity: int) -> None:
        self.first = torch.zeros(num_slots, num_sites, dtype=torch.int32)
        self.count = torch.zeros(num_slots, num_sites, dtype=torch.int32)
        self.in_scale = torch.full((num_slots, num_sites), ABSENT, dtype=torch.int64)
        self.out_scale = self.in_scale.clone()
        self.bias = self.in_scale.clone()
        self.a_offset = torch.zeros(heap_capacity, dtype=torch.int64)
        self.b_offset = torch.zeros(heap_capacity, dtype=torch.int64)
        self.gain = torch.zeros(heap_capacity, dtype=torch.float32)
        self.c = torch.zeros(heap_capacity, dtype=torch.float32)
        self.activation = torch.zeros(heap_capacity, dtype=torch.int8)
        self._changed: RowChanges | None = None  # None: nobody keeps a copy

    @property
    def num_slots(self) -> int:
        return self.first.shape[0]

    @property
    def num_sites(self) -> int:
        return self.first.shape[1]

    @property
    def heap_capacity(self) -> int:
        return self.gain.shape[0]

    def grow(self, num_slots: int, heap_capacity: int) -> None:
        """Make room, keeping every line where it is."""
        larger = RowTable(num_slots, self.num_sites, heap_capacity)
        for name in COLUMNS:
            tensor, target = getattr(self, name), getattr(larger, name)
            target[: tensor.shape[0]] = tensor
            setattr(self, name, target)
        if self._changed is not None:
            self._changed = RowChanges(has_grown=True)

    def note_change(self, slot: int, heap: slice = slice(0)) -> None:
        """A slot's line and these heap entries are about to be read: whoever keeps a copy must have them."""
        if self._changed is not None:
            self._changed.slots.add(slot)
            self._changed.heap.append(heap)

    def take_changes(self) -> RowChanges:
        """What is new since this was last asked; at first, everything. From then on changes are noted."""
        changed, self._changed = self._changed or RowChanges(has_grown=True), RowChanges()
        return changed

    def clear(self, slot: int) -> None:
        """Empty a slot's line: no rows, no vectors."""
        self.first[slot] = 0
        self.count[slot] = 0
        for column in (self.in_scale, self.out_scale, self.bias):
            column[slot] = ABSENT
        self.note_change(slot)

    def heap_of(self, slot: int, sites: range) -> slice:
        """The heap entries of all rows that a slot has at these consecutive sites."""
        first = int(self.first[slot, sites.start])
        return slice(first, first + int(self.count[slot, sites.start : sites.stop].sum()))

    def sites_of(self, slot: int) -> frozenset[int]:
        """The sites at which this slot changes anything."""
        line = (self.count[slot] > 0) | (self.in_scale[slot] >= 0)
        line |= (self.out_scale[slot] >= 0) | (self.bias[slot] >= 0)
        return frozenset(line.nonzero().flatten().tolist())


def vector_at(vectors: Tensor, column: Tensor, slot: int, site: int, width: int) -> Tensor | None:
    """A slot's vector [width] of one of the table's vector columns, out of the pool; None where it has none."""
    offset = int(column[slot, site])
    return None if offset == ABSENT else vectors[offset : offset + width]
