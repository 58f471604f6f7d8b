"""Bottleneck adapters: `y += s * (U act(D x + d) + u)`, behind a layer's attention, its MLP, or both.

Format: the `adapters` library 1.3 (AdapterHub; `methods/modeling.py`, `methods/bottleneck.py`), whose config has no
`peft_type` but an object `config`. Its adapter.safetensors is uploaded as adapter_model.safetensors. Per layer
`<layer>.output_adapters.adapters.<name>.` and `<layer>.attention_adapters.adapters.<name>.`, each with
`adapter_down.0.weight` D [bottleneck, hidden], `adapter_down.0.bias` d, `adapter_up.weight` U [hidden, bottleneck],
`adapter_up.bias` u, and perhaps `scaling` s, [1] if "learned" or [hidden] if "channel".

What x is follows from where the config puts layer norms and residuals; with h the stream before the layer's MLP:

    reads the module    x = mlp(h) or attention(h); the sum goes to the same     (double_seq_bn, Houlsby)
    reads the stream    x = h + mlp(h); the sum goes to the layer's output       (seq_bn, Pfeiffer; adapter_plus)
    reads in parallel   x = h; the sum goes to what the MLP adds                 (par_bn)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Layer
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Activation, Floats, Rows, SiteUpdate
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.methods.activation_names import activation_of
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

Reads = Literal["module", "stream", "parallel"]

DOWN, DOWN_BIAS, UP, UP_BIAS = "adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"
SCALING = "scaling"
BEHIND_ATTENTION, BEHIND_MLP = "attention_adapters", "output_adapters"
MAX_ABSOLUTE_SCALE = 1e4

# Of the outer object, which describes the model that the adapter was trained on.
OUTER_READ_FIELDS = frozenset({"config", "model_type", "name", "version"})
OUTER_HARMLESS_FIELDS = frozenset({"hidden_size", "model_class", "model_name"})

READ_FIELDS = frozenset(
    {
        "is_parallel",
        "leave_out",
        "mh_adapter",
        "non_linearity",
        "original_ln_after",
        "original_ln_before",
        "output_adapter",
        "reduction_factor",
        "residual_before_ln",
        "scaling",
    }
)

# Training and initialisation, and what matters only beside a refused field of the same name.
HARMLESS_FIELDS = frozenset(
    {
        "adapter_residual_before_ln",
        "dropout",
        "factorized_phm_W",
        "factorized_phm_rule",
        "hypercomplex_nonlinearity",
        "init_weights",
        "init_weights_seed",
        "inv_adapter_reduction_factor",
        "learn_phm",
        "phm_bias",
        "phm_c_init",
        "phm_dim",
        "phm_init_range",
        "phm_rank",
        "shared_W_phm",
        "shared_phm_rule",
        "stochastic_depth",
    }
)

REFUSED_FIELDS = {
    "architecture": "is set, and of the adapters library's methods bottlenecks alone are served as they are; save the "
    "adapter with PEFT, or try `heddle adapters convert`.",
    "cross_adapter": "is true, and cross attention is not served; train without it.",
    "inv_adapter": "is set: an invertible adapter also undoes itself before the head, which is not served; train "
    "without it.",
    "invertible_adapter": "is set, and invertible adapters are not served; train without one.",
    "ln_after": "is true: a layer norm of its own is no sum of rows; train with ln_after=False.",
    "ln_before": "is true: a layer norm of its own is no sum of rows; train with ln_before=False.",
    "phm_layer": "is true, and parameterised hypercomplex layers (Compacter) are not served; train without them.",
    "use_gating": "is true: the gate is a mean over the whole sequence, so every new token would change those before; "
    "train without it.",
}

REFUSED_PARTS = {
    SCALING: "the config's scaling is a number; upload the config that was saved with these weights",
}

# Those whose decoder layers give the adapters no layer norm (`models/*/modeling_*.py`, `wrappers/interfaces.py`). In
# the latter half the model itself adds the residual.
ADDS_RESIDUAL_ITSELF = {"gpt2": False, "llama": False, "mistral": False, "qwen2": True, "qwen3": True}


@dataclass(frozen=True, kw_only=True)
class BottleneckSource(Source):
    """One bottleneck of one layer."""

    names: Mapping[str, str]  # part to tensor name
    activation: Activation
    scaling: float

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        scale: Floats = np.array([self.scaling], np.float32)  # [1] or [hidden]
        if SCALING in self.names:
            scale = tensors.read(self.names[SCALING])
        down, up = tensors.read(self.names[DOWN]), tensors.read(self.names[UP])
        rows = Rows.of(down, scale * up.T, c=tensors.read(self.names[DOWN_BIAS]), act=self.activation)
        return SiteUpdate(self.site, rows, bias=scale * tensors.read(self.names[UP_BIAS]))


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """The settings of one bottleneck adapter."""

    name: str
    places: tuple[str, ...]  # of BEHIND_ATTENTION and BEHIND_MLP
    reads: Reads
    activation: Activation
    scaling: float | str  # "learned" or "channel" for a tensor in the file
    reduction_factors: Mapping[str, float]  # by layer number, or "default"
    leave_out: frozenset[int]  # layer numbers
    label: ClassVar[str] = "bottleneck adapter"
    combination: ClassVar[Literal["sum"]] = "sum"
    positions: ClassVar[Positions] = Positions()
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Bottleneck:
        nested = config.fields.get("config")
        if not isinstance(nested, dict):
            config.refuse("config", f"must be an object with the adapter's settings, not {quoted(nested)}.")
        settings = AdapterConfig(nested)
        settings.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=REFUSED_FIELDS)
        config.check_fields(read=OUTER_READ_FIELDS, harmless=OUTER_HARMLESS_FIELDS, refused={})
        model_type, name = config.text("model_type"), config.text("name")
        if model_type not in ADDS_RESIDUAL_ITSELF:
            config.refuse(
                "model_type",
                f"is {quoted(model_type)}, and what such adapters compute is known of {', '.join(ADDS_RESIDUAL_ITSELF)}"
                " only; train the adapter with PEFT.",
            )
        if not name:
            config.refuse("name", "is missing, and it is part of every tensor's name; upload the config as saved.")
        if "version" not in config.fields and nested.get("non_linearity") == "gelu":
            settings = AdapterConfig({**nested, "non_linearity": "gelu_new"})  # its meaning in the first releases
        places = {BEHIND_ATTENTION: settings.flag("mh_adapter"), BEHIND_MLP: settings.flag("output_adapter")}
        return cls(
            name=name,
            places=tuple(place for place, is_used in places.items() if is_used),
            reads=_reads(settings, ADDS_RESIDUAL_ITSELF[model_type]),
            activation=activation_of(settings, "non_linearity"),
            scaling=_scaling(settings),
            reduction_factors=_reduction_factors(settings),
            leave_out=_layer_numbers(settings, "leave_out"),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"activation": self.activation.name, "reads": self.reads, "scaling": self.scaling}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[BottleneckSource, ...]:
        parts = [DOWN, DOWN_BIAS, UP, UP_BIAS]
        if isinstance(self.scaling, str):
            parts.append(SCALING)
        endings = {place: {part: f"{place}.adapters.{self.name}.{part}" for part in parts} for place in self.places}
        every_ending = [ending for of_place in endings.values() for ending in of_place.values()]
        found = {each.site.path: each for each in by_site(tensors.values(), every_ending, base, "block")}
        layers = {layer.output: layer for layer in base.layers}
        astray = [quoted(path) for path in found if path not in layers]
        if astray:
            message = f"{WEIGHTS_FILE} has adapters at {listed(astray)}, which are no layers; save the adapter again."
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        sources = list[BottleneckSource]()
        for number, layer in enumerate(base.layers):
            at_layer = found.get(layer.output or "")
            for place in self.places:
                of_place = endings[place]
                has_one = at_layer is not None and not at_layer.parts.keys().isdisjoint(of_place.values())
                if has_one == (number in self.leave_out):
                    _refuse_promise(number, place, has_one)
                if has_one and at_layer is not None:
                    sources.append(self._source(number, layer, place, at_layer, of_place))
        return tuple(sources)

    def _source(
        self, number: int, layer: Layer, place: str, found: SiteTensors, endings: Mapping[str, str]
    ) -> BottleneckSource:
        hidden = found.site.out_features
        infos = {part: found.require(ending) for part, ending in endings.items()}
        width = self._width(number, infos[DOWN], hidden)
        fitting = {
            DOWN: (width, hidden),
            DOWN_BIAS: (width,),
            UP: (hidden, width),
            UP_BIAS: (hidden,),
            SCALING: (hidden if self.scaling == "channel" else 1,),
        }
        return BottleneckSource(
            site=self._site(layer, place),
            shapes={info.name: fitting[part] for part, info in infos.items()},
            num_rows=width,
            num_row_values=2 * width * hidden,
            num_vector_values=hidden,
            names={part: info.name for part, info in infos.items()},
            activation=self.activation,
            scaling=self.scaling if isinstance(self.scaling, float) else 1.0,
        )

    def _site(self, layer: Layer, place: str) -> str:
        """The site that changes; raises `AdapterIncompatible` where the base's layers have no such place."""
        behind_mlp = {"module": layer.mlp, "stream": layer.output, "parallel": layer.parallel_mlp}
        path = layer.attention if place == BEHIND_ATTENTION else behind_mlp[self.reads]
        if path is None:
            message = (
                f"{WEIGHTS_FILE} has {place} for {layer.output}, where this base's architecture has no such place; "
                "upload it where the base it was trained on is served."
            )
            raise AdapterIncompatible(message, param=WEIGHTS_FILE)
        return path

    def _width(self, number: int, down: TensorInfo, hidden: int) -> int:
        """The bottleneck's, as the file has it, if the config agrees."""
        factor = self.reduction_factors.get(str(number), self.reduction_factors.get("default"))
        if factor is None:
            message = f"{CONFIG_FILE}: reduction_factor names neither layer {number} nor a default; add one of them."
            raise InvalidAdapter(message, param=CONFIG_FILE)
        promised = max(1.0, hidden // factor)
        if not down.shape or down.shape[0] != promised:
            message = (
                f"{WEIGHTS_FILE}: {down.name} has shape {list(down.shape)}, but the reduction_factor in {CONFIG_FILE} "
                f"makes the bottleneck {promised:g} wide; upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return down.shape[0]


def _reads(settings: AdapterConfig, adds_residual_itself: bool) -> Reads:
    """Where an adapter reads; refuses what keeps the residual out of the sum, or counts it twice."""
    is_first_added = settings.flag("original_ln_before")
    is_added_after = settings.flag("original_ln_after") if "original_ln_after" in settings.fields else True
    residual_before = settings.fields.get("residual_before_ln", True)
    reads: Reads = "parallel" if settings.flag("is_parallel") else "stream" if is_first_added else "module"
    if reads != "module" and settings.flag("mh_adapter"):
        other = "is_parallel" if reads == "parallel" else "original_ln_before"
        settings.refuse(
            "mh_adapter", f"and {other} are true, and behind the attention no adapter reads the stream; train without."
        )
    if reads == "stream" and residual_before is False:
        is_whole = not is_added_after and not adds_residual_itself
    else:
        is_whole = is_added_after and (reads != "stream" or residual_before is True)
    if not is_whole:
        settings.refuse(
            "original_ln_after",
            f"is {quoted(is_added_after)} with original_ln_before {quoted(is_first_added)} and residual_before_ln "
            f"{quoted(residual_before)}: the layer would add its own input not once; train with another of the "
            "library's configurations, for example seq_bn.",
        )
    return reads


def _scaling(settings: AdapterConfig) -> float | str:
    value = settings.fields.get("scaling", 1.0)
    if value in ("learned", "channel"):
        return str(value)
    scale = settings.number("scaling", default=1.0)
    if abs(scale) > MAX_ABSOLUTE_SCALE:
        settings.refuse("scaling", f"is {scale:g}; at most {MAX_ABSOLUTE_SCALE:g} is allowed.")
    return scale


def _reduction_factors(settings: AdapterConfig) -> Mapping[str, float]:
    value = settings.fields.get("reduction_factor")
    by_layer = value if isinstance(value, dict) else {"default": value}
    factors = {
        key: AdapterConfig({quoted(key): factor}).number(quoted(key), default=0) for key, factor in by_layer.items()
    }
    if not factors or not all(factor > 0 for factor in factors.values()):
        settings.refuse("reduction_factor", f"must be a number above 0, or an object of such, not {quoted(value)}.")
    return factors


def _layer_numbers(settings: AdapterConfig, field: str) -> frozenset[int]:
    value = settings.fields.get(field) or []
    if not isinstance(value, list):
        settings.refuse(field, f"must be a list of layer numbers, not {quoted(value)}.")
    numbers = [item for item in value if type(item) is int and item >= 0]
    if len(numbers) != len(value):
        settings.refuse(field, "must hold whole numbers of at least 0 only.")
    return frozenset(numbers)


def _refuse_promise(number: int, place: str, has_one: bool) -> None:
    problem = "although leave_out names that layer" if has_one else f"which {CONFIG_FILE} promises"
    message = (
        f"{WEIGHTS_FILE} has {'an' if has_one else 'no'} adapter in {place} of layer {number}, {problem}; "
        "upload the two files that were saved together."
    )
    raise InvalidAdapter(message, param=WEIGHTS_FILE)
