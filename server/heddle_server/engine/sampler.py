"""Logits to tokens: greedy, temperature, min-p, top-k, top-p, logprobs. A draw depends on (seed, position) alone."""

from __future__ import annotations

from collections.abc import Callable
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


class Draw:
    """One new token for each row of logits: on the device at once, on the host when it is asked for."""

    def __init__(self, token_ids: Tensor, is_sound: Tensor, logprobs: dict[int, HostCopy]) -> None:
        """token_ids [num_rows] int64, is_sound [num_rows] bool; logprobs by row, see `_describe`."""
        self.token_ids = token_ids
        self._copy = HostCopy(torch.stack([token_ids, is_sound.long()]))
        self._logprobs = logprobs

    def read(self) -> list[Sampled | None]:
        """Waits for the device; None for a row from which nothing could be drawn."""
        token_ids, is_sound = self._copy.read().tolist()
        return [
            Sampled(token_id, self._described(row)) if sound else None
            for row, (token_id, sound) in enumerate(zip(token_ids, is_sound, strict=True))
        ]

    def _described(self, row: int) -> TokenLogprobs | None:
        return _token_logprobs(self._logprobs[row].read())[0] if row in self._logprobs else None


class HostCopy:
    """A small tensor on its way to the host, which need not wait for what the device is given after it."""

    def __init__(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            self._host, self._is_there = tensor, None
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._is_there.record()

    def read(self) -> Tensor:
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._host


def draw(
    logits: Tensor,
    sampling: list[SamplingParams],
    positions: list[int],
    change: Callable[[Tensor], None] = lambda logits: None,
) -> Draw:
    """Choose a token for each row; nothing for a row that holds NaN or infinity.

    logits [num_rows, vocabulary]; positions: the new token's index in its sequence; `change` turns sound float32 logits
    into what is drawn from, in place. Logprobs are of the logits as the model gave them.
    """
    logits = logits.float()
    is_sound = logits.amax(dim=-1).isfinite()  # the largest of a row with a NaN is NaN; -inf only excludes a token
    logits = logits.where(is_sound[:, None], 0.0)
    wanted = [row for row, params in enumerate(sampling) if params.num_logprobs is not None]
    unchanged = logits[wanted]
    change(logits)
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, params in enumerate(sampling) if params.temperature > 0]
    if drawn:
        uniforms = [uniform(sampling[row].seed, positions[row]) for row in drawn]
        chosen[drawn] = _draw(logits[drawn], [sampling[row] for row in drawn], uniforms)
    described = {
        row: _describe(unchanged[number : number + 1], chosen[row : row + 1], sampling[row].num_logprobs or 0)
        for number, row in enumerate(wanted)
    }
    return Draw(chosen, is_sound, described)


class Scores:
    """Logprobs of tokens that are given, not drawn: on the device at once, on the host when they are asked for."""

    def __init__(self, logits: Tensor, token_ids: Tensor, num_logprobs: int) -> None:
        """logits [num_tokens, vocabulary]; token_ids [num_tokens] int64."""
        self._copy = _describe(logits.float(), token_ids, num_logprobs)

    def read(self) -> list[TokenLogprobs]:
        """Waits for the device."""
        return _token_logprobs(self._copy.read())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same in every batch, process and machine."""
    fields = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(fields, digest_size=8).digest()[:7], "little") / 2**56


def _draw(logits: Tensor, sampling: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """Inverse-CDF draws: tokens ordered by probability, cut to top-k, to min-p and then to top-p, as everyone defines
    them."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    temperature = column([max(params.temperature, LOWEST_TEMPERATURE) for params in sampling])
    top_k = column([float(params.top_k or vocabulary) for params in sampling])
    top_p = column([params.top_p for params in sampling])
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities * (torch.arange(vocabulary, device=logits.device) < top_k)
    kept = kept * (probabilities >= column([params.min_p for params in sampling]) * probabilities[:, :1])
    mass_before = kept.cumsum(dim=-1) - kept
    within_top_p = mass_before < top_p * kept.sum(dim=-1, keepdim=True)
    within_top_p[:, 0] = True  # the best token stays, even for a top_p that is zero in float32
    kept = kept * within_top_p
    cumulative = kept.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, column(uniforms) * cumulative[:, -1:], right=True)
    last_kept = (kept > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not step over the end
    return order.gather(-1, picked.minimum(last_kept)).flatten()


def _describe(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> HostCopy:
    """logits [num_rows, vocabulary], token_ids [num_rows] to float64 [2, num_rows, 1 + num_logprobs]: logprobs and
    their token ids, the given token's first."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(num_logprobs, logprobs.shape[-1]))
    ids = torch.cat([token_ids[:, None], ids], dim=1)
    values = torch.cat([logprobs.gather(1, ids[:, :1]), values], dim=1)
    return HostCopy(torch.stack([values.double(), ids.double()]))


def _token_logprobs(described: Tensor) -> list[TokenLogprobs]:
    """What `_describe` has made, row by row."""
    all_values, all_ids = described.tolist()
    return [
        TokenLogprobs(values[0], tuple(zip(map(int, ids[1:]), values[1:], strict=True)))
        for values, ids in zip(all_values, all_ids, strict=True)
    ]
