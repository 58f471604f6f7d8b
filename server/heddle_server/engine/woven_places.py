"""Our forwards around a base's norms, its embedding and its layers' blocks: the base's answer, changed for some tokens.

Each is set as a module's own `forward` and asks first whether any adapter of the step changes its place; without
adapters that one look is all it costs. Parameters, paths and classes stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heddle_adapters.base_layout import Layer, Site
from heddle_kernels.site_group import SiteGroup
from heddle_server.engine.adapter_batch import AdapterBatch, ForwardContext, gathered
from heddle_server.engine.places import PARALLEL, Places

Forward = Callable[..., Any]
NUM_TRIAL_TOKENS = 3


class WovenPlace:
    """The forward of one place; the site's own number, and whether this step changes it."""

    def __init__(self, module: nn.Module, site: int, context: ForwardContext) -> None:
        self._forward: Forward = module.forward
        self._site = site
        self._context = context

    @property
    def _adapters(self) -> AdapterBatch | None:
        """The step's adapters, if one of them changes this place."""
        adapters = self._context.adapters
        return adapters if adapters is not None and self._site in adapters.touched_places else None


class WovenNorm(WovenPlace):
    """A norm, with an adapter's weight and bias for the tokens of some."""

    def __init__(
        self, module: nn.Module, site: int, context: ForwardContext, token_axis: int, weight_offset: float
    ) -> None:
        super().__init__(module, site, context)
        self._token_axis = token_axis
        self._module: Any = module
        self._weight_offset = weight_offset
        self._normalised = with_parameters(module, partial(torch.full_like, fill_value=1 - weight_offset))

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width], one of its axes counting tokens -> like x."""
        y: Tensor = self._forward(x)
        if (adapters := self._adapters) is None or adapters.lines is None:
            return y
        y = y.clone()
        for begin, end, scale, bias in adapters.lines.scales_of(self._site):
            normalised = self._normalised(x.narrow(self._token_axis, begin, end - begin)).float()
            if scale is None:
                scale = self._module.weight.float() + self._weight_offset
            changed = normalised * scale
            for addend in (self._module.bias if hasattr(self._module, "bias") else None, bias):
                changed = changed if addend is None else changed + addend.float()
            y.narrow(self._token_axis, begin, end - begin).copy_(changed)
        return y


class WovenEmbedding(WovenPlace):
    """The token embedding, with rows of adapters' own."""

    def __init__(self, module: nn.Module, site: int, context: ForwardContext, output_scale: float) -> None:
        super().__init__(module, site, context)
        self._output_scale = output_scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [1, num_tokens], any known id where an adapter answers -> [1, num_tokens, hidden_size]"""
        y: Tensor = self._forward(token_ids)
        adapters = self._context.adapters
        if adapters is None:
            return y
        if (answers := adapters.tokens) is not None and adapters.lines is not None:
            values = gathered(adapters.lines.rows.rows, answers.offsets, y.shape[-1])
            scaled = (values.float() * self._output_scale).to(y.dtype)
            y = y.clone()
            y[0, answers.tokens] = torch.where(answers.is_virtual[:, None], values, scaled)
        if self._site in adapters.touched_places and adapters.lines is not None:
            y = y.clone()
            adapters.lines.add_token_rows(y[0], token_ids[0], self._site)
        return y


class WovenBlock(WovenPlace):
    """What a layer, its attention or its MLP hands on, with rows of adapters that read it."""

    def __init__(self, module: nn.Module, site: int, context: ForwardContext, width: int) -> None:
        super().__init__(module, site, context)
        self._group = SiteGroup(site, width, (width,))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """-> what the module returns, a tensor [1, num_tokens, width] or a tuple that begins with one."""
        output = self._forward(*arguments, **options)
        if (adapters := self._adapters) is None:
            return output
        if isinstance(output, tuple):
            return self._changed(output[0], adapters), *output[1:]
        return self._changed(output, adapters)

    def _read(self, output: Tensor) -> Tensor:
        """What the rows read: like output."""
        return output

    def _changed(self, output: Tensor, adapters: AdapterBatch) -> Tensor:
        ops: Any = self._context.ops
        h = ops.shrink(self._read(output).reshape(-1, output.shape[-1]).contiguous(), adapters.plan, self._group)
        y = output.reshape(-1, output.shape[-1]).clone()
        ops.expand_add(y, h, adapters.plan, self._group, None)
        return y.view(output.shape)


class WovenParallel(WovenBlock):
    """An MLP, with rows that read what its norm has read and add to what the MLP hands on."""

    def __init__(self, module: nn.Module, norm: nn.Module, site: int, context: ForwardContext, width: int) -> None:
        super().__init__(module, site, context, width)
        self._norm_forward: Forward = norm.forward
        self._stream: Tensor | None = None

    def norm_forward(self, x: Tensor) -> Tensor:
        """In place of the norm's own forward: notes what it reads."""
        if self._adapters is not None:
            self._stream = x
        y: Tensor = self._norm_forward(x)
        return y

    def _read(self, output: Tensor) -> Tensor:
        stream, self._stream = self._stream, None
        assert stream is not None, "the norm runs before its MLP"
        return stream


