"""IA3: one vector per site, which scales the layer's output, or its input at feed-forward sites.

Format: PEFT's `tuners/ia3`, files of peft 0.21. Per targeted module `ia3_l`: [out_features, 1] multiplies the
layer's whole output, its bias included; [1, in_features], at modules whose path ends with one of the config's
`feedforward_modules`, multiplies the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

L = "ia3_l"

READ_FIELDS = frozenset({"feedforward_modules"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_ia3_weights"})
REFUSED_FIELDS = {"modules_to_save": "is set: whole modules of the base are not replaced; train without it."}


@dataclass(frozen=True)
class ChannelVectorSource:
    """One site's vector in the file."""

    layer: Site
    name: str
    is_feedforward: bool
    num_rows: ClassVar[int] = 0

    @property
    def site(self) -> str:
        return self.layer.path

    @property
    def row_width(self) -> int:
        return self.layer.in_features + self.layer.out_features

    @property
    def vector_width(self) -> int:
        return self.layer.in_features if self.is_feedforward else self.layer.out_features

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {self.name: _fitting_shape(self.layer, self.is_feedforward)}

    def build(self, read: Callable[[str], Floats]) -> SiteUpdate:
        scale = read(self.name).reshape(-1)
        return SiteUpdate(
            site=self.site,
            a=np.zeros((0, self.layer.in_features), np.float32),
            b=np.zeros((0, self.layer.out_features), np.float32),
            gain=np.zeros(0, np.float32),
            c=np.zeros(0, np.float32),
            in_scale=scale if self.is_feedforward else None,
            out_scale=None if self.is_feedforward else scale,
            scales_base_bias=not self.is_feedforward,
        )


@dataclass(frozen=True)
class ChannelVectors:
    """The settings of one IA3 adapter."""

    feedforward_modules: tuple[str, ...]
    label: ClassVar[str] = "IA3"
    combination: ClassVar[Literal["product"]] = "product"
    refused_parts: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> ChannelVectors:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=REFUSED_FIELDS)
        return cls(config.module_paths("feedforward_modules"))

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"feedforward_modules": [*sorted(set(self.feedforward_modules))]}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[ChannelVectorSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (L,), base))

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
        return ChannelVectorSource(found.site, tensor.name, is_feedforward)


def _fitting_shape(layer: Site, is_feedforward: bool) -> tuple[int, int]:
    return (1, layer.in_features) if is_feedforward else (layer.out_features, 1)
