"""What an adapter may attach to: the base's sites, described without torch.

The engine derives a `BaseLayout` from the loaded model and sends it to the API process, which
validates uploads against it. It knows module paths and widths, nothing of weights or devices.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SiteKind = Literal["linear", "norm", "embedding", "block", "parallel"]


class Site(msgspec.Struct, frozen=True):
    """One place of the base that adapters can change: `y = W(x) + b0`, with a W that depends on the kind.

    linear: the weight. norm: x normalised, without the norm's weight, which out_scale stands for; where an adapter has
    none there, it is the norm's own. embedding: x is a token as a one-hot vector of the vocabulary. block: x itself,
    the output of the module at `path`. parallel: nothing but the output of the module, to which rows add what they read
    elsewhere: from the stream that the module's norm reads.
    """

    path: str  # module path inside the base, for example "model.layers.0.self_attn.q_proj"
    kind: SiteKind
    in_features: int
    out_features: int
    has_bias: bool  # whether the base adds b0 here
    weight_offset: float = 0.0  # norm: what the module adds to its weight before it multiplies (Gemma: 1)
    output_scale: float = 1.0  # embedding: what the module multiplies a token's row with (Gemma: sqrt(hidden))


class Layer(msgspec.Struct, frozen=True):
    """The block sites of one layer, by path; None where the architecture has no such place."""

    output: str | None  # what the layer hands on
    attention: str | None  # what its attention adds
    mlp: str | None  # what its MLP adds
    parallel_mlp: str | None  # the same place, reading what the MLP's norm reads


class KvLayout(msgspec.Struct, frozen=True):
    """The keys and values of one token: [num_layers, 2, num_kv_heads, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def page_bytes(self, page_tokens: int, element_bytes: int) -> int:
        """Of the keys and values of so many tokens."""
        return self.num_layers * 2 * page_tokens * self.num_kv_heads * self.head_dim * element_bytes


class BaseLayout(msgspec.Struct, frozen=True):
    """The sites of one base, in a fixed order; a site's index in `sites` is its id in every table."""

    model_name: str
    fingerprint: str  # "sha256:<hex>" of the base's weights and quantisation format, "dummy:<hex>" of random ones
    quantization: str  # "nf4", "fp4", "int8" or "none"
    sites: tuple[Site, ...]
    layers: tuple[Layer, ...] = ()
    kv: KvLayout | None = None
    embedding: str | None = None  # path of the token embedding's site
    head: str | None = None  # path of the output head's site
    head_is_tied: bool = False  # whether the head multiplies with the embedding's own weight
    allows_dense: bool = False  # whether adapters as large as the weights they change are taken

    def index(self) -> dict[str, int]:
        """Module path to site id."""
        return {site.path: number for number, site in enumerate(self.sites)}

    def by_path(self, *kinds: SiteKind) -> dict[str, Site]:
        """The sites of these kinds, or of all, in order."""
        return {site.path: site for site in self.sites if not kinds or site.kind in kinds}

    def site(self, path: str) -> Site:
        """The site of that path, which must be one of the base's."""
        return next(site for site in self.sites if site.path == path)

    @property
    def vocabulary_size(self) -> int:
        """Token ids from here on are virtual; 0 for a layout without an embedding."""
        return 0 if self.embedding is None else self.site(self.embedding).in_features
