"""Whether two arms serve the same model: what each thinks of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

NEAR_TIE_MARGIN = 0.05  # below it the best token is a matter of rounding


@dataclass(frozen=True)
class Agreement:
    """One request's answer, seen by both arms with the same tokens before each place."""

    adapter: int | None  # None: the base
    num_tokens: int
    relative_error: float  # L2 of the difference of log-probabilities, less their means, over L2 of the other arm's
    num_decided: int  # places where the other arm's best token leads by more than a near tie
    num_equal: int  # of those, where both have the same best token

    @classmethod
    def of(cls, adapter: int | None, ours: Tensor, theirs: Tensor) -> Self:
        """ours, theirs: log-probabilities [num_tokens, vocabulary]."""
        best = theirs.topk(2).values
        is_decided = best[:, 0] - best[:, 1] > NEAR_TIE_MARGIN
        is_equal = ours.argmax(-1) == theirs.argmax(-1)
        return cls(
            adapter,
            len(ours),
            difference(ours, theirs),
            int(is_decided.sum()),
            int((is_equal & is_decided).sum()),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance of log-probabilities [num_tokens, vocabulary], each place's mean taken off."""
    ours, theirs = (values - values.mean(-1, keepdim=True) for values in (ours, theirs))
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def adapter_effect(of_base: Tensor, of_adapters: Sequence[Tensor]) -> float:
    """The smallest difference that an adapter makes, in the measure of `relative_error`, on the same tokens."""
    return min(difference(of_adapter, of_base) for of_adapter in of_adapters)
