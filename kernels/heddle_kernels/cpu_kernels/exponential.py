"""The exponential and the functions made of it, in float32 and without a call, so that loops over them are vectors."""

from __future__ import annotations

import math

import numpy as np

from heddle_kernels.cpu_kernels.bits import compiled, compiled_in_order, power_of_two

# Beyond these the result or its reciprocal would leave float32's normal numbers.
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(87.0)

_LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts: a whole number of up to 8 bits times the upper one is exact.
_LN2_UPPER = np.float32(0.693359375)
_LN2_LOWER = np.float32(math.log(2) - 0.693359375)
# e^r = 1 + r + r² p(r) for |r| <= ln(2) / 2: the Taylor series, with the last terms' error below float32's own.
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))

_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_GELU_SLOPE = np.float32(math.sqrt(2 / math.pi))
_GELU_CUBIC = np.float32(0.044715)


@compiled_in_order
def _reduced(x: np.float32) -> tuple[np.float32, np.float32]:
    """(2^n, e^r - 1) where x = n ln 2 + r; x is taken as at least -87 and at most 87."""
    x = _LOWEST if x < _LOWEST else x  # NaN passes
    x = _HIGHEST if x > _HIGHEST else x
    n = np.floor(x * _LOG2_E + _HALF)
    r = (x - n * _LN2_UPPER) - n * _LN2_LOWER
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    return power_of_two(n), p * (r * r) + r


@compiled_in_order
def exp(x: np.float32) -> np.float32:
    """e^x to about 1e-7 of itself."""
    scale, rest = _reduced(x)
    return scale * rest + scale


@compiled_in_order
def tanh(x: np.float32) -> np.float32:
    """(e^2x - 1) / (e^2x + 1) to about 2e-7 of itself, near zero too."""
    scale, rest = _reduced(_TWO * x)
    minus_one = scale * rest + (scale - _ONE)  # e^2x - 1 without the loss of taking 1 off e^2x
    return minus_one / (minus_one + _TWO)


@compiled
def sigmoid(x: np.float32) -> np.float32:
    return _ONE / (_ONE + exp(-x))


@compiled
def silu(x: np.float32) -> np.float32:
    return x * sigmoid(x)


@compiled
def gelu_tanh(x: np.float32) -> np.float32:
    """x/2 (1 + tanh u) = x sigmoid(2u), which does not lose the small values that 1 + tanh u would."""
    return x * sigmoid(_TWO * _GELU_SLOPE * (x + _GELU_CUBIC * x * x * x))
