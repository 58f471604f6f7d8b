"""ReFT: a low-rank edit of what layers hand on, at the first and last tokens of the prompt only.

    h + P^T (act(W h + b) - (P h + p))      loreft (P orthonormal, p absent), noreft
    h + P^T (b - P h)                       consreft
    h + P^T act(W h + b)                    direft (P orthonormal), nodireft
    h + P^T b                               lobireft

Source: pyreft 0.1 (`interventions.py`), whose folders hold pickles; so the format is heddle's own, and `heddle adapters
convert` writes it. The config has `peft_type` "HEDDLE_REFT", `intervention` (one of the names above), `activation`,
`first` and `last` (how many tokens), and `layers` (numbers). Per layer n the file has `layers.<n>.` with
`projection.weight` P [r, hidden], `projection.bias` p [r] (noreft only, if trained), `source.weight` W [r, hidden]
(where W occurs) and `source.bias` b [r].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Activation, Floats, Rows, SiteUpdate
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.methods.activation_names import activation_of
from heddle_adapters.positions import Positions
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

PEFT_TYPE = "HEDDLE_REFT"
P, P_BIAS, W, B = "projection.weight", "projection.bias", "source.weight", "source.bias"
MAX_POSITIONS = 2**20
MAX_LAYERS = 4096

READ_FIELDS = frozenset({"activation", "first", "intervention", "last", "layers"})

_TENSOR = re.compile(r"layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<part>projection|source)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Intervention:
    """Which of the formula's terms a variant has."""

    label: str
    has_source: bool  # W h + b, else b alone
    subtracts: bool  # P h, with p if the file has one
    may_have_bias: bool = False  # p


INTERVENTIONS = {
    "consreft": Intervention("ConsReFT", has_source=False, subtracts=True),
    "direft": Intervention("DiReFT", has_source=True, subtracts=False),
    "lobireft": Intervention("LobiReFT", has_source=False, subtracts=False),
    "loreft": Intervention("LoReFT", has_source=True, subtracts=True),
    "nodireft": Intervention("NodiReFT", has_source=True, subtracts=False),
    "noreft": Intervention("NoReFT", has_source=True, subtracts=True, may_have_bias=True),
}


@dataclass(frozen=True, kw_only=True)
class RepresentationSource(Source):
    """One layer's edit."""

    names: Mapping[str, str]  # part to tensor name
    subtracts: bool
    activation: Activation

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        parts = {part: tensors.read(name) for part, name in self.names.items()}
        p, b = parts[P], parts[B]
        if W not in parts and not self.subtracts:
            return SiteUpdate(self.site, bias=b @ p)
        shift: Floats = parts.get(P_BIAS, np.zeros_like(b))
        if not self.subtracts:
            return SiteUpdate(self.site, Rows.of(parts[W], p, c=b, act=self.activation))
        if self.activation is Activation.IDENTITY:
            return SiteUpdate(self.site, Rows.of(parts.get(W, np.zeros_like(p)) - p, p, c=b - shift))
        rank = len(b)
        rows = Rows(
            a=np.concatenate([parts[W], p]),
            b=np.concatenate([p, p]),
            gain=np.repeat(np.array([1, -1], np.float32), rank),
            c=np.concatenate([b, shift]),
            activation=np.repeat(np.array([self.activation, Activation.IDENTITY], np.int8), rank),
        )
        return SiteUpdate(self.site, rows)


