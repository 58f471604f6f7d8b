"""Uni-LoRA: every number of every A and B is an entry of one short vector, times a fixed scale.

`y += B (A x)` with `A = theta[indices_A] * scales_A` and B alike.

Format: PEFT's `tuners/unilora`, files of peft 0.21. Once `base_model.unilora_theta_d` [theta_d_length]. With
`save_indices` also, per targeted module, `unilora_indices_A` [r, in_features], `unilora_indices_B` [out_features, r],
both whole numbers, and `unilora_scales_A` and `unilora_scales_B` of the same shapes. Otherwise the file names no
module: the indices are the ones that numpy's generator deals out from `proj_seed` over the targeted modules in the
model's order, every entry equally often, and a scale is 1 / sqrt(how often).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_indices, check_size, whole_number
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes, shared_tensor
from heddle_adapters.module_pattern import path_endings
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

THETA = "unilora_theta_d"
INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"
MAX_DEALT_INDICES = 2**25  # 256 MiB, and twice that for a moment; rank 12 on all linears of an 8B model

READ_FIELDS = frozenset({"bias", "proj_seed", "r", "save_indices", "theta_d_length"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_theta_d_bound", "init_weights", "unilora_dropout"})
REMEDY = "save the adapter with save_indices=True."


@dataclass(frozen=True)
class DealtIndices:
    """The entries of theta that PEFT assigns to all sites' factors, in the model's order: A's, then B's, site by site.

    So PEFT 0.21 does in `tuners/unilora/model.py:generate_index`.
    """

    seed: int
    theta_length: int
    num_indices: int

    def part(self, begin: int, shape: tuple[int, int]) -> tuple[NDArray[np.int64], Floats]:
        """The indices from `begin` on as a matrix of that shape, and their scales."""
        indices = self._indices[begin : begin + shape[0] * shape[1]].reshape(shape)
        return indices, self._scales[indices]

    @cached_property
    def _indices(self) -> NDArray[np.int64]:
        repeats, remaining = divmod(self.num_indices, self.theta_length)
        generator = np.random.default_rng(self.seed)
        indices = np.repeat(np.arange(self.theta_length), repeats)
        if remaining:
            more = generator.choice(self.theta_length, size=remaining, replace=False)
            indices = np.concatenate([indices, more])
        generator.shuffle(indices)
        return indices

    @cached_property
    def _scales(self) -> Floats:
        counts = np.bincount(self._indices, minlength=self.theta_length)
        scales: Floats = (1 / np.sqrt(np.maximum(counts, 1))).astype(np.float32)
        return scales


@dataclass(frozen=True, kw_only=True)
class SavedIndicesSource(FactorSource):
    """One site's indices and scales in the file, beside theta."""

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        theta = tensors.read(self.names[THETA])
        a = self._entries(tensors, theta, INDICES_A) * tensors.read(self.names[SCALES_A])
        b = self._entries(tensors, theta, INDICES_B) * tensors.read(self.names[SCALES_B])
        return Rows.of(a, b.T)

    def _entries(self, tensors: Tensors, theta: Floats, part: str) -> Floats:
        indices = tensors.read_integers(self.names[part])
        check_indices(indices, part, self.site, THETA, len(theta))
        return theta[indices]


@dataclass(frozen=True, kw_only=True)
class DealtIndicesSource(FactorSource):
    """One site's share of the indices that the seed deals out."""

    dealt: DealtIndices
    begin: int  # of its share
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        theta = tensors.read(self.names[THETA])
        a_indices, a_scales = self.dealt.part(self.begin, self.a_shape)
        b_indices, b_scales = self.dealt.part(self.begin + a_indices.size, self.b_shape)
        return Rows.of(theta[a_indices] * a_scales, (theta[b_indices] * b_scales).T)


