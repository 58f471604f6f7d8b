"""IA3: one vector per site, which scales the layer's output, or its input at feed-forward sites.

Format: PEFT's `tuners/ia3`, files of peft 0.21. Per targeted module `ia3_l`: [out_features, 1] multiplies the
layer's whole output, its bias included; [1, in_features], at modules whose path ends with one of the config's
`feedforward_modules`, multiplies the layer's input. Whole modules may be saved beside them (`companions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.companions import Companions
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

L = "ia3_l"

READ_FIELDS = frozenset({"fan_in_fan_out", "feedforward_modules", "modules_to_save"})
HARMLESS_FIELDS = frozenset({"init_ia3_weights"})


@dataclass(frozen=True, kw_only=True)
class ChannelVectorSource(Source):
    """One site's vector in the file."""

    name: str
    is_feedforward: bool

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        scale = tensors.read(self.name).reshape(-1)
        if self.is_feedforward:
            return SiteUpdate(self.site, in_scale=scale)
        return SiteUpdate(self.site, out_scale=scale, scales_base_bias=True)


@dataclass(frozen=True)
class ChannelVectors:
    """The settings of one IA3 adapter."""

    feedforward_modules: tuple[str, ...]
    companions: Companions
    label: ClassVar[str] = "IA3"
    positions: ClassVar[Positions] = Positions()
    refused_parts: ClassVar[Mapping[str, str]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: AdapterConfig) -> ChannelVectors:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused={})
        return cls(config.module_paths("feedforward_modules"), Companions.from_config(config, "ia3_only"))

    @property
    def combination(self) -> Literal["product", "alone"]:
        return "product" if self.companions.are_none else "alone"

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"feedforward_modules": [*sorted(set(self.feedforward_modules))]}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        vectors = [self._source(found) for found in by_site(tensors.values(), (L,), base)]
        return self.companions.beside(vectors, tensors, base)

    def _source(self, found: SiteTensors) -> ChannelVectorSource:
        tensor = found.require(L)
        # PEFT compares characters here, not whole path components.
        is_feedforward = found.site.path.endswith(self.feedforward_modules)
        is_other_kind = tensor.shape == _fitting_shape(found.site, not is_feedforward)
        if is_other_kind and tensor.shape != _fitting_shape(found.site, is_feedforward):
            message = (
                f"{WEIGHTS_FILE}: {L} of {found.site.path} has shape {list(tensor.shape)}, but feedforward_modules of "
                f"{CONFIG_FILE} says that it scales the layer's {'input' if is_feedforward else 'output'}; "
                "upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return ChannelVectorSource(
            site=found.site.path,
            shapes={tensor.name: _fitting_shape(found.site, is_feedforward)},
            num_vector_values=_num_vector_values(found.site, is_feedforward),
            name=tensor.name,
            is_feedforward=is_feedforward,
        )


def _num_vector_values(layer: Site, is_feedforward: bool) -> int:
    """With what scaling the base's own bias amounts to, which is kept as a vector of the adapter's."""
    return layer.in_features if is_feedforward else layer.out_features * (1 + layer.has_bias)


def _fitting_shape(layer: Site, is_feedforward: bool) -> tuple[int, int]:
    return (1, layer.in_features) if is_feedforward else (layer.out_features, 1)
