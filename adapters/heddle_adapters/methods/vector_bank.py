"""VB-LoRA: A and B are put together from the vectors of one bank, each piece a mixture of its best few.

`y += B (A x)`, where a row of A is in_features / L pieces of length L and a column of B is out_features / L of them; a
piece is `sum_k softmax(logits)_k * bank_k` over the `topk` vectors with the largest logits.

Format: PEFT's `tuners/vblora`, files of peft 0.21. Once `base_model.vblora_vector_bank` [n, L]; per targeted module
`vblora_logits_A` [r, in_features / L, n] and `vblora_logits_B` [out_features / L, r, n]. With `save_only_topk_weights`
each of the two is instead `..._topk_indices` [.., .., topk], whole numbers, and `..._topk_weights` [.., .., topk - 1]:
the softmax itself, whose last value is what is missing to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Rows
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.factor_checks import bounded_rank, check_indices, check_size, divided
from heddle_adapters.methods.factor_source import FactoredMethod, FactorSource, row_sizes, shared_tensor
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import TensorInfo

A, B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"

READ_FIELDS = frozenset({"bias", "num_vectors", "r", "save_only_topk_weights", "topk", "vector_length"})
HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "vblora_dropout"})


@dataclass(frozen=True, kw_only=True)
class VectorBankSource(FactorSource):
    """One site's logits, or choices and weights, in the file."""

    bank: str
    num_chosen: int

    def factors(self, tensors: Tensors, base: BaseWeights) -> Rows:
        bank = tensors.read(self.bank)
        a, b = self._pieces(A, tensors, bank), self._pieces(B, tensors, bank)
        rank = len(a)
        return Rows.of(a.reshape(rank, -1), b.transpose(1, 0, 2).reshape(rank, -1))

    def _pieces(self, part: str, tensors: Tensors, bank: Floats) -> Floats:
        """[.., .., L]"""
        if part in self.names:
            indices, weights = best(tensors.read(self.names[part]), self.num_chosen)
        else:
            indices = tensors.read_integers(self.names[part + INDICES])
            first = tensors.read(self.names[part + WEIGHTS])
            weights = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], axis=-1)
            check_indices(indices, part + INDICES, self.site, BANK, len(bank))
        pieces = np.zeros((*indices.shape[:-1], bank.shape[1]), np.float32)
        for choice in range(self.num_chosen):
            pieces += weights[..., choice, None] * bank[indices[..., choice]]
        return pieces


@dataclass(frozen=True)
class VectorBank(FactoredMethod):
    """The settings of one VB-LoRA adapter."""

    rank: int
    num_vectors: int
    vector_length: int
    num_chosen: int
    has_only_chosen: bool
    label: ClassVar[str] = "VB-LoRA"
    integer_parts: ClassVar[frozenset[str]] = frozenset({INDICES})

    @classmethod
    def from_config(cls, config: AdapterConfig) -> VectorBank:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        num_vectors, num_chosen = config.rank("num_vectors", default=256), config.rank("topk", default=2)
        if num_chosen > num_vectors:
            config.refuse("topk", f"is {num_chosen}, more than num_vectors, {num_vectors}; upload the trained config.")
        return cls(
            rank=bounded_rank(config, "r", default=4),
            num_vectors=num_vectors,
            vector_length=config.rank("vector_length", default=256),
            num_chosen=num_chosen,
            has_only_chosen=config.flag("save_only_topk_weights"),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"topk": self.num_chosen}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[VectorBankSource, ...]:
        bank = shared_tensor(tensors, BANK, "save the adapter again.")
        check_size(bank, 0, self.num_vectors, "num_vectors")
        check_size(bank, 1, self.vector_length, "vector_length")
        suffixes = (INDICES, WEIGHTS) if self.has_only_chosen else ("",)
        parts = tuple(part + suffix for part in (A, B) for suffix in suffixes)
        return tuple(self._source(found, parts, bank.name) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors, parts: tuple[str, ...], bank: str) -> VectorBankSource:
        site = found.site
        leading = {
            A: (self.rank, divided(site.in_features, self.vector_length, found, "vector_length")),
            B: (divided(site.out_features, self.vector_length, found, "vector_length"), self.rank),
        }
        last = {"": self.num_vectors, INDICES: self.num_chosen, WEIGHTS: self.num_chosen - 1}
        fields = {"": "num_vectors", INDICES: "topk", WEIGHTS: "topk"}
        shapes: dict[str, tuple[int, ...]] = {bank: (self.num_vectors, self.vector_length)}
        for part in parts:
            matrix = next(matrix for matrix in (A, B) if part.startswith(matrix))
            suffix = part.removeprefix(matrix)
            check_size(found.require(part), 0 if matrix == A else 1, self.rank, "r")
            check_size(found.require(part), 2, last[suffix], fields[suffix])
            shapes[found.require(part).name] = (*leading[matrix], last[suffix])
        return VectorBankSource(
            site=site.path,
            shapes=shapes,
            **row_sizes(site, self.rank),
            names={part: found.require(part).name for part in parts},
            bank=bank,
            num_chosen=self.num_chosen,
        )


def best(logits: Floats, num_chosen: int) -> tuple[NDArray[np.int64], Floats]:
    """Which of the last axis are the largest, and their softmax: both [.., .., num_chosen]."""
    indices = np.argsort(-logits, axis=-1, kind="stable")[..., :num_chosen]
    chosen = np.take_along_axis(logits, indices, axis=-1)
    weights = np.exp(chosen - chosen[..., :1])
    return indices, weights / weights.sum(-1, keepdims=True)
