"""VeRA and PVeRA: two random matrices that all sites share, and two trained vectors per site.

VeRA: `y += lambda_b * (B (lambda_d * (A x)))`, where a site takes the first in_features columns of A and the first
out_features rows of B. Format: PEFT's `tuners/vera`, files of peft 0.21. Per targeted module `vera_lambda_b`
[out_features] and `vera_lambda_d` [r]; once `base_model.vera_A` [r, widest input] and `base_model.vera_B`
[widest output, r], unless `save_projection` is false: then both are drawn from `projection_prng_key`.

PVeRA (`tuners/pvera`) trains a mean and a variance: A and lambda_d have 2 r rows, and inference uses the first r, the
means, alone. Its names begin with `pvera_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_size, flag_or_default, whole_number
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes, shared_tensor
from heddle_adapters.methods.torch_uniform import kaiming_uniform
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

LAMBDA_B, LAMBDA_D = "lambda_b", "lambda_d"
MAX_DRAWN_VALUES = 2**26  # of both matrices together, 256 MiB: rank 2048 over inputs and outputs of 16,384

READ_FIELDS = frozenset({"bias", "projection_prng_key", "r", "save_projection"})
HARMLESS_FIELDS = frozenset({"d_initial", "fan_in_fan_out", "generator_seed", "init_weights"})
SAMPLING = {
    "sample_at_inference": "is true: answers would be drawn anew for every token; save with sample_at_inference=False."
}


class Projections(Protocol):
    """Where the shared matrices come from."""

    def matrices(self, tensors: Tensors) -> tuple[Floats, Floats]:
        """A [rows, widest input] and B [widest output, r]."""
        ...


@dataclass(frozen=True)
class SavedProjections:
    """They are in the file, under these names."""

    a: str
    b: str

    def matrices(self, tensors: Tensors) -> tuple[Floats, Floats]:
        return tensors.read(self.a), tensors.read(self.b)


@dataclass(frozen=True)
class DrawnProjections:
    """They are drawn as PEFT draws them, once for all sites."""

    seed: int
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]

    def matrices(self, tensors: Tensors) -> tuple[Floats, Floats]:
        return self._drawn

    @cached_property
    def _drawn(self) -> tuple[Floats, Floats]:
        a, b = kaiming_uniform(self.seed, self.a_shape, self.b_shape)
        return a, b


@dataclass(frozen=True, kw_only=True)
class SharedProjectionsSource(FactorSource):
    """One site's two vectors in the file, beside the shared matrices."""

    rank: int
    in_features: int
    projections: Projections

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        a, b = self.projections.matrices(tensors)
        scale_out, scale_rank = tensors.read(self.names[LAMBDA_B]), tensors.read(self.names[LAMBDA_D])
        return Rows.of(
            scale_rank[: self.rank, None] * a[: self.rank, : self.in_features],
            (scale_out[:, None] * b[: len(scale_out)]).T,
        )


@dataclass(frozen=True)
class SharedProjections(FactoredMethod):
    """The settings of one VeRA or PVeRA adapter."""

    label: str
    prefix: str  # of the names of its tensors
    rank: int
    rows_per_rank: int  # of A and lambda_d
    prng_key: int | None  # None where the file has the matrices

    @classmethod
    def of_vera(cls, config: AdapterConfig) -> SharedProjections:
        harmless = HARMLESS_FIELDS | {"vera_dropout"}
        config.check_fields(read=READ_FIELDS, harmless=harmless, refused=MODULES_TO_SAVE)
        return cls._of(config, "VeRA", "vera_", rows_per_rank=1)

    @classmethod
    def of_pvera(cls, config: AdapterConfig) -> SharedProjections:
        harmless = HARMLESS_FIELDS | {"pvera_dropout"}
        config.check_fields(read=READ_FIELDS, harmless=harmless, refused=MODULES_TO_SAVE | SAMPLING)
        return cls._of(config, "PVeRA", "pvera_", rows_per_rank=2)

    @classmethod
    def _of(cls, config: AdapterConfig, label: str, prefix: str, rows_per_rank: int) -> SharedProjections:
        refuse_trained_biases(config)
        prng_key = whole_number(config, "projection_prng_key", default=0)
        is_saved = flag_or_default(config, "save_projection", default=True)
        rank = bounded_rank(config, "r", default=256)
        return cls(label, prefix, rank, rows_per_rank, None if is_saved else prng_key)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"projection_prng_key": self.prng_key}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[SharedProjectionsSource, ...]:
        sites = by_site(tensors.values(), (self.prefix + LAMBDA_B, self.prefix + LAMBDA_D), base)
        widest_in = max((found.site.in_features for found in sites), default=1)
        widest_out = max((found.site.out_features for found in sites), default=1)
        a_shape, b_shape = (self.rows_per_rank * self.rank, widest_in), (widest_out, self.rank)
        projections, shapes = self._projections(tensors, a_shape, b_shape)
        return tuple(self._source(found, projections, shapes) for found in sites)

    def _projections(
        self, tensors: Mapping[str, TensorInfo], a_shape: tuple[int, int], b_shape: tuple[int, int]
    ) -> tuple[Projections, dict[str, tuple[int, ...]]]:
        """The matrices, with the shapes of those that are in the file."""
        if self.prng_key is not None:
            num_values = a_shape[0] * a_shape[1] + b_shape[0] * b_shape[1]
            if num_values > MAX_DRAWN_VALUES:
                message = (
                    f"{CONFIG_FILE}: r {self.rank} asks for {num_values} random numbers; at most {MAX_DRAWN_VALUES} "
                    "are drawn, so save the adapter with save_projection=True."
                )
                raise InvalidAdapter(message, param=CONFIG_FILE)
            return DrawnProjections(self.prng_key, a_shape, b_shape), {}
        a, b = (
            shared_tensor(tensors, self.prefix + part, "save the adapter again with save_projection=True.")
            for part in ("A", "B")
        )
        # Matrices that PEFT took over from an adapter loaded before may be wider than this one needs.
        wide_a = (a_shape[0], max(a_shape[1], *a.shape[1:2], 0))
        wide_b = (max(b_shape[0], *b.shape[:1], 0), b_shape[1])
        return SavedProjections(a.name, b.name), {a.name: wide_a, b.name: wide_b}

    def _source(
        self, found: SiteTensors, projections: Projections, shapes: dict[str, tuple[int, ...]]
    ) -> SharedProjectionsSource:
        site, num_rows = found.site, self.rows_per_rank * self.rank
        check_size(found.require(self.prefix + LAMBDA_D), 0, num_rows, "r")
        names = {part: found.require(self.prefix + part).name for part in (LAMBDA_B, LAMBDA_D)}
        return SharedProjectionsSource(
            site=site.path,
            shapes={**shapes, names[LAMBDA_B]: (site.out_features,), names[LAMBDA_D]: (num_rows,)},
            **row_sizes(site, self.rank),
            names=names,
            rank=self.rank,
            in_features=site.in_features,
            projections=projections,
        )
