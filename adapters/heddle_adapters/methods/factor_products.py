"""LoHa and LoKr: products of two low-rank matrices, whose rank is the product of theirs.

LoHa, element by element: `y += s * ((w1_a w1_b) * (w2_a w2_b)) x`. Format: PEFT's `tuners/loha`, files of peft 0.21.
Per targeted module `hada_w1_a` and `hada_w2_a` [out_features, r], `hada_w1_b` and `hada_w2_b` [r, in_features].

LoKr, Kronecker's: `y += s * kron(w1, w2) x` with w1 [o1, i1] and w2 [o2, i2], where o1 o2 is out_features and i1 i2
in_features. Format: `tuners/lokr`. Either matrix is in the file whole, `lokr_w1`, or as the product of `lokr_w1_a`
[o1, r] and `lokr_w1_b` [r, i1]; the same for w2.

s = alpha / r in both; r and alpha are the config's unless a pattern names the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.factor_checks import bounded_rank, bounded_scale, check_size
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes, rows_of_delta
from heddle_adapters.module_pattern import ModulePattern
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

HADA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
W1, W2 = "lokr_w1", "lokr_w2"
LOKR_PARTS = tuple(matrix + suffix for matrix in (W1, W2) for suffix in ("", "_a", "_b"))

READ_FIELDS = frozenset({"alpha", "alpha_pattern", "r", "rank_pattern"})
HARMLESS_FIELDS = frozenset(
    {
        "decompose_both",
        "decompose_factor",
        "init_weights",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "use_effective_conv2d",
    }
)
CONVOLUTION = "adapters of convolutions are not served; target linear layers"

Product = TypeVar("Product", bound="FactorProducts")


@dataclass(frozen=True, kw_only=True)
class HadamardSource(FactorSource):
    """One site's four factors in the file."""

    rank: int  # of each of the two matrices
    scale: float

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        first_b, first_a, second_b, second_a = (tensors.read(self.names[part]) for part in HADA_PARTS)
        in_features, out_features = first_a.shape[1], len(first_b)
        if self.rank**2 > min(in_features, out_features):
            return rows_of_delta(self.scale * (first_b @ first_a) * (second_b @ second_a))
        a = np.einsum("pi,qi->pqi", first_a, second_a).reshape(-1, in_features)
        b = np.einsum("op,oq->pqo", first_b, second_b).reshape(-1, out_features)
        return Rows.of(a, b, self.scale)


@dataclass(frozen=True, kw_only=True)
class KroneckerSource(FactorSource):
    """One site's two matrices in the file, each whole or in factors."""

    scale: float

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        first, second = (self._rows(matrix, tensors) for matrix in (W1, W2))
        return Rows.of(np.kron(first.a, second.a), np.kron(first.b, second.b), self.scale)

    def _rows(self, matrix: str, tensors: Tensors) -> Rows:
        if matrix in self.names:
            return rows_of_delta(tensors.read(self.names[matrix]))
        b, a = (tensors.read(self.names[matrix + suffix]) for suffix in ("_a", "_b"))
        return Rows.of(a, b.T) if len(a) <= min(len(b), a.shape[1]) else rows_of_delta(b @ a)


@dataclass(frozen=True)
class FactorProducts(FactoredMethod):
    """The settings of one adapter of either kind."""

    rank: int
    alpha: float
    rank_pattern: ModulePattern
    alpha_pattern: ModulePattern

    @classmethod
    def from_config(cls: type[Product], config: AdapterConfig) -> Product:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        return cls(
            rank=bounded_rank(config, "r", default=8),
            alpha=config.number("alpha", default=8),
            rank_pattern=config.rank_pattern("rank_pattern"),
            alpha_pattern=config.number_pattern("alpha_pattern"),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"alpha": self.alpha, "alpha_pattern": _in_order(self.alpha_pattern)}

    def rank_of(self, module: str) -> float:
        return self.rank_pattern.value_for(module, self.rank)

    def scale_of(self, module: str) -> float:
        scale = self.alpha_pattern.value_for(module, self.alpha) / self.rank_of(module)
        return bounded_scale(scale, module, "alpha or alpha_pattern, over r,")


