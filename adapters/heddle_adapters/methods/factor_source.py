"""The common ground of the methods whose update of a layer is a product of thin matrices: rows, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

import numpy as np

from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import Floats, Rows, SiteUpdate
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import PEFT_PREFIX
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

MODEL_PREFIX = PEFT_PREFIX.partition(".")[0] + "."  # of tensors that belong to no module of the base


class FactoredMethod:
    """What `AdapterMethod` asks for and these methods answer alike."""

    combination: ClassVar[Literal["sum"]] = "sum"
    positions: ClassVar[Positions] = Positions()
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = {}


@dataclass(frozen=True, kw_only=True)
class FactorSource(Source):
    """One site's factors in the file."""

    names: Mapping[str, str]  # part to tensor name

    @abstractmethod
    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        """The update; it may have more rows than the layer's narrower side has features."""

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        return SiteUpdate(self.site, narrowed(self.factors(tensors, base)))


class RowSizes(TypedDict):
    """Sizes of a source as `Source` names them."""

    num_rows: int
    num_row_values: int


def row_sizes(site: Site, rank: int) -> RowSizes:
    """Of an update of that rank: no layer needs more rows than its narrower side has features."""
    num_rows = min(rank, site.in_features, site.out_features)
    return {"num_rows": num_rows, "num_row_values": num_rows * (site.in_features + site.out_features)}


def narrowed(rows: Rows) -> Rows:
    """The same update in no more rows than the layer's narrower side has features."""
    if len(rows) <= min(rows.a.shape[1], rows.b.shape[1]):
        return rows
    scaled: Floats = rows.b * rows.gain[:, None]
    return rows_of_delta(scaled.T @ rows.a)


def rows_of_delta(delta: Floats) -> Rows:
    """A whole matrix [out_features, in_features] as rows, one for each feature of its narrower side."""
    out_features, in_features = delta.shape
    if out_features <= in_features:
        return Rows.of(delta, np.eye(out_features, dtype=np.float32))
    return Rows.of(np.eye(in_features, dtype=np.float32), delta.T)


def shared_tensor(tensors: Mapping[str, TensorInfo], part: str, remedy: str) -> TensorInfo:
    """The tensor that several modules share; raises `InvalidAdapter` where the file lacks it."""
    for name in (MODEL_PREFIX + part, part):
        if name in tensors:
            return tensors[name]
    raise InvalidAdapter(f"{WEIGHTS_FILE} has no {part}, which its modules share; {remedy}", param=WEIGHTS_FILE)
