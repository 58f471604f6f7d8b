"""Trainable tokens: new rows of the embedding, or of the output head, for a few of the base's tokens.

Format: PEFT's `tuners/trainable_tokens`, files of peft 0.21. Per targeted module `trainable_tokens_delta` [num_tokens,
hidden_size] holds the rows of the config's `token_indices`, in that order; despite the name they replace the base's.
With a head tied to a trained embedding PEFT trains one set of rows for both, and saves it for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.methods.trained_tokens import EmbeddingRowsSource, distinct_ids, rows_source
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

FIELD, ROWS = "token_indices", "trainable_tokens_delta"

READ_FIELDS = frozenset({FIELD})
HARMLESS_FIELDS = frozenset({"init_weights"})
# PEFT leaves out the bias of a head that has one.
REFUSED_PARTS = {ROWS: "only rows of the token embedding, and of an output head without a bias, are served"}


@dataclass(frozen=True, kw_only=True)
class TiedRowsSource(EmbeddingRowsSource):
    """Rows for the embedding and the head that is tied to it, which lie in the file twice."""

    copy_name: str

    def check(self, tensors: Tensors, base: BaseWeights) -> None:
        if not np.array_equal(tensors.read(self.copy_name), tensors.read(self.name)):
            message = (
                f"{WEIGHTS_FILE}: {quoted(self.copy_name)} differs from {quoted(self.name)}, but this base's head and "
                "embedding are one weight; train with tied weights, and save the adapter again."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)


@dataclass(frozen=True)
class TrainableTokens:
    """The settings of one trainable tokens adapter."""

    token_ids: tuple[int, ...]
    label: ClassVar[str] = "trainable tokens"
    combination: ClassVar[Literal["alone"]] = "alone"
    positions: ClassVar[Positions] = Positions()
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: AdapterConfig) -> TrainableTokens:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused={})
        return cls(distinct_ids(config, FIELD, config.fields.get(FIELD)))

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {FIELD: [*self.token_ids]}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        known = by_site(tensors.values(), (ROWS,), base, "embedding", "linear")
        served = (base.embedding, base.head)
        found = {each.site.path: each for each in known if each.site.path in served and not each.site.has_bias}
        is_tied = base.head_is_tied and base.embedding in found
        copy = found.pop(base.head or "", None) if is_tied else None
        return tuple(self._source(each, copy, base) for each in found.values())

    def _source(self, found: SiteTensors, copy: SiteTensors | None, base: BaseLayout) -> Source:
        tensor = found.require(ROWS)
        source = rows_source(FIELD, base, found.site, tensor, self.token_ids, base.head_is_tied)
        if copy is None or not isinstance(source, EmbeddingRowsSource):
            return source
        copy_name = copy.require(ROWS).name
        return TiedRowsSource(
            site=source.site,
            shapes=dict.fromkeys((source.name, copy_name), (len(self.token_ids), found.site.out_features)),
            num_row_values=source.num_row_values,
            name=source.name,
            token_ids=source.token_ids,
            reach_head=True,
            copy_name=copy_name,
        )
