"""What adapters are checked against, where there is a model's shape and no model."""

from __future__ import annotations

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_demo.bench.shapes import ModelShape


def layout_of(shape: ModelShape) -> BaseLayout:
    """The linears of all layers. Its fingerprint is that of no loaded base, so no adapter may name one."""
    sites = tuple(
        Site(f"model.layers.{layer}.{name}", "linear", in_features, out_features, has_bias=shape.has_bias(name))
        for layer in range(shape.num_layers)
        for name, (out_features, in_features) in shape.linears().items()
    )
    return BaseLayout(shape.name, "sha256:" + "0" * 64, "none", sites)
