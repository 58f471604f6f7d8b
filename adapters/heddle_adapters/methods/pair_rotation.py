"""RoAd: `y = R (W x + b0)`, a layer's whole output turned in pairs.

Within each group of `group_size` outputs, output j and the one half a group later are a pair (u, v) that becomes
(u c_j - v s_j, v c_k + u s_k), with c = alpha cos(theta) and s = alpha sin(theta). Format: PEFT's `tuners/road`, files
of peft 0.21. Per targeted module `road_theta` and `road_alpha`: [out_features / 2] in the variant road_1, where a pair
shares its angle and scale; [out_features] in road_2, where each output has its own; and [2 * out_features] in road_4,
where in each group the first half is for c and the second for s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.errors import quoted
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.dense_delta import DenseMethod, DenseSource, refuse_shape
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

THETA, ALPHA = "road_theta", "road_alpha"
HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers of each tensor for every two outputs

READ_FIELDS = frozenset({"group_size", "variant"})
HARMLESS_FIELDS = frozenset({"init_weights"})


@dataclass(frozen=True, kw_only=True)
class PairRotationSource(DenseSource):
    """One site's angles and scales in the file."""

    theta: str  # tensor names
    alpha: str
    variant: str
    group_size: int
    has_bias: bool  # whether the base has one here

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        cosine, sine = self._columns(tensors.read(self.theta), tensors.read(self.alpha))
        weight, bias = base.weight(self.site), base.bias(self.site) if self.has_bias else None
        return SiteUpdate(
            self.site,
            delta=self._turned(weight, cosine, sine) - weight,
            bias=None if bias is None else (self._turned(bias[:, None], cosine, sine) - bias[:, None])[:, 0],
        )

    def _columns(self, theta: Floats, alpha: Floats) -> tuple[Floats, Floats]:
        """c and s, each [out_features, 1]."""
        cosine, sine = alpha * np.cos(theta), alpha * np.sin(theta)
        if self.variant == "road_1":
            cosine, sine = (each.reshape(-1, self.group_size // 2).repeat(2, axis=0) for each in (cosine, sine))
        elif self.variant == "road_4":
            cosine = cosine.reshape(-1, 2, self.group_size)[:, 0]
            sine = sine.reshape(-1, 2, self.group_size)[:, 1]
        return cosine.reshape(-1, 1), sine.reshape(-1, 1)

    def _turned(self, outputs: Floats, cosine: Floats, sine: Floats) -> Floats:
        """outputs [out_features, any]"""
        halves = outputs.reshape(-1, 2, self.group_size // 2, outputs.shape[1])
        partners = np.stack((-halves[:, 1], halves[:, 0]), axis=1).reshape(outputs.shape)
        turned: Floats = cosine * outputs + sine * partners
        return turned


@dataclass(frozen=True)
class PairRotation(DenseMethod):
    """The settings of one RoAd adapter."""

    variant: str  # a key of HALVES
    group_size: int
    label: ClassVar[str] = "RoAd"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> PairRotation:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        variant, group_size = config.text("variant") or "road_1", config.rank("group_size", default=64)
        if variant not in HALVES:
            config.refuse("variant", f"is {quoted(variant)}; it must be one of {', '.join(HALVES)}.")
        if group_size % 2:
            config.refuse("group_size", f"is {quoted(group_size)}; it must be even, for its halves are paired.")
        return cls(variant, group_size)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"group_size": self.group_size, "variant": self.variant}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[PairRotationSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (THETA, ALPHA), base))

    def _source(self, found: SiteTensors) -> PairRotationSource:
        site, theta, alpha = found.site, found.require(THETA), found.require(ALPHA)
        if site.out_features % self.group_size:
            promised = f"of {self.group_size} does not divide the module's {site.out_features} outputs"
            refuse_shape(THETA, theta, site.path, "group_size", promised)
        fitting = (site.out_features // 2 * HALVES[self.variant],)
        if theta.shape != fitting:
            refuse_shape(THETA, theta, site.path, "variant", f"is {self.variant}, so that it must be {list(fitting)}")
        return PairRotationSource(
            site=site.path,
            shapes={theta.name: fitting, alpha.name: fitting},
            num_row_values=site.out_features * site.in_features,
            num_vector_values=site.out_features if site.has_bias else 0,
            theta=theta.name,
            alpha=alpha.name,
            variant=self.variant,
            group_size=self.group_size,
            has_bias=site.has_bias,
        )
