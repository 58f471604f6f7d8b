"""Our linears in place of the model's own: the base's output, changed for the tokens whose request has an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_layout import Site
from heddle_adapters.device_rows import DeviceRows
from heddle_kernels.segments import Segments


@dataclass(frozen=True)
class AdapterBatch:
    """The adapters of one step. Filled by the model runner."""

    segments: Segments  # of all tokens
    head_segments: Segments  # of the rows that reach the output head
    touched_sites: frozenset[int]  # sites that any of these adapters changes
    rows: DeviceRows
    ops: ModuleType


class ForwardContext:
    """The one thing that woven linears see of the step: whose tokens they are computing."""

    def __init__(self) -> None:
        self.adapters: AdapterBatch | None = None  # None: a base-only batch, or no forward running

    @contextmanager
    def using(self, adapters: AdapterBatch | None) -> Iterator[None]:
        """Hold the step's adapters during a forward. Forwards do not nest."""
        assert self.adapters is None, "a forward is already running"
        self.adapters = adapters
        try:
            yield
        finally:
            self.adapters = None


class WovenLinear(nn.Module):
    """A linear of the base with a site number. It never changes the base; without adapters it is the base."""

    base: Any  # nn.Linear, bitsandbytes' Linear4bit or GPT-2's Conv1D

    def __init__(self, base: nn.Module, site: int, is_head: bool, context: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.is_head = is_head
        self._context = context

    @property
    def weight(self) -> Tensor:
        """Some modelling code looks at its linears' weight dtype or device."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        adapters = self._context.adapters
        if adapters is None or self.site not in adapters.touched_sites:
            untouched: Tensor = self.base(x)
            return untouched
        ops, rows = adapters.ops, adapters.rows
        segments = adapters.head_segments if self.is_head else adapters.segments
        flat = x.reshape(-1, x.shape[-1])  # [num_tokens, in_features]
        assert flat.shape[0] == segments.num_tokens, "a site sees other tokens than the batch has"
        scaled = ops.scale_input(flat, rows.vectors, rows.table, segments, self.site)
        y: Tensor = self.base(scaled)
        h = ops.shrink(scaled, rows.rows, rows.table, segments, self.site)
        ops.expand_add(y, h, rows.rows, rows.vectors, rows.table, segments, self.site, self.base.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def weave(model: PreTrainedModel, context: ForwardContext) -> tuple[Site, ...]:
    """Put a WovenLinear in place of every linear, in module order; the sites that adapters may name."""
    head = model.get_output_embeddings()
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    sites = list[Site]()
    for path, module in linears:
        parent, _, name = path.rpartition(".")
        woven = WovenLinear(module, site=len(sites), is_head=module is head, context=context)
        setattr(model.get_submodule(parent), name, woven)
        sites.append(site_of(path, module))
    return tuple(sites)


def site_of(path: str, module: nn.Linear | Conv1D) -> Site:
    if isinstance(module, Conv1D):  # GPT-2's linear, whose weight is stored [in, out]
        in_features, out_features = module.weight.shape
    else:
        in_features, out_features = module.in_features, module.out_features
    return Site(path, "linear", in_features, out_features, has_bias=module.bias is not None)


def base_biases(model: PreTrainedModel, sites: tuple[Site, ...]) -> dict[str, NDArray[np.float32]]:
    """b0 [out_features] by path, of the sites where the base adds one."""
    biases = {site.path: model.get_submodule(site.path).bias for site in sites if site.has_bias}
    return {path: bias.detach().float().cpu().numpy() for path, bias in biases.items()}
