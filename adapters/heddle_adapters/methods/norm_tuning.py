"""Norm tuning: trained weights, and biases where the norm has one, in place of the base's norms' own.

Format: PEFT's `tuners/ln_tuning`, files of peft 0.21. Per targeted norm `ln_tuning_layers.weight` [width] and, if the
norm has a bias, `ln_tuning_layers.bias` [width]: a copy of the module, trained. A norm whose weight is stored less a
constant (Gemma's is 1 + weight) stores its copy so too. Whole modules may be saved beside them (`companions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.methods.companions import Companions
from heddle_adapters.methods.saved_modules import SavedNormSource, saved_norm
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import TensorInfo

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"

READ_FIELDS = frozenset({"modules_to_save"})
REFUSED_PARTS = {BIAS: "this base's norm of that name has no bias"}


@dataclass(frozen=True)
class NormTuning:
    """The settings of one norm tuning adapter."""

    companions: Companions
    label: ClassVar[str] = "LN tuning"
    combination: ClassVar[Literal["alone"]] = "alone"
    positions: ClassVar[Positions] = Positions()
    scalars: ClassVar[Mapping[str, Json]] = {}
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: AdapterConfig) -> NormTuning:
        config.check_fields(read=READ_FIELDS, harmless=frozenset(), refused={})
        return cls(Companions.from_config(config, "ln_tuning_only"))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        norms = [_source(found) for found in by_site(tensors.values(), (WEIGHT, BIAS), base, "norm")]
        return self.companions.beside(norms, tensors, base)


def _source(found: SiteTensors) -> SavedNormSource:
    bias = found.require(BIAS).name if found.site.has_bias else None
    return saved_norm(found.site, found.require(WEIGHT).name, bias)
