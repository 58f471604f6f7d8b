"""BEFT: one trained bias per site, added to the layer's output.

Format: PEFT's `tuners/beft`, files of peft 0.21. Per targeted linear layer `beft_bias` [1, out_features], whether the
base has a bias of its own there or not. Whole modules may be saved beside them (`companions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.methods.companions import Companions
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import TensorInfo

BIAS = "beft_bias"

READ_FIELDS = frozenset({"modules_to_save"})
HARMLESS_FIELDS = frozenset({"init_weights"})


@dataclass(frozen=True, kw_only=True)
class BiasSource(Source):
    """One site's bias in the file."""

    name: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        return SiteUpdate(self.site, bias=tensors.read(self.name).reshape(-1))


@dataclass(frozen=True)
class BiasTuning:
    """The settings of one BEFT adapter."""

    companions: Companions
    label: ClassVar[str] = "BEFT"
    positions: ClassVar[Positions] = Positions()
    scalars: ClassVar[Mapping[str, Json]] = {}
    refused_parts: ClassVar[Mapping[str, str]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: AdapterConfig) -> BiasTuning:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused={})
        return cls(Companions.from_config(config, "beft_only"))

    @property
    def combination(self) -> Literal["sum", "alone"]:
        return "sum" if self.companions.are_sums else "alone"

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        biases = [_source(found) for found in by_site(tensors.values(), (BIAS,), base)]
        return self.companions.beside(biases, tensors, base)


def _source(found: SiteTensors) -> BiasSource:
    site, name = found.site, found.require(BIAS).name
    return BiasSource(
        site=site.path, shapes={name: (1, site.out_features)}, num_vector_values=site.out_features, name=name
    )
