"""Weights that torch keeps as the parameters of an orthogonal matrix (`torch.nn.utils.parametrizations.orthogonal`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.utils.parametrizations import orthogonal

ORIGINAL, BASE = "original", "0.base"


def orthogonal_weight(state: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """The matrix that the parameters `<prefix>original` and `<prefix>0.base` stand for, in float32."""
    parameters = {name: state[prefix + name].float() for name in (ORIGINAL, BASE) if prefix + name in state}
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty_like(parameters[ORIGINAL])))
    orthogonal(holder)
    holder.load_state_dict({f"parametrizations.weight.{name}": value for name, value in parameters.items()})
    weight: torch.Tensor = holder.weight.detach()
    return weight
