"""What a family of adapter methods offers, and the table of the families that are served.

Nothing outside the families' own files names a method: a new one is a class that fits `AdapterMethod` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.methods.adaptive_rank import AdaptiveRank
from heddle_adapters.methods.bias_tuning import BiasTuning
from heddle_adapters.methods.block_grid import BlockGrid
from heddle_adapters.methods.block_rotation import BlockRotation, Butterfly
from heddle_adapters.methods.bottleneck import Bottleneck
from heddle_adapters.methods.bounded_directions import BoundedDirections
from heddle_adapters.methods.channel_vectors import ChannelVectors
from heddle_adapters.methods.combined import PEFT_TYPE as COMBINED
from heddle_adapters.methods.combined import Combined
from heddle_adapters.methods.factor_products import HadamardProducts, KroneckerProducts
from heddle_adapters.methods.hadamard_delta import HadamardDelta
from heddle_adapters.methods.low_rank import LowRank
from heddle_adapters.methods.norm_tuning import NormTuning
from heddle_adapters.methods.pair_rotation import PairRotation
from heddle_adapters.methods.prefix import Prefix
from heddle_adapters.methods.reflections import Reflections
from heddle_adapters.methods.refused_methods import REFUSED_METHODS
from heddle_adapters.methods.replaced_subspaces import ReplacedSubspaces
from heddle_adapters.methods.representation import Representation
from heddle_adapters.methods.shared_projections import SharedProjections
from heddle_adapters.methods.shared_vector import SharedVector
from heddle_adapters.methods.sparse_delta import Shira, SuperTuning
from heddle_adapters.methods.spectral import Circulant, Fourier
from heddle_adapters.methods.tied_vectors import TiedVectors
from heddle_adapters.methods.tiled_shards import TiledShards
from heddle_adapters.methods.token_rows import TrainableTokens
from heddle_adapters.methods.vector_bank import VectorBank
from heddle_adapters.methods.virtual_tokens import VirtualTokens
from heddle_adapters.methods.weight_networks import WeightNetworks
from heddle_adapters.positions import Positions
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import TensorInfo

# How an adapter takes part in a mix: what it adds is added up, what it multiplies is multiplied, or it cannot be mixed.
Combination = Literal["sum", "product", "alone"]


class AdapterMethod(Protocol):
    """One adapter's method with the settings that its config gave it."""

    @property
    def label(self) -> str:
        """The method's name for people."""

    @property
    def combination(self) -> Combination:
        """How the method's adapters take part in a mix; "sum" only if rows and biases are all it has."""

    @property
    def positions(self) -> Positions:
        """Which tokens of a sequence it changes."""

    @property
    def scalars(self) -> Mapping[str, Json]:
        """The settings that change what the tensors compute, and no others: part of the adapter's identity."""

    @property
    def refused_parts(self) -> Mapping[str, str]:
        """Endings of tensor names that the method knows and does not serve, with what is to be said about them."""

    @property
    def integer_parts(self) -> Collection[str]:
        """Endings of tensor names whose values are whole numbers; all others must be floating-point."""

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> Sequence[Source]:
        """The parts, in the order of the base's sites; raises `InvalidAdapter` for what makes no sense within the
        method."""


NESTED_CONFIG = "an object `config` of the adapters library"

# By the kind of config; each reads its settings from one and raises `InvalidAdapter` for what it does not serve.
METHODS: Mapping[str, Callable[[AdapterConfig], AdapterMethod]] = {
    "ADALORA": AdaptiveRank.from_config,
    "BEFT": BiasTuning.from_config,
    "BOFT": Butterfly.from_config,
    "C3A": Circulant.from_config,
    "CARTRIDGE": partial(Prefix.from_config, "cartridge"),
    "CPT": partial(VirtualTokens.from_config, "context-aware prompt tuning"),
    "DEFT": ReplacedSubspaces.from_config,
    "DELORA": BoundedDirections.from_config,
    "FOURIERFT": Fourier.from_config,
    "GRALORA": BlockGrid.from_config,
    "HEDDLE_REFT": Representation.from_config,
    "HIRA": HadamardDelta.from_config,
    "HRA": Reflections.from_config,
    "IA3": ChannelVectors.from_config,
    "LN_TUNING": NormTuning.from_config,
    "LOHA": HadamardProducts.from_config,
    "LOKR": KroneckerProducts.from_config,
    "LORA": LowRank.from_config,
    "MISS": TiledShards.from_config,
    "MULTITASK_PROMPT_TUNING": VirtualTokens.of_one_task,
    "OFT": BlockRotation.from_config,
    "PEANUT": WeightNetworks.from_config,
    "PREFIX_TUNING": partial(Prefix.from_config, "prefix tuning"),
    "PROMPT_TUNING": partial(VirtualTokens.from_config, "prompt tuning"),
    "PVERA": SharedProjections.of_pvera,
    "P_TUNING": partial(VirtualTokens.from_config, "P-tuning"),
    "ROAD": PairRotation.from_config,
    "SHIRA": Shira.from_config,
    "SUPERTUNING": SuperTuning.from_config,
    "TINYLORA": TiedVectors.from_config,
    "TRAINABLE_TOKENS": TrainableTokens.from_config,
    "UNILORA": SharedVector.from_config,
    "VBLORA": VectorBank.from_config,
    "VERA": SharedProjections.of_vera,
    COMBINED: lambda config: Combined.from_config(config, method_of),
    NESTED_CONFIG: Bottleneck.from_config,
}


def config_kind(config: AdapterConfig) -> str | None:
    """A key of `METHODS`, if the server takes it: the `peft_type`, or that settings are nested where it is missing."""
    return config.text("peft_type") or (NESTED_CONFIG if "config" in config.fields else None)


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The method that a config asks for; raises `InvalidAdapter`."""
    kind = config_kind(config)
    if kind is not None and kind in REFUSED_METHODS:
        config.refuse("peft_type", f"is {quoted(kind)}, which is not served: {REFUSED_METHODS[kind]}")
    if kind is None or kind not in METHODS:
        asked = "is missing" if kind is None else f"is {quoted(kind)}"
        message = f"{CONFIG_FILE}: peft_type {asked}; this server takes {', '.join(METHODS)}."
        raise InvalidAdapter(message, param=CONFIG_FILE)
    return METHODS[kind](config)
