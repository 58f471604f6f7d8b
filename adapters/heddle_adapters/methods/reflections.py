"""HRA: the input is reflected at r hyperplanes before the layer's weight sees it.

`y = W R x + b0` with `R = H_1 H_2 ... H_r`, `H_i = I - 2 u_i u_i^T` and u_i the i-th trained vector at length one. With
`apply_GS` the vectors are first made orthogonal, each to those before it, and `R = I - 2 sum_i u_i u_i^T`. Either way
`R = I - U T U^T` with a small upper triangular T, so W (R - I) is r rows.

Format: PEFT's `tuners/hra`, files of peft 0.21. Per targeted module `hra_u` [in_features, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_size
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

U = "hra_u"
# What is left of a vector without its part along those before it; PEFT takes its direction in float32, where below
# this share of its length more than a thousandth of the direction is rounding.
MIN_SHARE_LEFT = 1e-4

READ_FIELDS = frozenset({"apply_GS", "bias", "r"})
HARMLESS_FIELDS = frozenset({"init_weights"})

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ReflectionSource(FactorSource):
    """One site's vectors in the file."""

    is_orthogonalised: bool

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        vectors = tensors.read(self.names[U]).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=0)
        if not lengths.all():
            self._refuse(int(np.argmin(lengths)), "is zero")
        units = vectors / lengths
        if self.is_orthogonalised:
            units = self._orthogonal(units)
            inner = 2 * np.eye(units.shape[1])
        else:
            inner = _inner(units)
        b = -(base.weight(self.site) @ (units @ inner).astype(np.float32)).T
        return Rows.of(units.T.astype(np.float32), b)

    def _orthogonal(self, units: Doubles) -> Doubles:
        orthogonal = units.copy()
        for number in range(units.shape[1]):
            left = units[:, number]
            for _ in range(2):  # once more, for what rounding left
                left = left - orthogonal[:, :number] @ (orthogonal[:, :number].T @ left)
            share = float(np.linalg.norm(left))
            if share < MIN_SHARE_LEFT:
                self._refuse(number, "depends on those before it, which apply_GS makes it orthogonal to")
            orthogonal[:, number] = left / share
        return orthogonal

    def _refuse(self, number: int, problem: str) -> NoReturn:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE}: vector {number} of {U} of {self.site} {problem}, so it names no hyperplane; upload a "
            "trained checkpoint.",
            param=WEIGHTS_FILE,
        )


def _inner(units: Doubles) -> Doubles:
    """The upper triangular T with H_1 ... H_r = I - U T U^T."""
    rank = units.shape[1]
    gram = units.T @ units
    inner = np.zeros((rank, rank))
    for number in range(rank):
        inner[number, number] = 2
        inner[:number, number] = -2 * inner[:number, :number] @ gram[:number, number]
    return inner


@dataclass(frozen=True)
class Reflections(FactoredMethod):
    """The settings of one HRA adapter."""

    rank: int
    is_orthogonalised: bool
    label: ClassVar[str] = "HRA"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Reflections:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        return cls(bounded_rank(config, "r", default=8), config.flag("apply_GS"))

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"apply_GS": self.is_orthogonalised}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[ReflectionSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (U,), base))

    def _source(self, found: SiteTensors) -> ReflectionSource:
        site, tensor = found.site, found.require(U)
        check_size(tensor, 1, self.rank, "r")
        if self.rank > site.in_features:
            raise InvalidAdapter(
                f"{CONFIG_FILE}: r is {self.rank}, and {site.path} has {site.in_features} inputs to reflect; train "
                "with a smaller r.",
                param=CONFIG_FILE,
            )
        return ReflectionSource(
            site=site.path,
            shapes={tensor.name: (site.in_features, self.rank)},
            **row_sizes(site, self.rank),
            names={U: tensor.name},
            is_orthogonalised=self.is_orthogonalised,
        )
