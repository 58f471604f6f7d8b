"""The beginning of a random permutation as torch draws it on the CPU, without torch.

Some methods keep a seed in place of positions. What `torch.randperm(n, generator=torch.Generator().manual_seed(seed))`
answers is a Fisher-Yates shuffle of 0 .. n - 1 from the front, drawing 32 bits at a time from a Mersenne Twister
(torch, `aten/src/ATen/native/TensorFactories.cpp:randperm_cpu`); so its first numbers need only as many draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_LENGTH = (2**32 - 1) // 20 - 1  # torch shuffles what is longer in another way
MAX_SEED = 2**63 - 1


def permutation_head(length: int, count: int, seed: int) -> NDArray[np.int64]:
    """The first `count` numbers of the permutation of `length`, at most `MAX_LENGTH`, with a seed up to `MAX_SEED`."""
    assert count <= length <= MAX_LENGTH, "these would be drawn in another way"
    num_draws = min(count, length - 1)  # the last number is what is left over
    twister = np.random.RandomState(seed % 2**32)  # torch's takes the seed's lower 32 bits
    drawn = np.frombuffer(twister.bytes(4 * num_draws), "<u4").astype(np.int64)
    others = np.arange(num_draws) + drawn % (length - np.arange(num_draws))
    moved: dict[int, int] = {}  # place to the number that stands there, where it is no longer the place's own
    head = np.arange(count)
    for place, other in enumerate(others.tolist()):
        head[place] = moved.get(other, other)
        moved[other] = moved.pop(place, place)
    if count > num_draws:
        head[-1] = moved.get(length - 1, length - 1)
    return head
