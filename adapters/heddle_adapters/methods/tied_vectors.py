"""TinyLoRA: within the base's own main directions, an r by r matrix that a short vector spans; sites may share one.

`y += B (R (A x))` with `R = sum_i v[i] P[i]`.

Format: PEFT's `tuners/tinylora`, files of peft 0.21. Per targeted module `tinylora_A` [r, in_features] and `tinylora_B`
[out_features, r], from the base's singular vectors, and `tinylora_P` [u, r, r], random numbers that are in the file
unless `save_projection` is false. The vectors are `base_model.tinylora_v.<group>` [u]: with n targeted modules there
are `max(1, round(n (1 - weight_tying)))` groups of `max(1, n // groups)` modules, in the model's order, and the last
group takes what is left over. No layer has a larger r than its narrower side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows
from heddle_adapters.errors import quoted
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_size, flag_or_default
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes, shared_tensor
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B, P, V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"

READ_FIELDS = frozenset({"bias", "r", "save_projection", "u", "weight_tying"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_v_bound", "init_weights", "projection_seed", "tinylora_dropout"})


@dataclass(frozen=True, kw_only=True)
class TiedVectorSource(FactorSource):
    """One site's A, B and P in the file, and the vector of its group."""

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        a, b, projection, vector = (tensors.read(self.names[part]) for part in (A, B, P, V))
        return Rows.of(np.tensordot(vector, projection, axes=1) @ a, b.T)


@dataclass(frozen=True)
class TiedVectors(FactoredMethod):
    """The settings of one TinyLoRA adapter."""

    rank: int
    vector_length: int
    weight_tying: float
    label: ClassVar[str] = "TinyLoRA"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> TiedVectors:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        if not flag_or_default(config, "save_projection", default=True):
            config.refuse(
                "save_projection",
                "is false, and the random numbers that it leaves out cannot be drawn here as torch draws them; save "
                "the adapter with save_projection=True.",
            )
        weight_tying = config.number("weight_tying", default=0.0)
        if not 0 <= weight_tying <= 1:
            config.refuse("weight_tying", f"must be between 0 and 1, not {quoted(weight_tying)}.")
        return cls(bounded_rank(config, "r", default=2), config.rank("u", default=64), weight_tying)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"weight_tying": self.weight_tying}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[TiedVectorSource, ...]:
        sites = by_site(tensors.values(), (A, B, P), base)
        num_groups = max(1, round(len(sites) * (1 - self.weight_tying)))
        group_size = max(1, len(sites) // num_groups)
        groups = (min(number // group_size, num_groups - 1) for number in range(len(sites)))
        vectors = (shared_tensor(tensors, f"{V}.{group}", "save the adapter again.") for group in groups)
        return tuple(self._source(found, vector) for found, vector in zip(sites, vectors, strict=True))

    def _source(self, found: SiteTensors, vector: TensorInfo) -> TiedVectorSource:
        site, length = found.site, self.vector_length
        rank = min(self.rank, site.in_features, site.out_features)
        check_size(found.require(P), 0, length, "u")
        check_size(found.require(P), 1, rank, "r")
        check_size(vector, 0, length, "u")
        names = {**{part: found.require(part).name for part in (A, B, P)}, V: vector.name}
        fitting = {A: (rank, site.in_features), B: (site.out_features, rank), P: (length, rank, rank), V: (length,)}
        return TiedVectorSource(
            site=site.path,
            shapes={name: fitting[part] for part, name in names.items()},
            **row_sizes(site, rank),
            names=names,
        )