def weave_places(
    model: PreTrainedModel, places: Places, first_site: int, context: ForwardContext
) -> tuple[tuple[Site, ...], tuple[Layer, ...]]:
    """Set our forwards; the new sites, numbered from `first_site`, and each layer's block sites."""
    sites = list[Site]()

    def add(site: Site) -> int:
        sites.append(site)
        return first_site + len(sites) - 1

    for place in places.norms:
        norm: Any = model.get_submodule(place.path)
        if (offset := weight_offset(norm)) is not None:
            width, has_bias = len(norm.weight), getattr(norm, "bias", None) is not None
            number = add(Site(place.path, "norm", width, width, has_bias, weight_offset=offset))
            norm.forward = WovenNorm(norm, number, context, place.token_axis, offset)
    embedding: Any = model.get_input_embeddings()
    vocabulary_size, hidden_size = embedding.weight.shape
    scale = output_scale(embedding)
    number = add(Site(places.embedding, "embedding", vocabulary_size, hidden_size, False, output_scale=scale))
    embedding.forward = WovenEmbedding(embedding, number, context, scale)
    layers = list[Layer]()
    for places_of_layer in places.layers:
        blocks = (places_of_layer.layer, places_of_layer.attention, places_of_layer.mlp)
        for block in filter(None, blocks):
            number = add(Site(block, "block", places.width, places.width, False))
            module: Any = model.get_submodule(block)
            module.forward = WovenBlock(module, number, context, places.width)
        parallel = None
        if places_of_layer.mlp is not None and places_of_layer.mlp_norm is not None:
            parallel = PARALLEL.format(places_of_layer.mlp)
            number = add(Site(parallel, "parallel", places.width, places.width, False))
            mlp: Any = model.get_submodule(places_of_layer.mlp)
            mlp_norm: Any = model.get_submodule(places_of_layer.mlp_norm)
            mlp.forward = woven = WovenParallel(mlp, mlp_norm, number, context, places.width)
            mlp_norm.forward = woven.norm_forward
        layers.append(Layer(*blocks, parallel))
    return tuple(sites), tuple(layers)


def groups_of(sites: Sequence[Site], first_site: int) -> tuple[SiteGroup, ...]:
    """Each of these sites as a group of its own."""
    return tuple(
        SiteGroup(first_site + number, site.in_features, (site.out_features,)) for number, site in enumerate(sites)
    )


@torch.no_grad()
def weight_offset(norm: Any) -> float | None:
    """What a norm adds to its weight before it multiplies, 0 or 1; None if it is no such norm."""
    x = torch.linspace(-1, 2, NUM_TRIAL_TOKENS * len(norm.weight), device=norm.weight.device).to(norm.weight.dtype)
    x = x.view(1, NUM_TRIAL_TOKENS, len(norm.weight))
    for offset in (0.0, 1.0):
        silenced = with_parameters(norm, partial(torch.full_like, fill_value=-offset))
        if not silenced(x).any():
            return offset
    return None


@torch.no_grad()
def output_scale(embedding: Any) -> float:
    """What a token embedding multiplies its rows with."""
    for token in range(min(len(embedding.weight), 1000)):
        row = embedding.weight[token].float()
        if row.abs().max() > 0:
            answered = embedding(torch.tensor([token], device=row.device))[0].float()
            return float((answered @ row) / (row @ row))
    return 1.0


def with_parameters(module: nn.Module, make_weight: Callable[[Tensor], Tensor]) -> Forward:
    """The module's forward over another weight and no bias; the module itself stays untouched."""
    twin: Any = copy.copy(module)
    parameters: dict[str, nn.Parameter | None] = {
        name: None if parameter is None else nn.Parameter(torch.zeros_like(parameter), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    weight = module._parameters["weight"]
    assert weight is not None
    parameters["weight"] = nn.Parameter(make_weight(weight.data), requires_grad=False)
    twin.__dict__["_parameters"] = parameters
    if (own := twin.__dict__.get("forward")) is not None:  # a fused one, bound to the module that was copied
        twin.__dict__["forward"] = MethodType(own.__func__, twin)
    forward: Forward = twin.forward
    return forward
