"""The canonical form every adapter method compiles to: rank-one rows and vectors per site.

With `W` the base's weight without its bias and `b0` that bias, a site computes

    y = out_scale * W(in_scale * x) + b0_scale * b0 + bias + sum_i gain_i * act_i(a_i . x + c_i) * b_i

where absent scales are 1, an absent bias is 0, and `b0_scale` is `out_scale` if `scales_base_bias`, else 1: methods
that scale a layer's whole output scale the base's bias with it, methods that rescale the weight alone do not. So an
adapter is compiled without knowing b0; whoever applies it writes, from the base's own output `y_base`,
`out_scale * y_base` in the first case and `out_scale * (y_base - b0) + b0` in the second.

The layers that store, cache and batch adapters know this form only, never a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Activation(IntEnum):
    """What a row applies between its dot product and its output; the number travels to the kernels."""

    IDENTITY = 0


@dataclass(frozen=True)
class SiteUpdate:
    """What one adapter does at one site. Absent vectors are None; absent rows have zero height."""

    site: str  # module path, a key of `BaseLayout.index()`
    a: Floats  # [num_rows, in_features]
    b: Floats  # [num_rows, out_features]
    gain: Floats  # [num_rows]
    c: Floats  # [num_rows], added before the activation
    activation: Activation = Activation.IDENTITY
    in_scale: Floats | None = None  # [in_features]
    out_scale: Floats | None = None  # [out_features]
    bias: Floats | None = None  # [out_features]
    scales_base_bias: bool = False  # whether out_scale multiplies b0 too, see the formula above

    @property
    def num_rows(self) -> int:
        return int(self.gain.shape[0])


@dataclass(frozen=True)
class CompiledAdapter:
    """A whole adapter in canonical form, at most one update per site."""

    digest: str  # "sha256:<hex>" of the content it was compiled from
    updates: tuple[SiteUpdate, ...]
