"""What torch's CPU generator draws for `kaiming_uniform_`, without torch.

Both torch and numpy's legacy generator are MT19937, seeded alike. A float32 takes the low 24 bits of one draw and is
scaled with one rounding (torch 2.13, `aten/src/ATen/core/DistributionsHelper.h:uniform_real_distribution`).
"""

from __future__ import annotations

import math

import numpy as np

from heddle_adapters.canonical import Floats

MANTISSA_BITS = 24
SEED_MASK = 2**32 - 1  # torch seeds MT19937 with the low bits alone


def kaiming_uniform(seed: int, *shapes: tuple[int, int]) -> tuple[Floats, ...]:
    """Matrices drawn one after the other, each uniform within sqrt(6 / its columns) of zero."""
    generator = np.random.RandomState(seed & SEED_MASK)
    return tuple(_uniform(generator, shape) for shape in shapes)


def _uniform(generator: np.random.RandomState, shape: tuple[int, int]) -> Floats:
    bound = np.float32(math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1])))
    uniform = np.empty(shape, np.float32)
    for row in uniform:  # one at a time, for the float64 numbers between take twice the memory
        draws = np.frombuffer(generator.bytes(4 * len(row)), np.dtype("<u4"))
        fractions = (draws & (2**MANTISSA_BITS - 1)) * 2.0**-MANTISSA_BITS
        row[:] = fractions * (bound + bound) - bound
    return uniform
