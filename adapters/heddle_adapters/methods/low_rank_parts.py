"""What low-rank adapters add to one module, given the names of their tensors: `y += s * (B E A x + b)` and its kin.

A and B may be block-diagonal: then the file holds their blocks below each other (peft 0.21,
`tuners/lora/variants.py:BlockDiagonalLinear`). E is a diagonal matrix that only some methods have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.canonical import Floats, Rows, SiteUpdate
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.methods.removed_parts import RemovedPart, removed_factors
from heddle_adapters.packer import to_bfloat16, to_float16
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo


@dataclass(frozen=True, kw_only=True)
class LowRankSource(Source):
    """One module's A and B in the file, with what belongs to them."""

    a: str  # tensor names, here and below
    b: str
    scale: float
    diagonal: str | None = None
    bias: str | None = None
    num_blocks_a: int = 1
    num_blocks_b: int = 1
    base_copy: TensorInfo | None = None  # the base's own weight, which PEFT saves with targeted embeddings and heads

    def check(self, tensors: Tensors, base: BaseWeights) -> None:
        if self.base_copy is None:
            return
        if not _are_alike(tensors.read(self.base_copy.name), base.weight(self.site)):
            message = (
                f"{WEIGHTS_FILE}: {quoted(self.base_copy.name)} is not the weight of this server's base, which uploads "
                "cannot change; upload it where the base it was trained on is served, or save the adapter with "
                "save_embedding_layers=False if the base is the same."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        a, b = self.factors(tensors)
        bias = None if self.bias is None else self.scale * tensors.read(self.bias)
        return SiteUpdate(self.site, Rows.of(a, b.T, self.scale), bias=bias)

    def factors(self, tensors: Tensors) -> tuple[Floats, Floats]:
        """A with E [rank, in_features] and B [out_features, rank], without the scale."""
        a = block_diagonal(tensors.read(self.a), self.num_blocks_a)
        b = block_diagonal(tensors.read(self.b), self.num_blocks_b)
        return (a if self.diagonal is None else tensors.read(self.diagonal).reshape(-1, 1) * a), b


@dataclass(frozen=True, kw_only=True)
class DecomposedSource(LowRankSource):
    """DoRA: `m / ||W + s B A|| * (W + s B A) x`, the norms over each output's weights; the bias is not scaled."""

    magnitude: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        a, b = self.factors(tensors)
        weight = base.weight(self.site) + np.float32(self.scale) * (b @ a)
        norms = np.sqrt(np.square(weight).sum(axis=1, dtype=np.float64))
        if not norms.all():
            message = (
                f"{WEIGHTS_FILE}: the weights of an output of {self.site} are all zero with this adapter, so they have "
                "no direction that lora_magnitude_vector could scale; upload a sound training checkpoint."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        out_scale = (tensors.read(self.magnitude) / norms).astype(np.float32)
        return SiteUpdate(self.site, Rows.of(a, out_scale * b.T, self.scale), out_scale=out_scale)


@dataclass(frozen=True, kw_only=True)
class ResidualSource(LowRankSource):
    """A and B that were trained over the base's weight less a part of it: more rows take that part away."""

    removed: RemovedPart
    rank: int

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        a, b = self.factors(tensors)
        factors = removed_factors(self.removed, base.weight(self.site), self.rank)
        if factors is None:
            message = (
                f"{CONFIG_FILE}: the part that init_lora_weights or kasa_config takes from the weight of {self.site} "
                "is not determined by that weight: other parts are as good. Train with init_lora_weights=True, or "
                "convert the adapter when saving it (save_pretrained's path_initial_model_for_weight_conversion)."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        removed_b, removed_a = factors
        # OLoRA subtracts B0 A0 times the scale; PiSSA divides B0 A0 by it first, and KaSA has none.
        removed_scale = self.scale if self.removed == "leading columns" else 1.0
        rows = Rows.of(
            np.concatenate([a, removed_a]),
            np.concatenate([b.T, removed_b.T]),
            np.repeat(np.array([self.scale, -removed_scale], np.float32), self.rank),
        )
        bias = None if self.bias is None else self.scale * tensors.read(self.bias)
        return SiteUpdate(self.site, rows, bias=bias)


def block_diagonal(blocks: Floats, num_blocks: int) -> Floats:
    """[num_rows, num_columns * num_blocks] from blocks below each other, [num_rows, num_columns] in all."""
    if num_blocks == 1:
        return blocks
    num_rows, num_columns = blocks.shape
    height = num_rows // num_blocks
    whole = np.zeros((num_blocks, height, num_blocks, num_columns), np.float32)
    diagonal = np.arange(num_blocks)
    whole[diagonal, :, diagonal] = blocks.reshape(num_blocks, height, num_columns)
    return whole.reshape(num_rows, num_blocks * num_columns)


def _are_alike(saved: Floats, own: Floats) -> bool:
    """Whether these are the same weights, each rounded to whatever dtype somebody kept them in."""
    if saved.shape != own.shape:
        return False
    return any(np.array_equal(rounded(saved), rounded(own)) for rounded in (to_bfloat16, to_float16))
