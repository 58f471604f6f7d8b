"""PEANuT: a small network computes the update from the base's own weight.

`y += s * B (Z x)`, where Z [r, in_features] begins as `f(A W)`. Each of `depth` encoders E_i makes it `f(E_i Z)`; then
each decoder D_i makes it `f(D_i Z)` plus what the encoder across from it was given. So the update is r rows.

Format: PEFT's `tuners/peanut`, files of peft 0.21. Per targeted module `peanut_A.weight` [r, out_features],
`peanut_B.weight` [out_features, r], `peanut_encoders.<i>.weight` and `peanut_decoders.<i>.weight` [r, r].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.factor_checks import bounded_rank, bounded_scale, check_size, choice, whole_number
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B = "peanut_A.weight", "peanut_B.weight"
MAX_DEPTH = 64

READ_FIELDS = frozenset({"act_fn", "depth", "r", "scaling"})
HARMLESS_FIELDS = frozenset({"init_weights"})


def _sigmoid(x: Floats) -> Floats:
    sigmoid: Floats = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))
    return sigmoid


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    gelu: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return gelu


# By transformers' names.
ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}


@dataclass(frozen=True, kw_only=True)
class WeightNetworkSource(FactorSource):
    """One site's network in the file."""

    depth: int
    activation: str
    scale: float

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        activate = ACTIVATIONS[self.activation]
        hidden = activate(tensors.read(self.names[A]) @ base.weight(self.site))  # [r, in_features]
        given = list[Floats]()
        for number in range(self.depth):
            given.append(hidden)
            hidden = activate(tensors.read(self.names[_encoder(number)]) @ hidden)
        for number in range(self.depth):
            hidden = activate(tensors.read(self.names[_decoder(number)]) @ hidden) + given.pop()
        return Rows.of(hidden, tensors.read(self.names[B]).T, self.scale)


def _encoder(number: int) -> str:
    return f"peanut_encoders.{number}.weight"


def _decoder(number: int) -> str:
    return f"peanut_decoders.{number}.weight"


@dataclass(frozen=True)
class WeightNetworks(FactoredMethod):
    """The settings of one PEANuT adapter."""

    rank: int
    depth: int
    activation: str
    scale: float
    label: ClassVar[str] = "PEANuT"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> WeightNetworks:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        depth = whole_number(config, "depth", default=0)
        if depth > MAX_DEPTH:
            config.refuse("depth", f"is {depth}; at most {MAX_DEPTH} is served.")
        return cls(
            rank=bounded_rank(config, "r", default=32),
            depth=depth,
            activation=choice(config, "act_fn", "relu", tuple(ACTIVATIONS)),
            scale=bounded_scale(config.number("scaling", default=1.0), "every module", "scaling"),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"act_fn": self.activation, "scaling": self.scale}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[WeightNetworkSource, ...]:
        layers = [name(number) for number in range(self.depth) for name in (_encoder, _decoder)]
        parts = (A, B, *layers)
        return tuple(self._source(found, parts) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors, parts: tuple[str, ...]) -> WeightNetworkSource:
        site, rank = found.site, self.rank
        check_size(found.require(A), 0, rank, "r")
        fitting = {A: (rank, site.out_features), B: (site.out_features, rank)}
        names = {part: found.require(part).name for part in parts}
        return WeightNetworkSource(
            site=site.path,
            shapes={name: fitting.get(part, (rank, rank)) for part, name in names.items()},
            **row_sizes(site, rank),
            names=names,
            depth=self.depth,
            activation=self.activation,
            scale=self.scale,
        )
