"""The full layout of a tiny model: everything an adapter may attach to, as the engine describes it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_layout import BaseLayout, KvLayout, Layer, Site


def full_layout_of(model: Any, allows_dense: bool = True) -> BaseLayout:
    """Linears with the head, norms, the embedding, and each layer's block sites, of a Llama-like model or a GPT-2."""
    sites, layers = list[Site](), list[Layer]()
    embedding = path_of(model, model.get_input_embeddings())
    head = path_of(model, model.get_output_embeddings())
    hidden_size = model.config.hidden_size
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            first, second = module.weight.shape
            widths = (first, second) if isinstance(module, Conv1D) else (second, first)
            sites.append(Site(path, "linear", *widths, has_bias=module.bias is not None))
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1:
            width, has_bias = len(weight), getattr(module, "bias", None) is not None
            sites.append(Site(path, "norm", width, width, has_bias))
    sites.append(Site(embedding, "embedding", model.config.vocab_size, hidden_size, has_bias=False))
    for path, module in model.named_modules():
        if path.rpartition(".")[2].isdecimal():
            children = dict(module.named_children())
            attention = next(name for name in children if "attn" in name and "norm" not in name)
            layer = Layer(path, f"{path}.{attention}", f"{path}.mlp", f"{path}.mlp (parallel)")
            layers.append(layer)
            for block in (layer.output, layer.attention, layer.mlp):
                assert block is not None
                sites.append(Site(block, "block", hidden_size, hidden_size, has_bias=False))
            sites.append(Site(f"{path}.mlp (parallel)", "parallel", hidden_size, hidden_size, has_bias=False))
    config = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden_size // config.num_attention_heads
    return BaseLayout(
        model_name=f"tiny {config.model_type}",
        fingerprint="sha256:" + "0" * 64,
        quantization="none",
        sites=tuple(sites),
        layers=tuple(layers),
        kv=KvLayout(len(layers), num_kv_heads, head_dim),
        embedding=embedding,
        head=head,
        head_is_tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        allows_dense=allows_dense,
    )


def path_of(model: Any, wanted: Any) -> str:
    """The module path of one of the model's modules."""
    path: str = next(path for path, module in model.named_modules() if module is wanted)
    return path
