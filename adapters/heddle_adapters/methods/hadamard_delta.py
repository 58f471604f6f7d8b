"""HiRA: `y += (W * (B A)) x`, the weight times a low-rank matrix, element by element.

Format: PEFT's `tuners/hira`, files of peft 0.21. Per targeted module `hira_A` [r, in_features] and `hira_B`
[out_features, r]; r is the config's, or what `rank_pattern` gives the module. There is no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.dense_delta import DenseMethod, DenseSource, refuse_shape
from heddle_adapters.module_pattern import ModulePattern
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B = "hira_A", "hira_B"

READ_FIELDS = frozenset({"r", "rank_pattern"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "hira_dropout", "init_weights"})

EMBEDDING = "HiRA on an embedding is not served; leave the embedding out of target_modules"


@dataclass(frozen=True, kw_only=True)
class HadamardDeltaSource(DenseSource):
    """One site's A and B in the file."""

    a: str  # tensor names
    b: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        factor = tensors.read(self.b) @ tensors.read(self.a)
        return SiteUpdate(self.site, delta=base.weight(self.site) * factor)


@dataclass(frozen=True)
class HadamardDelta(DenseMethod):
    """The settings of one HiRA adapter."""

    rank: int
    rank_pattern: ModulePattern
    label: ClassVar[str] = "HiRA"
    scalars: ClassVar[Mapping[str, Json]] = {}
    refused_parts: ClassVar[Mapping[str, str]] = {"hira_embedding_A": EMBEDDING, "hira_embedding_B": EMBEDDING}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> HadamardDelta:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        return cls(config.rank("r", default=32), config.rank_pattern("rank_pattern"))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[HadamardDeltaSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (A, B), base))

    def _source(self, found: SiteTensors) -> HadamardDeltaSource:
        site, a, b = found.site, found.require(A), found.require(B)
        # PEFT 0.21 obeys the pattern over 4-bit and 8-bit layers only.
        ranks = (int(self.rank_pattern.value_for(site.path, self.rank)), self.rank)
        rank = a.shape[0] if a.shape else 0
        if rank not in ranks:
            refuse_shape(A, a, site.path, "r or rank_pattern", f"gives that module rank {ranks[0]}")
        return HadamardDeltaSource(
            site=site.path,
            shapes={a.name: (rank, site.in_features), b.name: (site.out_features, rank)},
            num_row_values=site.out_features * site.in_features,
            a=a.name,
            b=b.name,
        )
