"""Prefix tuning: keys and values of tokens that nobody wrote, which every layer's attention sees before the prompt.

Format: PEFT's `tuners/prefix_tuning` (P-tuning v2 writes the same) and `tuners/cartridge`, files of peft 0.21:
`prompt_embeddings` [num_virtual_tokens, 2 * num_layers * num_kv_heads * head_dim], a projection already applied when
it was saved. Seen as [token, 2 * num_layers, head, head_dim], layer l's keys are at 2 l and its values at 2 l + 1
(`peft_model.py:get_prompt`). The keys are taken as they are, without rotary positions; the prompt's positions begin
behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, KvLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import PrefixKv
from heddle_adapters.errors import AdapterIncompatible
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.methods.virtual_tokens import PROMPT, check_promise, promised_length
from heddle_adapters.positions import Positions
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import TensorInfo

MAX_PREFIX_TOKENS = 8192  # the longest cartridges; the file has every number of them

READ_FIELDS = frozenset(
    {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
)
HARMLESS_FIELDS = frozenset({"encoder_hidden_size", "init_weights", "num_frozen_tokens", "prefix_projection"})


@dataclass(frozen=True, kw_only=True)
class PrefixSource(Source):
    """All layers' keys and values in the file."""

    kv: KvLayout

    def build(self, tensors: Tensors, base: BaseWeights) -> PrefixKv:
        kv = self.kv
        flat = tensors.read(PROMPT).reshape(-1, kv.num_layers, 2, kv.num_kv_heads, kv.head_dim)
        keys, values = np.ascontiguousarray(flat.transpose(2, 1, 0, 3, 4))
        return PrefixKv(keys, values)


@dataclass(frozen=True)
class Prefix:
    """The settings of one prefix."""

    label: str
    num_tokens: int
    num_layers: int | None  # of the base it was trained on, None if the config does not say
    num_kv_heads: int | None
    num_key_values: int | None  # of all heads of a layer together
    combination: ClassVar[Literal["alone"]] = "alone"
    positions: ClassVar[Positions] = Positions()
    scalars: ClassVar[Mapping[str, Json]] = {}
    refused_parts: ClassVar[Mapping[str, str]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, label: str, config: AdapterConfig) -> Prefix:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)

        def size(field: str) -> int | None:
            return None if config.fields.get(field) is None else config.rank(field, default=1)

        return cls(
            label=label,
            num_tokens=promised_length(config, MAX_PREFIX_TOKENS),
            num_layers=size("num_layers"),
            num_kv_heads=size("num_attention_heads"),
            num_key_values=size("token_dim"),
        )

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[PrefixSource, ...]:
        kv = self._kv(base)
        check_promise(tensors, PROMPT, (self.num_tokens, None))
        width = 2 * kv.num_layers * kv.num_kv_heads * kv.head_dim
        source = PrefixSource(
            site="",
            shapes={PROMPT: (self.num_tokens, width)},
            num_row_values=self.num_tokens * width,
            num_virtual_tokens=self.num_tokens,
            kv=kv,
        )
        return (source,)

    def _kv(self, base: BaseLayout) -> KvLayout:
        """The base's keys and values, if the config speaks of the same."""
        if base.kv is None:
            message = f"{base.model_name} does not keep keys and values alike in all layers, so it takes no prefixes."
            raise AdapterIncompatible(message, param=CONFIG_FILE)
        promised = {
            "num_layers": (self.num_layers, base.kv.num_layers),
            "num_attention_heads": (self.num_kv_heads, base.kv.num_kv_heads),
            "token_dim": (self.num_key_values, base.kv.num_kv_heads * base.kv.head_dim),
        }
        for field, (asked, present) in promised.items():
            if asked not in (None, present):
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: {field} is {asked}, and the keys and values of {base.model_name} have {present}; "
                    "upload it where the base it was trained on is served.",
                    param=CONFIG_FILE,
                )
        return base.kv
