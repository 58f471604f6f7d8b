"""Logits to tokens: greedy, temperature, top-k, top-p, logprobs. A draw depends on (seed, position) alone."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from heddle_server.messages import TokenLogprobs
from heddle_server.request import SamplingParams

LOWEST_TEMPERATURE = 1e-6  # below it the division would overflow; the choice is greedy long before


@dataclass(frozen=True)
class Sampled:
    """One new token."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, sampling: list[SamplingParams], positions: list[int]) -> list[Sampled | None]:
    """One token for each row; None for a row that holds NaN or infinity, from which nothing can be drawn.

    logits [num_rows, vocabulary]; positions: the new token's index in its sequence.
    """
    logits = logits.float()
    is_sound = logits.amax(dim=-1).isfinite()  # the largest of a row with a NaN is NaN; -inf only excludes a token
    logits = logits.where(is_sound[:, None], 0.0)
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, params in enumerate(sampling) if params.temperature > 0]
    if drawn:
        uniforms = [uniform(sampling[row].seed, positions[row]) for row in drawn]
        chosen[drawn] = _draw(logits[drawn], [sampling[row] for row in drawn], uniforms)
    token_ids = chosen.tolist()
    described = _logprobs(logits, token_ids, sampling)
    return [
        Sampled(token_id, described.get(row)) if sound else None
        for row, (token_id, sound) in enumerate(zip(token_ids, is_sound.tolist(), strict=True))
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same in every batch, process and machine."""
    fields = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(fields, digest_size=8).digest()[:7], "little") / 2**56


def _draw(logits: Tensor, sampling: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """Inverse-CDF draws: tokens ordered by probability, cut to top-k and then to top-p, as everyone defines them."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    temperature = column([max(params.temperature, LOWEST_TEMPERATURE) for params in sampling])
    top_k = column([float(params.top_k or vocabulary) for params in sampling])
    top_p = column([params.top_p for params in sampling])
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities * (torch.arange(vocabulary, device=logits.device) < top_k)
    mass_before = kept.cumsum(dim=-1) - kept
    within_top_p = mass_before < top_p * kept.sum(dim=-1, keepdim=True)
    within_top_p[:, 0] = True  # the best token stays, even for a top_p that is zero in float32
    kept = kept * within_top_p
    cumulative = kept.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, column(uniforms) * cumulative[:, -1:], right=True)
    last_kept = (kept > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not step over the end
    return order.gather(-1, picked.minimum(last_kept)).flatten()


def _logprobs(logits: Tensor, token_ids: list[int], sampling: list[SamplingParams]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that ask; from the logits before temperature."""
    asking = [(row, wanted) for row, params in enumerate(sampling) if (wanted := params.num_logprobs) is not None]
    described = {}
    for row, num_logprobs in asking:
        logprobs = torch.log_softmax(logits[row], dim=-1)
        values, ids = logprobs.topk(min(num_logprobs, logprobs.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        described[row] = TokenLogprobs(logprobs[token_ids[row]].item(), top)
    return described
