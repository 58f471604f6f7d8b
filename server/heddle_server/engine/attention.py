"""Paged attention behind transformers' attention interface: its modelling code runs, our pages hold keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from heddle_kernels.ops import Ops
from heddle_kernels.paged_batch import PagedBatch

ATTENTION_NAME = "heddle_paged"


class Attention(Protocol):
    """One forward's attention; passed through the model as the keyword `heddle_attention`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """query [num_tokens, num_heads, head_dim], key and value alike with num_kv_heads -> like query."""


@dataclass(frozen=True)
class AttentionOptions:
    """What a model asks of its attention beside causality."""

    scaling: float
    sliding_window: int | None  # tokens a token sees, itself included; None = all
    softcap: float | None
    sinks: Tensor | None  # [num_heads]


@dataclass(frozen=True)
class PagedAttention:
    """Attention of one step over the pool's pages. Filled by the model runner."""

    batch: PagedBatch
    kv: Tensor  # [num_pages, num_layers, 2, page_tokens, num_kv_heads, head_dim]
    ops: Ops

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        kv = self.kv[:, layer]
        self.ops.write_kv(key, value, kv, self.batch)
        return self.ops.paged_attention(
            query, kv, self.batch, options.scaling, options.sliding_window, options.softcap, options.sinks
        )


@dataclass
class AttentionProbe:
    """Attends to nothing; notes which layers came by and the shape of their keys and values."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)  # by layer: (num_kv_heads, head_dim)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.shapes[layer] = (key.shape[1], key.shape[2])
        return query


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known. No mask is registered, so transformers builds none."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    heddle_attention: Attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, num_heads, num_tokens, head_dim], key and value alike with num_kv_heads
    -> ([1, num_tokens, num_heads, head_dim], None)."""
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module of transformers has one
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return heddle_attention.attend(layer, query, key, value, options)[None], None
