"""OFT and BOFT: a layer's input turned in blocks before its weight, `y = s * W(x R) + b0`.

Both make orthogonal blocks out of skew-symmetric ones, R = (I - Q) (I + Q)^-1, and keep nothing else but a scale.

OFT (format: PEFT's `tuners/oft`, files of peft 0.21): per targeted module `oft_R.weight` [in_features / b,
b (b - 1) / 2], the upper triangles of the Qs row by row, or [1, ...] with `block_share`; s is 1. With
`use_cayley_neumann` R is the beginning of that quotient's series, as many terms as the config says; with `coft` no Q is
longer than eps over the root of the number of Qs.

BOFT (`tuners/boft`): per module `boft_R` [m, in_features / b, b, b], whose Q is half of R less R transposed, and s as
`boft_s` [out_features, 1]. The m factors follow one another, each in an order of the inputs of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.dense_delta import DenseMethod, DenseSource, refuse_shape
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

R = "oft_R.weight"
BUTTERFLY_R, BUTTERFLY_S = "boft_R", "boft_s"
MAX_TERMS = 64
VERSION = re.compile(r"(?P<major>\d{1,4})\.(?P<minor>\d{1,4})")
NEUMANN_SINCE = (0, 18)  # the series was another before

READ_FIELDS = frozenset(
    {
        "bias",
        "block_share",
        "coft",
        "eps",
        "num_cayley_neumann_terms",
        "oft_block_size",
        "r",
        "use_cayley_neumann",
    }
)
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_weights", "module_dropout"})
BUTTERFLY_READ_FIELDS = frozenset({"bias", "boft_block_num", "boft_block_size", "boft_n_butterfly_factor"})
BUTTERFLY_HARMLESS_FIELDS = frozenset({"boft_dropout", "fan_in_fan_out", "init_weights"})

REFUSED_PARTS = {
    "oft_r": "OFT as PEFT saved it before 0.16 was another method; train again with a newer PEFT",
    "oft_embedding_R.weight": "OFT on an embedding is not served; leave the embedding out of target_modules",
}


@dataclass(frozen=True, kw_only=True)
class BlockRotationSource(DenseSource):
    """One site's triangles in the file."""

    name: str
    block_size: int
    num_terms: int | None  # of the series; None: the quotient itself
    max_norm: float | None  # of one Q

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        triangles = tensors.read(self.name)
        skew = np.zeros((len(triangles), self.block_size, self.block_size))
        skew[:, *np.triu_indices(self.block_size, 1)] = triangles
        skew -= skew.swapaxes(1, 2)
        if self.max_norm is not None:
            norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            skew *= self.max_norm / np.maximum(norms, self.max_norm)
        rotation = _quotient(skew) if self.num_terms is None else _series(skew, self.num_terms)
        weight = base.weight(self.site)
        return SiteUpdate(self.site, delta=_turned(weight, rotation) - weight)


