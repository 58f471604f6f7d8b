"""What the bootstrap over a few repeats leaves out: how far replicates are moved from the estimate. Draws nothing.

A bootstrap over R repeats sees (R - 1) / R of the variance between them, and takes that for known though R repeats
tell it roughly; Student's t has a wider interval for that (A. C. Davison and D. V. Hinkley, "Bootstrap Methods and
their Application", 1997, sections 2.1 and 3.8). One repeat says nothing of how runs differ, and no factor mends that.
"""

from __future__ import annotations

import math

import numpy as np

from heddle_loadtest.measure.sample import Floats

_NORMAL = 1.96
# The 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student_quantile(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile, the normal's beyond 30; raises ValueError for fewer than 1."""
    if degrees_of_freedom < 1:
        raise ValueError(f"{degrees_of_freedom} degrees of freedom: Student's t needs one at least")
    return _STUDENT[degrees_of_freedom - 1] if degrees_of_freedom <= len(_STUDENT) else _NORMAL


def stretch_factor(num_repeats: int, degrees_of_freedom: int) -> float:
    """By how much the replicates of a run of so many repeats are too close together; 1 where nobody can say."""
    of_variance = math.sqrt(num_repeats / (num_repeats - 1)) if num_repeats > 1 else 1.0
    of_tail = student_quantile(degrees_of_freedom) / _NORMAL if degrees_of_freedom > 0 else 1.0
    return of_variance * of_tail


def stretched(replicates: Floats, value: float, factor: float, *, is_share: bool) -> Floats:
    """The replicates `factor` times as far from `value`.

    A share stays within 0 and 1; all else is moved on a logarithmic scale, so that no latency and no rate gets below 0.
    """
    if is_share:
        return np.clip(value + factor * (replicates - value), 0.0, 1.0)
    if value <= 0:  # has no logarithm
        return np.maximum(value + factor * (replicates - value), 0.0)
    return np.asarray(value * (np.maximum(replicates, 0.0) / value) ** factor)
