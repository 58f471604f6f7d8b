"""DEFT and PaRa: a few output directions are taken out of the base's weight, and others put in their place.

`W' = W - Q S^T W + s Q R`, so `y += Q (s R - S^T W) x`: with `decomposition_method` "relu" Q is the trained P and S is
max(P, 0), with "qr" both are the orthogonal factor of P. s = alpha / r, or 1 without an alpha. PaRa (`para`) puts
nothing in: R is zero.

Format: PEFT's `tuners/deft`, files of peft 0.21. Per targeted module `deft_P` [out_features, r] and, but for PaRa,
`deft_R` [r, in_features]. No layer has a larger r than out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, bounded_scale, check_size, choice
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

P, R = "deft_P", "deft_R"
RELU, QR = "relu", "qr"

READ_FIELDS = frozenset({"alpha", "bias", "decomposition_method", "para", "r"})
HARMLESS_FIELDS = frozenset({"deft_dropout", "fan_in_fan_out", "init_scale", "init_weights"})


@dataclass(frozen=True, kw_only=True)
class ReplacedSubspaceSource(FactorSource):
    """One site's P and perhaps R in the file."""

    decomposition: str
    scale: float

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        out, taken = self._directions(tensors.read(self.names[P]))
        a = -(taken.T @ base.weight(self.site))
        if R in self.names:
            a = a + self.scale * tensors.read(self.names[R])
        return Rows.of(a, out.T)

    def _directions(self, trained: Floats) -> tuple[Floats, Floats]:
        """Q and S, both [out_features, r]."""
        if self.decomposition == RELU:
            return trained, np.maximum(trained, 0)
        # With the signs that Householder's reflections give in LAPACK, here as in PEFT: the trained R relies on them.
        orthogonal = np.linalg.qr(trained.astype(np.float64))[0].astype(np.float32)
        return orthogonal, orthogonal


@dataclass(frozen=True)
class ReplacedSubspaces(FactoredMethod):
    """The settings of one DEFT or PaRa adapter."""

    rank: int
    alpha: float | None
    decomposition: str
    is_removal_alone: bool

    @classmethod
    def from_config(cls, config: AdapterConfig) -> ReplacedSubspaces:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        return cls(
            rank=bounded_rank(config, "r", default=8),
            alpha=config.number("alpha", default=0) if config.fields.get("alpha") else None,
            decomposition=choice(config, "decomposition_method", RELU, (RELU, QR)),
            is_removal_alone=config.flag("para"),
        )

    @property
    def label(self) -> str:
        return "PaRa" if self.is_removal_alone else "DEFT"

    @property
    def scalars(self) -> Mapping[str, Json]:
        alpha = None if self.is_removal_alone else self.alpha
        return {"alpha": alpha, "decomposition_method": self.decomposition, "para": self.is_removal_alone}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[ReplacedSubspaceSource, ...]:
        parts = (P,) if self.is_removal_alone else (P, R)
        return tuple(self._source(found, parts) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors, parts: tuple[str, ...]) -> ReplacedSubspaceSource:
        site = found.site
        rank = min(self.rank, site.out_features)
        check_size(found.require(P), 1, rank, "r")
        fitting = {P: (site.out_features, rank), R: (rank, site.in_features)}
        names = {part: found.require(part).name for part in parts}
        scale = 1.0 if self.alpha is None else bounded_scale(self.alpha / rank, site.path, "alpha over r")
        return ReplacedSubspaceSource(
            site=site.path,
            shapes={name: fitting[part] for part, name in names.items()},
            **row_sizes(site, rank),
            names=names,
            decomposition=self.decomposition,
            scale=scale,
        )
