"""GraLoRA: the layer's weight as k by k blocks, each with a low-rank update of its own.

With x and y cut into k pieces, `y_j += s * sum_n B_jn^T (A_nj^T x_n)`: every piece of the output reads every piece of
the input through r / k directions. Beside them there may be an ordinary low-rank update of rank hybrid_r, scaled alike;
s = alpha / (r + hybrid_r).

Format: PEFT's `tuners/gralora`, files of peft 0.21. Per targeted module `gralora_A` [k, in_features / k, r], whose last
axis is (j, direction) for the input piece of the first, `gralora_B` [k, r, out_features / k], whose middle axis is
(n, direction) for the output piece of the first, and with hybrid_r `gralora_A_general.weight` [hybrid_r, in_features]
and `gralora_B_general.weight` [out_features, hybrid_r].
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
from heddle_adapters.methods.factor_checks import (
    MAX_RANK,
    bounded_rank,
    bounded_scale,
    check_size,
    divided,
    whole_number,
)
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"

READ_FIELDS = frozenset({"alpha", "bias", "gralora_k", "hybrid_r", "r"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "gralora_dropout", "init_weights"})


@dataclass(frozen=True, kw_only=True)
class BlockGridSource(FactorSource):
    """One site's blocks in the file."""

    scale: float

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        a, b = tensors.read(self.names[A]), tensors.read(self.names[B])
        num_pieces, piece_in, rank = a.shape
        piece_out, directions = b.shape[2], rank // num_pieces
        by_pair_a = a.reshape(num_pieces, piece_in, num_pieces, directions).transpose(0, 2, 3, 1)  # n, j, direction, in
        by_pair_b = b.reshape(num_pieces, num_pieces, directions, piece_out).swapaxes(0, 1)  # n, j, direction, out
        shape = (num_pieces, num_pieces, directions, num_pieces)
        wide_a, wide_b = np.zeros((*shape, piece_in), np.float32), np.zeros((*shape, piece_out), np.float32)
        for piece in range(num_pieces):
            wide_a[piece, :, :, piece] = by_pair_a[piece]
            wide_b[:, piece, :, piece] = by_pair_b[:, piece]
        all_a = wide_a.reshape(-1, num_pieces * piece_in)
        all_b = wide_b.reshape(-1, num_pieces * piece_out)
        if GENERAL_A in self.names:
            all_a = np.concatenate([all_a, tensors.read(self.names[GENERAL_A])])
            all_b = np.concatenate([all_b, tensors.read(self.names[GENERAL_B]).T])
        return Rows.of(all_a, all_b, self.scale)


@dataclass(frozen=True)
class BlockGrid(FactoredMethod):
    """The settings of one GraLoRA adapter."""

    rank: int
    hybrid_rank: int
    num_pieces: int
    alpha: float
    label: ClassVar[str] = "GraLoRA"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> BlockGrid:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        rank, num_pieces = bounded_rank(config, "r", default=32), bounded_rank(config, "gralora_k", default=2)
        hybrid_rank = whole_number(config, "hybrid_r", default=0)
        if rank % num_pieces:
            config.refuse("gralora_k", f"is {num_pieces} and does not divide r, {rank}; upload the trained config.")
        if num_pieces * rank + hybrid_rank > MAX_RANK:
            config.refuse(
                "gralora_k",
                f"times r, plus hybrid_r, is {num_pieces * rank + hybrid_rank}, the rank of the whole update; at most "
                f"{MAX_RANK} is served.",
            )
        return cls(rank, hybrid_rank, num_pieces, config.number("alpha", default=64))

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"alpha": self.alpha}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[BlockGridSource, ...]:
        parts = (A, B, GENERAL_A, GENERAL_B) if self.hybrid_rank else (A, B)
        return tuple(self._source(found, parts) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors, parts: tuple[str, ...]) -> BlockGridSource:
        site, pieces = found.site, self.num_pieces
        fitting = {
            A: (pieces, divided(site.in_features, pieces, found, "gralora_k"), self.rank),
            B: (pieces, self.rank, divided(site.out_features, pieces, found, "gralora_k")),
            GENERAL_A: (self.hybrid_rank, site.in_features),
            GENERAL_B: (site.out_features, self.hybrid_rank),
        }
        check_size(found.require(A), 0, pieces, "gralora_k")
        check_size(found.require(A), 2, self.rank, "r")
        if self.hybrid_rank:
            check_size(found.require(GENERAL_A), 0, self.hybrid_rank, "hybrid_r")
        names = {part: found.require(part).name for part in parts}
        scale = self.alpha / (self.rank + self.hybrid_rank)
        return BlockGridSource(
            site=site.path,
            shapes={name: fitting[part] for part, name in names.items()},
            **row_sizes(site, pieces * self.rank + self.hybrid_rank),
            names=names,
            scale=bounded_scale(scale, site.path, "alpha over r plus hybrid_r"),
        )
