"""The linears of a model's layer, one by one and as they are computed together."""

from __future__ import annotations

from heddle_demo.bench.shapes import ModelShape

JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SINGLE = {"q": ("self_attn.q_proj",), "k": ("self_attn.k_proj",), "gate": ("mlp.gate_proj",)}  # v is as k, up as gate


def widths(shape: ModelShape, linears: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
    """in_features, which they share, and out_features of each."""
    sizes = [shape.linears()[name] for name in linears]
    return sizes[0][1], tuple(out_features for out_features, _ in sizes)
