"""An adapter laid out in pages, wherever those pages will lie: what the disk keeps and the device receives.

Offsets count bytes from the beginning of the adapter's first page, as if its pages lay one after another. On the
device they may lie anywhere, except that the pages of one run stay adjacent; so a row's place there is
`page_map[offset // page_bytes] * page_bytes + offset % page_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.canonical import Floats
from heddle_adapters.positions import Positions

ABSENT = -1  # in a vector column: the adapter has no such vector at this site


@dataclass(frozen=True)
class PackedAdapter:
    """Pages and the table that says what lies in them. One entry per changed site, rows in the order of the sites.

    Keys and values of its own come first: whole pages as the pool keeps those of a sequence, the last one filled up
    with zeros."""

    digest: str
    pages: NDArray[np.uint8]  # [num_pages, page_bytes], zero where nothing lies
    run_lengths: NDArray[np.int32]  # [num_runs], adds up to num_pages
    used_bytes: int  # rows and vectors without alignment and page ends
    site: NDArray[np.int32]  # [num_sites] site ids of the base's layout
    count: NDArray[np.int32]  # [num_sites] rows at each
    in_scale: NDArray[np.int64]  # [num_sites] byte offset of float32 [in_features], or ABSENT
    out_scale: NDArray[np.int64]  # [num_sites] byte offset of float32 [out_features], or ABSENT
    bias: NDArray[np.int64]  # [num_sites] byte offset of float32 [out_features], or ABSENT
    a_offset: NDArray[np.int64]  # [num_rows] byte offset of a row of in_features in the compute dtype
    b_offset: NDArray[np.int64]  # [num_rows] byte offset of a row of out_features in the compute dtype
    gain: Floats  # [num_rows]
    c: Floats  # [num_rows]
    activation: NDArray[np.int8]  # [num_rows]
    delta_site: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # [num_deltas] site ids
    delta_offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # [sum of out_features] byte offset of each delta's rows of in_features in the compute dtype, delta after delta
    token_id: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [num_tokens], ascending
    token_offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # [num_tokens] byte offset of a row of hidden_size in the compute dtype
    tokens_reach_head: bool = False
    num_prefix_tokens: int = 0  # whose keys and values it brings
    num_prefix_pages: int = 0  # that hold them
    positions: Positions = field(default_factory=Positions)  # of everything it changes

    @property
    def num_pages(self) -> int:
        return int(self.pages.shape[0])

    @property
    def page_bytes(self) -> int:
        return int(self.pages.shape[1])

    @property
    def num_rows(self) -> int:
        return int(self.gain.shape[0])

    @property
    def size_bytes(self) -> int:
        """What it takes of a memory tier."""
        return int(self.pages.nbytes)
