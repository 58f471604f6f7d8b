"""A transformers model that computes what a compiled adapter says, by the canonical form's formula and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import Activation, CompiledAdapter, SiteUpdate, TokenRows

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda h: h,
    Activation.RELU: torch.relu,
    Activation.GELU_TANH: lambda h: nn.functional.gelu(h, approximate="tanh"),
    Activation.SILU: nn.functional.silu,
}


def with_adapter(model: Any, layout: BaseLayout, adapter: CompiledAdapter) -> Any:
    """A copy of the model whose linear layers, norms and embedding answer as the adapter says.

    For adapters that act on all tokens and add no virtual ones.
    """
    changed = copy.deepcopy(model)
    updates = {update.site: update for update in adapter.updates}
    tokens = adapter.tokens
    for site in layout.by_path("linear", "norm", "embedding").values():
        rows = (
            tokens if site.kind == "embedding" or (tokens and tokens.reach_head and site.path == layout.head) else None
        )
        update = updates.get(site.path)
        if update is not None or rows is not None:
            module = changed.get_submodule(site.path)
            module.register_forward_hook(_Hook(module, site, update or SiteUpdate(site.path), rows))
    return changed


class _Hook:
    """Replaces the output of one module."""

    def __init__(self, module: Any, site: Site, update: SiteUpdate, tokens: TokenRows | None) -> None:
        self.site, self.update, self.tokens = site, update, tokens
        self.weightless = _weightless(module, site)

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update, x = self.update, inputs[0]
        b0 = 0 if getattr(module, "bias", None) is None else module.bias
        answer = self._with_token_rows(output - b0, x)
        if update.in_scale is not None:
            answer = module(x * torch.from_numpy(update.in_scale)) - b0
        if self.weightless is not None and update.out_scale is not None:
            answer = self.weightless(x)
        out_scale = 1 if update.out_scale is None else torch.from_numpy(update.out_scale)
        answer = out_scale * answer + (out_scale if update.scales_base_bias else 1) * b0
        if update.bias is not None:
            answer = answer + torch.from_numpy(update.bias)
        if update.delta is not None:
            answer = answer + x @ torch.from_numpy(update.delta).T
        return answer if update.rows is None else answer + self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        rows = self.update.rows
        assert rows is not None
        a, b, c = (torch.from_numpy(values) for values in (rows.a, rows.b, rows.c))
        hidden = (a.T[x] if self.site.kind == "embedding" else x @ a.T) + c
        columns = [ACTIVATIONS[Activation(act)](hidden[..., i]) for i, act in enumerate(rows.activation.tolist())]
        return (torch.from_numpy(rows.gain) * torch.stack(columns, -1)) @ b

    def _with_token_rows(self, answer: Tensor, x: Tensor) -> Tensor:
        if self.tokens is None:
            return answer
        ids, values = torch.from_numpy(self.tokens.token_ids), torch.from_numpy(self.tokens.values)
        answer = answer.clone()
        if self.site.kind == "embedding":
            for token_id, value in zip(ids, values, strict=True):
                answer[x == token_id] = value * self.site.output_scale
        else:
            answer[..., ids] = x @ values.T
        return answer


def _weightless(module: Any, site: Site) -> Any:
    """The norm without its weight and bias."""
    if site.kind != "norm":
        return None
    plain = copy.deepcopy(module)
    plain._forward_hooks.clear()
    with torch.no_grad():
        plain.weight.fill_(1 - site.weight_offset)
        if getattr(plain, "bias", None) is not None:
            plain.bias.zero_()
    return plain


def random_input(site: Site, seed: int = 0) -> Tensor:
    """Something that the module of a site can take: [5, in_features], or all token ids."""
    if site.kind == "embedding":
        return torch.arange(site.in_features)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((5, site.in_features)).astype(np.float32))
