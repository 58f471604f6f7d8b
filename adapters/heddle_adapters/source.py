"""What one part of an adapter will be made of: known from names, shapes and scalars, before any tensor is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.canonical import Floats, Part


class Tensors(Protocol):
    """An adapter's own tensors."""

    def read(self, name: str) -> Floats:
        """A copy of one tensor in float32."""
        ...

    def read_integers(self, name: str) -> NDArray[np.int64]:
        """A copy of one tensor of whole numbers."""
        ...


class BaseWeights(Protocol):
    """The base's own numbers as it computes with them, dequantised in float32, one site at a time."""

    def weight(self, path: str) -> Floats:
        """linear [out_features, in_features]; embedding [vocabulary, hidden_size]; norm [width], without an offset."""
        ...

    def bias(self, path: str) -> Floats | None:
        """[out_features], None where the base adds none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One part: an update of a site, rows for tokens, or a prefix. Its sizes are those of what `build` returns."""

    site: str  # module path of what it changes, a key of `BaseLayout.index()`; for a prefix "": all layers' attention
    shapes: Mapping[str, tuple[int, ...]]  # of the file's tensors that it reads, as they fit the base; parts may share
    num_rows: int = 0
    num_row_values: int = 0  # numbers that are kept in the compute dtype: rows, deltas, token rows, keys and values
    num_vector_values: int = 0  # numbers in float32 vectors
    num_virtual_tokens: int = 0  # that it puts before every prompt
    is_dense: bool = False  # whether it takes the memory of a whole weight of the base
    reach_head: bool = False  # whether the output head multiplies with its rows of tokens too

    def check(self, tensors: Tensors, base: BaseWeights) -> None:  # noqa: B027  # most have nothing to do
        """Whether the numbers go with the base's; raises `AdapterError`. Most parts have nothing to compare."""

    @abstractmethod
    def build(self, tensors: Tensors, base: BaseWeights) -> Part:
        """The part itself. Raises `AdapterError` for what only the numbers show."""
