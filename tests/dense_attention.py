"""What paged attention must compute, over plain tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence, all tokens at once, float64: query [length, heads, dim] -> the same."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(group, dim=1).transpose(0, 1) for states in (key, value))
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(query))
    age = position[:, None] - position[None, :]
    hidden = (age < 0) | (age >= (window or math.inf))
    weights = scores.masked_fill(hidden, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(-1, 1, 1)
    return (weights / total @ value).transpose(0, 1)
