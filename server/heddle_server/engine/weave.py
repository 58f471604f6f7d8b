"""Our linears in place of the model's own: the base's output, changed for the tokens whose request has an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from heddle_adapters.base_layout import Site
from heddle_kernels.site_group import MAX_SITES, SiteGroup
from heddle_server.engine.adapter_batch import AdapterLines, ForwardContext
from heddle_server.engine.base_linear import BaseLinears
from heddle_server.engine.joined_linear import join
from heddle_server.engine.probe import features, linears_of


class WovenGroup:
    """Linears of the base that read the same input, computed together when the first of them is called."""

    def __init__(self, base: nn.Module, group: SiteGroup, is_head: bool, context: ForwardContext) -> None:
        self.base: Any = base
        self._group = group
        self._sums_are_open = hasattr(base, "partial_sums")  # whoever adds the adapters can finish its sums
        self._is_head = is_head
        self._context = context
        self._input: Tensor | None = None  # of the outputs that are kept
        self._outputs: list[Tensor | None] = []

    def output(self, number: int, x: Tensor) -> Tensor:
        """What the group's linear `number` answers to x [..., in_features]."""
        if self._input is not x or self._outputs[number] is None:
            self._input = x
            self._outputs = list(torch.split(self._compute(x), list(self._group.out_features), dim=-1))
        output, self._outputs[number] = self._outputs[number], None
        assert output is not None
        if not any(kept is not None for kept in self._outputs):
            self._input = None
        return output

    def _compute(self, x: Tensor) -> Tensor:
        """[..., sum of out_features]"""
        adapters, group = self._context.adapters, self._group
        if adapters is None or not adapters.touches(group):
            untouched: Tensor = self.base(x)
            return untouched
        flat = x.reshape(-1, group.in_features)  # [num_tokens, in_features]
        plan = adapters.head_plan if self._is_head else adapters.plan
        lines = adapters.head_lines if self._is_head else adapters.lines
        if adapters.scaled_input_sites.isdisjoint(group.sites):
            y = self._with_rows(flat, plan, lines)
        else:
            y = torch.cat([self._with_scaled_input(flat, plan, lines, site) for site in group.sites], dim=1)
        if lines is not None:
            lines.add_deltas(y, flat, group)
        return y.view(*x.shape[:-1], y.shape[1])

    def _with_rows(self, x: Tensor, plan: Any, lines: AdapterLines | None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, sum of out_features]"""
        ops: Any = self._context.ops
        h = ops.shrink(x, plan, self._group)
        answers_head = self._is_head and lines is not None and lines.reach_head
        if self._sums_are_open and not answers_head and (sums := self.base.partial_sums(x)) is not None:
            finished: Tensor = ops.expand_sums(sums, h, plan, self._group, self.base.bias, x.dtype)
            return finished
        y: Tensor = self.base(x)
        if answers_head and lines is not None:
            lines.answer_head(y, x, self.base.bias)
        ops.expand_add(y, h, plan, self._group, self.base.bias)
        return y

    def _with_scaled_input(self, x: Tensor, plan: Any, lines: AdapterLines | None, site: int) -> Tensor:
        """One site by itself, because its input is its own: [num_tokens, out_features]."""
        ops, group = self._context.ops, self._group.alone(site)
        number = site - self._group.first_site
        columns = slice(begin := self._group.column_start[number], begin + self._group.out_features[number])
        scaled = ops.scale_input(x, plan, site)
        h = ops.shrink(scaled, plan, group)
        y: Tensor = self.base(scaled)[:, columns].contiguous()
        base_bias = None if self.base.bias is None else self.base.bias[columns]
        if self._is_head and lines is not None:
            lines.answer_head(y, scaled, base_bias)
        ops.expand_add(y, h, plan, group, base_bias)
        return y


class WovenLinear(nn.Module):
    """A linear of the base, as one of its group. It never changes the base; without adapters it is the base."""

    def __init__(self, group: WovenGroup, number: int) -> None:
        super().__init__()
        self.base = group.base
        self._group = group
        self._number = number

    @property
    def weight(self) -> Tensor:
        """Some modelling code looks at its linears' weight dtype or device. It is the whole group's."""
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._number, x)


def weave(
    model: PreTrainedModel,
    shared_inputs: Sequence[tuple[str, ...]],
    base_linears: BaseLinears,
    context: ForwardContext,
) -> tuple[tuple[Site, ...], tuple[SiteGroup, ...]]:
    """Put a WovenLinear in place of every linear; the sites that adapters may name, in module order, and their groups.

    `shared_inputs` are the runs of linears that may be joined, as `probe` found them.
    """
    head = model.get_output_embeddings()
    linears = dict(linears_of(model))
    sites = tuple(site_of(path, module) for path, module in linears.items())
    number_of = {path: number for number, path in enumerate(linears)}
    run_of = {run[0]: run for run in shared_inputs if len(run) <= MAX_SITES}
    groups = list[SiteGroup]()
    woven = set[str]()
    for path in linears:
        if path in woven:
            continue
        run = run_of.get(path, (path,))
        modules = [linears[member] for member in run]
        base = modules[0] if len(run) == 1 else join(modules)
        if base is None:
            run, base = (path,), modules[0]
        first = number_of[path]
        group = SiteGroup(
            first, sites[first].in_features, tuple(sites[number_of[member]].out_features for member in run)
        )
        woven_group = WovenGroup(base_linears.make(base), group, is_head=base is head, context=context)
        for number, member in enumerate(run):
            parent, _, name = member.rpartition(".")
            setattr(model.get_submodule(parent), name, WovenLinear(woven_group, number))
        groups.append(group)
        woven.update(run)
    base_linears.finish()
    return sites, tuple(groups)


def site_of(path: str, module: nn.Module) -> Site:
    in_features, out_features = features(module)
    return Site(path, "linear", in_features, out_features, has_bias=module.bias is not None)


def base_biases(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """b0 [out_features] by path, of the linears where the base adds one. Asked before weaving."""
    biases = {path: bias for path, module in linears_of(model) if isinstance(bias := module.bias, Tensor)}
    return {path: bias.detach().float().cpu().numpy() for path, bias in biases.items()}
