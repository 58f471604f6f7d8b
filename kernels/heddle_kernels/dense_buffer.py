"""Room for a weight that is written out, used, and forgotten."""

from __future__ import annotations

from torch import Tensor


class DenseBuffer:
    """Memory for one layer's weights written out; all layers share it, one after the other."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, num_values: int, like: Tensor) -> Tensor:
        """At least `num_values` of `like`'s dtype, on its device."""
        if self._memory is None or self._memory.dtype != like.dtype or len(self._memory) < num_values:
            self._memory = like.new_empty(num_values)
        return self._memory
