"""Rows of the embedding, or of the output head, that were trained for a few of the base's tokens.

Format: PEFT's `TrainableTokensWrapper` (peft 0.21, `utils/other.py`), which any of its methods may have beside its own
tensors. Per wrapped module `token_adapter.trainable_tokens_delta` [num_tokens, hidden_size]: despite the name, these
rows replace the base's; the config's `trainable_token_indices` says for which tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows, SiteUpdate, TokenRows
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.site_tensors import PEFT_PREFIX, by_site
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

FIELD = "trainable_token_indices"
ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class EmbeddingRowsSource(Source):
    """Rows for the embedding."""

    name: str
    token_ids: tuple[int, ...]  # in the order of the file's rows
    reach_head: bool

    def build(self, tensors: Tensors, base: BaseWeights) -> TokenRows:
        ids = np.array(self.token_ids, np.int64)
        ascending = np.argsort(ids)
        return TokenRows(ids[ascending], tensors.read(self.name)[ascending], self.reach_head)


@dataclass(frozen=True, kw_only=True)
class HeadRowsSource(Source):
    """Rows for the head alone: each adds its difference from the base's row to one output.

    A delta of the whole head says the same in fewer numbers where tokens are many.
    """

    name: str
    token_ids: tuple[int, ...]

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        weight, ids = base.weight(self.site), np.array(self.token_ids)
        changes = tensors.read(self.name) - weight[ids]
        if self.is_dense:
            delta = np.zeros_like(weight)
            delta[ids] = changes
            return SiteUpdate(self.site, delta=delta)
        outputs = np.zeros((len(ids), len(weight)), np.float32)
        outputs[np.arange(len(ids)), ids] = 1
        return SiteUpdate(self.site, Rows.of(changes, outputs))


RowsSource = EmbeddingRowsSource | HeadRowsSource


@dataclass(frozen=True)
class TrainedTokens:
    """Which tokens of which modules were trained."""

    # By an ending of the module's path, compared by characters as PEFT does; None: the embedding.
    token_ids: Mapping[str | None, tuple[int, ...]]

    @classmethod
    def from_config(cls, config: AdapterConfig) -> TrainedTokens:
        value = config.fields.get(FIELD)
        if not value:
            return cls({})
        if isinstance(value, dict):
            return cls({end: distinct_ids(config, f"{FIELD}[{quoted(end)}]", ids) for end, ids in value.items()})
        return cls({None: distinct_ids(config, FIELD, value)})

    @property
    def scalars(self) -> Mapping[str, Json]:
        if not self.token_ids:
            return {}
        return {FIELD: [[ending, [*ids]] for ending, ids in self.token_ids.items()]}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> list[RowsSource]:
        """One part for the embedding, one for the head; a head that is tied to trained rows follows them."""
        asked = {site.path: ids for ending, ids in self.token_ids.items() for site in self._sites(ending, base)}
        if not asked:
            return []
        found = {each.site.path: each for each in by_site(tensors.values(), (ROWS,), base, "embedding", "linear")}
        head_ids, embedding_ids = asked.get(base.head or ""), asked.get(base.embedding or "")
        # PEFT ties them too, unless the config gives the head tokens of its own (`set_additional_trainable_modules`).
        is_tied = base.head_is_tied and embedding_ids is not None and head_ids in (None, embedding_ids)
        if is_tied:
            asked.pop(base.head or "", None)
        missing = [quoted(path) for path in asked if path not in found]
        if missing:
            message = f"{WEIGHTS_FILE} has no {ROWS} for {listed(missing)}, which {FIELD} of {CONFIG_FILE} promises"
            raise InvalidAdapter(
                f"{message}; upload the whole file that was saved with this config.", param=WEIGHTS_FILE
            )
        return [
            rows_source(FIELD, base, found[path].site, found[path].require(ROWS), ids, is_tied)
            for path, ids in asked.items()
        ]

    def _sites(self, ending: str | None, base: BaseLayout) -> list[Site]:
        if ending is None:
            return [base.site(base.embedding)] if base.embedding else _no_site(FIELD)
        known = base.by_path("embedding", "linear").values()
        sites = [site for site in known if (PEFT_PREFIX + site.path).endswith(ending)]
        wrong = [site.path for site in sites if site.path not in (base.embedding, base.head) or site.has_bias]
        return _no_site(f"{FIELD}[{quoted(ending)}]") if wrong or not sites else sites


def _no_site(field: str) -> list[Site]:
    message = (
        f"{CONFIG_FILE}: {field} does not name this base's token embedding or its output head, and tokens of other "
        "modules cannot be served; train rows of the embedding."
    )
    raise AdapterIncompatible(message, param=CONFIG_FILE)


def rows_source(
    field: str, base: BaseLayout, site: Site, tensor: TensorInfo, ids: tuple[int, ...], is_tied: bool
) -> RowsSource:
    """Rows for the tokens that the config's `field` names, of the embedding or the head."""
    if max(ids) >= base.vocabulary_size:
        message = (
            f"{CONFIG_FILE}: {field} names token {max(ids)}, and this base's tokens end at {base.vocabulary_size - 1}; "
            "upload it where the base it was trained on is served."
        )
        raise AdapterIncompatible(message, param=CONFIG_FILE)
    if tensor.shape[:1] != (len(ids),):
        message = (
            f"{WEIGHTS_FILE}: {quoted(tensor.name)} has shape {list(tensor.shape)}, but {field} of {CONFIG_FILE} names "
            f"{len(ids)} tokens; upload the config that was saved with these weights."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)
    is_embedding = site.kind == "embedding"
    hidden_size = site.out_features if is_embedding else site.in_features
    shapes = {tensor.name: (len(ids), hidden_size)}
    if is_embedding:
        return EmbeddingRowsSource(
            site=site.path,
            shapes=shapes,
            num_row_values=len(ids) * hidden_size,
            name=tensor.name,
            token_ids=ids,
            reach_head=is_tied,
        )
    num_row_values, num_delta_values = len(ids) * (hidden_size + site.out_features), hidden_size * site.out_features
    is_dense = num_row_values > num_delta_values
    return HeadRowsSource(
        site=site.path,
        shapes=shapes,
        num_rows=0 if is_dense else len(ids),
        num_row_values=min(num_row_values, num_delta_values),
        is_dense=is_dense,
        name=tensor.name,
        token_ids=ids,
    )


def token_ids(config: AdapterConfig, field: str, value: Json) -> tuple[int, ...]:
    """A list of token ids from a config, at least one."""
    if not isinstance(value, list) or not value:
        config.refuse(field, f"must be a list of token ids, not {quoted(value)}.")
    return tuple(
        item if type(item) is int and item >= 0 else config.refuse(field, f"must hold token ids, not {quoted(item)}.")
        for item in value
    )


def distinct_ids(config: AdapterConfig, field: str, value: Json) -> tuple[int, ...]:
    """The same, each of them once."""
    ids = token_ids(config, field, value)
    if len(set(ids)) != len(ids):
        config.refuse(field, "names a token twice, so it is unclear which of its rows counts; train each token once.")
    return ids
