"""The stores that the benchmark's servers run over, and how much memory their adapters need. Starts no server."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from heddle_demo.bench.random_adapters import RANKS, RandomAdapters, fill_store

PACKING_WASTE = 1.05  # of an adapter's rows, at most, for what its pages leave empty


class BenchStores:
    """Stores of the first n adapters, by n, in one folder."""

    def __init__(self, folder: Path, adapters: RandomAdapters) -> None:
        self._folder = folder
        self._adapters = adapters

    def path(self, num_registered: int) -> Path:
        return self._folder / f"store-{num_registered}"

    def names(self, count: int) -> list[str]:
        return self._adapters.names(count)

    def fill(self, num_registered: int) -> None:
        """Makes the store of the first `num_registered` adapters."""
        fill_store(self.path(num_registered), self._adapters, num_registered)

    def copy(self, num_registered: int) -> Path:
        """The same store once more, for a second server over equal adapters; no server may have it open."""
        target = self._folder / f"store-{num_registered}-copy"
        shutil.copytree(self.path(num_registered), target, copy_function=_link_content)
        return target

    def share_rows(self, num_registered: int, target: Path) -> None:
        """Lets the store `target`, which has none yet, use the rows that were compiled for another."""
        shutil.copytree(self.path(num_registered) / "rows", target / "rows", copy_function=os.link)

    def room_bytes(self, num_adapters: float) -> int:
        """What so many adapters of the mean size take in a memory tier."""
        return math.ceil(num_adapters * self._adapters.mean_row_bytes(len(RANKS)) * PACKING_WASTE)


def _link_content(source: str, target: str) -> None:
    """Content is never written in place, so two stores can have the same files; the index is each one's own."""
    is_content = Path(source).parent.parent.name == "content"
    (os.link if is_content else shutil.copy2)(source, target)