def _in_order(pattern: ModulePattern) -> Json:
    return [[key.path, key.is_whole_path, value] for key, value in pattern.values.items()]


@dataclass(frozen=True)
class HadamardProducts(FactorProducts):
    """The settings of one LoHa adapter."""

    label: ClassVar[str] = "LoHa"
    refused_parts: ClassVar[Mapping[str, str]] = {"hada_t1": CONVOLUTION, "hada_t2": CONVOLUTION}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[HadamardSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), HADA_PARTS, base))

    def _source(self, found: SiteTensors) -> HadamardSource:
        site = found.site
        tall = found.require(HADA_PARTS[0])
        check_size(tall, 1, self.rank_of(site.path), "r or rank_pattern")
        rank = tall.shape[1]
        names = {part: found.require(part).name for part in HADA_PARTS}
        fitting = {"a": (site.out_features, rank), "b": (rank, site.in_features)}
        return HadamardSource(
            site=site.path,
            shapes={name: fitting[part[-1]] for part, name in names.items()},
            **row_sizes(site, rank**2),
            is_dense=rank**2 >= min(site.in_features, site.out_features),
            names=names,
            rank=rank,
            scale=self.scale_of(site.path),
        )


@dataclass(frozen=True)
class KroneckerProducts(FactorProducts):
    """The settings of one LoKr adapter."""

    label: ClassVar[str] = "LoKr"
    refused_parts: ClassVar[Mapping[str, str]] = {"lokr_t2": CONVOLUTION}

    @property
    def scalars(self) -> Mapping[str, Json]:
        """With the ranks, which matrices that are in the file whole do not show."""
        return {**super().scalars, "r": self.rank, "rank_pattern": _in_order(self.rank_pattern)}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[KroneckerSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), LOKR_PARTS, base))

    def _source(self, found: SiteTensors) -> KroneckerSource:
        site = found.site
        rank_1, (out_1, in_1), shapes_1 = self._matrix(found, W1)
        rank_2, (out_2, in_2), shapes_2 = self._matrix(found, W2)
        if (out_1 * out_2, in_1 * in_2) != (site.out_features, site.in_features):
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE}: {W1} [{out_1}, {in_1}] and {W2} [{out_2}, {in_2}] of {site.path} make a matrix of "
                f"[{out_1 * out_2}, {in_1 * in_2}], but the layer is [{site.out_features}, {site.in_features}]; upload "
                "it where the base it was trained on is served.",
                param=WEIGHTS_FILE,
            )
        rank = rank_1 * rank_2  # at most min(out_1, in_1) * min(out_2, in_2), the layer's own
        shapes = shapes_1 | shapes_2
        return KroneckerSource(
            site=site.path,
            shapes={found.parts[part].name: shape for part, shape in shapes.items()},
            **row_sizes(site, rank),
            is_dense=rank >= min(site.in_features, site.out_features),
            names={part: found.parts[part].name for part in shapes},
            scale=self.scale_of(site.path),
        )

    def _matrix(self, found: SiteTensors, matrix: str) -> tuple[int, tuple[int, int], dict[str, tuple[int, ...]]]:
        """Its rank, its shape, and the shapes of what the file has of it."""
        if matrix in found.parts:
            shape = self._two_sizes(found.parts[matrix])
            return min(shape), shape, {matrix: shape}
        tall, wide = found.require(matrix + "_a"), found.require(matrix + "_b")
        rank = self.rank_of(found.site.path)
        check_size(tall, 1, rank, "r or rank_pattern")
        check_size(wide, 0, rank, "r or rank_pattern")
        shape = self._two_sizes(tall)[0], self._two_sizes(wide)[1]
        return min(*tall.shape, *wide.shape), shape, {matrix + "_a": tall.shape, matrix + "_b": wide.shape}

    def _two_sizes(self, tensor: TensorInfo) -> tuple[int, int]:
        if len(tensor.shape) != 2:
            message = (
                f"{WEIGHTS_FILE}: {tensor.name} has shape {list(tensor.shape)} and must be a matrix; {CONVOLUTION}."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        first, second = tensor.shape
        return first, second
