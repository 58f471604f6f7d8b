"""Before anything is served: does the base answer through pages what it answers by itself, whoever sits beside it?

transformers routes attention to us, but a model may have other ways from token to token (state-space layers, masks of
its own). Such a model would answer wrongly, or with its neighbour's words; here it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heddle_adapters.base_layout import KvLayout
from heddle_kernels.ops import Ops
from heddle_kernels.paged_batch import PagedBatch
from heddle_server.config import PAGE_TOKENS, ConfigError
from heddle_server.engine.attention import ATTENTION_NAME, PagedAttention

NUM_TOKENS = 2 * PAGE_TOKENS + 5  # of each of the two sequences: two full pages and a beginning
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Relative difference of a token's logits that rounding explains. In 16 bit, another order of sums moves a token by a
# few per cent, and now and then a router to another expert: so the median decides there, and two tokens may stray.
LIMIT_FP32, LIMIT_16_BIT = 1e-3, 0.1
MAX_STRAY_TOKENS = 2


@torch.inference_mode()
def self_test(model: PreTrainedModel, shape: KvLayout, dtype: torch.dtype, ops: Ops) -> None:
    """Raises ConfigError when this model's answers would be wrong, or depend on other requests."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "attention_chunk_size", None) or not layer_types <= SERVED_LAYER_TYPES:
        described = ", ".join(sorted(layer_types - SERVED_LAYER_TYPES)) or "chunked attention"
        raise ConfigError(f"{type(model).__name__} has layers that are not served: {described}.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens, *neighbours = torch.randint(0, vocabulary, (3, NUM_TOKENS), generator=generator).to(model.device)
    first, second = (_paged_logits(model, shape, dtype, ops, neighbour, tokens) for neighbour in neighbours)
    limit = LIMIT_FP32 if dtype == torch.float32 else LIMIT_16_BIT
    if (_difference(first, second) > limit).sum() > MAX_STRAY_TOKENS:
        raise ConfigError(
            f"{type(model).__name__} lets tokens of one request change another's answer: it has a way from token to "
            "token beside attention, which is not served."
        )
    difference = _difference(first, _own_logits(model, tokens)).median().item()
    if difference > limit:
        raise ConfigError(
            f"{type(model).__name__} does not answer through paged attention what it answers by itself (logits "
            f"{difference:.1%} apart): its attention has a rule that transformers does not hand on."
        )


def _own_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """As transformers computes them: [NUM_TOKENS, vocabulary]."""
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits


def _paged_logits(
    model: PreTrainedModel, shape: KvLayout, dtype: torch.dtype, ops: Ops, neighbour: Tensor, tokens: Tensor
) -> Tensor:
    """Of `tokens` behind `neighbour` in one flat batch: [NUM_TOKENS, vocabulary]."""
    num_pages = -(-NUM_TOKENS // PAGE_TOKENS)
    kv_size = (2 * num_pages, shape.num_layers, 2, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
    pages = torch.arange(2 * num_pages, dtype=torch.int32, device=model.device)
    positions = torch.arange(NUM_TOKENS, device=model.device)
    both = positions.repeat(2)
    batch = PagedBatch(
        query_start=torch.tensor([0, NUM_TOKENS, 2 * NUM_TOKENS], dtype=torch.int32, device=model.device),
        length=torch.tensor([NUM_TOKENS, NUM_TOKENS], dtype=torch.int32, device=model.device),
        page_table=pages.view(2, num_pages),
        write_slot=torch.cat([positions, num_pages * PAGE_TOKENS + positions]),
        query_bounds=(0, NUM_TOKENS, 2 * NUM_TOKENS),
        lengths=(NUM_TOKENS, NUM_TOKENS),
    )
    attention = PagedAttention(batch, torch.zeros(kv_size, dtype=dtype, device=model.device), ops)
    output = model(
        input_ids=torch.cat([neighbour, tokens])[None],
        position_ids=both[None],
        use_cache=False,
        heddle_attention=attention,
    )
    logits: Tensor = output.logits[0, NUM_TOKENS:].float()
    return logits


def _difference(left: Tensor, right: Tensor) -> Tensor:
    """Relative distance of each token's logits: [NUM_TOKENS]."""
    distance: Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    size: Tensor = torch.linalg.vector_norm(right, dim=-1)
    return distance / size.clamp(min=1e-6)
