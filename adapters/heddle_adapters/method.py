"""What a family of adapter methods offers, and the table of the families that are served.

Nothing outside the families' own files names a method: a new one is a class that fits `AdapterMethod` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.channel_vectors import ChannelVectors
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.low_rank import LowRank
from heddle_adapters.tensor_file import TensorInfo

# How an adapter takes part in a mix: what it adds is added up, what it multiplies is multiplied, or it cannot be mixed.
Combination = Literal["sum", "product", "alone"]


class SiteSource(Protocol):
    """What one site's update will be made of: known from names, shapes and scalars, before any tensor is read."""

    @property
    def site(self) -> str:
        """Module path, a key of `BaseLayout.index()`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The file's tensors that this update consumes, each with the shape that fits the site."""

    @property
    def num_rows(self) -> int: ...

    @property
    def row_width(self) -> int:
        """Numbers in one row pair: in_features + out_features."""

    @property
    def vector_width(self) -> int:
        """Numbers in the update's vectors together."""

    def build(self, read: Callable[[str], Floats]) -> SiteUpdate:
        """The update itself; `read` returns a tensor of the file in float32."""


class AdapterMethod(Protocol):
    """One adapter's method with the settings that its config gave it."""

    @property
    def label(self) -> str:
        """The method's name for people."""

    @property
    def combination(self) -> Combination:
        """How the method's adapters take part in a mix."""

    @property
    def scalars(self) -> Mapping[str, Json]:
        """The settings that change what the tensors compute, and no others: part of the adapter's identity."""

    @property
    def refused_parts(self) -> Mapping[str, str]:
        """Endings of tensor names that the method knows and does not serve, with what is to be said about them."""

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[SiteSource, ...]:
        """One source per changed site; raises `InvalidAdapter` for what makes no sense within the method."""


# By `peft_type`; each reads its settings from a config and raises `InvalidAdapter` for what it does not serve.
METHODS: Mapping[str, Callable[[AdapterConfig], AdapterMethod]] = {
    "LORA": LowRank.from_config,
    "IA3": ChannelVectors.from_config,
}


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The method that a config asks for; raises `InvalidAdapter`."""
    peft_type = config.text("peft_type")
    if peft_type is None or peft_type not in METHODS:
        asked = "is missing" if peft_type is None else f"is {quoted(peft_type)}"
        message = f"{CONFIG_FILE}: peft_type {asked}; this server takes {', '.join(METHODS)}."
        raise InvalidAdapter(message, param=CONFIG_FILE)
    return METHODS[peft_type](config)
