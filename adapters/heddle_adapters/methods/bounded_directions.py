"""DeLoRA: a low-rank update whose directions all have one trained length.

`y += B diag(lambda / (r |A_i| |B_i|)) A (w_norm * x)` over the rows A_i and the columns B_i, with norms of at least
1e-4. w_norm holds the lengths of the base weight's columns as they were in training.

Format: PEFT's `tuners/delora`, files of peft 0.21. Per targeted module `delora_A` [r, in_features], `delora_B`
[out_features, r], `delora_lambda` [1] and `delora_w_norm` [in_features].
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
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_size
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes
from heddle_adapters.module_pattern import ModulePattern
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B, LAMBDA, NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
PARTS = (A, B, LAMBDA, NORMS)
MIN_NORM = 1e-4

READ_FIELDS = frozenset({"bias", "r", "rank_pattern"})
# The lambdas of the config are where training begins.
HARMLESS_FIELDS = frozenset({"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"})


@dataclass(frozen=True, kw_only=True)
class BoundedDirectionsSource(FactorSource):
    """One site's directions, their length and the base's in the file."""

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        a, b, length, norms = (tensors.read(self.names[part]) for part in PARTS)
        a_norms = np.maximum(np.linalg.norm(a, axis=1), MIN_NORM)
        b_norms = np.maximum(np.linalg.norm(b, axis=0), MIN_NORM)
        return Rows.of(a * norms, b.T, length / len(a) / (a_norms * b_norms))


@dataclass(frozen=True)
class BoundedDirections(FactoredMethod):
    """The settings of one DeLoRA adapter."""

    rank: int
    rank_pattern: ModulePattern
    label: ClassVar[str] = "DeLoRA"
    scalars: ClassVar[Mapping[str, Json]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> BoundedDirections:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        return cls(bounded_rank(config, "r", default=8), config.rank_pattern("rank_pattern"))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[BoundedDirectionsSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), PARTS, base))

    def _source(self, found: SiteTensors) -> BoundedDirectionsSource:
        site, tensor = found.site, found.require(A)
        check_size(tensor, 0, self.rank_pattern.value_for(site.path, self.rank), "r or rank_pattern")
        rank = tensor.shape[0]
        fitting = {
            A: (rank, site.in_features),
            B: (site.out_features, rank),
            LAMBDA: (1,),
            NORMS: (site.in_features,),
        }
        names = {part: found.require(part).name for part in PARTS}
        return BoundedDirectionsSource(
            site=site.path,
            shapes={name: fitting[part] for part, name in names.items()},
            **row_sizes(site, rank),
            names=names,
        )
