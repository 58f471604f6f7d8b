"""The innermost loops of rows and attention: one vector against four, so that what is loaded once is used four times.

Any of the arrays may be stored in a compute dtype or be float32 already; sums are float32.
"""

from __future__ import annotations

import numpy as np

from heddle_kernels.cpu_kernels.bits import Floats, Stored, compiled, widen

FourFloats = tuple[np.float32, np.float32, np.float32, np.float32]

_ZERO = np.float32(0)


@compiled
def dot(one: Stored, other: Stored) -> np.float32:
    total = _ZERO
    for k in range(one.shape[0]):
        total += widen(one[k]) * widen(other[k])
    return total


@compiled
def dot_four(one: Stored, a: Stored, b: Stored, c: Stored, d: Stored) -> FourFloats:
    """The dot products of `one` with four others of its length."""
    with_a = with_b = with_c = with_d = _ZERO
    for k in range(one.shape[0]):
        shared = widen(one[k])
        with_a += shared * widen(a[k])
        with_b += shared * widen(b[k])
        with_c += shared * widen(c[k])
        with_d += shared * widen(d[k])
    return with_a, with_b, with_c, with_d


@compiled
def add_scaled(total: Floats, scale: np.float32, a: Stored) -> None:
    for k in range(total.shape[0]):
        total[k] += scale * widen(a[k])


@compiled
def add_four_scaled(total: Floats, scales: FourFloats, a: Stored, b: Stored, c: Stored, d: Stored) -> None:
    """Semantics: total += scales[0] a + scales[1] b + scales[2] c + scales[3] d."""
    for_a, for_b, for_c, for_d = scales
    for k in range(total.shape[0]):
        total[k] += for_a * widen(a[k]) + for_b * widen(b[k]) + for_c * widen(c[k]) + for_d * widen(d[k])


@compiled
def widen_into(stored: Stored, wide: Floats) -> None:
    for k in range(stored.shape[0]):
        wide[k] = widen(stored[k])


@compiled
def copy_into(source: Stored, target: Stored) -> None:
    for k in range(source.shape[0]):
        target[k] = source[k]


@compiled
def highest_of(values: Floats) -> np.float32:
    """The largest of at least one; four at a time, since LLVM leaves a maximum that must heed NaN one by one."""
    a = b = c = d = values[0]
    num_in_fours = values.shape[0] // 4 * 4
    for i in range(0, num_in_fours, 4):
        a, b, c, d = max(a, values[i]), max(b, values[i + 1]), max(c, values[i + 2]), max(d, values[i + 3])
    for i in range(num_in_fours, values.shape[0]):
        a = max(a, values[i])
    return max(max(a, b), max(c, d))
