"""MiSS: one small matrix, laid out again and again over the layer's weight.

`y += M^T (sum of x's shards)`, where x is cut into shards of length r, the last one padded with zeros, and M is
[r, out_features]. "mini": M is [r, mini_r], repeated along the outputs. "bat" multiplies each r by r block of the
base's weight too: block (m, n) becomes `W_mn (I + M_m) + M_m`, a change of full rank.

Format: PEFT's `tuners/miss`, files of peft 0.21. Per targeted module `miss_block`: [r, out_features], [r, mini_r], or
[out_features / r, r, r]; `init_weights` says which. (Bone, which MiSS was called before, had other layouts.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows, SiteUpdate
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_size, divided
from heddle_adapters.methods.factor_source import FactorSource, row_sizes
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import TensorInfo

BLOCK = "miss_block"
Variant = Literal["plain", "mini", "bat"]

READ_FIELDS = frozenset({"bias", "init_weights", "mini_r", "r"})
HARMLESS_FIELDS = frozenset({"miss_dropout"})


@dataclass(frozen=True, kw_only=True)
class ShardSource(FactorSource):
    """One site's matrix in the file, [r, width]: width is out_features or a part of it."""

    in_features: int
    out_features: int

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        block = tensors.read(self.names[BLOCK])
        rank, width = block.shape
        if rank <= width:
            return Rows.of(_tiles(rank, self.in_features), np.tile(block, self.out_features // width))
        in_turn = np.arange(self.in_features) % rank
        return Rows.of(block.T[:, in_turn], _tiles(width, self.out_features))


def _tiles(period: int, width: int) -> Floats:
    """[period, width]: row i has a one at i, i + period, i + 2 period, ..."""
    tiles: Floats = np.eye(period, dtype=np.float32)[:, np.arange(width) % period]
    return tiles


@dataclass(frozen=True, kw_only=True)
class WeightBlockSource(Source):
    """One site's matrices in the file, [out_features / r, r, r]."""

    name: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        blocks = tensors.read(self.name)
        num_blocks, rank, _ = blocks.shape
        weight = base.weight(self.site)
        cut = weight.reshape(num_blocks, rank, -1, rank).transpose(2, 0, 1, 3)  # [in / r, out / r, r, r]
        delta = (cut @ blocks + blocks).transpose(1, 2, 0, 3).reshape(weight.shape)
        return SiteUpdate(self.site, delta=np.ascontiguousarray(delta))


@dataclass(frozen=True)
class TiledShards:
    """The settings of one MiSS adapter."""

    rank: int
    mini_rank: int
    variant: Variant
    label: ClassVar[str] = "MiSS"
    positions: ClassVar[Positions] = Positions()
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> TiledShards:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        return cls(bounded_rank(config, "r", default=64), bounded_rank(config, "mini_r", default=1), _variant(config))

    @property
    def combination(self) -> Literal["sum", "alone"]:
        return "alone" if self.variant == "bat" else "sum"

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"variant": self.variant}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (BLOCK,), base))

    def _source(self, found: SiteTensors) -> Source:
        site, block = found.site, found.require(BLOCK)
        if self.variant == "bat":
            num_blocks = divided(site.out_features, self.rank, found, "r")
            divided(site.in_features, self.rank, found, "r")
            check_size(block, 1, self.rank, "r")
            return WeightBlockSource(
                site=site.path,
                shapes={block.name: (num_blocks, self.rank, self.rank)},
                num_row_values=site.in_features * site.out_features,
                is_dense=True,
                name=block.name,
            )
        check_size(block, 0, self.rank, "r")
        if self.rank > site.in_features:
            raise InvalidAdapter(
                f"{CONFIG_FILE}: r is {self.rank}, more than the {site.in_features} input features of {site.path}; "
                "upload it where the base it was trained on is served.",
                param=CONFIG_FILE,
            )
        width = site.out_features
        if self.variant == "mini":
            divided(site.out_features, self.mini_rank, found, "mini_r")
            check_size(block, 1, self.mini_rank, "mini_r")
            width = self.mini_rank
        return ShardSource(
            site=site.path,
            shapes={block.name: (self.rank, width)},
            **row_sizes(site, min(self.rank, width)),
            names={BLOCK: block.name},
            in_features=site.in_features,
            out_features=site.out_features,
        )


def _variant(config: AdapterConfig) -> Variant:
    value = config.fields.get("init_weights")
    if value is None or isinstance(value, bool):
        return "plain"
    if value == "bat":
        return "bat"
    if value != "mini":
        config.refuse("init_weights", f"is {quoted(value)}; served are true, false, 'bat' and 'mini'.")
    return "mini"
