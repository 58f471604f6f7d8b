"""What an adapter may attach to: the base's sites, described without torch.

The engine derives a `BaseLayout` from the loaded model and sends it to the API process, which
validates uploads against it. It knows module paths and widths, nothing of weights or devices.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Site(msgspec.Struct, frozen=True):
    """One module of the base that adapters can change: `y = W x + b0`."""

    path: str  # module path inside the base, for example "model.layers.0.self_attn.q_proj"
    kind: Literal["linear"]
    in_features: int
    out_features: int
    has_bias: bool  # whether the base adds b0 here


class BaseLayout(msgspec.Struct, frozen=True):
    """The sites of one base, in a fixed order; a site's index in `sites` is its id in every table."""

    model_name: str
    fingerprint: str  # "sha256:<hex>" of the base's weights and quantisation format, "dummy:<hex>" of random ones
    quantization: str  # "nf4", "fp4", "int8" or "none"
    sites: tuple[Site, ...]

    def index(self) -> dict[str, int]:
        """Module path to site id."""
        return {site.path: number for number, site in enumerate(self.sites)}