@dataclass(frozen=True)
class BlockRotation(DenseMethod):
    """The settings of one OFT adapter."""

    num_blocks: int  # 0 where the config gives their size
    block_size: int  # 0 where the config gives their number
    is_shared: bool
    num_terms: int | None
    epsilon: float | None  # of constrained OFT
    label: ClassVar[str] = "OFT"
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS

    @classmethod
    def from_config(cls, config: AdapterConfig) -> BlockRotation:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        if "oft_block_size" not in config.fields:
            config.refuse("oft_block_size", f"is missing: {REFUSED_PARTS['oft_r']}.")
        num_blocks, block_size = _one_of_two(config, "r", "oft_block_size")
        is_constrained, epsilon = config.flag("coft"), config.number("eps", default=6e-5)
        if is_constrained and epsilon <= 0:
            config.refuse("eps", f"is {epsilon:g}; with coft it must be more than 0.")
        return cls(
            num_blocks=num_blocks,
            block_size=block_size,
            is_shared=config.flag("block_share"),
            num_terms=_num_terms(config),
            epsilon=epsilon if is_constrained else None,
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"epsilon": self.epsilon, "num_terms": self.num_terms}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[BlockRotationSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (R,), base))

    def _source(self, found: SiteTensors) -> BlockRotationSource:
        site, triangles = found.site, found.require(R)
        block_size = self._fitting_block_size(site.in_features)
        num_blocks = 1 if self.is_shared else site.in_features // block_size
        num_elements = block_size * (block_size - 1) // 2
        if triangles.shape[1:] != (num_elements,):
            promised = f"gives that module {num_elements} numbers a block"
            refuse_shape(R, triangles, site.path, "r or oft_block_size", promised)
        if triangles.shape[0] != num_blocks:
            refuse_shape(R, triangles, site.path, "block_share", f"gives that module {num_blocks} blocks")
        return BlockRotationSource(
            site=site.path,
            shapes={triangles.name: (num_blocks, num_elements)},
            num_row_values=site.out_features * site.in_features,
            name=triangles.name,
            block_size=block_size,
            num_terms=self.num_terms,
            max_norm=None if self.epsilon is None else self.epsilon / num_blocks**0.5,
        )

    def _fitting_block_size(self, in_features: int) -> int:
        """PEFT takes the divisor of the width that is next to the number in the config, the smaller of two."""
        wanted = min(self.num_blocks or self.block_size, in_features)
        divisors = (number for number in range(1, in_features + 1) if in_features % number == 0)
        chosen = min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
        return in_features // chosen if self.num_blocks else chosen


@dataclass(frozen=True, kw_only=True)
class ButterflySource(DenseSource):
    """One site's blocks and scale in the file."""

    blocks: str  # tensor names
    scale: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        blocks, scale = tensors.read(self.blocks).astype(np.float64), tensors.read(self.scale)
        weight = base.weight(self.site)
        turned, num_factors = weight, len(blocks)
        for number, factor in enumerate(blocks):
            order = _butterfly_order(weight.shape[1], 2 ** (number + 1) if num_factors > 1 else 1, factor.shape[1])
            rotation = _quotient((factor - factor.swapaxes(1, 2)) / 2)
            turned = _turned(turned[:, np.argsort(order)], rotation)[:, order]
        return SiteUpdate(self.site, out_scale=scale[:, 0], delta=scale * (turned - weight))


