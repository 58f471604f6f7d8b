"""SHiRA and Super-Tuning: some elements of the weight get a number of their own added.

Formats: PEFT's `tuners/shira` and `tuners/supertuning`, files of peft 0.21, for weights that are stored
[out_features, in_features]. SHiRA, per targeted module: `shira_weight` [n] and `shira_indices` [2, n], rows and
columns, with n = r * (in_features + out_features). Super-Tuning: `supertuning_values` [n] and `supertuning_indices`
[n], which count through the weight row by row, with n the config's share of the weight; and where the config has an r,
a LoRA beside them: `supertuning_lora_A.weight` [r, in_features] and `supertuning_lora_B.weight` [out_features, r],
scaled by lora_alpha / r. In both, numbers of one element are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows, SiteUpdate
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.dense_delta import DenseMethod, DenseSource, refuse_shape
from heddle_adapters.methods.low_rank import MAX_ABSOLUTE_SCALE
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

SHIRA_VALUES, SHIRA_INDICES = "shira_weight", "shira_indices"
VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"

# What chose the elements; the file says which they are.
SHIRA_READ_FIELDS = frozenset({"r"})
SHIRA_HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_weights", "mask_type", "random_seed"})
READ_FIELDS = frozenset({"lora_alpha", "r", "save_precomputed_indices", "sparsity"})
HARMLESS_FIELDS = frozenset({"init_weights", "lora_dropout", "select_top"})


@dataclass(frozen=True, kw_only=True)
class SparseSource(DenseSource):
    """One site's elements in the file, and perhaps a LoRA beside them."""

    values: str  # tensor names
    indices: str
    shape: tuple[int, int]  # [out_features, in_features]
    a: str | None = None
    b: str | None = None
    scale: float = 1.0  # of the LoRA

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        indices = tensors.read_integers(self.indices)
        limits = np.array([[limit] for limit in self.shape]) if indices.ndim == 2 else self.shape[0] * self.shape[1]
        if (indices < 0).any() or (indices >= limits).any():
            raise InvalidAdapter(
                f"{WEIGHTS_FILE}: {self.indices} names elements outside of {self.site}, whose weight is "
                f"{list(self.shape)}; upload the file as it was saved.",
                param=WEIGHTS_FILE,
            )
        flat = indices[0] * self.shape[1] + indices[1] if indices.ndim == 2 else indices
        delta = np.zeros(self.shape, np.float32)
        np.add.at(delta.reshape(-1), flat, tensors.read(self.values))
        rows = None
        if self.a is not None and self.b is not None:
            rows = Rows.of(tensors.read(self.a), tensors.read(self.b).T, self.scale)
        return SiteUpdate(self.site, rows=rows, delta=delta)


@dataclass(frozen=True)
class Shira(DenseMethod):
    """The settings of one SHiRA adapter."""

    rank: int
    label: ClassVar[str] = "SHiRA"
    scalars: ClassVar[Mapping[str, Json]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset({SHIRA_INDICES})

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Shira:
        config.check_fields(read=SHIRA_READ_FIELDS, harmless=SHIRA_HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        return cls(config.rank("r", default=32))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[SparseSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (SHIRA_VALUES, SHIRA_INDICES), base))

    def _source(self, found: SiteTensors) -> SparseSource:
        site, values, indices = found.site, found.require(SHIRA_VALUES), found.require(SHIRA_INDICES)
        num_elements = self.rank * (site.in_features + site.out_features)
        if values.shape != (num_elements,):
            refuse_shape(SHIRA_VALUES, values, site.path, "r", f"gives that module {num_elements} elements")
        return SparseSource(
            site=site.path,
            shapes={values.name: (num_elements,), indices.name: (2, num_elements)},
            num_row_values=site.out_features * site.in_features,
            values=values.name,
            indices=indices.name,
            shape=(site.out_features, site.in_features),
        )


@dataclass(frozen=True)
class SuperTuning(DenseMethod):
    """The settings of one Super-Tuning adapter."""

    sparsity: float
    rank: int | None  # of the LoRA beside the elements
    alpha: float
    label: ClassVar[str] = "Super-Tuning"
    integer_parts: ClassVar[frozenset[str]] = frozenset({INDICES})

    @classmethod
    def from_config(cls, config: AdapterConfig) -> SuperTuning:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        if config.fields.get("save_precomputed_indices") is False:
            config.refuse(
                "save_precomputed_indices",
                "is false, so the file does not say which elements were trained; save the adapter with it true.",
            )
        sparsity = config.number("sparsity", default=0.99)
        if not 0 <= sparsity < 1:
            config.refuse("sparsity", f"is {sparsity:g}; it must be at least 0 and less than 1.")
        if config.fields.get("r") is None:
            return cls(sparsity, None, 0.0)
        rank = config.rank("r", default=1)
        alpha = config.number("lora_alpha", default=2 * rank)
        if abs(alpha / rank) > MAX_ABSOLUTE_SCALE:
            config.refuse("lora_alpha", f"scales by {alpha / rank:g}; at most {MAX_ABSOLUTE_SCALE:g} is allowed.")
        return cls(sparsity, rank, alpha)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {} if self.rank is None else {"alpha": self.alpha}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[SparseSource, ...]:
        parts = (VALUES, INDICES) if self.rank is None else (VALUES, INDICES, A, B)
        return tuple(self._source(found) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors) -> SparseSource:
        site, values, indices = found.site, found.require(VALUES), found.require(INDICES)
        num_weights = site.out_features * site.in_features
        num_elements = num_trained(num_weights, self.sparsity)
        if values.shape != (num_elements,):
            refuse_shape(VALUES, values, site.path, "sparsity", f"gives that module {num_elements} elements")
        shapes = {values.name: (num_elements,), indices.name: (num_elements,)}
        if self.rank is None:
            return SparseSource(
                site=site.path,
                shapes=shapes,
                num_row_values=num_weights,
                values=values.name,
                indices=indices.name,
                shape=(site.out_features, site.in_features),
            )
        a, b = found.require(A), found.require(B)
        if a.shape[:1] != (self.rank,):
            refuse_shape(A, a, site.path, "r", f"is {self.rank}")
        return SparseSource(
            site=site.path,
            shapes={**shapes, a.name: (self.rank, site.in_features), b.name: (site.out_features, self.rank)},
            num_rows=self.rank,
            num_row_values=num_weights + self.rank * (site.in_features + site.out_features),
            values=values.name,
            indices=indices.name,
            shape=(site.out_features, site.in_features),
            a=a.name,
            b=b.name,
            scale=self.alpha / self.rank,
        )


def num_trained(num_weights: int, sparsity: float) -> int:
    """How many elements of a weight Super-Tuning trains; as PEFT rounds it, to the last bit."""
    return int(num_weights * (1 - sparsity))