@dataclass(frozen=True)
class Representation:
    """The settings of one ReFT adapter."""

    intervention: str  # a key of INTERVENTIONS
    activation: Activation
    positions: Positions
    layers: tuple[int, ...]  # ascending
    combination: ClassVar[Literal["alone"]] = "alone"
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Representation:
        config.check_fields(read=READ_FIELDS, harmless=frozenset(), refused={})
        intervention = config.text("intervention") or ""
        if intervention not in INTERVENTIONS:
            config.refuse("intervention", f"is {quoted(intervention)}; it must be one of {', '.join(INTERVENTIONS)}.")
        activation = activation_of(config, "activation")
        if activation is not Activation.IDENTITY and not INTERVENTIONS[intervention].has_source:
            config.refuse("activation", f"is set, and {intervention} has nothing that it would act on; leave it out.")
        positions = Positions(num_first=_count(config, "first"), num_last=_count(config, "last"))
        if positions.are_all:
            config.refuse("first and last", "are both 0, so nothing would change; say how many tokens do.")
        return cls(intervention, activation, positions, _layers(config))

    @property
    def label(self) -> str:
        return INTERVENTIONS[self.intervention].label

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {
            "activation": self.activation.name,
            "first": self.positions.num_first,
            "intervention": self.intervention,
            "last": self.positions.num_last,
        }

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[RepresentationSource, ...]:
        by_layer: dict[int, dict[str, TensorInfo]] = {}
        for name, tensor in tensors.items():
            if (match := _TENSOR.fullmatch(name)) is not None:
                by_layer.setdefault(int(match["layer"]), {})[f"{match['part']}.{match['kind']}"] = tensor
        if tuple(sorted(by_layer)) != self.layers:
            message = (
                f"{WEIGHTS_FILE} has tensors of the layers {_numbers(sorted(by_layer))}, and {CONFIG_FILE} lists "
                f"{_numbers(self.layers)}; upload the two files that were saved together."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return tuple(self._source(layer, by_layer[layer], base) for layer in self.layers)

    def _source(self, layer: int, found: Mapping[str, TensorInfo], base: BaseLayout) -> RepresentationSource:
        path = base.layers[layer].output if layer < len(base.layers) else None
        if path is None:
            message = (
                f"{WEIGHTS_FILE} changes what layer {layer} hands on, and {base.model_name} has {len(base.layers)} "
                "layers that can be changed so; upload it where the base it was trained on is served."
            )
            raise AdapterIncompatible(message, param=WEIGHTS_FILE)
        terms = INTERVENTIONS[self.intervention]
        needed = {P, B} | ({W} if terms.has_source else set())
        known = needed | ({P_BIAS} if terms.may_have_bias else set())
        if missing := sorted(needed - found.keys()):
            message = f"{WEIGHTS_FILE} has no {missing[0]} for layer {layer}, which {terms.label} needs; convert again."
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        names = {part: info.name for part, info in found.items() if part in known}
        hidden, shape = base.site(path).out_features, found[P].shape
        rank = shape[0] if shape else 0
        fitting = {P: (rank, hidden), P_BIAS: (rank,), W: (rank, hidden), B: (rank,)}
        has_rows = terms.has_source or terms.subtracts
        num_groups = 2 if terms.subtracts and self.activation is not Activation.IDENTITY else 1
        num_rows = num_groups * rank if has_rows else 0
        return RepresentationSource(
            site=path,
            shapes={name: fitting[part] for part, name in names.items()},
            num_rows=num_rows,
            num_row_values=2 * num_rows * hidden,
            num_vector_values=0 if has_rows else hidden,
            names=names,
            subtracts=terms.subtracts,
            activation=self.activation,
        )


def _numbers(layers: Sequence[int]) -> str:
    return listed([str(layer) for layer in layers])


def _count(config: AdapterConfig, field: str) -> int:
    value = config.fields.get(field, 0)
    if type(value) is not int or not 0 <= value <= MAX_POSITIONS:
        config.refuse(field, f"must be a number of tokens from 0 to {MAX_POSITIONS}, not {quoted(value)}.")
    return value


def _layers(config: AdapterConfig) -> tuple[int, ...]:
    value = config.fields.get("layers")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        config.refuse("layers", f"must be a list of 1 to {MAX_LAYERS} layer numbers, not {quoted(value)}.")
    numbers = sorted({item for item in value if type(item) is int and item >= 0})
    if len(numbers) != len(value):
        config.refuse("layers", "must hold whole numbers of at least 0, each once.")
    return tuple(numbers)