@dataclass(frozen=True)
class Butterfly(DenseMethod):
    """The settings of one BOFT adapter."""

    num_blocks: int  # 0 where the config gives their size
    block_size: int  # 0 where the config gives their number
    num_factors: int
    label: ClassVar[str] = "BOFT"
    scalars: ClassVar[Mapping[str, Json]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Butterfly:
        config.check_fields(read=BUTTERFLY_READ_FIELDS, harmless=BUTTERFLY_HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        num_blocks, block_size = _one_of_two(config, "boft_block_num", "boft_block_size", default_size=4)
        return cls(num_blocks, block_size, config.rank("boft_n_butterfly_factor", default=1))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[ButterflySource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (BUTTERFLY_R, BUTTERFLY_S), base))

    def _source(self, found: SiteTensors) -> ButterflySource:
        site, blocks, scale = found.site, found.require(BUTTERFLY_R), found.require(BUTTERFLY_S)
        num_blocks = self.num_blocks or site.in_features // self.block_size
        block_size = site.in_features // num_blocks if num_blocks else 0
        if num_blocks * block_size != site.in_features:
            promised = f"does not divide the module's {site.in_features} inputs"
            refuse_shape(BUTTERFLY_R, blocks, site.path, "boft_block_size or boft_block_num", promised)
        num_factors = blocks.shape[0] if blocks.shape else 0
        # Where PEFT cannot build its CUDA extension it trains and saves one factor, whatever the config says.
        if num_factors not in (1, self.num_factors):
            promised = f"is {self.num_factors}"
            refuse_shape(BUTTERFLY_R, blocks, site.path, "boft_n_butterfly_factor", promised)
        if num_factors > 1 and (block_size % 2 or num_blocks % 2 ** (num_factors - 1)):
            promised = f"is {num_factors}, which needs blocks of even size, their number a multiple of a power of two"
            refuse_shape(BUTTERFLY_R, blocks, site.path, "boft_n_butterfly_factor", promised)
        fitting = (num_factors, num_blocks, block_size, block_size)
        if blocks.shape != fitting:
            promised = f"makes it {list(fitting)}"
            refuse_shape(BUTTERFLY_R, blocks, site.path, "boft_block_size or boft_block_num", promised)
        return ButterflySource(
            site=site.path,
            shapes={blocks.name: fitting, scale.name: (site.out_features, 1)},
            num_row_values=site.out_features * site.in_features,
            num_vector_values=site.out_features,
            blocks=blocks.name,
            scale=scale.name,
        )


def _one_of_two(config: AdapterConfig, number: str, size: str, default_size: int = 0) -> tuple[int, int]:
    """The number of blocks or their size, the other one 0; PEFT wants one of them."""
    num_blocks = config.rank(number, default=1) if config.fields.get(number) else 0
    block_size = config.rank(size, default=1) if config.fields.get(size, default_size) else 0
    if bool(num_blocks) == bool(block_size):
        config.refuse(f"{number} and {size}", "size the blocks: one of them must be set, and the other one 0.")
    return num_blocks, block_size


def _num_terms(config: AdapterConfig) -> int | None:
    """Of the series, None where the config asks for the quotient itself."""
    if config.fields.get("use_cayley_neumann") is not None and not config.flag("use_cayley_neumann"):
        return None
    version = VERSION.match(config.text("peft_version") or "")
    if version is None or (int(version["major"]), int(version["minor"])) < NEUMANN_SINCE:
        config.refuse(
            "use_cayley_neumann",
            "is true and peft_version does not say 0.18 or later, before which the series was another; train again "
            "with a newer PEFT, or with use_cayley_neumann=False.",
        )
    num_terms = config.rank("num_cayley_neumann_terms", default=5)
    if num_terms > MAX_TERMS:
        config.refuse("num_cayley_neumann_terms", f"is {num_terms}; at most {MAX_TERMS} are served.")
    return num_terms


def _quotient(skew: NDArray[np.float64]) -> NDArray[np.float64]:
    """(I - Q) (I + Q)^-1 of each Q [any, b, b]; both factors are functions of Q, so their order is free."""
    identity = np.eye(skew.shape[1])
    return np.asarray(np.linalg.solve(identity + skew, identity - skew), np.float64)


def _series(skew: NDArray[np.float64], num_terms: int) -> NDArray[np.float64]:
    """I + 2 Q + 2 Q^2 + ... + Q^n of each Q [any, b, b], as PEFT counts terms: its 3 are as many as its 4."""
    series = np.eye(skew.shape[1]) + (2 * skew if num_terms > 1 else np.zeros_like(skew))
    if num_terms > 2:
        power = skew @ skew
        series += 2 * power
        for _ in range(3, num_terms - 1):
            power = power @ skew
            series += 2 * power
        series += power @ skew
    return series


def _turned(weight: Floats, rotation: NDArray[np.float64]) -> Floats:
    """W R^T block by block: W [out_features, in_features], R [in_features / b, b, b], or [1, b, b] for all blocks."""
    blocks = weight.reshape(len(weight), -1, rotation.shape[1]).swapaxes(0, 1)
    turned = blocks @ rotation.swapaxes(1, 2)
    return np.ascontiguousarray(turned.swapaxes(0, 1).reshape(weight.shape), np.float32)


def _butterfly_order(width: int, num_groups: int, block_size: int) -> NDArray[np.int64]:
    """The inputs, in stretches of `num_groups` half blocks: the even ones of each stretch before the odd ones."""
    if num_groups == 1:
        return np.arange(width)
    halves = np.arange(width).reshape(-1, num_groups, block_size // 2)
    return np.concatenate((halves[:, 0::2], halves[:, 1::2]), axis=1).reshape(-1)