@dataclass(frozen=True)
class SharedVector(FactoredMethod):
    """The settings of one Uni-LoRA adapter."""

    rank: int
    theta_length: int
    seed: int
    targets: tuple[str, ...] | None  # None where the file has the indices
    label: ClassVar[str] = "Uni-LoRA"
    integer_parts: ClassVar[frozenset[str]] = frozenset({INDICES_A, INDICES_B})

    @classmethod
    def from_config(cls, config: AdapterConfig) -> SharedVector:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        return cls(
            rank=bounded_rank(config, "r", default=4),
            theta_length=config.rank("theta_d_length", default=256),
            seed=whole_number(config, "proj_seed", default=42),
            targets=None if config.flag("save_indices") else _targets(config),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        if self.targets is None:
            return {}
        return {"proj_seed": self.seed, "r": self.rank, "target_modules": [*sorted(set(self.targets))]}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[FactorSource, ...]:
        theta = shared_tensor(tensors, THETA, "save the adapter again.")
        check_size(theta, 0, self.theta_length, "theta_d_length")
        if self.targets is not None:
            return tuple(self._dealt_sources(theta, base, self.targets))
        parts = (INDICES_A, INDICES_B, SCALES_A, SCALES_B)
        return tuple(self._saved_source(found, parts, theta) for found in by_site(tensors.values(), parts, base))

    def _saved_source(self, found: SiteTensors, parts: tuple[str, ...], theta: TensorInfo) -> FactorSource:
        a_shape, b_shape = self._factor_shapes(found.site)
        check_size(found.require(INDICES_A), 0, self.rank, "r")
        fitting = {INDICES_A: a_shape, INDICES_B: b_shape, SCALES_A: a_shape, SCALES_B: b_shape}
        shapes = {found.require(part).name: fitting[part] for part in parts}
        return SavedIndicesSource(
            site=found.site.path,
            shapes={**shapes, theta.name: (self.theta_length,)},
            **row_sizes(found.site, self.rank),
            names={THETA: theta.name, **{part: found.require(part).name for part in parts}},
        )

    def _dealt_sources(self, theta: TensorInfo, base: BaseLayout, targets: tuple[str, ...]) -> list[FactorSource]:
        sites = [
            site for path, site in base.by_path("linear").items() if not set(targets).isdisjoint(path_endings(path))
        ]
        if not sites:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: target_modules names none of the layers of {base.model_name}; upload it where the "
                "base it was trained on is served.",
                param=CONFIG_FILE,
            )
        num_indices = sum(self.rank * (site.in_features + site.out_features) for site in sites)
        if num_indices > MAX_DEALT_INDICES:
            raise InvalidAdapter(
                f"{CONFIG_FILE}: r {self.rank} at {len(sites)} modules takes {num_indices} drawn indices; at most "
                f"{MAX_DEALT_INDICES} are drawn, so {REMEDY}",
                param=CONFIG_FILE,
            )
        dealt = DealtIndices(self.seed, self.theta_length, num_indices)
        sources, begin = list[FactorSource](), 0
        for site in sites:
            a_shape, b_shape = self._factor_shapes(site)
            sources.append(
                DealtIndicesSource(
                    site=site.path,
                    shapes={theta.name: (self.theta_length,)},
                    **row_sizes(site, self.rank),
                    names={THETA: theta.name},
                    dealt=dealt,
                    begin=begin,
                    a_shape=a_shape,
                    b_shape=b_shape,
                )
            )
            begin += self.rank * (site.in_features + site.out_features)
        return sources

    def _factor_shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rank, site.in_features), (site.out_features, self.rank)


def _targets(config: AdapterConfig) -> tuple[str, ...]:
    """The endings of the targeted modules' paths, which the file does not hold."""
    for rule in ("exclude_modules", "layers_pattern", "layers_to_transform"):
        if config.fields.get(rule) not in (None, []):
            config.refuse(rule, f"is set, and the file does not say which modules that leaves; {REMEDY}")
    targets = config.module_paths("target_modules")
    if not targets:
        config.refuse("target_modules", f"is empty, and the file does not name the modules either; {REMEDY}")
    return targets
