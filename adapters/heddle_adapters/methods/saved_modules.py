"""Whole modules of the base that were trained beside an adapter and saved in full.

Format: PEFT's `ModulesToSaveWrapper` (peft 0.21, `utils/other.py`): the module's own tensors, `weight` and perhaps
`bias`, under its own path. An embedding becomes rows for the tokens whose rows differ from the base's, a norm a new
weight, a linear layer a delta as large as its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import Floats, SiteUpdate, TokenRows
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE


@dataclass(frozen=True, kw_only=True)
class SavedBiasSource(Source):
    """A new bias of a linear layer or a norm."""

    bias: str  # tensor name

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        return SiteUpdate(self.site, bias=_bias_change(self.site, self.bias, tensors, base))


@dataclass(frozen=True, kw_only=True)
class SavedLinearSource(Source):
    """A new weight of a linear layer, and a new bias if it has one."""

    weight: str
    bias: str | None

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        delta = tensors.read(self.weight) - base.weight(self.site)
        return SiteUpdate(self.site, delta=delta, bias=_bias_change(self.site, self.bias, tensors, base))


@dataclass(frozen=True, kw_only=True)
class SavedNormSource(Source):
    """A new weight of a norm, and a new bias if it has one."""

    weight: str
    bias: str | None
    weight_offset: float

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        weight = tensors.read(self.weight) + np.float32(self.weight_offset)
        return SiteUpdate(self.site, out_scale=weight, bias=_bias_change(self.site, self.bias, tensors, base))


@dataclass(frozen=True, kw_only=True)
class SavedEmbeddingSource(Source):
    """A new embedding; the values that it may need are counted for all tokens, as only the numbers show which changed.

    A tied head that was trained as one weight with it lies in the file once more.
    """

    weight: str
    head_weight: str | None

    def check(self, tensors: Tensors, base: BaseWeights) -> None:
        if self.head_weight is None or np.array_equal(tensors.read(self.weight), tensors.read(self.head_weight)):
            return
        message = (
            f"{WEIGHTS_FILE}: {quoted(self.weight)} and {quoted(self.head_weight)} differ, but ensure_weight_tying "
            "says that they are one weight; upload the file that was saved with this config."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)

    def build(self, tensors: Tensors, base: BaseWeights) -> TokenRows:
        saved = tensors.read(self.weight)
        is_changed = (saved != base.weight(self.site)).any(axis=1)
        is_changed[0] |= not is_changed.any()  # no part is empty
        return TokenRows(np.flatnonzero(is_changed), saved[is_changed], reach_head=self.head_weight is not None)


def _bias_change(site: str, name: str | None, tensors: Tensors, base: BaseWeights) -> Floats | None:
    """What has to be added to the base's bias to get the saved one."""
    if name is None:
        return None
    own = base.bias(site)
    assert own is not None, f"{site} has no bias"
    return tensors.read(name) - own


def saved_norm(site: Site, weight: str, bias: str | None) -> SavedNormSource:
    """A norm's new weight and bias, by tensor name."""
    width = site.out_features
    return SavedNormSource(
        site=site.path,
        shapes={name: (width,) for name in (weight, bias) if name is not None},
        num_vector_values=width if bias is None else 2 * width,
        weight=weight,
        bias=bias,
        weight_offset=site.weight_offset,
    )


def saved_linear(site: Site, weight: str, bias: str | None) -> SavedLinearSource:
    """A linear layer's new weight and bias, by tensor name."""
    shapes: Mapping[str, tuple[int, ...]] = {weight: (site.out_features, site.in_features)}
    return SavedLinearSource(
        site=site.path,
        shapes=shapes if bias is None else {**shapes, bias: (site.out_features,)},
        num_row_values=site.out_features * site.in_features,
        num_vector_values=0 if bias is None else site.out_features,
        is_dense=True,
        weight=weight,
        bias=bias,
    )


def saved_embedding(site: Site, weight: str, head_weight: str | None) -> SavedEmbeddingSource:
    """A new embedding, by tensor name."""
    shape = (site.in_features, site.out_features)
    return SavedEmbeddingSource(
        site=site.path,
        shapes={name: shape for name in (weight, head_weight) if name is not None},
        num_row_values=site.in_features * site.out_features,
        is_dense=True,
        weight=weight,
        head_weight=head_weight,
    )


def saved_bias(site: Site, bias: str) -> SavedBiasSource:
    """A new bias, by tensor name."""
    return SavedBiasSource(
        site=site.path, shapes={bias: (site.out_features,)}, num_vector_values=site.out_features, bias=bias
    )
